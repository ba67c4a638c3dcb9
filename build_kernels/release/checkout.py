"""The commit of a checkout, and the files that differ from it.

Files are compared by their own bytes, not by git's index: an assume-unchanged flag, a
line-ending filter or an ignore rule of the user's cannot make a changed file look clean.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from build_kernels.errors import BuildError

#: Folders whose untracked files count even if an ignore rule names them.
_SHIPPED = ("artifacts/evidence", "build_kernels", "router_runtime")
_LINK = 0o120000


@dataclass(frozen=True, slots=True)
class Source:
    """A checkout's commit and the files that differ from it, ``"changed <path>"`` and the like."""

    commit: str
    changes: tuple[str, ...]


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
    return Source(commit, tuple(sorted(changes)))


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
    file = root / path
    try:
        found = file.lstat().st_mode
        link = stat.S_ISLNK(found)
        data = os.fsencode(os.readlink(file)) if link else file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return f"removed {path}"
    except IsADirectoryError:
        return f"changed {path}"
    # The length of the id shows which of git's two digests this repository uses.
    digest = hashlib.new("sha1" if len(identity) == 40 else "sha256")
    digest.update(b"blob %d\0" % len(data) + data)
    same_kind = link == (mode == _LINK) and (link or bool(found & 0o100) == bool(mode & 0o100))
    return None if same_kind and digest.hexdigest() == identity else f"changed {path}"


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
