"""Files of an artifacts folder as bytes: read once, plain files only, never more than expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from router_runtime.errors import ArtifactError, explain


def read_file(path: Path, limit: int, what: str, remedy: str) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes, read through one descriptor.

    A link is not followed: what was published is what is read. A pipe or a device is not waited
    for, and no more than one byte beyond the limit is read. Raises ArtifactError, starting with
    ``what`` and ending with ``remedy``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
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
            explain(what, expected=f"a readable {path}", found=error, remedy=remedy)
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a plain file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(
            explain(what, expected=f"a readable {path}", found=error, remedy=remedy)
        ) from error
    finally:
        os.close(descriptor)
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
