"""The NVIDIA driver through ``cuda.bindings.driver``: initialise, check, device facts, contexts.

The only module that imports the bindings. ``cuda.core`` and the runtime bindings stay out:
importing them imports NVRTC's bindings, and this package compiles nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from router_runtime.device.facts import DeviceFacts
from router_runtime.errors import DriverError, explain
from router_runtime.format import system_errors
from router_runtime.format.advice import DRIVER, USE_CPU, runtime
from router_runtime.format.shadows import shadow

_INSTALL_DRIVER = f"install an NVIDIA driver of {DRIVER}"

_SPAWN = "start workers with the 'spawn' method, or fork before the first CUDA call"
_LOST = (
    "an earlier kernel or copy of this process failed, and CUDA stays unusable in it: restart the "
    "process; to find which, run it with CUDA_LAUNCH_BLOCKING=1 or under compute-sanitizer"
)
_CAPTURE = "end the capture, whose graph is lost, and capture again without the call that broke it"

#: What to do about results that are the fault of no artifact and no argument, by CUresult.
REMEDIES = {
    2: "free device memory, or lower the share of it that the process reserves; see: nvidia-smi",
    3: _SPAWN,  # what cuInit and all others say in a forked child
    4: "call nothing while the interpreter shuts down",
    304: "raise what the operating system allows this process: see ulimit -n (open files), "
    "ulimit -l (locked memory) and dmesg",
    # ECC, NVLink; illegal address, timeout, context destroyed, assertion; hardware stack,
    # instruction, alignment, address space, program counter, any other failure of a kernel; unknown
    **dict.fromkeys((214, 220, 700, 702, 709, 710, *range(714, 720), 999), _LOST),
    **dict.fromkeys(range(900, 909), _CAPTURE),
}

_lock = threading.Lock()
_initialised_in: int | None = None
_contexts: dict[int, Any] = {}


def bindings() -> Any:
    """``cuda.bindings.driver``. Raises DriverError if the package is absent, or if a file of the
    user's hides it.
    """
    try:
        from cuda.bindings import driver
    except Exception as error:  # a file that hides the package can raise anything
        found, remedy = _why_no_bindings(error)
        raise DriverError(
            explain(
                "driver bindings",
                expected="the package cuda-bindings",
                found=found,
                remedy=remedy,
            )
        ) from error
    return driver


def _why_no_bindings(error: Exception) -> tuple[str, str]:
    """What was found in place of the bindings, and what to do about it."""
    hiding = shadow("cuda.bindings.driver", "cuda-bindings")
    if hiding is not None:
        found = f"{hiding}, which Python imports in its place"
        return found, f"rename {hiding}, or start Python in another folder"
    if isinstance(error, OSError):
        install = "run: pip install --force-reinstall cuda-bindings"
        return system_errors.found(error), system_errors.remedy(error, install)
    return str(error), "run: pip install cuda-bindings"


def check(result: tuple[Any, ...], call: str) -> Any:
    """Return what a driver call returned after its status: None, one value, or a tuple.

    Raises DriverError if the call failed.
    """
    status, *payload = result
    if status:
        raise DriverError(
            explain(
                f"driver call {call}",
                expected="CUDA_SUCCESS",
                found=f"{getattr(status, 'name', status)} ({int(status)})",
                remedy=remedy(status),
            )
        )
    if not payload:
        return None
    return payload[0] if len(payload) == 1 else tuple(payload)


def remedy(status: Any) -> str:
    """The next step after a driver call returned ``status``."""
    return REMEDIES.get(int(status), f"run: {runtime('doctor')}")


def initialise(*, needs_gpu: bool = False) -> Any:
    """Initialise the driver, once per process, and return the bindings. Raises DriverError.

    ``needs_gpu``: the caller's work needs a GPU, so the error does not advise to use the CPU.

    A process forked after CUDA was initialised cannot use CUDA: its copy of the driver's state is
    dead. The driver's own errors about this are obscure, so such a process is refused here.
    """
    global _initialised_in
    refuse_fork()
    api = bindings()
    install = _INSTALL_DRIVER if needs_gpu else f"{_INSTALL_DRIVER}, or {USE_CPU}"
    with _lock:
        if _initialised_in is None:
            try:
                status = api.cuInit(0)[0]
            except Exception as error:  # the bindings raise their own type if libcuda is absent
                raise DriverError(
                    explain(
                        "NVIDIA driver",
                        expected="libcuda on this machine",
                        found=f"none: {str(error).rstrip('.')}",
                        remedy=install,
                    )
                ) from error
            if status:
                raise DriverError(
                    explain(
                        "NVIDIA driver",
                        expected="a driver with a usable GPU",
                        found=f"{getattr(status, 'name', status)} from cuInit",
                        remedy=REMEDIES.get(int(status), install),
                    )
                )
            _initialised_in = os.getpid()
    return api


def refuse_fork() -> None:
    """Raise DriverError in a process forked after its parent initialised CUDA."""
    if _initialised_in is not None and _initialised_in != os.getpid():
        raise fork_error()


def fork_error() -> DriverError:
    """The error of a process forked after CUDA was initialised."""
    return DriverError(
        explain(
            "CUDA after fork",
            expected=f"the process {_initialised_in or os.getppid()} that initialised CUDA",
            found=f"its forked child {os.getpid()}",
            remedy=_SPAWN,
        )
    )


def lost_error(what: str, error: Exception) -> DriverError:
    """The error of a process whose CUDA context has failed, from what torch said about it."""
    return DriverError(
        explain(
            what, expected="CUDA in working order", found=str(error).split("\n")[0], remedy=_LOST
        )
    )


def driver_version() -> int:
    """The CUDA version that the driver supports: 13000 is 13.0."""
    version: int = check(initialise().cuDriverGetVersion(), "cuDriverGetVersion")
    return version


def device_count() -> int:
    """Return the number of visible GPUs."""
    count: int = check(initialise().cuDeviceGetCount(), "cuDeviceGetCount")
    return count


def device_facts(index: int) -> DeviceFacts:
    """Return what the choice of a kernel needs to know about device ``index``, as torch counts."""
    api = initialise()
    count = device_count()
    if not 0 <= index < count:
        raise DriverError(
            explain(
                f"device cuda:{index}",
                expected=f"an index below {count}, the number of visible GPUs",
                found=index,
                remedy=f"check CUDA_VISIBLE_DEVICES, or run: {runtime('doctor')}",
            )
        )
    device = check(api.cuDeviceGet(index), "cuDeviceGet")
    kinds = api.CUdevice_attribute

    def attribute(name: str) -> int:
        kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        value: int = check(api.cuDeviceGetAttribute(kind, device), f"cuDeviceGetAttribute({name})")
        return value

    return DeviceFacts(
        major=attribute("COMPUTE_CAPABILITY_MAJOR"),
        minor=attribute("COMPUTE_CAPABILITY_MINOR"),
        driver=driver_version(),
        sms=attribute("MULTIPROCESSOR_COUNT"),
        shared_memory_per_block_optin=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


def device_name(index: int) -> str:
    """Return the driver's name of device ``index``, such as ``NVIDIA H200``."""
    api = initialise()
    device = check(api.cuDeviceGet(index), "cuDeviceGet")
    name: bytes = check(api.cuDeviceGetName(128, device), "cuDeviceGetName")
    return name.split(b"\0")[0].decode()


def primary_context(index: int) -> Any:
    """The device's primary context: the one that torch uses. Retained for the life of the process,
    as torch does, because functions loaded into it are.
    """
    api = initialise()
    with _lock:
        if index not in _contexts:
            device = check(api.cuDeviceGet(index), "cuDeviceGet")
            _contexts[index] = check(
                api.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain"
            )
        return _contexts[index]


@contextlib.contextmanager
def context(index: int) -> Iterator[Any]:
    """Make the primary context of device ``index`` current for the block; yields the bindings."""
    api = initialise()
    check(api.cuCtxPushCurrent(primary_context(index)), "cuCtxPushCurrent")
    try:
        yield api
    finally:
        check(api.cuCtxPopCurrent(), "cuCtxPopCurrent")


def adopt_thread(index: int) -> None:
    """Give a thread that has no current context the primary one of device ``index``.

    A fresh thread has none until its first CUDA runtime call; torch's allocator answers from its
    cache without one, and a launch into the default stream would then find no context.
    """
    api = initialise()
    if not int(check(api.cuCtxGetCurrent(), "cuCtxGetCurrent")):
        check(api.cuCtxSetCurrent(primary_context(index)), "cuCtxSetCurrent")


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Allow this thread to allocate and synchronise outside a graph capture that is in progress."""
    api = initialise()
    relaxed = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    call = "cuThreadExchangeStreamCaptureMode"
    previous = check(api.cuThreadExchangeStreamCaptureMode(relaxed), call)
    try:
        yield
    finally:
        check(api.cuThreadExchangeStreamCaptureMode(previous), call)


@functools.cache
def tensor_map_encoder() -> Callable[..., int]:
    """``cuTensorMapEncodeTiled`` itself, to be called with plain addresses.

    The driver wants the map 64-byte aligned, and the bindings' wrapper writes it into a Python
    object that is not; this way the launcher encodes straight into its own aligned memory.
    """
    api = initialise()
    address, _ = check(
        api.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0), "cuGetProcAddress"
    )
    integer, pointer = ctypes.c_uint32, ctypes.c_void_p
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int,
        pointer,  # the map
        integer,  # element type
        integer,  # rank
        pointer,  # address
        pointer,  # extents
        pointer,  # strides in bytes, without the innermost
        pointer,  # box
        pointer,  # element strides
        integer,  # interleave
        integer,  # swizzle
        integer,  # L2 promotion
        integer,  # fill of elements outside
    )
    return prototype(int(address))
