"""Multiplication by ``wgmma`` (sm_90a) for swap_ab and tile.

A warpgroup issues MMAs whose operands are stages in shared memory and whose sums are registers. The
weights' stages are packed without a swizzle: 8 x 8 core matrices, first along the hidden dimension.
The hidden states' stages are rows of 128 bytes, swizzled as the tensor map leaves them.
"""

from __future__ import annotations

from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from build_kernels.kernels.common.ptx import arith
from build_kernels.kernels.dense.geometry.common import (
    K_BLOCK,
    LANES,
    MMA_K,
    MMA_M,
    WARPGROUP,
)
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.mma.swap_ab_registers import SwapAbInRegisters
from build_kernels.kernels.dense.mma.tile_registers import TileInRegisters
from build_kernels.kernels.dense.ring import Ring

#: Elements of a row of a packed 8 x 8 core matrix, and of the whole core matrix.
_ROW = 8
_CORE = 64


def packed_weight(address: Int32, experts: int, stages: int, stage_elements: int) -> cute.Tensor:
    """Return the stages of ``experts`` packed experts, K-major: [expert, hidden element, stage]."""
    pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(
        pointer,
        cute.make_layout(
            ((_ROW, experts // _ROW), (_ROW, K_BLOCK // _ROW), stages),
            stride=((_ROW, _ROW * K_BLOCK), (1, _CORE), stage_elements),
        ),
    )


def swizzled_hidden(address: Int32, tokens: int, stages: int, stage_elements: int) -> cute.Tensor:
    """Return the stages of ``tokens`` tokens in swizzled rows: [token, hidden element, stage]."""
    pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(
        cute.recast_ptr(pointer, cute.make_swizzle(3, 4, 3), dtype=BFloat16),
        cute.make_layout((tokens, K_BLOCK, stages), stride=(K_BLOCK, 1, stage_elements)),
    )


class Wgmma:
    """64 rows of ``a`` x ``n`` rows of ``b``, for the threads of one warpgroup.

    ``a`` and ``b`` are stages in shared memory, [row, hidden element, stage].
    """

    def __init__(self, n: int, a: cute.Tensor, b: cute.Tensor) -> None:
        op = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (MMA_M, n, MMA_K),
            warpgroup.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        self._start = cute.make_tiled_mma(cute.make_mma_atom(op))
        self._start.set(warpgroup.Field.ACCUMULATE, False)
        self._go_on = cute.make_tiled_mma(cute.make_mma_atom(op))
        self._go_on.set(warpgroup.Field.ACCUMULATE, True)
        part = self._start.get_slice(0)
        self._a = self._start.make_fragment_A(part.partition_A(a))
        self._b = self._start.make_fragment_B(part.partition_B(b))
        self._shape = part.partition_shape_C((MMA_M, n))

    def accumulator(self) -> cute.Tensor:
        """Return new registers for the sums."""
        return cute.make_rmem_tensor(self._shape, Float32)

    def multiply(
        self,
        accumulator: cute.Tensor,
        a_stage: Int32 | int,
        b_stage: Int32 | int,
        starts: bool,
    ) -> None:
        """Begin to multiply the 64 hidden elements of one stage each; ``starts`` from zero."""
        warpgroup.fence()
        for step in range(K_BLOCK // MMA_K):
            cute.gemm(
                self._start if starts and step == 0 else self._go_on,
                accumulator,
                self._a[None, None, step, a_stage],
                self._b[None, None, step, b_stage],
                accumulator,
            )
        warpgroup.commit_group()

    def wait(self, pending: int) -> None:
        """Wait until all but the last ``pending`` calls of ``multiply`` have completed."""
        warpgroup.wait_group(pending)

    def zero_behind_reads(self, accumulator: cute.Tensor) -> int:
        """Return 0: ``wait`` waits until the MMAs have read their operands."""
        return 0


class SwapAbWgmma(SwapAbInRegisters):
    """64 experts of one warpgroup x the tile's tokens, one stage at a time."""

    def stages(self, shared: Int32, warp: Int32) -> SwapAbStagesWgmma:
        """Return the multiplication of this warp's warpgroup."""
        return SwapAbStagesWgmma(self.g, shared, warp)


class SwapAbStagesWgmma:
    """What ``SwapAbWgmma.stages`` returns."""

    def __init__(self, g: SwapAbGeometry, shared: Int32, warp: Int32) -> None:
        own = shared + arith.quotient(warp, WARPGROUP // LANES) * (MMA_M * K_BLOCK * 2)
        stage_elements = g.stage_bytes // 2
        self._mma = Wgmma(
            g.tile_tokens,
            packed_weight(own, MMA_M, g.stages, stage_elements),
            swizzled_hidden(shared + g.weight_stage_bytes, g.tile_tokens, g.stages, stage_elements),
        )
        self._sums = self._mma.accumulator()

    def multiply(self, stage: Int32, starts: bool) -> None:
        """Begin to multiply a stage that has arrived; ``starts`` the chunk's sums from zero."""
        self._mma.multiply(self._sums, stage, stage, starts)

    def wait(self, pending: int) -> None:
        """Wait until all but the last ``pending`` stages have been read and added."""
        self._mma.wait(pending)

    def zero_behind_reads(self) -> int:
        """Return 0, as ``Wgmma.zero_behind_reads`` does."""
        return self._mma.zero_behind_reads(self._sums)

    def n_tile(self, n_tile: int) -> list[Float32]:
        """Return this thread's four sums of an n-tile of 8 tokens."""
        return [Float32(self._sums[4 * n_tile + i]) for i in range(4)]


class TileWgmma(TileInRegisters):
    """Tokens are the rows of the MMA, 64 per warpgroup, and experts its columns."""

    def stages(self, hidden: Ring, weight: Ring, thread: Int32) -> Wgmma:
        """Return the multiplication of this thread's warpgroup."""
        g = self.g
        group = cute.arch.make_warp_uniform(arith.quotient(thread, WARPGROUP))
        return Wgmma(
            g.mma_n,
            swizzled_hidden(
                hidden.data + group * (MMA_M * K_BLOCK * 2),
                MMA_M,
                g.hidden_stages,
                g.hidden_stage_bytes // 2,
            ),
            packed_weight(weight.data, g.mma_n, g.weight_stages, g.weight_stage_bytes // 2),
        )
