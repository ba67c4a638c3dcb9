"""The artifacts folder: where it is, its manifest, and cubin bytes that match their digest.

Plain standard-library Python. Bytes that leave ``read_cubin`` are the bytes that were hashed: the
loader hands them to the driver without touching the file again, and nothing switches the check off.
Every digest goes through ``trust.admit``, so that a signature policy covers what is used. Where
none is in force, a folder or a file that others may write is refused (``format/permissions.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from router_runtime.errors import ArtifactError, FormatError, explain
from router_runtime.format import provenance
from router_runtime.format.advice import (
    ARTIFACTS_VARIABLE,
    REINSTALL,
    artifacts_places,
    build_artifacts,
    name_other,
    restore,
    unpack,
)
from router_runtime.format.files import exists, list_folder, read_file
from router_runtime.format.manifest import MANIFEST_NAME, Entry, Manifest, loads
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust
from router_runtime.version import __version__

#: Far above what any manifest or marker needs, far below what hurts.
_MAX_MANIFEST = 16 * 2**20
_MAX_MARKER = 64 * 2**10

#: What a release marker must agree with.
_MARKED = ("name", "version", "manifest_sha256")

# Of a cubin's ELF header: identification, type, machine, flags.
_HEADER = struct.Struct("<6s10xHH28xI")
_IDENTITY = b"\x7fELF\x02\x01"
_EXECUTABLE, _EM_CUDA = 2, 190


def find_artifacts(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that holds the manifest.

    In this order: the argument, the environment variable ``ROUTER_RUNTIME_ARTIFACTS``,
    ``artifacts`` inside the installed package (a wheel), ``artifacts`` beside the package (a
    checkout). A folder that was named is used or refused; the search goes on only when none was
    named.
    """
    named = explicit if explicit is not None else os.environ.get(ARTIFACTS_VARIABLE)
    if named:
        folder = Path(named)
        if exists(folder / MANIFEST_NAME):
            return folder
        source = "" if explicit is not None else ARTIFACTS_VARIABLE
        zipped = zipfile.is_zipfile(folder)
        raise ArtifactError(
            explain(
                f"artifacts folder named by {source or 'the argument'}",
                expected=f"{MANIFEST_NAME} in {folder}",
                found="a zip file" if zipped else "none",
                remedy=unpack(folder) if zipped else name_other(folder, source, _default()),
            )
        )
    tried = artifacts_places()
    if (default := _default()) is not None:
        return default
    raise ArtifactError(
        explain(
            "artifacts folder",
            expected=f"{MANIFEST_NAME} in one of {[str(folder) for folder in tried]}",
            found="none",
            remedy=f"{build_artifacts()}, or set {ARTIFACTS_VARIABLE}",
        )
    )


def _default() -> Path | None:
    """The artifacts that are used where no folder is named."""
    return next((each for each in artifacts_places() if exists(each / MANIFEST_NAME)), None)


def list_artifacts(folder: Path) -> list[str]:
    """Return the names in an artifacts folder. Raises ArtifactError if others may write to it and
    no signature is required.
    """
    return list_folder(folder, "artifacts folder", restore(folder), signed=trust.in_force())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder``, read once.

    An installed release has a marker beside its manifest. Where there is one, it must name the
    digest of this manifest and the version of this runtime. Raises ArtifactError, TrustError or
    FormatError.
    """
    names = list_artifacts(folder)
    path = folder / MANIFEST_NAME
    signed = trust.in_force()
    data = read_file(path, _MAX_MANIFEST, "manifest", restore(folder), signed=signed)
    sha256 = hashlib.sha256(data).hexdigest()
    trust.admit(MANIFEST_NAME, sha256, path)
    with _told(path):
        manifest = loads(data)
    markers = [folder / name for name in names if name.endswith(provenance.MARKER_SUFFIX)]
    _check_marker(markers, manifest, sha256)
    return manifest


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Add to a FormatError of the block which file it is about, and what to do."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}; {restore(path.parent)}") from error


def _check_marker(paths: Sequence[Path], manifest: Manifest, sha256: str) -> None:
    if not paths:
        return
    if len(paths) > 1:
        names = " ".join(path.name.rpartition("-")[0].replace("_", "-") for path in paths)
        raise ArtifactError(
            explain(
                f"artifacts folder {paths[0].parent}",
                expected="one release",
                found=", ".join(path.name for path in paths),
                remedy=f"run: pip uninstall -y {names}, then install one of them",
            )
        )
    (path,) = paths
    signed = trust.in_force()
    data = read_file(path, _MAX_MARKER, "release marker", restore(path.parent), signed=signed)
    trust.admit(path.name, hashlib.sha256(data).hexdigest(), path)
    with _told(path):
        marker = provenance.marker_loads(data)
    expected = (path.name, __version__, sha256)
    found = (marker.file_name, marker.version, marker.manifest_sha256)
    foreign = sorted({entry.target for entry in manifest.entries} - set(marker.targets))
    if found != expected or foreign:
        differing = [
            f"{name} {value}"
            for name, value, wanted in zip(_MARKED, found, expected, strict=True)
            if value != wanted
        ]
        differing += [f"no target {target}" for target in foreign]
        raise ArtifactError(
            explain(
                f"release marker {path}",
                expected=f"runtime {__version__} and the {MANIFEST_NAME} beside it, "
                f"sha256 {sha256}",
                found=", ".join(differing),
                remedy=f"these files are of different releases: install one again: {REINSTALL}",
            )
        )


def read_cubin(entry: Entry, folder: Path) -> bytes:
    """Return the bytes of ``entry``'s cubin, read once and equal to the manifest's size and digest.

    The manifest allows plain file names only, and links are refused. The bytes are machine code for
    the entry's target: PTX, a fat binary or a cubin of another target is refused even if the
    manifest has its digest: a driver would compile PTX, also that inside a fat binary.
    """
    path = folder / entry.file
    what = f"cubin of {entry.key}"
    data = read_file(path, entry.size, what, restore(folder), signed=trust.in_force())
    if len(data) != entry.size:
        found = f"{len(data)} bytes (truncated)"
        raise ArtifactError(
            explain(
                what,
                expected=f"{entry.size} bytes in {path}",
                found=found,
                remedy=restore(folder),
            )
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise ArtifactError(
            explain(
                what,
                expected=f"sha256 {entry.sha256} of {path}",
                found=f"{digest} (altered)",
                remedy=restore(folder),
            )
        )
    trust.admit(entry.file, digest, path)
    _check_machine_code(data, entry, what, restore(folder))
    return data


def _check_machine_code(data: bytes, entry: Entry, what: str, remedy: str) -> None:
    """Refuse what is not an executable ELF for the entry's compute capability. The header is
    the same for ``a`` and ``f``: the builder checks that, and a driver refuses what does not fit.
    """
    target = Target.parse(entry.target)
    expected = (_IDENTITY, _EXECUTABLE, _EM_CUDA, target.major * 10 + target.minor)
    if len(data) < _HEADER.size:
        found: object = data
    else:
        identity, kind, machine, flags = _HEADER.unpack_from(data)
        header = (identity, kind, machine, flags >> 8 & 0xFF)
        if header == expected:
            return
        found = f"a cubin for sm_{header[3]}" if header[:3] == expected[:3] else data[:16]
    raise ArtifactError(
        explain(
            what,
            expected=f"machine code for {entry.target}, an executable CUDA ELF",
            found=found,
            remedy=remedy,
        )
    )
