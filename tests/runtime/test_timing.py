"""The latencies of ``verify --bundle``: what a chain calls, what is stated beside a figure, and
that what cannot be timed is said. The fake driver runs the kernels; the machine here counts, and
its microseconds are invented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real
from torch import Tensor

from router_runtime.device import kernels
from router_runtime.routing.router import ROUTERS, Router, register_router
from router_runtime.verification import timing
from router_runtime.verification.report import timing_table
from router_runtime.verification.timing import Timing, time_models
from tests.runtime.routers import build_on_the_fake_gpu

H, E = 128, 24
PHASES = ("decode", "prefill")
LAYERS = 5
#: Of each call of a Router, and of each product.
ROUTER_US, MM_US = 6.0, 8.0


class Machine:
    """A CPU whose cache is so small that five weights are three times as large."""

    device = torch.device("cpu")
    capability = (9, 0)
    l2_bytes = LAYERS * H * E * 2 // timing.CACHES

    def __init__(self) -> None:
        self.products: list[tuple[int, int]] = []

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        assert rows.dtype == weight.dtype == torch.bfloat16
        self.products.append((rows.data_ptr(), weight.data_ptr()))
        return rows.float() @ weight.float().t()

    def microseconds(self, chain: Callable[[], object]) -> float:
        before = len(self.products)
        chain()
        products = len(self.products) - before
        return products * MM_US if products else LAYERS * ROUTER_US


@pytest.fixture
def folder(
    gpu: Any, build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The small model: decode up to 8 tokens, prefill up to 32, each with figures."""
    figures = {
        "dense_router_decode": ((1, 2.0), (8, 3.0)),
        "dense_router_prefill": ((8, 5.0), (32, 7.0)),
    }
    gpu.entries = [
        dataclasses.replace(entry, latency=figures.get(entry.kernel, ())) for entry in build.small()
    ]
    build_on_the_fake_gpu(monkeypatch)
    path: Path = build.artifacts(tmp_path / "timed", gpu.entries)
    return path


def timed(folder: Path, *tokens: int, machine: Any = None) -> Sequence[Timing]:
    return tuple(time_models(folder, machine or Machine(), tokens))


def test_a_figure_is_that_of_one_call_beside_what_is_stated(folder: Path) -> None:
    decode, prefill = (f"dense_router_{name}/small/sm_90a/portable" for name in PHASES)
    few, many = timed(folder, 5, 20)
    assert few == Timing("small", 5, (decode,), 1, ROUTER_US, MM_US, 3.0)
    assert many == Timing("small", 20, (prefill,), 1, ROUTER_US, MM_US, 7.0)


def test_a_batch_of_several_launches_is_stated_as_their_sum(folder: Path) -> None:
    """32 and 32 tokens, then 6, which the decode kernel serves."""
    (found,) = timed(folder, 70)
    assert found.launches == 3
    assert [key.partition("/")[0] for key in found.entries] == [
        "dense_router_prefill",
        "dense_router_decode",
    ]
    assert found.stated_us == 7.0 + 7.0 + 3.0


def test_no_call_of_a_chain_finds_what_another_read(folder: Path, gpu: Any) -> None:
    """Each has weights of its own, and the hidden states change until they too fill the cache."""
    machine = Machine()
    timed(folder, 1, 24, machine=machine)
    launches = [each for each in gpu.launches if each.symbol.startswith("dense_router")]
    weights = {each.arguments["packed_weight"] for each in launches}
    assert len(weights) == LAYERS
    assert len({weight for _, weight in machine.products}) == LAYERS
    one, more = machine.products[:LAYERS], machine.products[LAYERS:]
    assert len({rows for rows, _ in one}) == LAYERS
    assert len({rows for rows, _ in more}) == LAYERS
    # Two inputs of 100 rows are three times as large as the cache, and take turns.
    machine = Machine()
    timed(folder, 100, machine=machine)
    assert len({rows for rows, _ in machine.products}) == 2


def test_the_routers_of_a_model_are_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph registers those that it captures, as the stand-in does."""
    made: list[int] = []

    class Captured(Router):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(register_router(self))
            ROUTERS.mark_captured(self)

    monkeypatch.setattr(timing, "Router", Captured)
    timed(folder, 1)
    assert len(made) == LAYERS
    assert not ROUTERS.ids() & set(made)


def test_what_nothing_serves_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "status", lambda *_: "unproven")
    first, second = timed(folder, 1, 16)
    assert (first.tokens, second.tokens) == (1, 16)
    for found in (first, second):
        assert found.router_us is None
        assert "verify --record" in str(found.error)


def test_a_failing_device_ends_no_other_line(folder: Path, gpu: Any) -> None:
    gpu.launch_status = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    found = timed(folder, 1, 16)
    assert len(found) == 2
    for each in found:
        assert each.router_us is None
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(each.error)


def test_models_of_other_devices_are_left_out(folder: Path) -> None:
    machine = Machine()
    machine.capability = (10, 0)
    assert not timed(folder, 1, machine=machine)


def test_the_table() -> None:
    lines = list(
        timing_table(
            [
                Timing("small", 5, ("dense_router_decode/small/sm_90a/x",), 1, 6.0, 8.0, 3.0),
                Timing("other", 1, error="nothing serves it\nnext: make"),
            ]
        )
    )
    head, small, other, why = lines[-4:]
    assert head.split()[0:2] == ["served", "by"]
    assert small.split() == (
        ["dense_router_decode/small/sm_90a/x", "5", "1", "6.00", "8.00", "0.75", "3.00", "2.00"]
    )
    assert other.split() == ["other", "1", "0", "-", "-", "-", "-", "-"]
    assert why == "other, 1 tokens: nothing serves it"
