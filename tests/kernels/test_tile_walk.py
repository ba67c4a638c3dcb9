"""The tile form's multiplication with sums in registers, run on the CPU: rings that CTAs fill for
each other, passes over a chunk, slices whose totals wait in shared memory, a short last chunk.

Every thread of a cluster is a Python thread, as in test_swap_ab_walk.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from build_kernels.catalog.models import Model
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense import ring
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.forms import tile
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.mma import tile_registers
from build_kernels.kernels.dense.ring import Ring
from tests.kernels.summation import chunk_sums, tree, uneven
from tests.kernels.tensor_core import BASE, Block, Memory, Sums, bf16, exact, to_bf16, together
from tests.kernels.walk import (
    NO_SCORES,
    Running,
    as_python,
    packed,
    packed_place,
    plain,
    swizzled_place,
)


class Registers(list[Any]):
    """A thread's registers, with the methods of a DSL tensor."""

    def load(self) -> Sums:
        return np.array(self, np.float32)

    def store(self, values: Sums) -> None:
        self[:] = values

    def fill(self, value: float) -> None:
        self[:] = [np.float32(value)] * len(self)


class ModelStages:
    """A TileStages for the thread that runs: two tokens x the experts of a pass, from operands in
    shared memory. The lanes of a warp synchronise where they wait for their MMAs."""

    def __init__(self, running: Running, g: TileGeometry, hidden: Ring, weight: Ring) -> None:
        self.running, self.g, self.hidden, self.weight = running, g, hidden, weight
        warp, lane = divmod(running.here.thread, LANES)
        register = np.arange(g.mma_n // 2)
        self.rows = warp * 16 + lane // 4 + register // 2 % 2 * 8
        self.columns = register // 4 * 8 + lane % 4 * 2 + register % 2

    def accumulator(self) -> Registers:
        return Registers([np.float32(np.nan)] * (self.g.mma_n // 2))

    def multiply(self, accumulator: Registers, a_stage: int, b_stage: int, starts: bool) -> None:
        k = np.arange(K_BLOCK)
        words = self.running.shared.view(np.uint16)
        places = self.hidden.data_at(a_stage) - BASE + swizzled_place(self.rows[:, None], k)
        hidden = bf16(words[places // 2])
        places = self.weight.data_at(b_stage) - BASE + packed_place(self.columns[:, None], k)
        product = (hidden * bf16(words[places // 2])).sum(axis=1)
        accumulator.store(product if starts else accumulator.load() + product)

    def wait(self, pending: int) -> None:
        self.running.sync_warp()

    def zero_behind_reads(self, accumulator: Any) -> int:
        return 0


MODEL = Model("small", 0, 0, 6, 1.0, 0, 100)


@pytest.mark.parametrize(
    ("division", "parked"),
    [
        ({"HIDDEN": 1600, "EXPERTS": 40, "CLUSTER_E": 1, "CLUSTER_T": 1, "PASSES": 1}, 20),
        ({"HIDDEN": 2304, "EXPERTS": 64, "CLUSTER_E": 2, "CLUSTER_T": 1, "PASSES": 1}, 12),
        ({"HIDDEN": 2048, "EXPERTS": 32, "CLUSTER_E": 1, "CLUSTER_T": 2, "PASSES": 2}, 8),
        ({"HIDDEN": 320, "EXPERTS": 32, "CLUSTER_E": 1, "CLUSTER_T": 1, "PASSES": 2}, 8),
        ({"HIDDEN": 192, "EXPERTS": 16, "CLUSTER_E": 1, "CLUSTER_T": 1, "PASSES": 1}, 0),
    ],
    ids=[
        "a short last chunk",
        "two parts, some kept",
        "two tiles and passes",
        "passes over a short chunk",
        "one short chunk",
    ],
)
def test_every_logit_is_the_sum_in_order(
    division: dict[str, int], parked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = as_python(monkeypatch, tile, tile_registers, ring)
    constants = {**CONSTANTS, **MODEL.constants(), "FORM": "tile", "MMA": "wgmma", **division}
    monkeypatch.setattr(TileGeometry, "parked_sums", parked)
    monkeypatch.setattr(TileGeometry, "weight_stages", 4)
    monkeypatch.setattr(TileGeometry, "hidden_stages", 4)
    g = TileGeometry.of(constants)
    assert parked <= g.sums
    generator = np.random.default_rng(10)
    tokens = g.tokens_tile * g.cluster_t - 5
    weight, hidden = exact((g.experts, g.hidden), generator), exact((tokens, g.hidden), generator)
    hidden = uneven(hidden, g.k_chunk, generator)
    found = walk(g, running, packed(contract(constants), weight), hidden)
    expected = tree(weight, hidden, g.k_chunk)
    assert np.array_equal(found[:tokens, : g.experts], expected)
    if g.chunks >= 8:
        one_by_one = functools.reduce(np.add, chunk_sums(weight, hidden, g.k_chunk))
        assert not np.array_equal(expected, one_by_one)


def walk(g: TileGeometry, running: Running, image: Sums, hidden: Sums) -> Sums:
    """The logits [tokens, experts] that the threads of one cluster hold in the end."""

    class ModelTile(tile_registers.TileInRegisters):
        def stages(self, hidden: Ring, weight: Ring, thread: Any) -> Any:
            return ModelStages(running, g, hidden, weight)

    memory = Memory()
    address = memory.add(image)
    mma = plain(ModelTile)(g)
    kernel = plain(tile.Tile)(g, mma, NO_SCORES)
    cluster: list[Block] = []
    found = np.full((g.tokens_tile * g.cluster_t, g.padded_experts), np.nan, np.float32)
    full, weight_full = BASE + g.barrier_offset, BASE + g.weight_barrier_offset
    hidden_ring = Ring.of(BASE, 0, g.hidden_stage_bytes, g.hidden_stages, full)
    weight_ring = Ring.of(BASE, g.weight_offset, g.weight_stage_bytes, g.weight_stages, weight_full)

    def tasks(block: Block) -> list[Callable[[], None]]:
        t_rank, e_rank = divmod(block.rank, g.cluster_e)

        def load_hidden() -> None:
            running.as_thread(block, g.consumer_threads)
            kernel.load_hidden(0, hidden_ring, t_rank * g.tokens_tile, e_rank, t_rank)

        def load_weight() -> None:
            running.as_thread(block, g.consumer_threads + LANES)
            kernel.load_weight(address, weight_ring, e_rank, t_rank)

        def multiply(thread: int) -> None:
            running.as_thread(block, thread)
            sums = mma.multiply(BASE, hidden_ring, weight_ring, e_rank, t_rank, thread)
            stages = ModelStages(running, g, hidden_ring, weight_ring)
            for number, registers in enumerate(sums):
                rows = t_rank * g.tokens_tile + stages.rows
                columns = e_rank * g.cta_experts + number * g.mma_n + stages.columns
                assert np.isnan(found[rows, columns]).all()
                found[rows, columns] = registers

        multiplying = [functools.partial(multiply, thread) for thread in range(g.consumer_threads)]
        return [load_hidden, load_weight, *multiplying]

    for _ in range(g.cluster):
        block = Block(cluster, memory, to_bf16(hidden), g.owned_tokens)
        block.side_by_side(g.consumer_threads)
        for stage in range(g.hidden_stages):
            block.barrier_init(full + 8 * stage, 1)
            block.barrier_init(hidden_ring.empty_at(stage), mma.releases * g.cluster_e)
        for stage in range(g.weight_stages):
            block.barrier_init(weight_full + 8 * stage, 1)
            block.barrier_init(weight_ring.empty_at(stage), mma.weight_releases)

    together(cluster, [task for block in cluster for task in tasks(block)])
    for block in cluster:
        assert all(barrier.bytes == 0 for barrier in block.barriers.values())
    return found
