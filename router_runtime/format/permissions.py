"""Who else may change a file or a folder that is used as an authority.

A manifest says which code runs, and a record of evidence says that it is right. So both are used
only if nobody but root and the user of this process can have written them, which is what ssh
requires of its keys:

- the owner is root or this user (the effective one);
- other users may not write. The owner's group may, if the owner is its only member: many systems
  give each user a group of their own and let it write (umask 002).

The folder and each file in it are judged by what was opened, so that nothing can be exchanged
between the check and the use. Folders above are not judged: who may write there can put another
folder in this one's place, but that folder and its files would be theirs, and so be refused.
"""

from __future__ import annotations

import errno
import functools
import grp
import os
import pwd
import shlex
import stat
from pathlib import Path

from router_runtime.errors import ArtifactError, explain

_ROOT = 0
#: An extended attribute of a file whose access control list lets more users in than its mode says.
_ACCESS_LIST = "system.posix_acl_access"
#: Far more than the files of an artifacts folder and its evidence.
_MOST_FILES = 10_000


def require_private(descriptor: int, what: str, path: Path, folder: Path | None = None) -> None:
    """Raise ArtifactError if anybody but root and this user may change an opened file or folder.

    Args:
        descriptor: Of what was opened.
        what: The error starts with it.
        path: Where it was opened.
        folder: What the command in the error is to mend as a whole. None: ``path`` alone.

    """
    status = os.fstat(descriptor)
    found = [*_foreign_owner(status), *_other_writers(descriptor, status)]
    if found:
        trusted = " and ".join(map(_user, sorted({_ROOT, os.geteuid()}, reverse=True)))
        raise ArtifactError(
            explain(
                what,
                expected=f"nobody but {trusted} to be able to write {path}",
                found=" and ".join(found),
                remedy=_remedy(status, folder or path, recursive=folder is not None),
            )
        )


def _foreign_owner(status: os.stat_result) -> list[str]:
    if status.st_uid in (_ROOT, os.geteuid()):
        return []
    return [f"the owner {_user(status.st_uid)}"]


def _other_writers(descriptor: int, status: os.stat_result) -> list[str]:
    mode = f"mode {stat.S_IMODE(status.st_mode):04o}"
    if status.st_mode & stat.S_IWOTH:
        return [f"{mode}: every user may write"]
    if not status.st_mode & stat.S_IWGRP:
        return []
    if _has_access_list(descriptor):
        return [f"{mode} and an access control list: more users may write"]
    if _only_member(status.st_gid) not in (_ROOT, os.geteuid()):
        return [f"{mode}: the group {_group(status.st_gid)} may write"]
    return []


def _has_access_list(descriptor: int) -> bool:
    try:
        return _ACCESS_LIST in os.listxattr(descriptor)
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # a file system without them
            return False
        raise


@functools.cache
def _only_member(group: int) -> int | None:
    """The user id of a group's only member; None if it has more, or none that is known here."""
    members = {each.pw_uid for each in pwd.getpwall() if each.pw_gid == group}
    try:
        for name in grp.getgrgid(group).gr_mem:
            members.add(pwd.getpwnam(name).pw_uid)
    except KeyError:  # a group or a member without a name: there is no telling who else is in it
        return None
    return members.pop() if len(members) == 1 else None


def _remedy(status: os.stat_result, path: Path, *, recursive: bool) -> str:
    """What makes the check pass for this user: commands, or advice to use another folder. No
    command touches files of anybody but root, this user and the owner of ``path``.
    """
    option = " -R" if recursive else ""
    where = shlex.quote(str(path.resolve()))
    if _is_shared(path, status.st_uid):
        return (
            f"leave {where} as it is, because others use it too: make a folder of your own with "
            "mkdir -m 0700 DIR, copy into it what is yours, and name DIR instead"
        )
    sudo = "" if os.geteuid() in (_ROOT, status.st_uid) else "sudo "
    if not _foreign_owner(status):
        return f"look through what it holds, then run: {sudo}chmod{option} go-w {where}"
    chown = f"{sudo}chown{option} {os.geteuid()} {where}"
    return (
        f"if you trust that owner, run: {chown} && {sudo}chmod{option} go-w {where}, "
        f"or name a copy that is yours: cp -r {where} DIR"
    )


def _is_shared(path: Path, owner: int) -> bool:
    """Whether a folder is for several users, so that its modes and owners are not ours to change:
    it has the sticky bit, as /tmp has, or holds something of a user who is neither root, nor this
    user, nor ``owner``. One with more files than the artifacts of a release is not looked through:
    it counts as shared.
    """
    if not path.is_dir():
        return False
    if path.stat().st_mode & stat.S_ISVTX:
        return True
    seen = 0
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            seen += 1
            try:
                holder = os.lstat(os.path.join(folder, name)).st_uid
            except OSError:  # not to be seen by this user, or gone since: in use by somebody
                return True
            if seen > _MOST_FILES or holder not in (_ROOT, os.geteuid(), owner):
                return True
    return False


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"user {number}"


def _group(number: int) -> str:
    try:
        return f"{grp.getgrgid(number).gr_name} ({number})"
    except KeyError:
        return str(number)
