"""The commit of a checkout, and the files that differ from it.

Files are compared by their own bytes, not by git's index: an assume-unchanged flag, a
line-ending filter or an ignore rule of the user's cannot make a changed file look clean.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from build_kernels.errors import BuildError

#: Folders whose untracked files count even if an ignore rule names them.
_SHIPPED = ("artifacts/evidence", "build_kernels", "router_runtime")
#: The kind of a file that does not exist.
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkout's commit and the files that differ from it.

    Attributes:
        commit: Its full id.
        changes: ``"changed <path>"`` and the like; empty if the checkout is clean.
        changes_sha256: Of what the changed files hold; None if the checkout is clean.

    """

    commit: str
    changes: tuple[str, ...]
    changes_sha256: str | None = None


def source(root: Path) -> Source:
    """Return the state of the checkout at ``root``. Raises BuildError if ``root`` is none."""
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    if top.resolve() != root.resolve():
        raise BuildError(
            f"expected {root} to be a git checkout of its own, found that it is inside {top}: "
            "that commit would not name these sources; next: clone the repository"
        )
    commit = _git(root, "rev-parse", "--verify", "HEAD^{commit}").strip()
    tree = _tree(root, commit)
    changes = [change for path, entry in tree.items() if (change := _change(root, path, *entry))]
    changes += [f"untracked {path}" for path in _untracked(root) if path not in tree]
    changes.sort()
    return Source(commit, tuple(changes), _digest(root, changes) if changes else None)


def files(root: Path, folder: str) -> dict[str, bytes]:
    """Return the files below a folder that belong to the checkout's sources, by path from root."""
    names = {*_tree(root, "HEAD"), *_untracked(root)}
    return {
        name: (root / name).read_bytes()
        for name in sorted(names)
        if name.startswith(folder + "/") and (root / name).is_file()
    }


def clone(root: Path, commit: str, folder: Path) -> None:
    """Check a commit out into a new folder, with none of the user's filters, hooks or templates."""
    settings = ("core.hooksPath=/dev/null", "core.autocrlf=false", "core.attributesFile=/dev/null")
    options = [word for setting in settings for word in ("-c", setting)]
    _git(
        root,
        *("clone", "--quiet", "--no-checkout", "--no-hardlinks", "--template="),
        *(*options, str(root), str(folder)),
    )
    try:
        _git(folder, "checkout", "--quiet", "--detach", commit)
    except BuildError as error:
        raise BuildError(
            f"expected the commit {commit} in {root}, found none; next: git fetch, or name a "
            f"clone that has it with --repository ({error})"
        ) from error


def _tree(root: Path, commit: str) -> dict[str, tuple[int, str]]:
    """Path -> (mode, object id) of every file of a commit."""
    tree = {}
    for line in _git(root, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0"):
        if line:
            facts, path = line.split("\t", 1)
            mode, _kind, identity = facts.split()
            tree[path] = (int(mode, 8), identity)
    return tree


def _change(root: Path, path: str, mode: int, identity: str) -> str | None:
    kind, data = _read(root / path)
    if kind == _NONE:
        return f"removed {path}"
    # The length of the id shows which of git's two digests this repository uses.
    digest = hashlib.new("sha1" if len(identity) == 40 else "sha256")
    digest.update(b"blob %d\0" % len(data) + data)
    same = (kind, digest.hexdigest()) == (_kind(mode), identity)
    return None if same else f"changed {path}"


def _digest(root: Path, changes: Iterable[str]) -> str:
    """The SHA-256 of changes and of what the files that they name hold now."""
    whole = hashlib.sha256()
    for change in changes:
        kind, data = _read(root / change.partition(" ")[2])
        whole.update(os.fsencode(f"{change}\0{kind}\0{hashlib.sha256(data).hexdigest()}\0"))
    return whole.hexdigest()


def _read(file: Path) -> tuple[str, bytes]:
    """What git would record of a file: its kind and its bytes, which a folder has none of."""
    try:
        mode = file.lstat().st_mode
        data = os.fsencode(os.readlink(file)) if stat.S_ISLNK(mode) else file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return _NONE, b""
    except IsADirectoryError:
        return "folder", b""
    return _kind(mode), data


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "link"
    return "executable" if mode & 0o100 else "file"


def _untracked(root: Path) -> list[str]:
    listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    listed += _git(root, "ls-files", "-z", "--others", "--", *_SHIPPED).split("\0")
    return sorted({path for path in listed if path and not _compiled(path)})


def _compiled(path: str) -> bool:
    """Python's own cache, which git lists where ignore rules are off."""
    return "__pycache__" in PurePosixPath(path).parts


def _git(root: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", "-c", "core.quotePath=off", "-c", "core.fsmonitor=false", *arguments],
            cwd=root,
            env={**environment, "LC_ALL": "C.UTF-8"},
            umask=0o022,  # evidence that others may write does not count
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildError(
            "expected the program git on the path, found none; next: install git"
        ) from error
    if result.returncode:
        raise BuildError(
            f"expected a git checkout with a commit in {root}, found: {result.stderr.strip()}; "
            "next: git clone the repository and run the command there"
        )
    return result.stdout
