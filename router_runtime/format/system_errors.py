"""What the operating system refused, in words, and what to do about it.

An error that has nothing to do with the file that was opened (no free file descriptor, a file
system that is read-only or full) is told as what it is. The advice of the caller, such as to build
the artifacts again, would not help.
"""

from __future__ import annotations

import errno
import os
import resource

_WORDS = {
    errno.EMFILE: "too few file descriptors: this process has all {limit} open that it may have",
    errno.ENFILE: "too few file descriptors: all of this machine are in use",
    errno.EROFS: "a read-only file system",
    errno.ENOSPC: "a full disk",
    errno.EDQUOT: "a full disk: the quota of this user is used up",
}

_REMEDIES = {
    errno.ENFILE: "end other programs, or as root raise: sysctl fs.file-max",
    errno.EROFS: "name a folder on a file system that can be written",
    errno.ENOSPC: "make room on that disk (run: df -h), or name a folder on another",
    errno.EDQUOT: "make room on that disk, or name a folder on another",
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
    """Return what to do about an error: ``otherwise``, unless its cause is the machine's."""
    if error.errno == errno.EMFILE:
        return _raise_the_limit()
    return _REMEDIES.get(error.errno or 0, otherwise)


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
