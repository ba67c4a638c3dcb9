"""What the operating system refused, in words, and what to do about it.

An error that has nothing to do with the file that was opened (too few file descriptors, a file
system that is read-only or full) is told as what it is.
"""

from __future__ import annotations

import errno
import os
import resource
import shlex
from pathlib import Path

from router_runtime.errors import explain

_WORDS = {
    errno.EMFILE: "too few file descriptors: this process has all {limit} open that it may have",
    errno.ENFILE: "too few file descriptors: all of this machine are in use",
    errno.EROFS: "a read-only file system",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left for this user on the device",
}


def found(error: OSError) -> str:
    """Return what an error says was found, with the path that it is about."""
    if error.errno not in _WORDS:
        return str(error)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = _WORDS[error.errno].format(limit=soft)
    where = f" at {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return f"{words}{where}"


def remedy(error: OSError, otherwise: str) -> str:
    """Return what to do about an error: ``otherwise``, unless file descriptors have run out."""
    if error.errno == errno.EMFILE:
        return _raise_the_limit()
    if error.errno == errno.ENFILE:
        return "end other programs, or as root raise the limit: sysctl fs.file-max"
    return otherwise


def explained(error: OSError) -> str:
    """Return the text of an error that no code which opens files has told about."""
    return explain(
        "operating system",
        expected="a file that can be used",
        found=found(error),
        remedy=remedy(error, "mend that, or name another path, and run the command again"),
    )


def reading_remedy(error: OSError, path: Path, otherwise: str, *, whole: Path | None = None) -> str:
    """Return what to do about an error of reading a file or listing a folder.

    Args:
        error: What was raised.
        path: The file or folder.
        otherwise: As for ``remedy``.
        whole: The folder whose files are all to be readable. None: ``path`` alone is.

    """
    if error.errno != errno.EACCES:
        return remedy(error, otherwise)
    absolute = path.absolute()
    folders = (folder for folder in reversed(absolute.parents) if not os.access(folder, os.X_OK))
    closed = next(folders, absolute)
    wanted = absolute if whole is None else whole.absolute()
    if closed in (absolute, wanted):
        return _chmod(wanted, "rX", "" if whole is None else "-R ")
    return _chmod(closed, "x", "")


def _chmod(path: Path, rights: str, option: str) -> str:
    """The command that gives this user rights to a file or folder."""
    where = shlex.quote(str(path))
    if path.stat().st_uid == os.geteuid():
        return f"run: chmod {option}u+{rights} {where}"
    return f"run: sudo chmod {option}a+{rights} {where}, or name a copy that you may read"


def _raise_the_limit() -> str:
    """The command that lets a process open more files: a user may raise the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return (
            "start the process with a higher limit of open files: LimitNOFILE= of systemd, "
            "--ulimit nofile= of docker, or as root: ulimit -n 65536"
        )
    most = 65536 if hard == resource.RLIM_INFINITY else hard
    return f"run: ulimit -n {most}, and start the process again from that shell"
