"""The one form of a release's wheel: entries stored, in a fixed order, with fixed modes and times.

A wheel is the same bytes wherever it is made, and there is nothing before, between or after its
entries. Reading accepts that form only, by writing what was read once more and comparing.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import PurePosixPath

from router_runtime.errors import FormatError

PACKAGE = "router_runtime"
#: Where the artifacts are inside a wheel.
ARTIFACTS = f"{PACKAGE}/artifacts/"

#: The earliest time that a zip archive can state.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16
_UNIX = 3
_LINK = 0o12

#: What a receiver does about a release that is not whole.
FETCH_AGAIN = (
    "do not install it, fetch it again, and if that does not help, ask those who released it"
)


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
    """The entries of a wheel. Raises FormatError, starting with ``where``, for an archive that
    ``write`` would not have written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            for info in infos:
                _check(info, where)
            if sum(info.file_size for info in infos) > len(data):
                raise FormatError(
                    f"{where}: expected entries no larger than the archive, found larger ones; "
                    f"{FETCH_AGAIN}"
                )
            entries = {info.filename: archive.read(info) for info in infos}
    except FormatError:
        raise
    # A RuntimeError: an entry is said to be encrypted.
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OSError) as error:
        raise FormatError(
            f"{where}: expected a whole wheel, found a damaged one ({error}); {FETCH_AGAIN}"
        ) from error
    if len(entries) != len(infos):
        raise FormatError(f"{where}: expected each entry once, found one twice; {FETCH_AGAIN}")
    if write(entries) != data:
        raise FormatError(
            f"{where}: expected the form that a release has (fixed order, times, modes, nothing "
            f"before, between or after the entries), found another; {FETCH_AGAIN}"
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
    raise FormatError(f"{where}: expected {expected}, found {found}; {FETCH_AGAIN}")


def _order(name: str) -> tuple[bool, bool, str]:
    """The package, then the metadata, its RECORD last, as installers like it."""
    metadata = name.split("/", 1)[0].endswith(".dist-info")
    return metadata, metadata and name.endswith("/RECORD"), name
