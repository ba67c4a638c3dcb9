"""The swap-A/B form's multiplication, run on the CPU: rings that CTAs fill for each other, slices
divided among k ranks, sums that cross the cluster and are added in order.

Every thread of a cluster is a Python thread, so whatever the protocol allows to happen early or
late does. Sums are exact within a chunk and are not between chunks: another order has other bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from build_kernels.catalog.models import Model
from build_kernels.kernels.common.numerics import CONSTANTS, SLICES
from build_kernels.kernels.dense import ring, share
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.exchange import swap_ab as exchange
from build_kernels.kernels.dense.exchange.swap_ab import SliceExchange
from build_kernels.kernels.dense.forms import swap_ab
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.swap_ab import N_TILE, SwapAbGeometry
from build_kernels.kernels.dense.geometry.tcgen05 import SwapAbTcgen05Geometry
from build_kernels.kernels.dense.mma import (
    swap_ab_registers,
    tcgen05_accumulators,
    tcgen05_swap_ab,
)
from build_kernels.kernels.dense.mma.swap_ab_registers import SwapAbInRegisters
from build_kernels.kernels.dense.ring import Ring
from router_runtime.format.contract import Contract
from tests.kernels.summation import chunk_sums, tree, uneven
from tests.kernels.tensor_core import (
    BASE,
    WINDOW,
    Block,
    Memory,
    Sums,
    bf16,
    exact,
    to_bf16,
    together,
)
from tests.kernels.walk import (
    NO_SCORES,
    Running,
    as_python,
    packed,
    packed_place,
    plain,
    swizzled_place,
)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    proxy = as_python(
        monkeypatch,
        *(swap_ab, exchange, ring, share),
        *(swap_ab_registers, tcgen05_swap_ab, tcgen05_accumulators),
    )
    monkeypatch.setattr(swap_ab, "SliceExchange", plain(SliceExchange))
    for module, kind in (
        (swap_ab_registers, swap_ab_registers.BoundInRegisters),
        (tcgen05_swap_ab, tcgen05_swap_ab.BoundTcgen05),
    ):
        monkeypatch.setattr(module, kind.__name__, plain(kind))
    written = tcgen05_accumulators.allocate.__wrapped__
    monkeypatch.setattr(tcgen05_accumulators, "allocate", written)
    return proxy


class ModelStages:
    """The stages of a SwapAbWgmma for the thread that runs: its sums, from operands in shared
    memory. The lanes of a warp synchronise where they wait for their MMAs."""

    def __init__(self, running: Running, g: SwapAbGeometry, shared: int, warp: int) -> None:
        self.running, self.g, self.shared = running, g, shared
        lane = running.here.thread % LANES
        self.experts = np.array([warp * 16 + lane // 4 + 8 * (i // 2) for i in range(4)])
        self.tokens = np.array([lane % 4 * 2 + i % 2 for i in range(4)])
        self.partial = np.full((g.n_tiles, 4), np.nan, np.float32)

    def multiply(self, stage: int, starts: bool) -> None:
        g = self.g
        k = np.arange(K_BLOCK)
        first = self.shared % WINDOW + stage * g.stage_bytes - BASE
        words = self.running.shared.view(np.uint16)
        weight = bf16(words[(first + packed_place(self.experts[:, None], k)) // 2])
        for n_tile in range(g.n_tiles):
            token = n_tile * N_TILE + self.tokens[:, None]
            places = first + g.weight_stage_bytes + swizzled_place(token, k)
            product = (weight * bf16(words[places // 2])).sum(axis=1)
            self.partial[n_tile] = product if starts else self.partial[n_tile] + product

    def wait(self, pending: int) -> None:
        self.running.sync_warp()

    def zero_behind_reads(self) -> int:
        return 0

    def n_tile(self, n_tile: int) -> list[np.float32]:
        return list(self.partial[n_tile])


def in_registers(running: Running, g: SwapAbGeometry, all_lanes: bool) -> Any:
    """An MMA object with sums in registers, whose multiplication is the model's."""

    class InRegisters(SwapAbInRegisters):
        all_lanes_release = all_lanes

        def stages(self, shared: Any, warp: Any) -> Any:
            return ModelStages(running, g, shared, warp)

    return InRegisters(g)


MODEL = Model("small", 0, 0, 6, 1.0, 0, 100)


@pytest.mark.parametrize(
    "division",
    [
        {"HIDDEN": 512, "TILE_TOKENS": 8, "CLUSTER_T": 1, "SPLIT_K": 1},
        {"HIDDEN": 1280, "TILE_TOKENS": 16, "CLUSTER_T": 2, "SPLIT_K": 1},
        {"HIDDEN": 3072, "TILE_TOKENS": 24, "CLUSTER_T": 1, "SPLIT_K": 2},
        {"HIDDEN": 2048, "TILE_TOKENS": 16, "CLUSTER_T": 2, "SPLIT_K": 2},
        {"HIDDEN": 2048, "TILE_TOKENS": 32, "CLUSTER_T": 1, "SPLIT_K": 4},
        {"EXPERTS": 128, "HIDDEN": 1024, "TILE_TOKENS": 16, "CLUSTER_T": 1, "SPLIT_K": 2},
    ],
    ids=[
        "one block",
        "two tiles",
        "two shares",
        "two tiles and shares",
        "four shares",
        "two parts and shares",
    ],
)
@pytest.mark.parametrize(("stages", "buffers"), [(2, 1), (5, 1), (3, 2)])
def test_every_logit_is_the_sum_in_order(
    division: dict[str, int],
    stages: int,
    buffers: int,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g, image = made(SwapAbGeometry, {"TILE_EXPERTS": 64, **division}, stages, buffers, monkeypatch)
    check(g, image, running, in_registers(running, g, all_lanes=False))


#: Divisions whose slices differ or whose last chunk is short, with (stages, buffers) of each.
UNEVEN = {
    "one short chunk": ({"HIDDEN": 192, "TILE_TOKENS": 8}, (2, 1)),
    "a short fourth chunk": ({"HIDDEN": 896, "TILE_TOKENS": 8}, (3, 1)),
    "slices of one and two": ({"HIDDEN": 1536, "TILE_TOKENS": 16, "CLUSTER_T": 2}, (3, 1)),
    "slices of two and three": ({"HIDDEN": 2688, "TILE_TOKENS": 8}, (2, 1)),
    "the shorter slice in turn": ({"HIDDEN": 1536, "TILE_TOKENS": 16, "SPLIT_K": 2}, (2, 1)),
    "in turn, the last one short": ({"HIDDEN": 1344, "TILE_TOKENS": 16, "SPLIT_K": 2}, (3, 2)),
    "shares of three and four": (
        {"HIDDEN": 1728, "TILE_TOKENS": 16, "CLUSTER_T": 2, "SPLIT_K": 2},
        (3, 1),
    ),
    "shares of five and six": ({"HIDDEN": 2688, "TILE_TOKENS": 24, "SPLIT_K": 2}, (5, 2)),
    "even but for the last": ({"HIDDEN": 1984, "TILE_TOKENS": 16, "SPLIT_K": 2}, (2, 1)),
    "more stages than blocks": ({"HIDDEN": 1216, "TILE_TOKENS": 16, "SPLIT_K": 2}, (10, 2)),
    "four shares, the last short": ({"HIDDEN": 1920, "TILE_TOKENS": 32, "SPLIT_K": 4}, (3, 1)),
    "four shares of one and two": ({"HIDDEN": 1536, "TILE_TOKENS": 32, "SPLIT_K": 4}, (5, 1)),
    "parts and shares": (
        {"EXPERTS": 128, "HIDDEN": 1472, "TILE_TOKENS": 16, "SPLIT_K": 2},
        (3, 2),
    ),
}


@pytest.mark.parametrize(("division", "ring"), UNEVEN.values(), ids=UNEVEN)
def test_slices_may_differ_and_the_last_chunk_be_short(
    division: dict[str, int],
    ring: tuple[int, int],
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = {"TILE_EXPERTS": 64, "CLUSTER_T": 1, "SPLIT_K": 1}
    g, image = made(SwapAbGeometry, {**common, **division}, *ring, monkeypatch)
    assert g.last_k_blocks or not g.even
    check(g, image, running, in_registers(running, g, all_lanes=False))


@pytest.mark.parametrize(("hidden", "tiles"), [(1024, 1), (1344, 1), (1280, 2)])
def test_every_lane_may_release_the_weights(
    hidden: int, tiles: int, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``mma.sync`` does."""
    division = {"EXPERTS": 128, "HIDDEN": hidden, "TILE_TOKENS": 16, "SPLIT_K": 2}
    division["CLUSTER_T"] = tiles
    g, image = made(SwapAbGeometry, {"TILE_EXPERTS": 64, **division}, 3, 1, monkeypatch)
    check(g, image, running, in_registers(running, g, all_lanes=True))


@pytest.mark.parametrize(
    ("division", "stages", "buffers"),
    [
        ({"HIDDEN": 768, "TILE_TOKENS": 16, "CLUSTER_T": 1, "SPLIT_K": 1}, 3, 1),
        ({"HIDDEN": 1280, "TILE_TOKENS": 48, "CLUSTER_T": 2, "SPLIT_K": 1}, 2, 1),
        ({"HIDDEN": 2048, "TILE_TOKENS": 16, "CLUSTER_T": 1, "SPLIT_K": 2}, 3, 2),
        ({"EXPERTS": 256, "HIDDEN": 1024, "TILE_TOKENS": 32, "CLUSTER_T": 1, "SPLIT_K": 2}, 5, 1),
        ({"EXPERTS": 200, "TILE_EXPERTS": 256, "HIDDEN": 512, "TILE_TOKENS": 16}, 3, 1),
        ({"HIDDEN": 1344, "TILE_TOKENS": 16, "SPLIT_K": 2}, 3, 1),
        ({"HIDDEN": 1728, "TILE_TOKENS": 16, "CLUSTER_T": 2, "SPLIT_K": 2}, 3, 2),
        ({"HIDDEN": 1152, "TILE_TOKENS": 32, "SPLIT_K": 4}, 5, 1),
        ({"HIDDEN": 2240, "TILE_TOKENS": 16}, 4, 1),
        ({"HIDDEN": 128, "TILE_TOKENS": 16}, 2, 1),
    ],
    ids=[
        "one block",
        "two tiles",
        "two shares",
        "two parts and shares",
        "two rows of experts",
        "the shorter slice in turn",
        "shares of three and four",
        "one chunk in a share",
        "slices of two and three",
        "one short chunk",
    ],
)
def test_with_tensor_memory(
    division: dict[str, int],
    stages: int,
    buffers: int,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sums, when one warp issues all MMAs into accumulators that take turns."""
    common = {"EXPERTS": 128, "TILE_EXPERTS": 128, "CLUSTER_T": 1, "SPLIT_K": 1, "MMA": "tcgen05"}
    g, image = made(SwapAbTcgen05Geometry, {**common, **division}, stages, buffers, monkeypatch)
    check(g, image, running, plain(tcgen05_swap_ab.SwapAbTcgen05)(g))


Geometry = TypeVar("Geometry", bound=SwapAbGeometry)


def made(
    kind: type[Geometry],
    division: dict[str, Any],
    stages: int,
    buffers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Geometry, Contract]:
    """A geometry with that many stages, which can be fewer than fit, and its contract."""
    constants = {**CONSTANTS, **MODEL.constants(), "EXPERTS": 64}
    constants |= {"FORM": "swap_ab", "MMA": "wgmma", **division}
    monkeypatch.setattr(SwapAbGeometry, "stages", stages)
    monkeypatch.setattr(SwapAbGeometry, "buffers", min(buffers, SLICES // constants["SPLIT_K"]))
    monkeypatch.setattr(SwapAbGeometry, "epilogue_bytes", 0)
    return kind.of(constants), contract(constants)


def check(g: SwapAbGeometry, image: Contract, running: Running, mma: Any) -> None:
    """Raise AssertionError unless all logits are the sums of their products in the order."""
    generator = np.random.default_rng(9)
    tokens = g.tile_tokens * g.cluster_t - 3
    weight, hidden = exact((g.experts, g.hidden), generator), exact((tokens, g.hidden), generator)
    hidden = uneven(hidden, g.k_chunk, generator)
    found = walk(g, running, mma, packed(image, weight), hidden)
    expected = tree(weight, hidden, g.k_chunk)
    assert np.array_equal(found[:tokens, : g.experts], expected)
    if g.hidden >= 8 * g.k_chunk:
        one_by_one = functools.reduce(np.add, chunk_sums(weight, hidden, g.k_chunk))
        assert not np.array_equal(expected, one_by_one)


def walk(g: SwapAbGeometry, running: Running, mma: Any, image: Sums, hidden: Sums) -> Sums:
    """The logits [tokens, experts] that the threads of one cluster hold in the end."""
    memory = Memory()
    address = memory.add(image)
    kernel = plain(swap_ab.SwapAb)(g, mma, NO_SCORES)
    cluster: list[Block] = []
    found = np.full((g.tile_tokens * g.cluster_t, g.padded_experts), np.nan, np.float32)

    def rings_of(block: Block) -> tuple[Ring, Ring]:
        full = block.base + g.barrier_offset
        hidden = Ring.of(block.base, g.weight_stage_bytes, g.stage_bytes, g.stages, full)
        weight_empty = hidden.empty + 8 * g.stages
        assert weight_empty + 8 * g.stages == block.base + g.exchange_barrier_offset
        return hidden, Ring(block.base, 0, g.stage_bytes, g.stages, full, weight_empty)

    def tasks(block: Block) -> list[Callable[[], None]]:
        t_rank, x = divmod(block.rank, g.cluster_x)
        k_rank, e_rank = divmod(x, g.cluster_e)
        cta = Cta(e_rank, k_rank, t_rank)
        rings = rings_of(block)

        def load_hidden() -> None:
            running.as_thread(block, g.consumer_threads)
            kernel.load_hidden(0, rings[0], t_rank * g.tile_tokens, cta)

        def load_weight() -> None:
            running.as_thread(block, g.consumer_threads + LANES)
            kernel.load_weight(address + e_rank * g.weight_stage_bytes, rings[1], cta)

        def issue() -> None:
            issuer = g.consumer_warps + 2
            running.as_thread(block, issuer * LANES)
            mma.issue(block.base, *rings, cta, issuer)

        def multiply(thread: int) -> None:
            running.as_thread(block, thread)
            warp, lane = divmod(thread, LANES)
            totals = kernel.multiply(block.base, *rings, cta, warp, lane, thread)
            for number in range(4 * g.n_tile_count(k_rank)):
                n_tile, i = g.first_n_tile(k_rank) + number // 4, number % 4
                row = t_rank * g.tile_tokens + n_tile * N_TILE + lane % 4 * 2 + i % 2
                expert = e_rank * g.tile_experts + mma.first_row(warp) + lane // 4 + 8 * (i // 2)
                assert np.isnan(found[row, expert])
                found[row, expert] = totals[number]

        multiplying = [functools.partial(multiply, thread) for thread in range(g.consumer_threads)]
        return [load_hidden, load_weight, issue, *multiplying]

    for _ in range(g.cluster):
        block = Block(cluster, memory, to_bf16(hidden), g.tile_tokens)
        block.side_by_side(g.consumer_threads)
        running.as_thread(block, (g.consumer_warps + 2) * LANES)
        # As the kernel begins.
        hidden_ring, weight_ring = rings_of(block)
        for stage in range(g.stages):
            block.barrier_init(hidden_ring.full_at(stage), 1)
            block.barrier_init(hidden_ring.empty_at(stage), mma.hidden_releases * g.cluster_e)
            block.barrier_init(weight_ring.empty_at(stage), mma.weight_releases * g.cluster_t)
            if stage < g.share_k_blocks[block.rank % g.cluster_x // g.cluster_e]:
                block.barrier_arrive_expect_tx(hidden_ring.full_at(stage), g.stage_bytes)
        exchanges = g.buffers * g.consumer_warps if g.split_k > 1 else 0
        first = block.base + g.exchange_barrier_offset
        for number in range(exchanges):
            block.barrier_init(first + 8 * number, 1)
            block.barrier_init(first + 8 * (exchanges + number), g.split_k - 1)
        mma.allocate(block.base, g.consumer_warps + 2)

    together(cluster, [task for block in cluster for task in tasks(block)])
    for block in cluster:
        assert all(barrier.bytes == 0 for barrier in block.barriers.values())
        assert block.tensor is None
    return found
