"""The split-K form's multiplication by ``tcgen05``, for the Blackwell targets.

Warp 0 issues all MMAs of the CTA, 128 experts by the tile's tokens, each chunk into an accumulator
of its own in tensor memory. Every warp then loads the sums of 16 experts into registers, in the
layout that mma/__init__.py states.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mbarrier, memory, tcgen05, tcgen05_layout
from build_kernels.kernels.common.ptx.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, K_BLOCK, MMA_K
from build_kernels.kernels.dense.geometry.split_k import M_TILE_STEP
from build_kernels.kernels.dense.mma.interface import SplitKMma

#: The warp that issues the MMAs, and the one that allocates their accumulators.
ISSUER = 0
ALLOCATOR = 1


class SplitKTcgen05(SplitKMma):
    """One warp issues, and every warp loads the sums of 16 experts."""

    @cute.jit
    def allocate(self, shared: Int32, warp: Int32) -> None:
        """Allocate the accumulators in tensor memory and initialise their barriers.

        All threads call this, before the CTA's first barrier; one warp does the work.
        """
        g = self.g
        if warp == ALLOCATOR:
            for chunk in cutlass.range_constexpr(g.cta_chunks):
                # One arrival: that of the commit behind the chunk's last MMA.
                if cute.arch.lane_idx() == 0:
                    mbarrier.init(shared + g.accumulated_offset + BARRIER_BYTES * chunk, 1)
            mbarrier.fence_init()
            tcgen05.allocate(shared + g.tensor_address_offset, g.tensor_columns)
            tcgen05.relinquish()
        tcgen05.fence_before()

    @cute.jit
    def free(self, shared: Int32, warp: Int32) -> None:
        """Free the tensor memory.

        All warps call this, after a barrier behind ``multiply``: all of them have read their
        sums by then.
        """
        if warp == ALLOCATOR:
            tcgen05.fence_after()
            tcgen05.deallocate(self.tensor_address(shared), self.g.tensor_columns)

    def tensor_address(self, shared: Int32) -> Int32:
        """Return the address of the CTA's tensor memory."""
        return memory.load_shared_b32(shared + self.g.tensor_address_offset)

    def first_row(self, warp: Int32) -> Int32:
        """Return the first of the 16 experts of the group whose sums a warp loads."""
        # 128 experts are two m-tiles: the warpgroup of the first has half 0 of every 32 rows.
        pair = arith.quotient(self.task(warp)[0], M_TILE_STEP)
        return pair * tcgen05_layout.MMA_M + self.first_lane(warp)

    def first_lane(self, warp: Int32) -> Int32:
        """Return the first of the 16 lanes of tensor memory that a warp loads."""
        half = arith.remainder(self.task(warp)[0], M_TILE_STEP)
        return tcgen05_layout.first_lane(arith.remainder(warp, 4), half)

    @cute.jit
    def multiply(
        self, shared: Int32, weight_full: Int32, hidden_full: Int32, warp: Int32
    ) -> list[Float32]:
        """Return this warp's partial sums of 16 experts x the tile's tokens, FP32.

        All warps call this. The issuing warp waits at the full barriers of weights and hidden
        states; every warp then waits at the barrier of its chunk's accumulator, which the commit
        behind the chunk's last MMA completes. On return the sums are in registers.
        """
        g = self.g
        tcgen05.fence_after()
        tensor = self.tensor_address(shared)
        if warp == ISSUER:
            self.issue(shared, weight_full, hidden_full, tensor)
        m_tile, chunk = self.task(warp)
        mbarrier.wait(shared + g.accumulated_offset + BARRIER_BYTES * chunk, Int32(0))
        tcgen05.fence_after()
        pair = arith.quotient(m_tile, M_TILE_STEP)
        column = (chunk * g.pairs + pair) * g.tokens_tile
        sums = tcgen05.load(tensor + column + (self.first_lane(warp) << 16), g.tokens_tile)
        tcgen05.fence_before()
        return sums

    def issue(self, shared: Int32, weight_full: Int32, hidden_full: Int32, tensor: Int32) -> None:
        """Issue the MMAs of all chunks, in the order in which their operands were requested.

        The issuing warp calls this. Within a chunk, k ascends, and the first MMA starts the sums.
        """
        g = self.g
        instruction = tcgen05_layout.instruction_descriptor(g.tokens_tile)
        weight = tcgen05.operand(PACKED_STAGE.descriptor, shared)
        rows = tcgen05.operand(SWIZZLED_ROWS.descriptor, shared + g.weight_bytes)
        for number in range(g.k_blocks):
            stage = g.stage_of(number)
            chunk, block = divmod(stage, g.chunk_k_blocks)
            mbarrier.wait(weight_full + BARRIER_BYTES * stage, Int32(0))
            mbarrier.wait(hidden_full + BARRIER_BYTES * stage, Int32(0))
            cute.arch.sync_warp()
            tcgen05.fence_after()
            for pair in range(g.pairs):
                for step in range(K_BLOCK // MMA_K):
                    a = stage * g.weight_stage_bytes
                    a += pair * (tcgen05_layout.MMA_M * K_BLOCK * 2)
                    b = stage * g.hidden_stage_bytes
                    tcgen05.mma(
                        tensor + (chunk * g.pairs + pair) * g.tokens_tile,
                        weight + (a + step * PACKED_STAGE.step_bytes) // 16,
                        rows + (b + step * SWIZZLED_ROWS.step_bytes) // 16,
                        instruction,
                        block > 0 or step > 0,
                    )
            if block == g.chunk_k_blocks - 1:
                tcgen05.commit(shared + g.accumulated_offset + BARRIER_BYTES * chunk)
