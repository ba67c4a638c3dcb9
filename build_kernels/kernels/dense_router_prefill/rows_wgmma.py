"""The multiplication of the form with experts as MMA rows, by wgmma: sm_90a.

What expert_rows.py asks of a multiplication: ``multiply`` adds one stage to the chunk's partial
sums, or starts them; ``wait`` returns when all but so many of the last stages have been read and
added; ``column`` gives this thread's four sums of a column of 8 tokens, of which ``expert_of`` and
``token_of`` tell the row and the place in the column.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from build_kernels.kernels.common import ptx
from build_kernels.kernels.dense_router_prefill.geometry import (
    K_BLOCK,
    LANES,
    MMA_K,
    MMA_M,
    WARPGROUP,
)
from build_kernels.kernels.dense_router_prefill.rows_geometry import RowsGeometry


class WgmmaRows:
    """64 experts of one warpgroup x the tile's tokens, operands in the ring that begins at
    ``shared``."""

    def __init__(self, g: RowsGeometry, shared: Int32, warp: Int32) -> None:
        op = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (MMA_M, g.tile_tokens, MMA_K),
            warpgroup.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        self.start = cute.make_tiled_mma(cute.make_mma_atom(op))
        self.start.set(warpgroup.Field.ACCUMULATE, False)
        self.go_on = cute.make_tiled_mma(cute.make_mma_atom(op))
        self.go_on.set(warpgroup.Field.ACCUMULATE, True)
        smem = cute.AddressSpace.smem
        own = shared + ptx.quotient(warp, WARPGROUP // LANES) * (MMA_M * K_BLOCK * 2)
        weight = cute.make_tensor(
            cute.make_ptr(BFloat16, own, smem, assumed_align=1024),
            cute.make_layout(
                ((8, MMA_M // 8), (8, K_BLOCK // 8), g.stages),
                stride=((8, 8 * K_BLOCK), (1, 64), g.stage_bytes // 2),
            ),
        )
        hidden = cute.make_tensor(
            cute.recast_ptr(
                cute.make_ptr(BFloat16, shared + g.weight_stage_bytes, smem, assumed_align=1024),
                cute.make_swizzle(3, 4, 3),
                dtype=BFloat16,
            ),
            cute.make_layout(
                (g.tile_tokens, K_BLOCK, g.stages), stride=(K_BLOCK, 1, g.stage_bytes // 2)
            ),
        )
        slice_ = self.start.get_slice(0)
        self.weight = self.start.make_fragment_A(slice_.partition_A(weight))
        self.hidden = self.start.make_fragment_B(slice_.partition_B(hidden))
        self.partial = cute.make_rmem_tensor(
            slice_.partition_shape_C((MMA_M, g.tile_tokens)), Float32
        )

    def multiply(self, stage: Int32, starts: bool) -> None:
        """Multiply the 64 hidden elements of a stage that has arrived."""
        warpgroup.fence()
        for step in range(K_BLOCK // MMA_K):
            cute.gemm(
                self.start if starts and step == 0 else self.go_on,
                self.partial,
                self.weight[None, None, step, stage],
                self.hidden[None, None, step, stage],
                self.partial,
            )
        warpgroup.commit_group()

    def wait(self, pending: cutlass.Constexpr[int]) -> None:
        warpgroup.wait_group(pending)

    def column(self, column: int) -> list[Float32]:
        """This thread's four sums of a column of 8 tokens."""
        return [Float32(self.partial[4 * column + i]) for i in range(4)]

    @staticmethod
    def expert_of(i: int, warp: Int32, lane: Int32) -> Int32:
        """The row of the tile of experts that sum i of a column belongs to."""
        return warp * 16 + ptx.quotient(lane, 4) + 8 * (i // 2)

    @staticmethod
    def token_of(i: int, lane: Int32) -> Int32:
        """The token of a column that sum i of it belongs to."""
        return (lane & 3) * 2 + i % 2
