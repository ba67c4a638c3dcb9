"""The split form of dense_router_prefill (split_k.py) on the tensor core of sm_100a and sm_103a.

Only the multiplication differs. Warp 0 issues all MMAs of the block, 128 experts by the tile's
tokens, each chunk into an accumulator of its own. Every warp then reads the sums of 16 experts from
tensor memory: those that it would have multiplied itself, up to the order of the warps, in the
same registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common import bulk, ptx, tcgen05, tcgen05_layout
from build_kernels.kernels.common.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense_router_prefill import split_k
from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, MMA_K, MMA_M

#: The warp that issues the MMAs, and the one that allocates their accumulators.
ISSUER = 0
ALLOCATOR = 1


class SplitTcgen05(split_k.SplitPrefill):
    @cute.jit
    def acquire(self, shared: Int32, warp: Int32) -> None:
        g = self.g
        if warp == ALLOCATOR:
            for chunk in cutlass.range_constexpr(g.block_chunks):
                # One lane: the barrier of a chunk's sums gets the arrival of a commit.
                if cute.arch.lane_idx() == 0:
                    ptx.barrier_init(shared + g.accumulated_offset + 8 * chunk, 1)
            ptx.barrier_init_fence()
            tcgen05.allocate(shared + g.tensor_address_offset, g.tensor_columns)
            tcgen05.relinquish()
        tcgen05.fence_before()

    @cute.jit
    def give_back(self, shared: Int32, warp: Int32) -> None:
        if warp == ALLOCATOR:
            tcgen05.fence_after()
            tcgen05.deallocate(self.tensor_address(shared), self.g.tensor_columns)

    def tensor_address(self, shared: Int32) -> Int32:
        return ptx.load_shared_b32(shared + self.g.tensor_address_offset)

    def first_row(self, warp: Int32) -> Int32:
        """128 experts are two m-tiles: the warpgroup of the first has half 0 of every 32 rows."""
        m_tile = self.task(warp)[0]
        pair = ptx.quotient(m_tile, tcgen05_layout.MMA_M // MMA_M)
        return pair * tcgen05_layout.MMA_M + self.first_lane(warp)

    def first_lane(self, warp: Int32) -> Int32:
        half = ptx.remainder(self.task(warp)[0], tcgen05_layout.MMA_M // MMA_M)
        return tcgen05_layout.first_lane(ptx.remainder(warp, 4), half)

    @cute.jit
    def multiply(
        self,
        shared: Int32,
        ring: Int32,
        weight_full: Int32,
        hidden_full: Int32,
        hidden_empty: Int32,
        warp: Int32,
        lane: Int32,
    ) -> list[Float32]:
        """This warp's partial sums: the accumulator of 16 experts x the tile's tokens."""
        g = self.g
        tcgen05.fence_after()
        tensor = self.tensor_address(shared)
        if warp == ISSUER:
            self.issue(shared, ring, weight_full, hidden_full, hidden_empty, tensor)
        m_tile, chunk = self.task(warp)
        bulk.wait(shared + g.accumulated_offset + 8 * chunk, Int32(0))
        tcgen05.fence_after()
        pair = ptx.quotient(m_tile, tcgen05_layout.MMA_M // MMA_M)
        column = (chunk * g.pairs + pair) * g.tokens_tile
        sums = tcgen05.load(tensor + column + (self.first_lane(warp) << 16), g.tokens_tile)
        tcgen05.fence_before()
        return sums

    def issue(
        self,
        shared: Int32,
        ring: Int32,
        weight_full: Int32,
        hidden_full: Int32,
        hidden_empty: Int32,
        tensor: Int32,
    ) -> None:
        """Issue the MMAs of all chunks in the order in which their operands were requested: within
        a chunk, k ascending, and the first one starts the sums."""
        g = self.g
        instruction = tcgen05_layout.instruction_descriptor(g.tokens_tile)
        weight = tcgen05.operand(PACKED_STAGE.descriptor, shared)
        hidden = tcgen05.operand(SWIZZLED_ROWS.descriptor, ring)
        for order in range(g.blocks):
            stage = self.stage_of(order)
            chunk, block = divmod(stage, g.chunk_blocks)
            place, lap = order % g.hidden_stages, order // g.hidden_stages
            bulk.wait(weight_full + 8 * stage, Int32(0))
            bulk.wait(hidden_full + 8 * place, Int32(lap % 2))
            cute.arch.sync_warp()
            tcgen05.fence_after()
            for pair in range(g.pairs):
                for step in range(K_BLOCK // MMA_K):
                    a = stage * g.weight_stage_bytes + pair * (tcgen05_layout.MMA_M * K_BLOCK * 2)
                    b = place * g.hidden_stage_bytes
                    tcgen05.mma(
                        tensor + (chunk * g.pairs + pair) * g.tokens_tile,
                        weight + (a + step * PACKED_STAGE.step_bytes) // 16,
                        hidden + (b + step * SWIZZLED_ROWS.step_bytes) // 16,
                        instruction,
                        block > 0 or step > 0,
                    )
            # Only a stage that will be filled again needs to be released.
            if order + g.hidden_stages < g.blocks:
                tcgen05.commit(hidden_empty + 8 * place)
            if block == g.chunk_blocks - 1:
                tcgen05.commit(shared + g.accumulated_offset + 8 * chunk)


def program(constants: Mapping[str, int | float]) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    return split_k.program(constants, SplitTcgen05)
