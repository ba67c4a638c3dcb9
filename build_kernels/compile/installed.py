"""Whether installed packages are what pip installed: their files against their RECORD.

A RECORD is the list that pip leaves beside a package: each file with its SHA-256. The comparison
finds files that were damaged, edited, removed or overwritten by another package since. It does not
find what a RECORD does not list: bytecode that Python has cached, files that were added, and edits
of somebody who has changed the RECORD too.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

#: The CuTe DSL adds this folder to the ones in which Python looks for packages.
_DSL_FOLDER = "nvidia_cutlass_dsl/dsl_packages/"


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a package, by its RECORD. ``digest`` is as written there: ``sha256=...``."""

    package: str
    name: str
    path: Path
    digest: str


def altered(packages: Iterable[str]) -> list[str]:
    """Return what is wrong with the files of installed packages, one line for each."""
    wrong, listed = [], []
    for package in packages:
        files = _files(package)
        if not files:
            wrong.append(f"{package}: expected a RECORD of its files, found none")
        listed += [file for file in files if file.digest]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        return wrong + [line for line in executor.map(_wrong, listed) if line is not None]


def hiding(packages: Iterable[str], folder: Path) -> list[str]:
    """Return the files in a folder that Python imports in place of a package's, if it looks into
    that folder first.
    """
    names = {name for package in packages for name in _modules(package)}
    found = (PathFinder.find_spec(name, [str(folder)]) for name in sorted(names))
    return [spec.origin for spec in found if spec is not None and spec.origin is not None]


def _files(package: str) -> list[_File]:
    distribution = importlib.metadata.distribution(package)
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return [
        _File(package, name, Path(str(distribution.locate_file(name))), digest)
        for name, digest, _size in rows
    ]


def _wrong(file: _File) -> str | None:
    kind, _, expected = file.digest.partition("=")
    try:
        with file.path.open("rb") as opened:
            digest = hashlib.file_digest(opened, kind).digest()
    except FileNotFoundError:
        return f"{file.package}: expected {file.path}, found none"
    if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected:
        return f"{file.package}: expected {file.path} as it was installed, found it altered"
    return None


def _modules(package: str) -> Iterator[str]:
    """Yield the first names by which the files of a package are imported."""
    for file in _files(package):
        parts = Path(file.name.removeprefix(_DSL_FOLDER)).parts
        if parts[-1].endswith((".py", ".so")):
            yield parts[0].split(".")[0]
