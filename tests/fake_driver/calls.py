"""The driver's calls as the runtime makes them, answered without a driver."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from cuda.bindings import driver as real

from router_runtime.format.contract import PARAMETER_TYPES
from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target
from tests.fake_driver.artifacts import code_of
from tests.fake_driver.execution import EXECUTE

SUCCESS = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE

_SCALARS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}


@dataclass
class Launch:
    """One launch as the device would see it.

    ``attributes`` maps launch attribute ids to values; ``arguments`` has the scalars and addresses
    by parameter name, ``raw`` the bytes of every parameter; ``thread`` launched it.
    """

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: dict[int, Any]
    arguments: dict[str, Any]
    raw: dict[str, bytes]
    thread: int


@dataclass
class FakeDriver:
    """A replacement for the module ``cuda.bindings.driver``.

    Types and enums are those of the real bindings; only the calls are replaced. The first fields
    are what a test may set: the device's facts, the status that a call returns, and ``entries``,
    whose cubins can be loaded. The others record what was called.

    With ``execute``, a launch computes its outputs by the oracle on the memory that its arguments
    point to.
    """

    capability: tuple[int, int] = (9, 0)
    version: int = 13000
    init: Any = SUCCESS
    devices: int = 1
    load: Any = SUCCESS
    clusters: int = 1
    max_threads: int = 1024
    launch_status: Any = SUCCESS
    current_context: int = 0
    execute: bool = False
    entries: list[Entry] = field(default_factory=list)
    layouts: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    attributes: dict[tuple[str, str], int] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    encoded: list[dict[str, Any]] = field(default_factory=list)
    encode_status: int = 0
    during_launch: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int,
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32),
            *[ctypes.c_void_p] * 5,
            *[ctypes.c_uint32] * 4,
        )
        self._encode = prototype(self._encode_tiled)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(name)

    def cuInit(self, flags: int) -> tuple[Any]:
        if isinstance(self.init, Exception):
            raise self.init
        return (self.init,)

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return SUCCESS, self.version

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return SUCCESS, self.devices

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:
        return SUCCESS, index

    def cuDeviceGetName(self, size: int, device: int) -> tuple[Any, bytes]:
        return SUCCESS, b"Fake GPU\0\0"

    def cuDeviceGetAttribute(self, kind: Any, device: int) -> tuple[Any, int]:
        values = {
            "COMPUTE_CAPABILITY_MAJOR": self.capability[0],
            "COMPUTE_CAPABILITY_MINOR": self.capability[1],
            "MULTIPROCESSOR_COUNT": 132,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 * 1024,
        }
        return SUCCESS, values[kind.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        return SUCCESS, 1000 + device

    def cuCtxPushCurrent(self, context: int) -> tuple[Any]:
        self.calls.append(f"push {context}")
        return (SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, int]:
        self.calls.append("pop")
        return SUCCESS, 0

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return SUCCESS, self.current_context

    def cuCtxSetCurrent(self, context: int) -> tuple[Any]:
        self.calls.append(f"set {context}")
        return (SUCCESS,)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[Any, Any]:
        self.calls.append(f"capture mode {mode.name}")
        return SUCCESS, real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    def cuLibraryLoadData(self, code: bytes, *options: Any) -> tuple[Any, Any]:
        self.calls.append("cuLibraryLoadData")
        if self.load:
            return self.load, None
        entry = next(entry for entry in self.entries if code_of(entry) == code)
        return SUCCESS, SimpleNamespace(entry=entry)

    def cuLibraryUnload(self, library: Any) -> tuple[Any]:
        self.calls.append("cuLibraryUnload")
        return (SUCCESS,)

    def cuLibraryGetKernel(self, library: Any, name: bytes) -> tuple[Any, Any]:
        assert isinstance(name, bytes)
        return SUCCESS, library

    def cuKernelGetParamInfo(self, kernel: Any, index: int) -> tuple[Any, int, int]:
        target = Target.parse(kernel.entry.target)
        layout = self.layouts.get(
            kernel.entry.symbol, kernel.entry.contract.parameter_layout(target)
        )
        return (SUCCESS, *layout[index]) if index < len(layout) else (INVALID, 0, 0)

    def cuKernelGetAttribute(self, kind: Any, kernel: Any, device: int) -> tuple[Any, int]:
        assert kind.name == "CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK"
        return SUCCESS, self.max_threads

    def cuKernelSetAttribute(self, kind: Any, value: int, kernel: Any, device: int) -> tuple[Any]:
        name = kind.name.removeprefix("CU_FUNC_ATTRIBUTE_")
        self.attributes[kernel.entry.symbol, name] = value
        return (SUCCESS,)

    def cuKernelGetFunction(self, kernel: Any) -> tuple[Any, Any]:
        return SUCCESS, kernel

    def cuFuncLoad(self, function: Any) -> tuple[Any]:
        self.calls.append(f"cuFuncLoad {function.entry.symbol}")
        return (SUCCESS,)

    def cuOccupancyMaxActiveClusters(self, function: Any, config: Any) -> tuple[Any, int]:
        self.calls.append("cuOccupancyMaxActiveClusters")
        return SUCCESS, self.clusters

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> tuple[Any, int, int]:
        assert name == b"cuTensorMapEncodeTiled"
        return SUCCESS, ctypes.cast(self._encode, ctypes.c_void_p).value or 0, 0

    def _encode_tiled(self, *arguments: Any) -> int:
        names = "map type rank address extents strides box steps interleave swizzle l2 fill"
        call = dict(zip(names.split(), arguments, strict=True))
        wide, narrow = ctypes.c_uint64, ctypes.c_uint32
        for name, kind, count in (
            *(("extents", wide, 2), ("strides", wide, 1)),
            *(("box", narrow, 2), ("steps", narrow, 2)),
        ):
            call[name] = tuple((kind * count).from_address(call[name]))
        facts = struct.pack("<4Q", call["address"], *call["extents"], *call["strides"])
        ctypes.memmove(call["map"], facts.ljust(128, b"\xa5"), 128)
        self.encoded.append(call)
        return self.encode_status

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: int, extra: int) -> tuple[Any]:
        if self.during_launch is not None:
            self.during_launch()  # the real call releases the interpreter lock
        entry = function.entry
        table = (ctypes.c_void_p * len(entry.contract.parameters)).from_address(pointers)
        arguments: dict[str, Any] = {}
        raw: dict[str, bytes] = {}
        for parameter, address in zip(entry.contract.parameters, table, strict=True):
            size = PARAMETER_TYPES[parameter.type][0]
            raw[parameter.name] = ctypes.string_at(address, size)
            if parameter.type != "tensormap":
                kind = _SCALARS.get(parameter.type, ctypes.c_uint64)
                arguments[parameter.name] = kind.from_address(address).value
        attributes = {}
        for attribute in config.attrs[: config.numAttrs]:
            extents = attribute.value.clusterDim
            attributes[int(attribute.id)] = (
                (extents.x, extents.y, extents.z)
                if attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                else attribute.value.programmaticStreamSerializationAllowed
            )
        launch = Launch(
            entry.symbol,
            (config.gridDimX, config.gridDimY, config.gridDimZ),
            (config.blockDimX, config.blockDimY, config.blockDimZ),
            config.sharedMemBytes,
            int(config.hStream),
            attributes,
            arguments,
            raw,
            threading.get_ident(),
        )
        self.launches.append(launch)
        if self.execute:
            EXECUTE[entry.symbol](SimpleNamespace(raw=raw, **arguments), entry)
        return (self.launch_status,)
