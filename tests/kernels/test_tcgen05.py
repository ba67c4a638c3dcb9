"""The tensor-core kernels of sm_100a and sm_103a, without such a device.

Descriptors and fragments are compared with the DSL's own layout algebra; then the kernels' index
arithmetic is walked through, from the weights' packed image to the logits' places, by running its
Python against a model of the hardware (tensor_core.py). What neither can show: that the hardware is
as its manual says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_kernels import plan
from build_kernels.catalog.models import MODELS, Model
from build_kernels.kernels.common.ptx import tcgen05_layout
from build_kernels.kernels.common.ptx.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense import ring
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.exchange import split_k as exchange
from build_kernels.kernels.dense.exchange.split_k import SumsExchange
from build_kernels.kernels.dense.forms import split_k
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES, MMA_K
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.tcgen05 import SwapAbTcgen05Geometry
from build_kernels.kernels.dense.mma import (
    interface,
    tcgen05_split_k,
)
from router_runtime.format.contract import Constants
from tests.kernels.tensor_core import (
    BASE,
    Block,
    Memory,
    exact,
    operand_address,
    to_bf16,
)
from tests.kernels.walk import NO_SCORES, Running, as_python, packed, plain

#: A model of a user, whose geometry is searched: experts that fill no group, few chunks.
OWN = Model("own", 1024, 144, 6, 1.0, 0, 100)

JOBS = {
    f"{job.kernel}-{job.model}-{job.variant}": job.constants
    for job in plan.plan(
        targets=["sm_100a"], models=[model.name for model in MODELS], extra_models=[OWN]
    )
    if job.constants.get("MMA") == "tcgen05"
}


SPLIT = {name: SplitKGeometry.of(c) for name, c in JOBS.items() if c["FORM"] == "split_k"}
SWAP_AB = {name: SwapAbTcgen05Geometry.of(c) for name, c in JOBS.items() if c["FORM"] == "swap_ab"}

#: (experts, tokens) of a stage.
STAGES = {(g.group_experts, g.tokens_tile) for g in SPLIT.values()}
STAGES |= {(g.tile_experts, g.tile_tokens) for g in SWAP_AB.values()}


@pytest.fixture(scope="module")
def algebra(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the DSL says, in a process of its own: it takes its target from the environment."""
    root = Path(__file__).parents[2]
    stages = [f"{experts}x{tokens}" for experts, tokens in STAGES]
    said = subprocess.run(
        [sys.executable, root / "tests/kernels/tcgen05_algebra.py", *stages],
        cwd=tmp_path_factory.mktemp("algebra"),
        env=os.environ | {"CUTE_DSL_ARCH": "sm_100a", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize(("experts", "tokens"), sorted(STAGES))
def test_descriptors_and_fragments_are_those_of_the_dsl(
    experts: int, tokens: int, algebra: dict[str, Any]
) -> None:
    said = algebra[f"{experts}x{tokens}"]
    expected = [
        [
            PACKED_STAGE.descriptor
            + (stage * experts * K_BLOCK * 2 + step * PACKED_STAGE.step_bytes) // 16,
            SWIZZLED_ROWS.descriptor
            + (stage * tokens * K_BLOCK * 2 + step * SWIZZLED_ROWS.step_bytes) // 16,
            tcgen05_layout.instruction_descriptor(tokens),
        ]
        for step in range(K_BLOCK // MMA_K)
        for stage in range(2)
    ]
    assert said["mma"] == expected
    # A row of the accumulator is a lane of tensor memory, in the upper half of an address.
    assert said["accumulator"] == [[lane << 16 | c for c in range(tokens)] for lane in range(128)]
    # The DSL has four warps, each with the first half of its lanes.
    for thread, registers in enumerate(said["load"]):
        warp, lane = divmod(thread, LANES)
        for register, place in enumerate(registers):
            row, column = tcgen05_layout.fragment(lane, register)
            assert place == [tcgen05_layout.first_lane(warp, 0) + row, column]


@pytest.mark.parametrize("g", SWAP_AB.values(), ids=SWAP_AB)
def test_budgets_of_the_swapped_form(g: SwapAbTcgen05Geometry) -> None:
    assert g.tensor_columns in (64, 128, 256, 512)
    assert g.tensor_columns >= 2 * g.row_tiles * g.tile_tokens
    # All CTAs of a multiprocessor get theirs.
    assert 228 * 1024 // (g.shared_bytes + 1024) * g.tensor_columns <= 512
    assert g.shared_bytes <= 227 * 1024
    # Barriers and the address lie behind the ring's barriers and those of the exchange.
    assert g.accumulator_offset >= g.exchange_barrier_offset
    assert g.accumulator_offset % 8 == 0
    assert g.tensor_address_offset == g.accumulator_offset + 32
    assert g.tensor_address_offset + 4 <= g.shared_bytes
    # The warps of a pair of warpgroups hold the rows of 128 experts, all tokens.
    assert g.row_tiles * 128 * g.tile_tokens == g.consumer_threads * 4 * g.n_tiles


@pytest.mark.parametrize("g", SPLIT.values(), ids=SPLIT)
def test_budgets_of_the_split_form(g: SplitKGeometry) -> None:
    columns = g.tensor_columns
    assert columns in (32, 64, 128, 256, 512)
    assert columns >= g.pairs * g.cta_chunks * g.tokens_tile
    assert g.shared_bytes <= 227 * 1024
    # Barriers and the address, 8 bytes each, lie behind everything else.
    places = {g.accumulated_offset + 8 * chunk for chunk in range(g.cta_chunks)}
    places.add(g.tensor_address_offset)
    assert min(places) >= g.barrier_offset + 8 * (2 * g.k_blocks + 1)
    assert max(places) + 8 <= g.shared_bytes
    assert g.barrier_offset % 8 == 0
    # A warp reads 16 of the 128 rows of a pair; together the warps read every sum once.
    assert g.threads == g.group_experts * g.cta_chunks * 2


@pytest.mark.parametrize(("experts", "chunks"), [(128, 1), (256, 1), (384, 1), (128, 2)])
def test_blocks_of_one_multiprocessor_all_get_tensor_memory(experts: int, chunks: int) -> None:
    """Blocks of later launches join as long as shared memory allows; a block that had to wait for
    columns could hold up a cluster that another one waits for."""
    constants = {
        **JOBS["dense_router_decode-dsv4-flash-tcgen05"],
        "EXPERTS": experts,
        "GROUPS": 1,
        "CLUSTER_K": 2,
    }
    served = 0
    for tokens in range(16, 257, 16):
        try:
            g = SplitKGeometry.of({**constants, "HIDDEN": 512 * chunks, "TOKENS_TILE": tokens})
        except ValueError:
            continue
        served += 1
        assert 228 * 1024 // (g.shared_bytes + 1024) * g.tensor_columns <= 512
    assert served


def test_wrong_geometries_are_refused() -> None:
    constants = JOBS["dense_router_decode-dsv4-flash-tcgen05"]
    for wrong, said in (
        ({"TOKENS_TILE": 24}, "multiple of 16"),
        ({"CLUSTER_K": 3}, "divide evenly"),
    ):
        with pytest.raises(ValueError, match=said):
            SplitKGeometry.of({**constants, **wrong})
    constants = JOBS["dense_router_prefill-dsv4-pro-tcgen05"]
    for division in (
        {"TILE_EXPERTS": 192, "TILE_TOKENS": 64},
        {"TILE_TOKENS": 40},
        {"TILE_TOKENS": 272},
    ):
        with pytest.raises(ValueError, match="columns of tensor memory, found"):
            SwapAbTcgen05Geometry.of({**constants, **division})


@pytest.mark.parametrize("columns", [0, 513])
def test_an_allocation_that_does_not_exist_is_refused(columns: int) -> None:
    with pytest.raises(ValueError, match="1 to 512 columns"):
        tcgen05_layout.allocation(columns)


@pytest.mark.parametrize("n", [0, 8, 24, 272])
def test_a_shape_that_does_not_exist_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="16 to 256 columns"):
        tcgen05_layout.instruction_descriptor(n)


def test_loads_cover_every_column_once() -> None:
    for columns in range(8, 257, 8):
        repeats = tcgen05_layout.repeats(columns)
        assert sum(repeats) * 8 == columns
        assert all(r & (r - 1) == 0 and r <= 32 for r in repeats)


def test_swizzled_steps_stay_in_their_rows() -> None:
    """A step's descriptor starts inside the first row: the swizzle still sees the row's bits."""
    for step in range(4):
        descriptor = SWIZZLED_ROWS.descriptor + (4096 + step * SWIZZLED_ROWS.step_bytes) // 16
        for row in range(24):
            for k in range(16):
                chunk = (step * 16 + k) // 8
                assert operand_address(descriptor, row, k) == (
                    4096 + row * 128 + (chunk ^ row % 8) * 16 + k % 8 * 2
                )


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    return as_python(monkeypatch, exchange, interface, ring, split_k, tcgen05_split_k)


@pytest.mark.parametrize(
    ("constants", "tokens"),
    [
        ({**JOBS["dense_router_decode-dsv4-flash-tcgen05"], "HIDDEN": 512, "CLUSTER_K": 2}, 13),
        ({**JOBS["dense_router_decode-dsv4-pro-tcgen05"], "HIDDEN": 1024, "CLUSTER_K": 2}, 33),
        (JOBS["dense_router_decode-own-tcgen05"], 5),
    ],
    ids=["flash", "pro", "own"],
)
def test_every_logit_comes_from_its_own_operands(
    constants: Constants, tokens: int, running: Running
) -> None:
    """From the packed image and the tensor map to the logits' places, through stages, descriptors,
    MMAs, tensor memory, registers, staged rows and the owner's sums.
    """
    g = SplitKGeometry.of(constants)
    generator = np.random.default_rng(7)
    weight, hidden = exact((g.experts, g.hidden), generator), exact((tokens, g.hidden), generator)
    memory = Memory()
    image = memory.add(packed(contract(constants), weight))
    logits = np.full((tokens, g.experts), np.nan, np.float32)
    out = memory.add(logits)
    (box,) = contract(constants).tensor_maps
    for group in range(g.groups):
        for number in range(-(-tokens // g.tokens_tile)):
            for address, value in route(
                g, running, memory, image, out, to_bf16(hidden), box.box[1], group, number
            ).items():
                place = divmod((address - out) // 4, g.experts)
                assert np.isnan(logits[place])
                logits[place] = np.uint32(value).view(np.float32)
    assert np.array_equal(logits, hidden @ weight.T)


def route(
    g: SplitKGeometry,
    running: Running,
    memory: Memory,
    image: int,
    out: int,
    hidden: Any,
    box: int,
    group: int,
    number: int,
) -> dict[int, int]:
    """What one cluster stores to global memory, by address."""
    mma = plain(tcgen05_split_k.SplitKTcgen05)(g)
    sender = plain(SumsExchange)(g, mma)
    kernel = plain(split_k.SplitK)(g, mma, sender, NO_SCORES)
    first_token = number * g.tokens_tile
    tile_tokens = min(len(hidden) - first_token, g.tokens_tile)
    cluster: list[Block] = []
    sums: dict[tuple[int, int], list[np.float32]] = {}
    weight_full = g.barrier_offset
    hidden_full = weight_full + 8 * g.k_blocks
    sums_full = hidden_full + 8 * g.k_blocks
    assert (hidden_full, sums_full) == (g.hidden_barrier_offset, g.sums_barrier_offset)
    for k_rank in range(g.cluster_k):
        block = Block(cluster, memory, hidden, box)
        shared = block.base
        full = [shared + weight_full, shared + hidden_full, shared + sums_full]
        running.as_thread(block, tcgen05_split_k.ALLOCATOR * LANES)
        kernel.init_barriers(*full, k_rank, tile_tokens)
        kernel.load_weight(image, shared, full[0], k_rank, group)
        mma.allocate(shared, tcgen05_split_k.ALLOCATOR)
        kernel.load_hidden(0, shared, full[1], first_token, k_rank)
        for thread in range(g.threads):
            running.as_thread(block, thread)
            sums[k_rank, thread] = mma.multiply(shared, *full[:2], thread // LANES)
            mma.issue = block.nothing
        del mma.issue
        mma.free(shared, tcgen05_split_k.ALLOCATOR)
        assert block.tensor is None
        assert all(
            barrier.phases == 1
            for address, barrier in block.barriers.items()
            if address - BASE != sums_full
        )
    for k_rank, block in enumerate(cluster):
        shared = block.base
        staged = shared + g.staged_offset
        running.as_thread(block, 0)
        for thread in range(g.threads):
            sender.stage(sums[k_rank, thread], staged, *divmod(thread, LANES))
        # As ``send`` does, one row a token.
        for token in range(tile_tokens):
            slot, owner = divmod(token, g.cluster_k)
            target = shared + slot * g.slot_bytes + k_rank * g.sums_bytes
            source = staged + token * g.sums_row_bytes
            counted = shared + sums_full
            if owner == k_rank:
                block.at(target, g.sums_bytes)[:] = block.at(source, g.sums_bytes)
                for _ in range(LANES):
                    block.barrier_arrive(counted)
            else:
                block.copy_bulk_to_peer(
                    block.map_shared(target, owner),
                    source,
                    g.sums_bytes,
                    block.map_shared(counted, owner),
                )
    stored: dict[int, int] = {}
    for k_rank, block in enumerate(cluster):
        shared = block.base
        running.as_thread(block, 0)
        block.barrier_wait(shared + sums_full, 0)
        for thread in range(g.threads):
            before = block.shared.copy()
            kernel.score(
                shared,
                shared + g.bias_offset,
                out,
                sender.owned(tile_tokens, k_rank),
                first_token,
                k_rank,
                group,
                thread,
            )
            block.shared[:] = before  # the scores would take the place of sums
        stored |= block.stored
    return stored
