"""The wheel: made by the build backend, then written again in one canonical form.

The backend (hatchling, locked, without build isolation) owns names and metadata. What it does
not fix is the bytes: its entries are compressed, and zlib's output differs between versions. So its
entries are written again: stored, in a fixed order, with fixed modes and times. Reading accepts
that form only, by writing what was read once more and comparing.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from build_kernels.compile.environment import isolated
from build_kernels.errors import BuildError

PACKAGE = "router_runtime"
ARTIFACTS = f"{PACKAGE}/artifacts/"
_SBOM = "sbom.cdx.json"

#: The earliest time that a zip archive can state.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_EPOCH_SECONDS = "315532800"
_MODE = 0o100644 << 16
_UNIX = 3
_LINK = 0o12

_REFETCH = "next: do not install it; fetch it again"


@dataclass(frozen=True, slots=True)
class Project:
    """The runtime's distribution, as in pyproject.toml."""

    name: str
    version: str
    license: str
    requirements: tuple[str, ...]


def project(pyproject: bytes, version: str) -> Project:
    """``version`` is the runtime's own, which pyproject.toml takes from its source."""
    table = tomllib.loads(pyproject.decode("utf-8"))["project"]
    return Project(
        name=table["name"],
        version=version,
        license=table["license"],
        requirements=tuple(table["dependencies"]),
    )


def make(
    distribution: str,
    pyproject: bytes,
    beside: Mapping[str, bytes],
    package: Mapping[str, bytes],
    sbom: bytes,
    folder: Path,
) -> bytes:
    """Return the bytes of a wheel of the runtime.

    ``beside``: the files that pyproject.toml refers to (README, licences). ``package``: the files
    to install, by their path. ``folder`` must be new; it is where the backend works.
    """
    source = {"pyproject.toml": _pyproject(distribution, pyproject), _SBOM: sbom}
    for name, data in {**source, **beside, **package}.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    # Nothing of the caller's environment configures the backend. -P and -s: as for a worker.
    result = subprocess.run(
        [sys.executable, "-P", "-s", "-m", "hatchling", "build", "-t", "wheel", "-d", ".."],
        cwd=folder / "source",
        env={**isolated(str(folder)), "SOURCE_DATE_EPOCH": _EPOCH_SECONDS},
        umask=0o022,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    built = list(folder.glob("*.whl"))
    if result.returncode or len(built) != 1:
        raise BuildError(
            f"expected the build backend to make a wheel, found:\n{result.stdout}\n"
            "next: mend what it names: pyproject.toml, a file that it refers to, or a full disk"
        )
    with zipfile.ZipFile(built[0]) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    # A file that the backend left out for a reason of its own must not go missing unnoticed.
    missing = sorted(name for name in package if packed.get(name) != package[name])
    if missing:
        raise BuildError(
            f"expected every file of the runtime in the wheel, missing {missing}; "
            "next: see what pyproject.toml excludes"
        )
    return write(packed)


def write(entries: Mapping[str, bytes]) -> bytes:
    """Return the canonical archive of these entries, path -> bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries, key=_order):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = _UNIX
            info.external_attr = _MODE
            archive.writestr(info, entries[name])
    return buffer.getvalue()


def read(data: bytes, where: str) -> dict[str, bytes]:
    """The entries of a wheel. Raises BuildError, starting with ``where``, for an archive that
    ``write`` would not have written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            for info in infos:
                _check(info, where)
            if sum(info.file_size for info in infos) > len(data):
                raise BuildError(
                    f"{where}: expected entries no larger than the archive, found larger ones; "
                    f"{_REFETCH}"
                )
            entries = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise BuildError(
            f"{where}: expected a whole wheel, found a damaged one ({error}); {_REFETCH}"
        ) from error
    if len(entries) != len(infos):
        raise BuildError(f"{where}: expected each entry once, found one twice; {_REFETCH}")
    if write(entries) != data:
        raise BuildError(
            f"{where}: expected the form that a release has (fixed order, times, modes, nothing "
            f"before, between or after the entries), found another; {_REFETCH}"
        )
    return entries


def _check(info: zipfile.ZipInfo, where: str) -> None:
    name = info.filename
    path = PurePosixPath(info.orig_filename)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        expected, found = "plain paths inside the wheel", repr(name)
    elif info.external_attr != _MODE:
        link = info.external_attr >> 28 == _LINK
        expected = f"{name} to be a plain file of mode 0644"
        found = "a symbolic link" if link else "another kind or mode"
    elif info.compress_type != zipfile.ZIP_STORED:
        expected, found = f"{name} to be stored", "a compressed entry"
    else:
        return
    raise BuildError(f"{where}: expected {expected}, found {found}; {_REFETCH}")


def _order(name: str) -> tuple[bool, bool, str]:
    """The package, then the metadata, its RECORD last, as installers like it."""
    metadata = name.split("/", 1)[0].endswith(".dist-info")
    return metadata, metadata and name.endswith("/RECORD"), name


def _pyproject(distribution: str, text: bytes) -> bytes:
    """The checkout's pyproject.toml narrowed to the runtime alone, under the release's name."""
    import tomlkit  # of release.lock; reading a wheel does without

    document: Any = tomlkit.parse(text.decode("utf-8"))
    document["project"]["name"] = distribution
    scripts = document["project"]["scripts"]
    for script, target in dict(scripts).items():
        if not target.startswith(f"{PACKAGE}."):
            del scripts[script]
    build = document["tool"]["hatch"]["build"]
    build["ignore-vcs"] = True  # cubins are ignored in a checkout
    build["targets"]["wheel"]["packages"] = [PACKAGE]
    build["targets"]["wheel"]["core-metadata-version"] = (
        "2.4"  # newer ones are not known everywhere
    )
    build["targets"]["wheel"]["sbom-files"] = [_SBOM]
    return tomlkit.dumps(document).encode("utf-8")
