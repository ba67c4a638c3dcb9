"""Files of an artifacts folder as bytes: read once, plain files only, never more than expected, and
only if nobody else can have written them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from router_runtime.errors import ArtifactError, explain
from router_runtime.format import system_errors
from router_runtime.format.permissions import require_private

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def read_file(path: Path, limit: int, what: str, remedy: str, *, signed: bool = False) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes, read through one descriptor.

    A link is not followed: what was published is what is read. A pipe or a device is not waited
    for, and no more than one byte beyond the limit is read. Raises ArtifactError, starting with
    ``what`` and ending with ``remedy``.

    ``signed``: the caller checks a signature over the bytes, so it does not matter who may write
    the file.
    """
    whole = None if signed else path.parent
    with _opened(path, _FLAGS | os.O_NOFOLLOW, what, remedy, whole) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a plain file")
        if not signed:
            require_private(descriptor, what, path, path.parent)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(
            explain(
                what,
                expected=f"at most {limit} bytes in {path}",
                found="a longer file",
                remedy=remedy,
            )
        )
    return data


def exists(path: Path) -> bool:
    """Return whether there is a file or folder of this name. True also if this user may not look:
    opening it then fails with what to do about that.
    """
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def list_folder(folder: Path, what: str, remedy: str, *, signed: bool = False) -> list[str]:
    """The names in a folder, sorted. Raises ArtifactError as ``read_file`` does."""
    with _opened(folder, _FLAGS | os.O_DIRECTORY, what, remedy, folder) as descriptor:
        if not signed:
            require_private(descriptor, what, folder, folder)
        return sorted(os.listdir(descriptor))


@contextlib.contextmanager
def _opened(path: Path, flags: int, what: str, remedy: str, whole: Path | None) -> Iterator[int]:
    """Open a file or a folder for the block. An OSError of the block ends as ArtifactError too.

    ``whole``: the folder that is of no use before all of it can be read.
    """
    try:
        descriptor = os.open(path, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ArtifactError(
            explain(what, expected=path, found="no such file", remedy=remedy)
        ) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ArtifactError(
                explain(
                    what,
                    expected=f"a file inside {path.parent}",
                    found=f"{path.name}, a link to {os.path.realpath(path)}",
                    remedy=f"replace the link by the file, or {remedy}",
                )
            ) from error
        raise ArtifactError(
            explain(
                what,
                expected=f"a readable {path}",
                found=system_errors.found(error),
                remedy=system_errors.reading_remedy(error, path, remedy, whole=whole),
            )
        ) from error
