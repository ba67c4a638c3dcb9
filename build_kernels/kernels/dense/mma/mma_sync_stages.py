"""Multiplication by ``mma.sync`` of stages in shared memory, for swap_ab and tile.

It has no instruction of one architecture alone. The stages are those that ``wgmma`` reads: packed
weights in 8 x 8 core matrices without a swizzle, and rows of hidden states swizzled as the tensor
map leaves them. A warp loads fragments with ``ldmatrix``, whose eight addresses of a matrix fall
into different banks in both layouts, and keeps its sums in registers, in the same places as
``wgmma`` would: so exchange and epilogue are the same.

A lane loads for the others, too, so ``wait`` lets the warp meet before a stage is released. The
MMAs need no wait of their own, but the release has to be behind them: ``zero_behind_reads``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mma_sync, warp_ops
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES, MMA_K
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.mma.swap_ab_registers import SwapAbInRegisters
from build_kernels.kernels.dense.mma.tile_registers import TileInRegisters
from build_kernels.kernels.dense.ring import Ring

#: Rows of an A operand, columns of a B operand.
MMA_ROWS = 16
MMA_COLUMNS = 8

#: k16 steps of a stage, and steps whose fragments of B one ``ldmatrix`` loads.
STEPS = K_BLOCK // MMA_K
LOADED_STEPS = 2

#: Tiles of 8 columns whose fragments are in registers at a time, beside sums and totals.
GROUP = 4

#: Bytes of a core matrix, of 8 packed experts of a stage, and of 8 swizzled rows of a stage.
_CORE_BYTES = 8 * 8 * 2
_PACKED_BYTES = K_BLOCK // 8 * _CORE_BYTES
_ROWS_BYTES = 8 * K_BLOCK * 2


# --- where a lane's row of each fragment lies, in bytes from the start of a stage's operand -------


def packed_a(lane: Any, step: int) -> Any:
    """Return where a lane's row of the A fragment of 16 packed experts lies, in k16 step ``step``.

    The four matrices: experts 0 to 7 and 8 to 15 of the step's first 8 elements, then of the other.
    """
    return (
        (lane >> 3 & 1) * _PACKED_BYTES
        + (lane >> 4) * _CORE_BYTES
        + (lane & 7) * 16
        + 2 * step * _CORE_BYTES
    )


def packed_b(lane: Any, step: int) -> Any:
    """Return where a lane's row of the B fragments of 8 packed experts lies, in ``step`` and the
    step after it: the four matrices follow each other along the hidden dimension.
    """
    return lane * 16 + 2 * step * _CORE_BYTES


def swizzled_a(lane: Any, step: int) -> Any:
    """Return where a lane's row of the A fragment of 16 swizzled rows lies, in ``step``.

    The order of the four matrices is that of ``packed_a``.
    """
    row = (lane & 7) * (K_BLOCK * 2) + (lane >> 3 & 1) * _ROWS_BYTES
    return row + (((lane >> 4) + 2 * step) ^ (lane & 7)) * 16


def swizzled_b(lane: Any, step: int) -> Any:
    """Return where a lane's row of the B fragments of 8 swizzled rows lies, in ``step`` and the
    step after it.
    """
    return (lane & 7) * (K_BLOCK * 2) + (((lane >> 3) + 2 * step) ^ (lane & 7)) * 16


# --- one stage ------------------------------------------------------------------------------------


def multiply_stage(
    sums: Any,
    load_a: Callable[[int], list[Int32]],
    load_b: Callable[[int, int], list[Int32]],
    columns: int,
    starts: bool,
) -> None:
    """Add the products of one stage to a warp's sums, k ascending; ``starts`` them from zero.

    Args:
        sums: Registers, four for each of the ``columns`` tiles of 8 columns.
        load_a: Returns the A fragment of a step.
        load_b: Returns the B fragments of a tile of columns in a step and the one after it.
        columns: Tiles of 8 columns. Each MMA needs the sums of the one before it in its tile, so
            the tiles of a group take turns.
        starts: Whether the sums before are zero, and not those in the registers.

    """
    for first_step in range(0, STEPS, LOADED_STEPS):
        a = [load_a(first_step + i) for i in range(LOADED_STEPS)]
        for first in range(0, columns, GROUP):
            tiles = range(first, min(first + GROUP, columns))
            b = [load_b(tile, first_step) for tile in tiles]
            for i in range(LOADED_STEPS):
                for tile, fragments in zip(tiles, b, strict=True):
                    own = range(4 * tile, 4 * tile + 4)
                    zero = starts and first_step + i == 0
                    before = [Float32(0.0) if zero else Float32(sums[place]) for place in own]
                    after = mma_sync.mma_m16n8k16(before, a[i], fragments[2 * i : 2 * i + 2])
                    for place, value in zip(own, after, strict=True):
                        sums[place] = value


def zero_behind_sums(sums: cute.Tensor) -> Int32:
    """Return 0, computed from a sum of every tile of 8 columns, for the address of a release.

    An arrival at a barrier does not wait for ldmatrix, nor does a barrier of the warp, of which the
    assembler makes no instruction. An MMA waits for the ldmatrix of its operands, and what reads a
    sum waits for the MMAs that made it. If the release did not depend on the sums, the assembler
    could move MMAs behind it, and their operands might be unread when the stage is filled again.
    """
    tiles = range(0, cute.size(sums), 4)
    return warp_ops.zero_behind([arith.bits(Float32(sums[first])) for first in tiles])


class SwapAbMmaSync(SwapAbInRegisters):
    """16 experts of one warp x the tile's tokens, one stage at a time."""

    @property
    def all_lanes_release(self) -> bool:
        """True, for the reason that ``TileMmaSync.weight_lanes`` states."""
        return True

    def stages(self, shared: Int32, warp: Int32) -> SwapAbStagesMmaSync:
        """Return the multiplication of this warp."""
        return SwapAbStagesMmaSync(self.g, shared, warp)


class SwapAbStagesMmaSync:
    """What ``SwapAbMmaSync.stages`` returns."""

    def __init__(self, g: SwapAbGeometry, shared: Int32, warp: Int32) -> None:
        self.g = g
        lane = cute.arch.lane_idx()
        self._weights = shared + warp * (MMA_ROWS // 8 * _PACKED_BYTES) + packed_a(lane, 0)
        self._hidden = [
            shared + g.weight_stage_bytes + swizzled_b(lane, step)
            for step in range(0, STEPS, LOADED_STEPS)
        ]
        self._sums = cute.make_rmem_tensor(4 * g.n_tiles, Float32)

    def multiply(self, stage: Int32, starts: bool) -> None:
        """Multiply a stage that has arrived; ``starts`` the chunk's sums from zero."""
        offset = stage * self.g.stage_bytes
        weights = self._weights + offset
        hidden = [place + offset for place in self._hidden]
        multiply_stage(
            self._sums,
            lambda step: mma_sync.ldmatrix_x4(weights + packed_a(0, step)),
            lambda tile, step: mma_sync.ldmatrix_x4(
                hidden[step // LOADED_STEPS] + tile * _ROWS_BYTES
            ),
            self.g.n_tiles,
            starts,
        )

    def wait(self, pending: int) -> None:
        """Wait for the lanes of the warp, which have loaded for each other."""
        cute.arch.sync_warp()

    def zero_behind_reads(self) -> Int32:
        """Return 0, computed from the sums."""
        return zero_behind_sums(self._sums)

    def n_tile(self, n_tile: int) -> list[Float32]:
        """Return this thread's four sums of an n-tile of 8 tokens."""
        return [Float32(self._sums[4 * n_tile + i]) for i in range(4)]


class TileMmaSync(TileInRegisters):
    """16 tokens of one warp x the experts of a pass."""

    @property
    def weight_lanes(self) -> int:
        """All lanes. ``wait`` has a barrier of the warp, so one lane could release the stage for
        all. But the assembler makes no instruction of that barrier, so compute-sanitizer's
        racecheck does not see it and would report the loads of the other lanes.
        """
        return LANES

    def stages(self, hidden: Ring, weight: Ring, thread: Int32) -> TileStagesMmaSync:
        """Return the multiplication of this thread's warp."""
        return TileStagesMmaSync(self.g, hidden, weight, thread)


class TileStagesMmaSync:
    """What ``TileMmaSync.stages`` returns."""

    def __init__(self, g: TileGeometry, hidden: Ring, weight: Ring, thread: Int32) -> None:
        self.g = g
        warp = arith.quotient(thread, LANES)
        lane = arith.remainder(thread, LANES)
        rows = hidden.data + warp * (MMA_ROWS // 8 * _ROWS_BYTES)
        self._hidden = [rows + swizzled_a(lane, step) for step in range(STEPS)]
        self._weights = weight.data + packed_b(lane, 0)

    def accumulator(self) -> cute.Tensor:
        """Return new registers for the sums of one pass."""
        return cute.make_rmem_tensor(self.g.mma_n // 2, Float32)

    def multiply(
        self, accumulator: cute.Tensor, a_stage: Int32, b_stage: Int32, starts: bool
    ) -> None:
        """Multiply a stage of hidden states by one of weights; ``starts`` from zero."""
        rows = a_stage * self.g.hidden_stage_bytes
        weights = self._weights + b_stage * self.g.weight_stage_bytes
        multiply_stage(
            accumulator,
            lambda step: mma_sync.ldmatrix_x4(self._hidden[step] + rows),
            lambda tile, step: mma_sync.ldmatrix_x4(
                weights + (tile * _PACKED_BYTES + packed_b(0, step))
            ),
            self.g.mma_n // MMA_COLUMNS,
            starts,
        )

    def wait(self, pending: int) -> None:
        """Wait for the lanes of the warp, which have loaded for each other."""
        cute.arch.sync_warp()

    def zero_behind_reads(self, accumulator: cute.Tensor) -> Int32:
        """Return 0, computed from the sums."""
        return zero_behind_sums(accumulator)
