"""The locked toolchain: what it is, where it is, and the check that no other one is installed.

``toolchain.lock`` names every package that can affect a byte of a cubin, with hashes that pip
checked when it installed them. A build starts with ``check``; so does every worker process. It
compares versions. A build that compiles anything also compares every file (``check_files``).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from build_kernels.compile import installed
from build_kernels.compile.languages import LANGUAGES
from build_kernels.compile.sources import PACKAGE
from build_kernels.errors import BuildError
from router_runtime.format.manifest import Toolchain

LOCK = Path(__file__).parents[1] / "toolchain.lock"
#: The packages that make a wheel and sign it. They cannot change a cubin, so manifests lack them.
RELEASE_LOCK = Path(__file__).parents[1] / "release.lock"
#: What assembles translated PTX (``build-kernels emulate``); nothing else needs it.
EMULATION_LOCK = Path(__file__).parents[1] / "emulation.lock"

_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;]+)(\s*;[^\\]*)?(?:\s*\\)?")
_HASH = re.compile(r"\s+--hash=sha256:([0-9a-f]{64})(?:\s*\\)?")
#: An error lists at most so many files.
_MOST = 5
_REMEDY = "next: make clean-venv && make build-cubins"
_RELEASE_REMEDY = "next: make release, which installs it"
_EMULATION_REMEDY = "next: make emulation, which installs them"


def locked(text: str) -> dict[str, str]:
    """Return package -> version of a lock file's text."""
    return {match[1]: match[2] for match, _ in _requirements(text)}


def hashes(text: str) -> dict[str, tuple[str, ...]]:
    """Return package -> the digests of the files that a lock file's text accepts for it."""
    return {match[1]: digests for match, digests in _requirements(text)}


def of_lock() -> Toolchain:
    """Return the toolchain that the lock names, whether or not it is installed."""
    flags = {str(name): facts.flags for name, facts in LANGUAGES.items()}
    return Toolchain(packages=locked(LOCK.read_text(encoding="ascii")), flags=flags)


def check() -> Toolchain:
    """Return the installed toolchain, as the manifest records it.

    Raises BuildError if it is not exactly the locked one.
    """
    recorded = of_lock()
    expected = recorded.packages
    found = _installed()
    wrong = _differences(expected, found)
    # A second set of CuTe DSL libraries would be preferred over, or mixed with, the locked ones.
    wrong += [
        f"  {name}: expected none, found {version}"
        for name, version in sorted(found.items())
        if name.startswith("nvidia-cutlass-dsl") and name not in expected
    ]
    if wrong:
        raise BuildError(
            f"the installed toolchain is not the one of {LOCK.name}:\n"
            + "\n".join(wrong)
            + f"\n{_REMEDY}"
        )
    return recorded


def check_files() -> None:
    """Raise BuildError if a file of the toolchain is not the one that pip installed, or if one in
    the folder of ``build_kernels`` hides a package from the worker processes, which look there
    first. ``installed.py`` says what that cannot find.
    """
    packages = locked(LOCK.read_text(encoding="ascii"))
    if hidden := installed.hiding(packages, PACKAGE.parent):
        raise BuildError(
            "expected the workers to import the toolchain's packages, found in their place:\n  "
            + "\n  ".join(hidden)
            + "\nnext: rename it or move it away"
        )
    _refuse_altered(packages, "toolchain", "build-cubins")


def check_release() -> None:
    """Raise BuildError if what makes a release is not exactly what ``release.lock`` names."""
    _check_tools(RELEASE_LOCK, "release tools", _RELEASE_REMEDY, "release")


def check_emulation() -> Mapping[str, str]:
    """Return package -> version of what assembles translated PTX.

    Raises BuildError if what is installed is not exactly what ``emulation.lock`` names.
    """
    return _check_tools(EMULATION_LOCK, "tools for emulation", _EMULATION_REMEDY, "emulation")


def _check_tools(lock: Path, what: str, remedy: str, make: str) -> Mapping[str, str]:
    """Return the locked packages with their versions. Raises BuildError, with ``remedy`` if the
    versions differ; ``make`` is the target that installs them into a new environment.
    """
    text = lock.read_text(encoding="ascii")
    found = _installed()
    # A package with a marker is not needed everywhere; where it is installed, it is that version.
    expected = {
        match[1]: match[2]
        for match, _ in _requirements(text, lock.name)
        if match[3] is None or match[1] in found
    }
    if wrong := _differences(expected, found):
        raise BuildError(
            f"the installed {what} are not those of {lock.name}:\n"
            + "\n".join(wrong)
            + f"\n{remedy}"
        )
    _refuse_altered(expected, what, make)
    return expected


def _refuse_altered(packages: Iterable[str], what: str, make: str) -> None:
    """Raise BuildError if a file of these packages is not the one that pip installed."""
    if wrong := installed.altered(packages):
        more = f"\n  and {len(wrong) - _MOST} others" if len(wrong) > _MOST else ""
        raise BuildError(
            f"the files of the installed {what} are not those that pip installed:\n  "
            + "\n  ".join(wrong[:_MOST])
            + f"{more}\nnext: make clean-venv && make {make}"
        )


def ptxas() -> Path:
    """The assembler of the locked ``nvidia-cuda-nvcc`` package."""
    return _packaged("nvidia-cuda-nvcc", "bin/ptxas")


def nvdisasm() -> Path:
    """Return the path of the disassembler, of the locked ``nvidia-cuda-nvdisasm`` package."""
    return _packaged("nvidia-cuda-nvdisasm", "bin/nvdisasm")


def include_directories() -> tuple[Path, Path]:
    """Return the folders of the CUDA headers and of CCCL, of the locked packages."""
    runtime = _packaged("nvidia-cuda-runtime", "include/cuda_runtime.h").parent
    return runtime, _packaged("nvidia-cuda-cccl", "cuda/std/cstdint").parents[2]


def _requirements(text: str, name: str = LOCK.name) -> list[tuple[re.Match[str], tuple[str, ...]]]:
    """The parsed requirement lines of a lock file, each with the digests below it. A marker is a
    third group; the toolchain, which is one for all, has none.
    """
    found: list[tuple[re.Match[str], list[str]]] = []
    for line in text.splitlines():
        if digest := _HASH.fullmatch(line.rstrip()):
            if found:
                found[-1][1].append(digest[1])
        elif line and not line.startswith((" ", "#")):
            match = _PINNED.fullmatch(line.rstrip())
            if match is None or (match[3] and name == LOCK.name):
                raise BuildError(
                    f"{name}: expected 'package==version \\', found {line!r}; "
                    "next: restore the file, or make lock"
                )
            found.append((match, []))
    return [(match, tuple(digests)) for match, digests in found]


def _differences(expected: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    return [
        f"  {name}: expected {version}, found {installed.get(name, 'none')}"
        for name, version in sorted(expected.items())
        if installed.get(name) != version
    ]


def _installed() -> Mapping[str, str]:
    return {
        re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(): distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }


@cache
def _packaged(package: str, suffix: str) -> Path:
    for file in importlib.metadata.files(package) or ():
        if file.as_posix().endswith("/" + suffix):
            return Path(str(file.locate()))
    raise BuildError(f"expected {suffix} in the package {package}, found none; {_REMEDY}")
