"""Router: what it refuses, and that both its devices give the oracle's result.

``gpu`` is the fake driver, which reads the launch's argument memory and runs the oracle on it:
wrong addresses, strides, order of arguments or repacking would show as wrong results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import math
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real
from torch import Tensor

import router_runtime as rt
from router_runtime import spec
from router_runtime.device import kernels, launch
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request
from router_runtime.errors import InputError, ResolutionError
from router_runtime.evidence.status import status
from router_runtime.routing import row_kernels
from router_runtime.routing import row_ops as rows
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cpu import CpuDense
from router_runtime.routing.cuda_dense import CudaDense
from router_runtime.routing.cuda_hash import CudaHash
from router_runtime.routing.placement import Placement
from router_runtime.routing.router import Router, warmup_router_compilation
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights
from router_runtime.routing.workspace import Workspaces, workspaces_of
from tests.runtime import releases
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
CONFIG = RouterConfig(H, E, K, 1.5)
HASH = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V)


def weights_of(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, H, generator=generator).bfloat16()
    return weight, torch.randn(E, generator=generator) * 0.1


def table_of() -> Tensor:
    return torch.randint(0, E, (V, K), generator=torch.Generator().manual_seed(1))


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).bfloat16()


@pytest.fixture
def cpu_dense() -> Router:
    weight, bias = weights_of()
    return Router(CONFIG, weight=weight, bias=bias, device="cpu")


def cuda_dense(config: RouterConfig = CONFIG, **variants: str) -> tuple[CudaDense, Weights]:
    """The CUDA path of a router, on CPU memory."""
    weights = Weights(config, torch.device("cpu"))
    path = CudaDense(config, weights, kernels_on(0), Selection(variants))
    weights.write(named(*weights_of()))
    return path, weights


def named(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {"weight": weight, "bias": bias}


def cuda_hash() -> CudaHash:
    """The CUDA path of a hash router, on CPU memory."""
    weights = Weights(HASH, torch.device("cpu"))
    weights.write({"table": table_of()})
    return CudaHash(HASH, weights, kernels_on(0), Selection())


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int32
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


# --- configuration ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "a multiple of 64"),
        ({"hidden_size": 0}, "hidden_size: expected an integer from 64"),
        ({"hidden_size": 128.0}, "hidden_size: expected an integer"),
        ({"num_experts": 1025}, "num_experts: expected an integer from 1 to 1024"),
        ({"num_experts": True}, "num_experts: expected an integer"),
        ({"top_k": 25}, "top_k: expected an integer from 1 to 24"),
        ({"top_k": 0}, "top_k"),
        ({"num_experts": 64, "top_k": 33}, "top_k: expected an integer from 1 to 32"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor: expected a number from 0"),
        ({"routed_scaling_factor": math.inf}, r"from 0 to 1e\+18, found inf"),
        ({"routed_scaling_factor": -1.0}, "found -1.0"),
        ({"routed_scaling_factor": 1.01e18}, "routed_scaling_factor"),
        ({"routed_scaling_factor": "1.5"}, "found '1.5'"),
        ({"mode": "hash_table"}, "mode: expected .*'hash_gate'"),
        ({"mode": "hash"}, "vocab_size: expected an integer from 1"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"renormalize": 1}, "renormalize: expected True or False"),
        ({"sentinel": 2**31}, "sentinel"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    fields = {"hidden_size": H, "num_experts": E, "top_k": K, "routed_scaling_factor": 1.5}
    with pytest.raises(InputError, match=message):
        RouterConfig(**(fields | change))


@pytest.mark.parametrize("scale", [0, 0.0, 1, 1e18])
def test_accepted_scales(scale: float) -> None:
    assert RouterConfig(H, E, K, scale).routed_scaling_factor == scale


# --- weights and tables ---


def test_refused_weights() -> None:
    weight, bias = weights_of()
    for bad, message in (
        ({"weight": weight.float()}, r"weight: expected torch.bfloat16 \[24, 128\], found"),
        ({"weight": weight[:-1]}, r"found 'torch.bfloat16 \[23, 128\]'"),
        ({"weight": weight.T}, r"\[128, 24\]"),
        ({"bias": bias.double()}, r"bias: expected torch.float32 \[24\]"),
        ({"bias": bias[None]}, r"\[1, 24\]"),
        ({"bias": None}, r"expected \['weight', 'bias'\], found \['weight'\]"),
        ({"table": table_of()}, "tensors of a dense router"),
    ):
        with pytest.raises(InputError, match=message):
            Router(CONFIG, **({"weight": weight, "bias": bias} | bad), device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    weight, bias = weights_of()
    weight[3, 7] = weight[5, 0] = value
    with pytest.raises(InputError, match=r"weight: expected finite .*'2 others, .*\[3, 7\]"):
        Router(CONFIG, weight=weight, bias=bias, device="cpu")
    weight, bias = weights_of()
    bias[2] = value
    with pytest.raises(InputError, match=r"bias: .*1 others, the first at \[2\]"):
        Router(CONFIG, weight=weight, bias=bias, device="cpu")


def test_strided_weights_are_made_contiguous() -> None:
    weight, bias = weights_of()
    spread = torch.zeros(H, 2 * E, dtype=torch.bfloat16).T[::2]
    spread.copy_(weight)
    router = Router(CONFIG, weight=spread, bias=bias, device="cpu")
    same(router(hidden(3)), spec.dense_router(hidden(3), weight, bias, K, 1.5))


def test_router_copies_what_it_is_given(cpu_dense: Router) -> None:
    weight, bias = weights_of()
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    before = router(hidden(3))
    weight.zero_()
    bias.zero_()
    same(router(hidden(3)), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.float(), "torch.int32 or torch.int64"),
        (lambda t: t[:-1], r"\[49, 4\]"),
        (lambda t: t[:, :-1], r"\[50, 3\]"),
        (
            lambda t: t.index_fill(0, torch.tensor([9]), E),
            r"'4 others, .*\[9, 0\]: 24",
        ),
        (lambda t: t.index_fill(0, torch.tensor([9]), -1), r"\[9, 0\]: -1"),
        (lambda t: t.index_fill(1, torch.tensor([2]), 2**32), r"\[0, 2\]: 4294967296"),
    ],
)
def test_refused_tables(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Router(HASH, table=make(table_of()), device="cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_of_both_widths(dtype: torch.dtype) -> None:
    table = table_of().to(dtype)
    router = Router(HASH, table=table, device="cpu")
    table.zero_()
    token_ids = torch.tensor([0, 7, -1, V, V - 1])
    same(router(token_ids), spec.hash_router(token_ids, table_of().int(), K))


@pytest.mark.parametrize("accept", ["verified", "unproven", "Emulated", "", True, ["emulated"]])
def test_a_status_that_cannot_be_accepted(accept: Any) -> None:
    weight, bias = weights_of()
    with pytest.raises(InputError, match=r"accept: expected None or one of \['emulated'\], found"):
        Router(CONFIG, weight=weight, bias=bias, device="cpu", accept=accept)


def test_unknown_variants_and_devices() -> None:
    weight, bias = weights_of()
    with pytest.raises(InputError, match=r"variants: expected kernels of a dense router"):
        Router(CONFIG, weight=weight, bias=bias, device="cpu", variants={"hash_router": "x"})
    for device in ("meta", "no such", None, -1, 1.5):
        with pytest.raises(InputError, match="device: expected 'cpu' or a CUDA device"):
            Router(CONFIG, weight=weight, bias=bias, device=device)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_cuda_without_a_gpu() -> None:
    weight, bias = weights_of()
    with pytest.raises(InputError, match=r"expected a GPU .* for cuda, found none; .*doctor"):
        Router(CONFIG, weight=weight, bias=bias, device="cuda")


# --- calls, on both paths ---


D, P = "dense_router_decode", "dense_router_prefill"


@pytest.mark.parametrize(
    ("tokens", "launched"),
    # Beyond what any kernel takes, 32 tokens, a batch is split.
    [(0, ""), (1, "D"), (7, "D"), (8, "D"), (9, "P"), (32, "P"), (33, "PD"), (100, "PPPD")],
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_dense_decode_and_prefill(gpu: Any, tokens: int, launched: str, renormalize: bool) -> None:
    config = RouterConfig(H, E, K, 2.5, renormalize=renormalize)
    weight, bias = weights_of()
    expected = spec.dense_router(hidden(tokens), weight, bias, K, 2.5, renormalize)
    same(Router(config, weight=weight, bias=bias, device="cpu")(hidden(tokens)), expected)
    path, _ = cuda_dense(config)
    same(path.route(hidden(tokens)), expected)
    assert [each.symbol for each in gpu.launches] == [{"D": D, "P": P}[it] for it in launched]
    assert all(launch.stream == 7 for launch in gpu.launches)


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 20])
def test_logits(gpu: Any, cpu_dense: Router, tokens: int) -> None:
    """Only the decode kernel here stores logits, so larger batches are split for it."""
    x = hidden(tokens)
    x[tokens // 2 :, 3] = math.nan
    path, weights = cuda_dense()
    logits = spec.dense_logits(x, weights.weight)
    for found in (cpu_dense.forward_with_logits(x), path.route_with_logits(x)):
        same(found[:2], spec.dense_router(x, weights.weight, weights.bias, K, 1.5))
        assert torch.equal(found[2].view(torch.int32), logits.view(torch.int32))
        assert (found[2][tokens // 2 :].view(torch.int32) == spec.NAN_LOGIT_BITS).all()
    assert [each.symbol for each in gpu.launches] == [D] * -(-tokens // 8)
    path.route(x[:8])
    if tokens:
        assert gpu.launches[-1].arguments["logits_out"] == 0


def test_logits_of_kernels_that_store_none(
    gpu: Any, build: SimpleNamespace, tmp_path: Path
) -> None:
    for index, entry in enumerate(gpu.entries):
        if entry.kernel == D:
            contract = build.dense(H, E, logits=False)
            gpu.entries[index] = dataclasses.replace(entry, contract=contract)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    path, weights = cuda_dense()
    same(path.route(hidden(3)), spec.dense_router(hidden(3), weights.weight, weights.bias, K, 1.5))
    with pytest.raises(
        ResolutionError, match=r"has no parameter logits_out[\s\S]*run: make build-cubins"
    ):
        path.route_with_logits(hidden(3))


def test_hash_routers_have_no_logits() -> None:
    with pytest.raises(InputError, match="a dense router, found \"mode 'hash'\""):
        Router(HASH, table=table_of(), device="cpu").forward_with_logits(torch.arange(3))


def test_token_ranges(gpu: Any, cpu_dense: Router) -> None:
    token_ranges = cpu_dense.token_ranges
    assert token_ranges == ()
    cpu_dense.backend = cuda_dense()[0]
    token_ranges = cpu_dense.token_ranges
    found = [(each.low, each.high, each.entry.kernel) for each in token_ranges]
    assert found == [(1, 8, D), (9, 32, P)]


@pytest.mark.parametrize("tokens", [0, 1, 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash(gpu: Any, tokens: int, dtype: torch.dtype) -> None:
    token_ids = torch.randint(-3, V + 3, (tokens,)).to(dtype)
    expected = spec.hash_router(token_ids, table_of().int(), K)
    same(Router(HASH, table=table_of(), device="cpu")(token_ids), expected)
    path = cuda_hash()
    same(path.route(token_ids), expected)
    strided = torch.empty(tokens, 2, dtype=dtype)[:, 0]
    strided.copy_(token_ids)
    same(path.route(strided), expected)


def activations(kind: str, tokens: int = 5) -> Tensor:
    """The same rows, with different strides."""
    x = hidden(tokens)
    match kind:
        case "row stride":
            buffer = torch.full((tokens, H + 64), math.nan, dtype=torch.bfloat16)
            view = buffer[:, :H]
        case "unaligned row stride":
            buffer = torch.full((tokens, H + 3), math.nan, dtype=torch.bfloat16)
            view = buffer[:, :H]
        case "unaligned start":
            view = torch.empty(tokens * H + 1, dtype=torch.bfloat16)[1:].view(tokens, H)
        case "transposed":
            view = torch.empty(H, tokens, dtype=torch.bfloat16).T
        case "every other element":
            view = torch.empty(tokens, 2 * H, dtype=torch.bfloat16)[:, ::2]
        case "repeated row":
            return x[:1].expand(tokens, H)
        case _:
            return x
    view.copy_(x)
    return view


@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        *[("contiguous", False), ("row stride", False), ("repeated row", False)],
        *[("unaligned row stride", True), ("unaligned start", True), ("transposed", True)],
        ("every other element", True),
    ],
)
def test_layouts_of_activations(gpu: Any, kind: str, copied: bool) -> None:
    path, weights = cuda_dense()
    x = activations(kind)
    expected = spec.dense_router(x, weights.weight, weights.bias, K, 1.5)
    same(path.route(x), expected)
    (launch,) = gpu.launches
    assert (launch.arguments["hidden_states"] != x.data_ptr()) == copied
    if not copied:
        assert launch.arguments["row_stride"] == x.stride(0)
    # Through a tensor map, which takes no rows that overlap.
    x = activations(kind, 20)
    same(path.route(x), spec.dense_router(x, weights.weight, weights.bias, K, 1.5))
    (encoded,) = gpu.encoded
    assert (encoded["address"] != x.data_ptr()) == (copied or kind == "repeated row")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hidden(3).float(), r"expected torch.bfloat16 \[tokens, 128\] on cpu, found"),
        (lambda: hidden(3)[:, :64], r"\[3, 64\]"),
        (lambda: hidden(3)[None], r"\[1, 3, 128\]"),
        (lambda: hidden(3).to("meta"), "on meta"),
        (lambda: hidden(3).requires_grad_(), "expected a tensor that needs no gradient"),
    ],
)
def test_refused_activations(cpu_dense: Router, gpu: Any, make: Any, message: str) -> None:
    for route in (cpu_dense, cuda_dense()[0].route):
        with pytest.raises(InputError, match=message):
            route(make())
    assert not gpu.launches


def test_gradients_are_no_matter_outside_grad_mode(cpu_dense: Router) -> None:
    with torch.no_grad():
        weights, _ = cpu_dense(hidden(3).requires_grad_())
    assert not weights.requires_grad
    with torch.inference_mode():
        cpu_dense(hidden(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3),
        lambda: torch.zeros(3, 1, dtype=torch.int64),
        lambda: torch.zeros(3, dtype=torch.int16),
    ],
)
def test_refused_token_ids(gpu: Any, make: Any) -> None:
    for route in (
        Router(HASH, table=table_of(), device="cpu"),
        cuda_hash().route,
    ):
        with pytest.raises(InputError, match=r"torch.int32 or torch.int64 \[tokens\]"):
            route(make())


def test_row_ops(gpu: Any) -> None:
    for columns, k in ((7, 3), (1024, 32), (1025, 1), (5000, 6)):
        scores = torch.randn(5, columns + 3)[:, :columns]
        same(rows.topk_select_cuda(scores, k), spec.topk_select(scores, k))
        same(rows.topk_select_cuda(scores.T.contiguous().T, k), spec.topk_select(scores, k))
    assert gpu.calls.count("cuLibraryLoadData") == 2
    for experts in (7, 16, 17, 256):
        logits, bias = torch.randn(5, experts), torch.randn(experts * 2)[::2]
        expected = spec.activation_topk(logits, bias, 4, 2.5, False)
        same(rows.activation_topk_cuda(logits, bias, 4, 2.5, False), expected)
    assert gpu.calls.count("cuLibraryLoadData") == 4
    assert rows.topk_select_cuda(torch.randn(0, 9), 2)[0].shape == (0, 2)


def test_row_ops_refuse_to_load_during_capture(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from router_runtime.routing import placement

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(row_kernels, "refuse_capture", placement.refuse_capture)
    with pytest.raises(InputError, match=r"first call of topk_select .*do it before the capture"):
        rows.topk_select_cuda(torch.randn(3, 9), 2)


# --- loading and evidence ---


def test_everything_is_loaded_at_construction(gpu: Any) -> None:
    path, _ = cuda_dense()
    loaded = list(gpu.calls)
    path.route(hidden(3))
    path.route(hidden(20))
    assert gpu.calls == [*loaded, "set 1000", "set 1000"]


def test_one_row_of_any_stride(gpu: Any) -> None:
    """torch lets a dimension of one element have any stride; a tensor map does not."""
    path, weights = cuda_dense(dense_router_prefill="portable")
    x = hidden(1).expand(1, H).as_strided((1, H), (0, 1))
    launcher = path.plan.launchers[-1]
    assert launcher.mapped
    path.plan.launchers[0] = launcher
    same(path.route(x), spec.dense_router(x, weights.weight, weights.bias, K, 1.5))
    assert gpu.encoded[0]["strides"] == (2 * H,)


def test_unproven_kernels_need_their_name(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "status", lambda *_: "unproven")
    with pytest.raises(ResolutionError, match="verify --record"):
        cuda_dense()
    path, weights = cuda_dense(dense_router_decode="portable")
    assert {each.entry.kernel for each in path.token_ranges} == {D}
    expected = spec.dense_router(hidden(20), weights.weight, weights.bias, K, 1.5)
    same(path.route(hidden(20)), expected)


def test_emulated_kernels_need_to_be_accepted(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "status", lambda *_: "emulated")
    with pytest.raises(ResolutionError, match=r"verify --record.*accept='emulated'"):
        cuda_dense()
    weights = Weights(CONFIG, torch.device("cpu"))
    path = CudaDense(CONFIG, weights, kernels_on(0), Selection(accept="emulated"))
    weights.write(named(*weights_of()))
    assert {each.entry.kernel for each in path.token_ranges} == {D, P}
    assert set(path.evidence) >= {each.entry.key for each in path.token_ranges}
    assert set(path.evidence.values()) == {"emulated"}
    expected = spec.dense_router(hidden(20), weights.weight, weights.bias, K, 1.5)
    same(path.route(hidden(20)), expected)


def test_new_evidence_is_seen(gpu: Any, tmp_path: Path) -> None:
    first = kernels_on(0)
    assert kernels_on(0) is first
    evidence = tmp_path / "artifacts" / "evidence"
    evidence.mkdir()
    assert kernels_on(0) is first
    manifest = tmp_path / "artifacts" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())
    assert kernels_on(0) is not first


def test_new_evidence_of_ones_own_is_seen(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = kernels_on(0)
    own = tmp_path / "own"
    entries = gpu.entries
    releases.add_evidence(own, entries[:1])
    monkeypatch.setenv("ROUTER_RUNTIME_EVIDENCE", str(own))
    first = kernels_on(0)
    assert first is not shipped
    releases.add_evidence(own, entries[1:])
    assert kernels_on(0) is not first
    # The fixture reports every entry as verified; without it the folder's evidence decides.
    monkeypatch.setattr(kernels, "status", status)
    assert {kernels_on(0).status(entry) for entry in entries} == {"verified"}


# --- weights in place ---


def test_update_on_the_cpu(cpu_dense: Router) -> None:
    weight, bias = weights_of(1)
    cpu_dense.update_weights(weight=weight, bias=bias)
    same(cpu_dense(hidden(3)), spec.dense_router(hidden(3), weight, bias, K, 1.5))
    cpu_dense.update_weights(bias=weights_of()[1])
    same(cpu_dense(hidden(3)), spec.dense_router(hidden(3), weight, weights_of()[1], K, 1.5))


def test_update_keeps_addresses(gpu: Any) -> None:
    path, weights = cuda_dense()
    path.route(hidden(3))
    weight, bias = weights_of(1)
    weights.write(named(weight, bias))
    same(path.route(hidden(3)), spec.dense_router(hidden(3), weight, bias, K, 1.5))
    same(path.route(hidden(30)), spec.dense_router(hidden(30), weight, bias, K, 1.5))
    first, second = gpu.launches[:2]
    for name in ("packed_weight", "bias"):
        assert first.arguments[name] == second.arguments[name]


def test_bad_update_changes_nothing(cpu_dense: Router) -> None:
    before = cpu_dense(hidden(3))
    weight, bias = weights_of(1)
    for bad in (
        {},
        {"weight": weight, "bias": bias * math.nan},
        {"weight": weight.float()},
        {"weight": weight[1:], "bias": bias},
    ):
        with pytest.raises(InputError):
            cpu_dense.update_weights(**bad)
    same(cpu_dense(hidden(3)), before)


def test_update_waits_on_both_sides(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches before it and after it are ordered by the host, on any stream."""
    weight, bias = weights_of()
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    events: list[str] = []
    write = Weights.write
    monkeypatch.setattr(router, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(Weights, "write", lambda *values: (events.append("write"), write(*values)))
    router.update_weights(weight=weight)
    assert events == ["wait", "write", "wait"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match=r"update_weights: expected no CUDA graph capture"):
        router.update_weights(weight=weight)
    assert len(events) == 3


def test_hash_routers_have_no_weights() -> None:
    with pytest.raises(InputError, match="a router with a weight, found \"mode 'hash'\""):
        Router(HASH, table=table_of(), device="cpu").update_weights(bias=weights_of()[1])


def test_equal_recipes_share_a_buffer(build: SimpleNamespace) -> None:
    recipe = build.dense(H, E).repacks[0]
    weights = Weights(CONFIG, torch.device("cpu"))
    buffer = weights.packed(recipe)
    assert weights.packed(dataclasses.replace(recipe, parameter="other")) is buffer
    assert weights.packed(dataclasses.replace(recipe, order=(0, 1, 2))) is not buffer
    with pytest.raises(InputError, match="repack recipe"):
        weights.packed(dataclasses.replace(recipe, rows=16))
    with pytest.raises(InputError, match="the argument 'weight'"):
        weights.packed(dataclasses.replace(recipe, argument="bias"))


# --- workspaces ---


class Streams:
    """Stand-ins for torch's streams, which a CPU has not.

    ``captured`` are being captured, in the capture ``capture``. New streams come from 1 up, so 1
    can be the one that a graph is being captured on.
    """

    def __init__(self) -> None:
        self.current = 0
        self.captured: set[int] = set()
        self.capture = 1
        self.made = 0
        self.waits: list[int] = []

    def new(self, device: torch.device) -> SimpleNamespace:
        self.made += 1
        handle = (self.made - 1) % 3 + 1
        return SimpleNamespace(handle=handle, synchronize=lambda: self.waits.append(handle))

    def known(self, handle: int, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(handle=handle, synchronize=lambda: self.waits.append(handle))

    def query(self, handle: int) -> tuple[Any, ...]:
        """As ``cuStreamGetCaptureInfo``."""
        assert handle in self.captured
        return real.CUresult.CUDA_SUCCESS, "active", self.capture, "graph", (), (), 0

    @contextlib.contextmanager
    def use(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.handle
        yield
        self.current = before


@pytest.fixture
def streams(fake: Any, monkeypatch: pytest.MonkeyPatch) -> Streams:
    state = Streams()
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: state.current in state.captured
    )
    monkeypatch.setattr(torch.cuda, "Stream", state.new)
    monkeypatch.setattr(torch.cuda, "ExternalStream", state.known)
    fake.cuStreamGetCaptureInfo = state.query
    monkeypatch.setattr(torch.cuda, "stream", state.use)
    return state


def test_workspace_belongs_to_a_stream(streams: Streams) -> None:
    spaces = Workspaces(100, torch.device("cpu"))
    first, second = spaces.address(0), spaces.address(5)
    assert first != second
    assert spaces.address(0) == first
    assert spaces.address(5) == second
    other = Workspaces(100, torch.device("cpu"))
    assert other.address(0) not in (first, second)


def test_workspace_of_the_per_thread_stream_belongs_to_the_thread(
    streams: Streams,
) -> None:
    spaces = Workspaces(100, torch.device("cpu"))
    found = [spaces.address(2)]
    # A thread that is alive at the same time has another identity.
    thread = threading.Thread(target=lambda: found.append(spaces.address(2)))
    thread.start()
    thread.join()
    assert found[0] != found[1]
    assert spaces.address(2) == found[0]


def test_workspace_belongs_to_a_capture(streams: Streams, fake: Any) -> None:
    spaces = Workspaces(100, torch.device("cpu"))
    eager = spaces.address(1)
    streams.waits.clear()
    fake.calls.clear()
    streams.current, streams.captured = 1, {1}
    captured = []
    for streams.capture in range(20):
        captured.append(spaces.address(1))
    assert len({eager, *captured}) == 21
    assert all(abs(a - b) >= 256 for a in captured for b in captured if a != b)
    # Zeroed on a stream that is not captured, and waited for.
    assert len(streams.waits) == 3
    assert 1 not in streams.waits
    modes = [call for call in fake.calls if call.startswith("capture mode")]
    assert modes[:2] == [
        "capture mode CU_STREAM_CAPTURE_MODE_RELAXED",
        "capture mode CU_STREAM_CAPTURE_MODE_GLOBAL",
    ]
    streams.captured = set()
    assert spaces.address(1) == eager


def test_launches_of_one_capture_share_by_stream(streams: Streams, fake: Any) -> None:
    """Those on one stream of it run in order; two streams of one capture may overlap."""
    spaces = Workspaces(100, torch.device("cpu"))
    streams.current, streams.captured = 1, {1, 5}
    first = spaces.address(1)
    assert spaces.address(1) == first
    assert spaces.address(5) != first
    streams.capture += 1
    assert spaces.address(1) != first


def test_workspaces_are_allocated_in_a_thread_of_their_own(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch diverts what a thread allocates while it warms a CUDA graph of torch.compile up."""
    threads, zeros = [], torch.zeros

    def spied(*arguments: Any, **options: Any) -> Tensor:
        threads.append(threading.get_ident())
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", spied)
    spaces = Workspaces(100, torch.device("cpu"))
    spaces.address(1)
    streams.current, streams.captured = 1, {1}
    spaces.address(1)
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_routers_of_one_kernel_share_its_workspaces(
    gpu: Any, build: SimpleNamespace, tmp_path: Path, streams: Streams
) -> None:
    """For any number of routers. The memory is freed with the last one."""
    gpu.entries = build.small(workspace=100)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    paths = [cuda_dense()[0] for _ in range(3)]
    streams.current, streams.captured = 7, {7}
    for path in paths:
        path.route(hidden(3))
        path.route(hidden(20))
    workspaces = {each.symbol: each.arguments.get("workspace") for each in gpu.launches}
    assert len({each.arguments.get("workspace") for each in gpu.launches}) == len(workspaces) == 2
    held = weakref.ref(workspaces_of(kernels_on(0).load(Request(D)), torch.device("cpu")))
    del path, paths
    gc.collect()
    assert held() is None


def test_workspace_reaches_the_kernel(
    gpu: Any, build: SimpleNamespace, tmp_path: Path, streams: Streams
) -> None:
    gpu.entries = build.small(workspace=100)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    path, _ = cuda_dense()
    path.route(hidden(3))
    path.route(hidden(3))
    first, second = (each.arguments["workspace"] for each in gpu.launches)
    assert first == second != 0


def test_no_workspace_is_null(gpu: Any) -> None:
    cuda_dense()[0].route(hidden(3))
    assert gpu.launches[0].arguments["workspace"] == 0


# --- several devices ---


def test_call_while_another_device_is_current(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's device is made current for the launch, and the caller's is restored."""
    path, weights = cuda_dense()
    hashing = cuda_hash()
    entered: list[str] = []

    @contextlib.contextmanager
    def current(self: Placement) -> Iterator[None]:
        entered.append("in")
        monkeypatch.setattr(Placement, "elsewhere", lambda self: False)
        yield
        monkeypatch.setattr(Placement, "elsewhere", lambda self: True)
        entered.append("out")

    several = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Placement, "several", several)
    monkeypatch.setattr(Placement, "elsewhere", lambda self: True)
    monkeypatch.setattr(Placement, "current", current)
    expected = spec.dense_router(hidden(3), weights.weight, weights.bias, K, 1.5)
    same(path.route(hidden(3)), expected)
    hashing.route(torch.arange(3))
    rows.topk_select_cuda(torch.randn(3, 9), 2)
    rows.activation_topk_cuda(torch.randn(3, 9), torch.zeros(9), 2, 1.0, True)
    assert entered == ["in", "out"] * 4
    assert len(gpu.launches) == 4


# --- registry and lifetime ---


def test_registry(cpu_dense: Router) -> None:
    with pytest.raises(InputError, match=r"call register_router\(router\)"):
        _ = cpu_dense.router_id
    first = rt.register_router(cpu_dense)
    assert first >= 2
    assert rt.register_router(cpu_dense) == first == cpu_dense.router_id
    assert rt.get_router(first) is cpu_dense
    with pytest.raises(InputError, match=r"router of register_router: expected Router, found int"):
        rt.register_router(first)  # type: ignore[arg-type]
    rt.unregister_router(first)
    second = rt.register_router(cpu_dense)
    assert second > first
    for action in (rt.get_router, rt.unregister_router):
        with pytest.raises(InputError, match=rf"router_id: .*found {first}; .*not reused"):
            action(first)
    rt.unregister_router(second)


def test_threads_get_distinct_ids() -> None:
    weight, bias = weights_of()
    routers = [Router(CONFIG, weight=weight, bias=bias, device="cpu") for _ in range(32)]
    barrier = threading.Barrier(8)
    found: list[int] = []

    def work(number: int) -> None:
        barrier.wait()
        found.extend(rt.register_router(router) for router in routers[number::4])

    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 64
    assert len(set(found)) == 32
    for router_id in set(found):
        rt.unregister_router(router_id)


def test_memory_comes_back(gpu: Any) -> None:
    weight, bias = weights_of()
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    path, weights = cuda_dense()
    path.route(hidden(3))
    router_id = rt.register_router(router)
    router(hidden(3))
    held: list[Any] = [weakref.ref(router), weakref.ref(path), weakref.ref(weights)]
    held += [weakref.ref(router.weight), weakref.ref(weights.weight)]
    held += [weakref.ref(buffer) for buffer in weights.packed_buffers()]
    del router, path, weights
    gc.collect()
    assert held[0]() is not None
    rt.unregister_router(router_id)
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_warmup(cpu_dense: Router, gpu: Any) -> None:
    warmup_router_compilation(cpu_dense)
    warmup_router_compilation(Router(HASH, table=table_of(), device="cpu"))
    path, _ = cuda_dense()
    cpu_dense.backend = path
    warmup_router_compilation(cpu_dense)
    assert [each.symbol for each in gpu.launches] == [D, P]


def test_warmup_runs_kernels_that_only_logits_or_images_take(
    gpu: Any, build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = build.entry(
        D,
        build.dense(H, E, logits=False),
        model="small",
        variant="quick",
        constants={"HIDDEN": H, "EXPERTS": E, "TOP_K": K},
        numerics=build.numerics,
    )
    timed = {"quick": 2.0, "portable": 3.0}
    gpu.entries = [
        dataclasses.replace(entry, latency=((8, timed[entry.variant]),))
        if entry.kernel == D
        else entry
        for entry in (*build.small(), quick)
    ]
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    weight, bias = weights_of()
    build_on_the_fake_gpu(monkeypatch)
    router = Router(CONFIG, weight=weight, bias=bias, image_bias=bias, device="cpu")
    path = router.backend
    assert isinstance(path, CudaDense)
    plain = {each.entry.key for each in path.token_ranges}
    only_logits = {each.entry.key for each in path.logits_token_ranges} - plain
    assert only_logits
    router.warmup()
    assert len(gpu.launches) == len(path.token_ranges) + len(only_logits) + 1
    assert [bool(each.arguments["image_mask"]) for each in gpu.launches].count(True) == 1


def test_warmup_of_a_registered_router_goes_through_its_op(
    cpu_dense: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's dispatcher remembers an op that was called."""
    called = []
    route = CpuDense.route

    def spied(self: Any, tensor: Tensor) -> Any:
        frames = inspect.stack(context=0)
        called.append(any(frame.function == "plain_dense_router" for frame in frames))
        return route(self, tensor)

    monkeypatch.setattr(CpuDense, "route", spied)
    cpu_dense.warmup()
    router_id = rt.register_router(cpu_dense)
    cpu_dense.warmup()
    rt.unregister_router(router_id)
    assert called == [False, True]


def test_the_first_call_makes_nothing(
    gpu: Any,
    build: SimpleNamespace,
    tmp_path: Path,
    streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workspace of the stream and the argument memory are there from construction on."""
    gpu.entries = build.small(workspace=100)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    path, weights = cuda_dense()
    wanted = spec.dense_router(hidden(3), weights.weight, weights.bias, K, 1.5)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("made by a call")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "LaunchBlock", refused)
        patch.setattr(Workspaces, "_zeros", refused)
        same(path.route(hidden(3)), wanted)
        same(
            path.route(hidden(20)),
            spec.dense_router(hidden(20), weights.weight, weights.bias, K, 1.5),
        )
        # Another thread makes its own.
        with ThreadPoolExecutor(1) as pool, pytest.raises(AssertionError, match="made by a call"):
            pool.submit(path.route, hidden(3)).result()
