"""Locks on a process: what compiles, writes, starts children or reaches a network fails there.

``enter`` makes compilers look uninstalled. ``seal`` closes three locks. ``hook`` is an audit hook:
it refuses and remembers what Python code tries. The other two are enforced by the Linux kernel on
every library in the process: with ``limit`` no file grows; with ``filter`` no file is made, renamed
or removed, no program starts and no internet socket opens. Only the standard library is imported.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from pathlib import Path
from typing import Any

COMPILERS = (
    *("build_kernels", "cutlass", "triton", "tvm", "numba", "cupy", "pynvjitlink", "setuptools"),
    *("cuda.core", "cuda.nvrtc", "cuda.tile", "cuda.bindings.nvrtc", "cuda.bindings.nvvm"),
    *("cuda.bindings.nvjitlink", "cuda.bindings.runtime", "torch.utils.cpp_extension"),
)

#: Parts of the names of libraries that turn source, IR or PTX into machine code.
COMPILER_LIBRARIES = ("nvrtc", "nvvm", "nvptxcompiler")
#: Those that are the driver's own. It may load them before it knows that it has no use for them, so
#: that they are there shows nothing: ``serve`` shows whether the driver would compile.
DRIVER_LIBRARIES = ("libnvidia-ptxjitcompiler", "libnvidia-nvvm")
LOCKS = ("limit", "filter", "hook")

_STARTS = ("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.")
_CHANGES = (
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.truncate", "os.utime", "tempfile.", "shutil."),
)
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_violations: list[str] = []
_present: set[str] = set()


class _Without:
    """A module finder that does not find some modules. It returns None for them instead of raising,
    because torch looks for some of them when it initialises CUDA and would stop at an error.
    """

    def __init__(self, finder: Any, absent: tuple[str, ...]) -> None:
        self._finder, self._absent = finder, absent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == each or name.startswith(each + ".") for each in self._absent):
            return None
        return self._finder.find_spec(name, path, target)


def _callers() -> str:
    """The call stack of the event that an audit hook handles, innermost frame first."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 12:
        code = frame.f_code
        found.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    wrong = event.startswith((*_STARTS, *_CHANGES, *_NETWORK))
    if event == "open":
        path, _mode, flags = arguments
        wrong = bool(flags & _WRITING) and path != os.devnull
    elif event == "ctypes.dlopen":
        wrong = _is_one_of(COMPILER_LIBRARIES + DRIVER_LIBRARIES, str(arguments[0]))
    if wrong:
        _violations.append(f"{event} {arguments}, called by {_callers()}")
        raise PermissionError(errno.EPERM, f"locked: {event} {arguments}")


def enter(absent: tuple[str, ...] = COMPILERS) -> None:
    """Make compilers, or other modules, look uninstalled until the process ends."""
    sys.meta_path[:] = [_Without(finder, absent) for finder in sys.meta_path]


def _is_one_of(parts: tuple[str, ...], library: str) -> bool:
    return any(part in library.rpartition("/")[2] for part in parts)


def _in_memory(parts: tuple[str, ...]) -> set[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split(maxsplit=5)[-1] for line in maps}
    return {each for each in libraries if _is_one_of(parts, each)}


def driver_compilers() -> list[str]:
    """The driver's own compiler libraries that are in memory, sorted."""
    return sorted(_in_memory(DRIVER_LIBRARIES))


def violations() -> list[str]:
    """What has violated the locks since ``seal``: refused attempts, child processes, and compiler
    libraries that were not loaded before. torch loads NVRTC when it is imported, used or not.
    """
    found = list(_violations)
    for task in Path("/proc/self/task").iterdir():
        children = (task / "children").read_text() if (task / "children").exists() else ""
        found += [f"child process {child}: {_command(child)}" for child in children.split()]
    loaded = _in_memory(COMPILER_LIBRARIES) - _in_memory(DRIVER_LIBRARIES) - _present
    found += [f"loaded: {library}" for library in sorted(loaded)]
    found += [f"imported: {name}" for name in COMPILERS if name in sys.modules]
    return found


def _command(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError as error:
        return str(error)


# --- the kernel's locks --------------------------------------------------------------------------

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7
#: Machine -> (architecture, number of seccomp, denied: nothing may change in the file system,
#: denied: nothing may be started, then openat, socket, clone and clone3, open).
_EROFS, _EPERM, _ENOSYS = errno.EROFS, errno.EPERM, errno.ENOSYS
_CALLS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "architecture": _X86_64,
        "seccomp": 317,
        # creat, rename, mkdir, rmdir, link, unlink, symlink, mknod, truncate, and their *at forms
        "changes": [85, 82, 83, 84, 86, 87, 88, 133, 76, 258, 259, 263, 264, 265, 266, 316],
        "starts": [57, 58, 59, 322],  # fork, vfork, execve, execveat
        "open": 2,
        "openat": 257,
        "socket": 41,
        "clone": 56,
    },
    "aarch64": {
        "architecture": _AARCH64,
        "seccomp": 277,
        "changes": [33, 34, 35, 36, 37, 38, 45, 276],
        "starts": [221, 281],
        "open": None,
        "openat": 56,
        "socket": 198,
        "clone": 220,
    },
}
_CLONE3, _OPENAT2 = 435, 437
_CLONE_THREAD = 0x10000
_O_TMPFILE = 0x400000

_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def seal(without: tuple[str, ...] = ()) -> None:
    """Refuse writes, child processes and connections on every thread until the process ends.

    ``without`` names locks that are left open, to find out which of them a fault runs into. Raises
    OSError if the Linux kernel does not support the filter.
    """
    if "limit" not in without:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # SIGXFSZ is ignored by Python: EFBIG
    if "filter" not in without:
        _install_filter()
    _present.update(_in_memory(COMPILER_LIBRARIES))
    if "hook" not in without:
        sys.addaudithook(_hook)


def _install_filter() -> None:
    calls = _CALLS[platform.machine()]
    program = b"".join(_filter(calls))
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    set_no_new_privileges, set_filter, on_all_threads = 38, 1, 1
    if library.prctl(set_no_new_privileges, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if status := library.syscall(calls["seccomp"], set_filter, on_all_threads, header):
        # Positive: the thread that has a filter of its own.
        raise OSError(ctypes.get_errno(), f"seccomp(SECCOMP_SET_MODE_FILTER) returned {status}")


def _filter(calls: dict[str, Any]) -> list[bytes]:
    def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    def refuse(number: int, error: int) -> list[bytes]:
        return [statement(_JUMP_EQUAL, number, 0, 1), statement(_RETURN, _ERRNO | error)]

    def refuse_if(number: int, argument: int, test: int, value: int, error: int) -> list[bytes]:
        """If the call's argument equals the value, or has any of its bits."""
        return [
            statement(_JUMP_EQUAL, number, 0, 4),
            statement(_LOAD, _ARGUMENTS + 8 * argument),
            statement(test, value, 0, 1),
            statement(_RETURN, _ERRNO | error),
            statement(_LOAD, _NUMBER),
        ]

    def allow_if(number: int, argument: int, value: int) -> list[bytes]:
        return [
            statement(_JUMP_EQUAL, number, 0, 4),
            statement(_LOAD, _ARGUMENTS + 8 * argument),
            statement(_JUMP_SET, value, 0, 1),
            statement(_RETURN, _ALLOW),
            statement(_RETURN, _ERRNO | _EPERM),
        ]

    made = os.O_CREAT | os.O_TRUNC | _O_TMPFILE
    parts = [
        statement(_LOAD, _ARCHITECTURE),
        statement(_JUMP_EQUAL, calls["architecture"], 1, 0),
        statement(_RETURN, _ERRNO | _EPERM),  # a foreign ABI has other numbers
        statement(_LOAD, _NUMBER),
    ]
    for number in calls["changes"]:
        parts += refuse(number, _EROFS)
    for number in calls["starts"]:
        parts += refuse(number, _EPERM)
    # Their arguments lie behind a pointer; C libraries fall back to the older calls.
    parts += refuse(_CLONE3, _ENOSYS) + refuse(_OPENAT2, _ENOSYS)
    if calls["open"] is not None:
        parts += refuse_if(calls["open"], 1, _JUMP_SET, made, _EROFS)
    parts += refuse_if(calls["openat"], 2, _JUMP_SET, made, _EROFS)
    for family in (2, 10):  # AF_INET, AF_INET6
        parts += refuse_if(calls["socket"], 0, _JUMP_EQUAL, family, _EPERM)
    parts += allow_if(calls["clone"], 0, _CLONE_THREAD)
    return [*parts, statement(_RETURN, _ALLOW)]
