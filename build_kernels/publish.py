"""Writing a finished build into its folder, so that a reader never sees half of it.

Order: cubins first, each written beside its place, synced and renamed; then the manifest, by one
``os.replace``; then the build's notes, and cubins that the new manifest does not name are removed.
A build killed at any point leaves a manifest whose files are all there. File names carry the
content's digest, so new cubins never replace different old ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format import system_errors
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, dumps, loads

#: The names of this project's cubins: pruning removes no other file.
_OURS = re.compile(r"[A-Za-z0-9_.-]+-sm_[0-9]+[af]?-[A-Za-z0-9_.-]+-[0-9a-f]{16}\.cubin")
_TEMPORARY = re.compile(r"\.publish-.*\.tmp")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other builds, and create it if it does not exist.

    If the build fails, the folders that were created for it are removed again. Raises BuildError if
    another build is running there, or if the folder cannot be written.
    """
    try:
        made = _make(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"expected to be the only build in {folder}, found another one at work there; "
                "next: wait for it to end, or build with another --out"
            ) from None
        yield
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise
    finally:
        os.close(descriptor)


def is_ours(name: str) -> bool:
    """Return whether a build makes files of this name, its manifest aside."""
    return bool(_OURS.fullmatch(name) or _TEMPORARY.fullmatch(name))


def probe(folder: Path) -> None:
    """Raise BuildError if no file can be written into the folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise _unwritable(folder, error) from error


def current(folder: Path) -> Manifest | None:
    """Return the manifest in the folder, None if there is none that this version can read."""
    try:
        return loads((folder / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, FormatError):
        return None


def bytes_with_digest(folder: Path, file: str, sha256: str) -> bytes | None:
    """Return the bytes of an artifact with this digest, None if it is missing or has another."""
    try:
        data = (folder / file).read_bytes()
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def publish(
    folder: Path, manifest: Manifest, cubins: Mapping[str, bytes], notes: Mapping[str, bytes]
) -> None:
    """Write a build into its folder, which the caller locked.

    Args:
        folder: The build's folder.
        manifest: Its manifest.
        cubins: File name -> bytes, of every cubin that the manifest names.
        notes: File name -> bytes, of files for the next build. They may be lost.

    """
    text = dumps(manifest)
    _prune(folder, _TEMPORARY, ())
    for name, data in sorted(cubins.items()):
        _write(folder, name, data)
    sync(folder)
    _write(folder, MANIFEST_NAME, text)
    sync(folder)
    for name, data in notes.items():
        _write(folder, name, data)
    _prune(folder, _OURS, cubins)


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically. Its mode is 0644 for every umask."""
    _write(path.parent, path.name, data)
    sync(path.parent)


def _write(folder: Path, name: str, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".publish-", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync(folder: Path) -> None:
    """Flush the names in a folder to disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, pattern: re.Pattern[str], keep: Mapping[str, bytes] | tuple[()]) -> None:
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _unwritable(folder: Path, error: OSError) -> BuildError:
    """The error for a disk that is full, read-only or gone, and for too few file descriptors."""
    advice = system_errors.remedy(
        error, "make room or mend the disk, or name another folder with --out"
    )
    return BuildError(
        f"expected to write in {folder}, found: {system_errors.found(error)}; what was published "
        f"there before is as it was; next: {advice}"
    )


def _make(folder: Path) -> list[Path]:
    """Create a folder and its parents with mode 0755. Returns those created, innermost first."""
    missing = []
    path = folder.absolute()
    while not path.exists():
        missing.append(path)
        path = path.parent
    if not path.is_dir():
        raise BuildError(f"expected {path} to be a folder, found a file; next: another --out")
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    return missing
