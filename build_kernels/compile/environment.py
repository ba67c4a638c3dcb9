"""The environment of the processes whose output becomes part of a cubin or a release."""

from __future__ import annotations

import os


def isolated(folder: str) -> dict[str, str]:
    """Return environment variables that take nothing from the caller's environment.

    No variable that configures a compiler, a cache, a locale or a time zone reaches the process.
    Its home and its temporary files are in ``folder``.
    """
    return {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
