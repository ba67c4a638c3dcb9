"""An environment that holds the installed package, torch, cuda-python and nothing else.

``python -m tests.nojit.fresh`` checks on this machine, with its GPU if there is one, that serving
compiles nothing, writes no file and starts no process, and prints what it found. If that fails, it
prints what is in the environment, the output of the process, and which of the locks stopped it:
those without which it succeeds. ``--verify`` first runs the oracle suite on the kernels and uses
the result as evidence, for a checkout whose evidence is missing or stale.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from router_runtime.device.artifact_store import find_artifacts
from router_runtime.format.manifest import MANIFEST_NAME, artifact_name
from tests.nojit.lockdown import LOCKS

PACKAGE = Path(__file__).parents[2] / "router_runtime"
SERVE = Path(__file__).with_name("serve.py")

#: What the package requires.
ROOTS = ("torch", "cuda-bindings", "click")
#: Of what those require, this stays away. CUDA's own libraries do not: torch cannot be imported
#: without NVRTC's, which it loads for itself. Nothing may load them later: see ``lockdown``.
ABSENT = ("triton", "setuptools")

PTX = b".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry hash_router() { ret; }\n"

#: Folders that the driver makes in a home when it starts, for what it may compile. They
#: must stay empty.
DRIVER_CACHE = (".nv", ".nv/ComputeCache")

#: Kept from the caller's environment: where a machine keeps its driver, and which GPU to use.
PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


def make_site(into: Path, artifacts: Path) -> Path:
    """A folder for ``sys.path`` with what a wheel installs and links to what it requires."""
    shutil.copytree(
        PACKAGE, into / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "artifacts")
    )
    shutil.copytree(
        artifacts,
        into / PACKAGE.name / "artifacts",
        ignore=shutil.ignore_patterns("artifacts.lock", ".*"),
    )
    for name in sorted(_closure()):
        _link(importlib.metadata.distribution(name), into)
    return into


def run(site: Path, device: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``serve`` in ``site``, with no PATH, an empty home folder and an empty working folder.

    Files that are in those folders afterwards are added to the output and make the run fail, except
    an empty cache of the driver. ``without`` names locks that are left open.
    """
    home = site.with_name("-without-".join((site.name + "-home", *without)))
    home.mkdir()
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {
        "PATH": "",
        "HOME": str(home),
        "TMPDIR": str(home),
        "CUDA_DISABLE_PTX_JIT": "1",
    }
    before = _files(site)
    for folder in (home, site):
        os.chmod(folder, 0o555)  # the superuser may write all the same: hence the locks
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", SERVE, site, device, *without],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        for folder in (home, site):
            os.chmod(folder, 0o755)
    before += [str(home / folder) for folder in DRIVER_CACHE]
    left = sorted(file for file in _files(home) + _files(site) if file not in before)
    if left:
        done.stdout += f"left behind: {left}\n"
        done.returncode = done.returncode or 1
    return done


def report(done: subprocess.CompletedProcess[str]) -> str:
    """The exit status and the output of a run."""
    return f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def exchange_for_ptx(folder: Path, target: str) -> None:
    """Replace the target's first cubin by PTX, which a driver would compile, and its digest and
    size in the manifest.
    """
    code = PTX.replace(b"sm_90a", target.encode())
    sha256 = hashlib.sha256(code).hexdigest()
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    entry = next(entry for entry in document["entries"] if entry["target"] == target)
    kernel, model, target, variant = (
        entry[name] for name in ("kernel", "model", "target", "variant")
    )
    name = artifact_name(kernel, model, target, variant, sha256)
    entry.update(file=name, sha256=sha256, size=len(code))
    (folder / entry["file"]).write_bytes(code)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


def _files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*")]


def _closure() -> set[str]:
    """The installed distributions that ``ROOTS`` require, without compilers."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(root, "") for root in ROOTS]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name.startswith(ABSENT):
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # if it matters, the import fails with its name
        found.add(name)
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                required = canonicalize_name(requirement.name)
                # torch names the parts of CUDA that it needs as extras of one package.
                waiting += [(required, each) for each in ("", *requirement.extras)]
    return found


def _link(distribution: importlib.metadata.Distribution, into: Path) -> None:
    """Link a distribution's top-level files and folders; those of a shared folder one by one."""
    for file in distribution.files or []:
        if file.parts[0] in ("..", "__pycache__"):
            continue
        root = Path(str(distribution.locate_file("")))
        depth = 1
        top = root / file.parts[0]
        if top.is_dir() and not (top / "__init__.py").exists() and top.suffix != ".dist-info":
            depth = 2
        link = into.joinpath(*file.parts[:depth])
        if not link.is_symlink() and not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(root.joinpath(*file.parts[:depth]))


def main(arguments: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m tests.nojit.fresh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--artifacts", type=Path, help="the folder to serve from")
    parser.add_argument("--verify", action="store_true", help="make evidence for it first")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nojit-") as scratch:
        folder = find_artifacts(given.artifacts)
        if given.verify:
            folder = _verified(folder, Path(scratch) / "artifacts")
        site = make_site(Path(scratch) / "site", folder)
        done = run(site, given.device)
        print(report(done))
        if done.returncode:
            print(_environment())
            for lock in LOCKS:
                again = run(site, given.device, (lock,))
                print(f"\nwithout the lock {lock!r}: {report(again)}")
    return done.returncode


def _verified(folder: Path, copy: Path) -> Path:
    """A copy of an artifacts folder, with evidence of this very run."""
    from router_runtime.verification import verify

    copy.mkdir()
    for file in [folder / MANIFEST_NAME, *folder.glob("*.cubin")]:
        shutil.copy(file, copy)
    if not verify.run(copy, True, lambda line: print(line, flush=True)).passed:
        raise SystemExit(
            "expected kernels that pass the oracle suite, found some that do not; "
            "next: router-runtime verify"
        )
    return copy


def _environment() -> str:
    """The Python and the distributions of a site on this machine, one per line."""
    lines = [f"python {sys.version} at {sys.executable}"]
    for name in sorted(_closure()):
        distribution = importlib.metadata.distribution(name)
        files = "no list of files, so no link" if distribution.files is None else ""
        where = distribution.locate_file("")
        lines.append(f"{name} {distribution.version} in {where} {files}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
