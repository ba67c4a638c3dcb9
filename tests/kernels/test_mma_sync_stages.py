"""The multiplication of stages by ``mma.sync``, run on the CPU: a warp's registers are arrays with
an element for each lane, and ``ldmatrix`` and ``mma`` move them as the PTX ISA says.

Stages are filled as the packed image and the tensor map fill them. Operands are small integers, so
all sums are exact: a wrong address or register gives another number.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.table import geometry_of
from build_kernels.kernels.dense.mma import mma_sync_stages
from build_kernels.kernels.dense.mma.mma_sync_stages import SwapAbMmaSync, TileMmaSync
from build_kernels.kernels.dense.ring import Ring
from router_runtime.format.contract import Constants
from tests.kernels.tensor_core import bf16
from tests.kernels.walk import packed

Lanes = npt.NDArray[Any]

SHAPE = {"HIDDEN": 256, "EXPERTS": 176, "TOP_K": 6}
SWAP_AB: Constants = {
    **CONSTANTS,
    **SHAPE,
    "FORM": "swap_ab",
    "MMA": "mma_sync",
    "TILE_EXPERTS": 192,
    "TILE_TOKENS": 72,
    "CLUSTER_T": 1,
    "SPLIT_K": 1,
}
TILE: Constants = {
    **CONSTANTS,
    **SHAPE,
    "FORM": "tile",
    "MMA": "mma_sync",
    "CLUSTER_E": 2,
    "CLUSTER_T": 1,
    "PASSES": 1,
}


class Warp:
    """The instructions of one warp on shared memory of 16-bit words, from address 0 on."""

    def __init__(self, shared: npt.NDArray[np.uint16]) -> None:
        self.shared = shared

    def ldmatrix_x4(self, address: Lanes) -> list[Lanes]:
        """Return registers of two elements per lane: row l / 4, from element 2 (l % 4) on."""
        assert address.shape == (LANES,)
        assert not (address % 16).any()
        # Eight rows that one access reads lie in different banks.
        assert all(len(set(rows % 128)) == 8 for rows in address.reshape(4, 8))
        rows = self.shared[address[:, None] // 2 + np.arange(8)]
        return [matrix.reshape(LANES, 2) for matrix in rows.reshape(4, 8, 4, 2)]

    def mma_m16n8k16(
        self, before: Sequence[Any], a: Sequence[Lanes], b: Sequence[Lanes]
    ) -> list[Lanes]:
        top = np.concatenate([whole(a[0]), whole(a[2])], axis=1)
        bottom = np.concatenate([whole(a[1]), whole(a[3])], axis=1)
        columns = np.concatenate([whole(b[0]), whole(b[1])], axis=1)
        product = np.concatenate([top, bottom]) @ columns.T
        lane = np.arange(LANES)
        places = [(lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2) for i in range(4)]
        return [value + product[place] for value, place in zip(before, places, strict=True)]


def whole(register: Lanes) -> Lanes:
    """An 8 x 8 matrix from the registers that hold it."""
    return bf16(register).reshape(8, 8)


@pytest.fixture
def numbers() -> np.random.Generator:
    return np.random.default_rng(5)


def on_cpu(monkeypatch: pytest.MonkeyPatch, shared: npt.NDArray[np.uint16]) -> None:
    warp = Warp(shared)
    arith = types.SimpleNamespace(
        quotient=lambda a, b: a // b,
        remainder=lambda a, b: a % b,
    )
    lanes = types.SimpleNamespace(lane_idx=lambda: np.arange(LANES))
    cute = types.SimpleNamespace(arch=lanes, make_rmem_tensor=lambda size, kind: [None] * size)
    replaced = {"mma_sync": warp, "arith": arith, "cute": cute, "Float32": lambda value: value}
    for name, value in replaced.items():
        monkeypatch.setattr(mma_sync_stages, name, value)


def operands(
    numbers: np.random.Generator, tokens: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    weight = numbers.integers(-4, 5, (SHAPE["EXPERTS"], SHAPE["HIDDEN"])).astype(np.float32)
    hidden = numbers.integers(-4, 5, (tokens, SHAPE["HIDDEN"])).astype(np.float32)
    return weight, hidden


def swizzled(hidden: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.uint16]:
    """Words of one block of 64 elements, as the tensor map stores rows of 128 bytes."""
    rows = words(hidden[:, block * K_BLOCK : (block + 1) * K_BLOCK]).reshape(len(hidden), 8, 8)
    stored = np.empty_like(rows)
    for row in range(len(rows)):
        for chunk in range(8):
            stored[row, chunk ^ row % 8] = rows[row, chunk]
    return stored.ravel()


def words(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of floats that bf16 represents exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def stage_words(constants: Constants, weight: Any, block: int, experts: slice) -> Any:
    image = packed(contract(constants), weight)
    return (
        np.ascontiguousarray(image[block])
        .reshape(-1, 8 * K_BLOCK)[experts.start // 8 : experts.stop // 8]
        .ravel()
    )


def test_swap_ab(monkeypatch: pytest.MonkeyPatch, numbers: np.random.Generator) -> None:
    """Every warp's sums of two stages, of which the second goes on where the first ended."""
    g: Any = geometry_of(SWAP_AB)
    weight, hidden = operands(numbers, g.tile_tokens)
    shared = np.zeros(g.stages * g.stage_bytes // 2, np.uint16)
    for stage, block in ((1, 0), (2, 1)):
        first = stage * g.stage_bytes // 2
        found = stage_words(SWAP_AB, weight, block, slice(0, g.tile_experts))
        shared[first : first + len(found)] = found
        rows = swizzled(hidden, block)
        first += g.weight_stage_bytes // 2
        shared[first : first + len(rows)] = rows
    on_cpu(monkeypatch, shared)
    padded = np.zeros((g.tile_experts, SHAPE["HIDDEN"]), np.float32)
    padded[: len(weight)] = weight
    exact = padded[:, : 2 * K_BLOCK] @ hidden[:, : 2 * K_BLOCK].T
    lane = np.arange(LANES)
    for warp in range(g.consumer_warps):
        mma: Any = SwapAbMmaSync(g).stages(0, warp)
        mma.multiply(1, starts=True)
        mma.multiply(2, starts=False)
        for n_tile in range(g.n_tiles):
            for i, sums in enumerate(mma.n_tile(n_tile)):
                expert = warp * 16 + lane // 4 + 8 * (i // 2)
                token = n_tile * 8 + lane % 4 * 2 + i % 2
                assert (sums == exact[expert, token]).all()


def test_tile(monkeypatch: pytest.MonkeyPatch, numbers: np.random.Generator) -> None:
    """Every warp's sums, with the experts of the second e rank."""
    g: Any = geometry_of(TILE)
    weight, hidden = operands(numbers, g.tokens_tile)
    shared = np.zeros(g.shared_bytes // 2, np.uint16)
    mine = slice(g.cta_experts, 2 * g.cta_experts)
    for hidden_stage, weight_stage, block in ((0, 1, 0), (1, 0, 1)):
        rows = swizzled(hidden, block)
        first = hidden_stage * g.hidden_stage_bytes // 2
        shared[first : first + len(rows)] = rows
        found = stage_words(TILE, weight, block, mine)
        first = (g.weight_offset + weight_stage * g.weight_stage_bytes) // 2
        shared[first : first + len(found)] = found
    on_cpu(monkeypatch, shared)
    padded = np.zeros((g.padded_experts, SHAPE["HIDDEN"]), np.float32)
    padded[: len(weight)] = weight
    exact = hidden[:, : 2 * K_BLOCK] @ padded[mine, : 2 * K_BLOCK].T
    lane = np.arange(LANES)
    hidden_ring = Ring.of(0, 0, g.hidden_stage_bytes, g.hidden_stages, 0)
    weight_ring = Ring.of(0, g.weight_offset, g.weight_stage_bytes, g.weight_stages, 0)
    for warp in range(g.consumer_warps):
        mma = TileMmaSync(g).stages(hidden_ring, weight_ring, warp * LANES + lane)
        sums: Any = mma.accumulator()
        mma.multiply(sums, 0, 1, starts=True)
        mma.multiply(sums, 1, 0, starts=False)
        for i, found in enumerate(sums):
            token = warp * 16 + lane // 4 + 8 * (i % 4 // 2)
            expert = i // 4 * 8 + lane % 4 * 2 + i % 2
            assert (found == exact[token, expert]).all()
