"""A synthetic artifacts folder and a driver that is not there.

The fake driver takes its types and enums from the real bindings, so the launch configuration and
the attributes are the real structures; only the calls are replaced. It records them, and it
executes a launch by reading the argument memory exactly as the hardware would and running the
oracle on it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from router_runtime import spec
from router_runtime.device import driver, kernels, loader
from router_runtime.format.contract import (
    PARAMETER_TYPES,
    Constants,
    Contract,
    GridAxis,
    Parameter,
    Repack,
    TensorMap,
)
from router_runtime.format.manifest import (
    MANIFEST_NAME,
    Entry,
    Manifest,
    Resources,
    Toolchain,
    artifact_name,
    dumps,
)
from router_runtime.format.target import Target
from router_runtime.routing import row_ops as rows

SUCCESS = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE
ZERO = "0" * 64
NUMERICS = "bf16-k16-f32/chunk256/epilogue1"

#: How every routing kernel's parameters end.
SERVED = (
    " serving=i32 sentinel=i32 first_row=i32 replicas=i32 is_padding=ptr:u8 "
    "num_valid_tokens=ptr:i32 image_mask=ptr:u8 image_bias=ptr:f32 expert_map=ptr:i32 "
    "replica_counts=ptr:i32 given_ids_i32=ptr:i32 given_ids_i64=ptr:i64 ids_out_i64=ptr:i64 "
    "logical_ids_out=ptr:i32 logical_ids_out_i64=ptr:i64"
)

CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}


def parameters(text: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(*item.split("=")) for item in text.split())


def hash_contract() -> Contract:
    return Contract(
        parameters=parameters(
            "token_ids_i32=ptr:i32 token_ids_i64=ptr:i64 table=ptr:i32 weights_out=ptr:f32 "
            "ids_out=ptr:i32 tokens=i32 vocab=i32 top_k=i32 serving=i32 sentinel=i32 first_row=i32 "
            "replicas=i32 is_padding=ptr:u8 num_valid_tokens=ptr:i32 expert_map=ptr:i32 "
            "replica_counts=ptr:i32 ids_out_i64=ptr:i64 logical_ids_out=ptr:i32 "
            "logical_ids_out_i64=ptr:i64"
        ),
        grid=(GridAxis("ceil", argument="tokens", divisor=128), GridAxis("constant"), ONE),
        block=(128, 1, 1),
        limits={"top_k": (1, 32)},
    )


ONE = GridAxis("constant")


def gate_contract() -> Contract:
    return Contract(
        parameters=tuple(
            parameter
            for parameter in parameters(
                "hidden_states=ptr:bf16 token_ids_i32=ptr:i32 token_ids_i64=ptr:i64 "
                "weight=ptr:bf16 table=ptr:i32 row_stride=i64 vocab=i32 weights_out=ptr:f32 "
                "ids_out=ptr:i32 tokens=i32 scale=f32 renormalize=i32" + SERVED
            )
            if not parameter.name.startswith("given_ids")
        ),
        grid=(GridAxis("ceil", argument="tokens"), ONE, ONE),
        block=(64, 1, 1),
        programmatic_dependent_launch=True,
        limits={"tokens": (1, 2**31 - 1)},
    )


def select_contract(longest: int) -> Contract:
    return Contract(
        parameters=parameters(
            "scores=ptr:f32 values_out=ptr:f32 ids_out=ptr:i32 rows=i32 row_length=i32 "
            "row_stride=i64 top_k=i32"
        ),
        grid=(GridAxis("ceil", argument="rows", divisor=4), ONE, ONE),
        block=(128, 1, 1),
        limits={"row_length": (1, longest), "top_k": (1, 32)},
    )


def activation_contract(capacity: int) -> Contract:
    return Contract(
        parameters=parameters(
            "logits=ptr:f32 bias=ptr:f32 weights_out=ptr:f32 ids_out=ptr:i32 tokens=i32 "
            "experts=i32 row_stride=i64 top_k=i32 scale=f32 renormalize=i32" + SERVED
        ),
        grid=(GridAxis("ceil_capped_at_sms", argument="tokens", divisor=4), ONE, ONE),
        block=(128, 1, 1),
        programmatic_dependent_launch=True,
        limits={"experts": (1, capacity), "top_k": (1, 32)},
    )


def dense_contract(
    hidden: int,
    experts: int,
    *,
    workspace: int = 0,
    tokens: tuple[int, int] = (1, 8),
    logits: bool = True,
) -> Contract:
    padded = -(-experts // 16) * 16
    return Contract(
        parameters=parameters(
            "hidden_states=ptr:bf16 packed_weight=ptr:bf16 bias=ptr:f32 weights_out=ptr:f32 "
            + "logits_out=ptr:f32 " * logits
            + "ids_out=ptr:i32 workspace=ptr:u32 tokens=i32 row_stride=i64 scale=f32 "
            "renormalize=i32" + SERVED
        ),
        grid=(GridAxis("constant", 16), ONE, ONE),
        block=(256, 1, 1),
        cluster=(16, 1, 1),
        dynamic_shared_memory=100 * 1024,
        programmatic_dependent_launch=True,
        workspace_bytes=workspace,
        repacks=(Repack("packed_weight", "weight", padded, (padded // 16, 16, hidden), (0, 2, 1)),),
        limits={"tokens": tokens},
    )


def prefill_contract(hidden: int, experts: int, tokens: tuple[int, int] = (1, 32)) -> Contract:
    """As the decode kernel's, but the rows come through a tensor map and no logits go out."""
    return dataclasses.replace(
        dense_contract(hidden, experts, tokens=tokens),
        parameters=parameters(
            "hidden_states=tensormap packed_weight=ptr:bf16 bias=ptr:f32 weights_out=ptr:f32 "
            "ids_out=ptr:i32 tokens=i32 scale=f32 renormalize=i32" + SERVED
        ),
        grid=(GridAxis("ceil", 2, "tokens", 16), ONE, ONE),
        cluster=(2, 1, 1),
        tensor_maps=(TensorMap("hidden_states", "hidden_states", "bf16", (64, 8), "128B"),),
    )


def make_entry(
    kernel: str,
    contract: Contract,
    *,
    model: str | None = None,
    target: str = "sm_90a",
    variant: str = "portable",
    constants: Constants | None = None,
    numerics: str | None = None,
    shared: int = 0,
    latency: tuple[tuple[int, float], ...] = (),
) -> Entry:
    code = machine_code(kernel, model, target, variant)
    digest = hashlib.sha256(code).hexdigest()
    return Entry(
        kernel=kernel,
        model=model,
        target=target,
        variant=variant,
        constants=constants or {},
        file=artifact_name(kernel, model, target, variant, digest),
        sha256=digest,
        size=len(code),
        symbol=kernel,
        contract=contract,
        source_sha256=ZERO,
        numerics=numerics,
        resources=Resources(32, 0, 0, 0, shared),
        latency=latency,
    )


def machine_code(kernel: str, model: str | None, target: str, variant: str) -> bytes:
    """Bytes that differ from entry to entry, with the header of a cubin for the target."""
    parsed = Target.parse(target)
    architecture = (parsed.major * 10 + parsed.minor) << 8
    header = struct.pack("<6s10xHH28xI12x", b"\x7fELF\x02\x01", 2, 190, architecture)
    return header + f"{kernel} {model} {target} {variant}".encode() * 8


def code_of(entry: Entry) -> bytes:
    """The bytes behind a synthetic entry's digest."""
    return machine_code(entry.kernel, entry.model, entry.target, entry.variant)


def make_manifest(entries: list[Entry]) -> Manifest:
    toolchain = Toolchain({"nvrtc": "13.5.37"}, {"cuda": ("-std=c++20",)})
    return Manifest(ZERO, toolchain, tuple(entries))


def write_artifacts(folder: Path, entries: list[Entry]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        (folder / entry.file).write_bytes(code_of(entry))
    (folder / MANIFEST_NAME).write_bytes(dumps(make_manifest(entries)))
    return folder


def small_entries(target: str = "sm_90a", workspace: int = 0) -> list[Entry]:
    """Every kernel, for a model with H 128, E 24 and k 4."""
    small: dict[str, Any] = {
        "model": "small",
        "target": target,
        "constants": {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4},
        "numerics": NUMERICS,
    }
    dense = dense_contract(128, 24, workspace=workspace)
    return [
        make_entry("hash_router", hash_contract(), target=target),
        make_entry("topk_select", select_contract(1024), target=target, variant="row1024"),
        make_entry("topk_select", select_contract(65536), target=target, variant="row65536"),
        make_entry("activation_topk", activation_contract(16), target=target, variant="e16"),
        make_entry("activation_topk", activation_contract(256), target=target, variant="e256"),
        make_entry("dense_router_prefill", prefill_contract(128, 24), **small),
        make_entry("dense_router_decode", dense, **small),
    ]


@dataclass
class Launch:
    """What one launch was given, as the device would see it."""

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
    """Stands in for ``cuda.bindings.driver``."""

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
                kind = CTYPES.get(parameter.type, ctypes.c_uint64)
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


def view(address: int, dtype: torch.dtype, *shape: int, stride: int | None = None) -> torch.Tensor:
    """The tensor that a kernel sees at an address."""
    rows_, columns = shape if len(shape) == 2 else (1, shape[0])
    step = columns if stride is None else stride
    count = (rows_ - 1) * step + columns
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((rows_, columns), (step, 1)).view(*shape)


def _run_hash(a: Any, entry: Entry) -> None:
    assert bool(a.token_ids_i32) != bool(a.token_ids_i64)
    dtype = torch.int32 if a.token_ids_i32 else torch.int64
    token_ids = view(a.token_ids_i32 or a.token_ids_i64, dtype, a.tokens)
    table = view(a.table, torch.int32, a.vocab, a.top_k)
    result = spec.hash_router(token_ids, table, a.top_k, -1, _served(a).get("padding"))
    _store(a, a.tokens, result)


def _run_gate(a: Any, entry: Entry) -> None:
    sizes = entry.constants
    hidden, experts = int(sizes["HIDDEN"]), int(sizes["EXPERTS"])
    a.top_k = int(sizes["TOP_K"])
    assert bool(a.token_ids_i32) != bool(a.token_ids_i64)
    assert a.hidden_states % 16 == 0
    assert a.row_stride % 8 == 0
    dtype = torch.int32 if a.token_ids_i32 else torch.int64
    served = _served(a, experts)
    assert sizes["IMAGES"] or "image_mask" not in served
    result = spec.hash_gate(
        view(a.hidden_states, torch.bfloat16, a.tokens, hidden, stride=a.row_stride),
        view(a.token_ids_i32 or a.token_ids_i64, dtype, a.tokens),
        view(a.weight, torch.bfloat16, experts, hidden),
        view(a.table, torch.int32, a.vocab, a.top_k),
        a.scale,
        bool(a.renormalize),
        **served,
    )
    _store(a, a.tokens, result)


def _run_select(a: Any, entry: Entry) -> None:
    scores = view(a.scores, torch.float32, a.rows, a.row_length, stride=a.row_stride)
    a.weights_out = a.values_out
    _store(a, a.rows, spec.topk_select(scores, a.top_k))


def _run_activation(a: Any, entry: Entry) -> None:
    logits = view(a.logits, torch.float32, a.tokens, a.experts, stride=a.row_stride)
    bias = view(a.bias, torch.float32, a.experts)
    result = spec.activation_topk(
        logits, bias, a.top_k, a.scale, bool(a.renormalize), **_served(a, a.experts)
    )
    _store(a, a.tokens, result)


def _run_dense(a: Any, entry: Entry) -> None:
    sizes = entry.constants
    hidden, experts = int(sizes["HIDDEN"]), int(sizes["EXPERTS"])
    a.top_k = int(sizes["TOP_K"])
    if entry.contract.tensor_maps:
        a.hidden_states, columns, count, stride = struct.unpack("<4Q", a.raw["hidden_states"][:32])
        assert (columns, count) == (hidden, a.tokens)
        assert stride >= 2 * columns  # the hardware takes no rows that overlap
        a.row_stride = stride // 2
    assert a.hidden_states % 16 == 0
    assert a.row_stride % 8 == 0
    x = view(a.hidden_states, torch.bfloat16, a.tokens, hidden, stride=a.row_stride)
    recipe = entry.contract.repacks[0]
    packed = view(a.packed_weight, torch.bfloat16, recipe.rows * hidden)
    weight = packed.view(recipe.rows // 16, hidden, 16).permute(0, 2, 1).reshape(-1, hidden)
    assert not weight[experts:].any()
    bias = view(a.bias, torch.float32, experts)
    logits = spec.dense_logits(x, weight[:experts])
    result = spec.activation_topk(
        logits, bias, a.top_k, a.scale, bool(a.renormalize), **_served(a, experts)
    )
    _store(a, a.tokens, result)
    if getattr(a, "logits_out", 0):
        view(a.logits_out, torch.float32, a.tokens, experts).copy_(logits)


def _served(a: Any, experts: int = 0) -> dict[str, Any]:
    """The serving inputs of a launch as ``spec.activation_topk`` takes them."""
    if not a.serving:
        return {}
    rows_ = torch.arange(a.first_row, a.first_row + a.tokens)
    marks = view(a.is_padding, torch.bool, a.tokens) if a.is_padding else None
    count = view(a.num_valid_tokens, torch.int32, 1) if a.num_valid_tokens else None
    inputs: dict[str, Any] = {"padding": spec.padding_rows(rows_, marks, count)}
    if getattr(a, "image_mask", 0):
        inputs["image_mask"] = view(a.image_mask, torch.bool, a.tokens)
        inputs["image_bias"] = view(a.image_bias, torch.float32, experts)
    for name, dtype in (("given_ids_i32", torch.int32), ("given_ids_i64", torch.int64)):
        if address := getattr(a, name, 0):
            inputs["given_ids"] = view(address, dtype, a.tokens, a.top_k)
    return inputs


def _store(a: Any, count: int, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, ids = result
    view(a.weights_out, torch.float32, count, a.top_k).copy_(weights)
    if not getattr(a, "serving", 0):
        stored = spec.with_sentinel(ids, getattr(a, "sentinel", -1))
        view(a.ids_out, torch.int32, count, a.top_k).copy_(stored)
        return
    logical = physical = spec.with_sentinel(ids, a.sentinel)
    if a.expert_map:
        entries = max(int(ids.max()) + 1, 1)
        counts = view(a.replica_counts, torch.int32, entries)
        expert_map = view(a.expert_map, torch.int32, entries, a.replicas)
        rows_ = torch.arange(a.first_row, a.first_row + count)
        physical = spec.physical_ids(ids, rows_, expert_map, counts, a.sentinel)
    for kept, narrow, wide in (
        (physical, a.ids_out, a.ids_out_i64),
        (logical, a.logical_ids_out, a.logical_ids_out_i64),
    ):
        dtype = torch.int64 if wide else torch.int32
        if address := wide or narrow:
            view(address, dtype, count, a.top_k).copy_(kept)


EXECUTE: dict[str, Callable[[Any, Entry], None]] = {
    "hash_router": _run_hash,
    "hash_gate": _run_gate,
    "topk_select": _run_select,
    "activation_topk": _run_activation,
    "dense_router_decode": _run_dense,
    "dense_router_prefill": _run_dense,
}


@pytest.fixture
def build() -> SimpleNamespace:
    """Builders of synthetic entries, manifests and folders."""
    return SimpleNamespace(
        activation=activation_contract,
        artifacts=write_artifacts,
        code=code_of,
        dense=dense_contract,
        entry=make_entry,
        gate=gate_contract,
        hash=hash_contract,
        numerics=NUMERICS,
        prefill=prefill_contract,
        manifest=make_manifest,
        parameters=parameters,
        select=select_contract,
        small=small_entries,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A fake driver in place of the real one, and none of the runtime's caches."""
    stand_in = FakeDriver()
    monkeypatch.setattr(driver, "bindings", lambda: stand_in)
    monkeypatch.setattr(driver, "_initialised_in", None)
    monkeypatch.setattr(driver, "_contexts", {})
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(kernels, "_cache", {})
    monkeypatch.setattr(rows, "_loaded", {})
    driver.tensor_map_encoder.cache_clear()
    yield stand_in
    driver.tensor_map_encoder.cache_clear()


@pytest.fixture
def gpu(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The fake driver with a small model's artifacts, all verified, serving CPU memory.

    torch on a CPU has no streams; they are given the plainest stand-in.
    """
    fake.execute = True
    fake.entries = small_entries()
    folder = write_artifacts(tmp_path / "artifacts", fake.entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    monkeypatch.setattr(kernels, "status", lambda *_: "verified")
    serve_cpu_memory(monkeypatch)
    return fake


def serve_cpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from router_runtime.device.launch import LoadedKernel
    from router_runtime.routing import placement

    def kernels_on(index: int | None, artifacts: Any = None) -> kernels.Kernels:
        return kernels.kernels_on(0, artifacts)

    monkeypatch.setattr(rows, "kernels_on", kernels_on)
    monkeypatch.setattr(rows, "refuse_capture", lambda what: None)
    monkeypatch.setattr(placement.Placement, "stream", lambda self: 7)
    monkeypatch.setattr(LoadedKernel, "_check_tensor", lambda *_: None)
