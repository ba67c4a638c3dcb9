"""The swap-A/B form's multiplication by ``tcgen05``, for the Blackwell targets.

A third producer warp issues the MMAs: 128 experts are their rows, the tile's tokens their columns.
A chunk of the hidden dimension goes into one of two accumulators in tensor memory, from zero;
meanwhile the consumer warps add the other one to the sums of its slice, in the registers where
``wgmma`` would leave them. A stage is released by a commit, at the two CTAs that fill it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mbarrier, tcgen05, tcgen05_layout
from build_kernels.kernels.common.ptx.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense import share
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES, MMA_K, WARPGROUP
from build_kernels.kernels.dense.geometry.tcgen05 import ACCUMULATORS, SwapAbTcgen05Geometry
from build_kernels.kernels.dense.mma import tcgen05_accumulators
from build_kernels.kernels.dense.mma.interface import BoundSwapAbMma, SwapAbMma
from build_kernels.kernels.dense.mma.tcgen05_accumulators import LOADED
from build_kernels.kernels.dense.ring import CountedRingState, Ring, RingState

#: Warpgroups that divide the 128 rows of an accumulator: each warp takes 16 of the 32 that it
#: reaches.
HALVES = tcgen05_layout.MMA_M // 64


class SwapAbTcgen05(SwapAbMma):
    """A producer warp issues, and the consumer warps add chunk by chunk."""

    g: SwapAbTcgen05Geometry

    @property
    def hidden_releases(self) -> int:
        """A stage is released by one commit."""
        return 1

    @property
    def weight_releases(self) -> int:
        """A stage is released by one commit."""
        return 1

    @property
    def issuer(self) -> int:
        """The warp that allocates, issues the MMAs, and frees."""
        return self.g.consumer_warps + 2

    @cute.jit
    def allocate(self, shared: Int32, warp: Int32) -> None:
        """Allocate both accumulators in tensor memory and initialise their barriers.

        All threads call this, before the CTA's first barrier; the issuing warp does the work.
        """
        if warp == self.issuer:
            tcgen05_accumulators.allocate(self.g, shared)
        tcgen05.fence_before()

    # --- the issuing warp -------------------------------------------------------------------------

    @cute.jit
    def issue(self, shared: Int32, hidden: Ring, weight: Ring, cta: Cta, warp: Int32) -> None:
        """Multiply all chunks, then free the tensor memory when it has been read."""
        g = self.g
        if warp == self.issuer:
            tensor = tcgen05_accumulators.address(g, shared)
            accumulators = tcgen05_accumulators.barriers(g, shared)
            state = CountedRingState(g.stages)
            whole, short = share.chunks_of_share(g, cta.k_rank)
            rings = (accumulators, hidden, weight)
            for chunk in cutlass.range(whole, unroll=1):
                state = self.issue_chunk(chunk, g.chunk_k_blocks, tensor, *rings, cta, state)
            # The short chunk is the last one of its CTA.
            if cutlass.const_expr(g.last_k_blocks > 0):
                for chunk in cutlass.range(whole, whole + short, unroll=1):
                    state = self.issue_chunk(chunk, g.last_k_blocks, tensor, *rings, cta, state)
            tcgen05_accumulators.drain(accumulators, whole + short)
            tcgen05_accumulators.free(g, tensor)

    @cute.jit
    def issue_chunk(
        self,
        chunk: Int32,
        blocks: cutlass.Constexpr[int],
        tensor: Int32,
        accumulators: Ring,
        hidden: Ring,
        weight: Ring,
        cta: Cta,
        state: CountedRingState,
    ) -> CountedRingState:
        """Issue the MMAs of a chunk of ``blocks`` stages, k ascending, the first one from zero. The
        last commit makes the accumulator full. Returns the ring's state behind the chunk."""
        g = self.g
        number, turn = arith.remainder(chunk, ACCUMULATORS), arith.quotient(chunk, ACCUMULATORS)
        mbarrier.wait(accumulators.empty_at(number), arith.remainder(turn, 2) ^ 1)
        accumulator = tensor + number * g.accumulator_columns
        instruction = tcgen05_layout.instruction_descriptor(g.tile_tokens)
        fillings = share.k_blocks(g, cta.k_rank)
        for block in cutlass.range_constexpr(blocks):
            mbarrier.wait(hidden.full_at(state.stage), state.phase)
            following = state.count + g.stages
            # Before the stage is released: the bytes of its next filling are announced.
            if cute.arch.lane_idx() == 0 and following < fillings:
                mbarrier.arrive_expect_tx(hidden.full_at(state.stage), Int32(g.stage_bytes))
            cute.arch.sync_warp()
            tcgen05.fence_after()
            a = tcgen05.operand(PACKED_STAGE.descriptor, weight.data_at(state.stage))
            b = tcgen05.operand(SWIZZLED_ROWS.descriptor, hidden.data_at(state.stage))
            for rows in cutlass.range_constexpr(g.row_tiles):
                first = rows * (tcgen05_layout.MMA_M * K_BLOCK * 2)
                for step in cutlass.range_constexpr(K_BLOCK // MMA_K):
                    tcgen05.mma(
                        accumulator + rows * g.tile_tokens,
                        a + (first + step * PACKED_STAGE.step_bytes) // 16,
                        b + step * SWIZZLED_ROWS.step_bytes // 16,
                        instruction,
                        block > 0 or step > 0,
                    )
            if following < fillings:
                self.release(hidden, weight, cta, state.stage, following)
            state = state.next()
        tcgen05.commit(accumulators.full_at(number))
        return state

    def release(self, hidden: Ring, weight: Ring, cta: Cta, stage: Int32, following: Int32) -> None:
        """Release a stage, by commits, to the two CTAs that fill it as number ``following``."""
        g = self.g
        if g.cluster == 1:
            tcgen05.commit(hidden.empty_at(stage))
            tcgen05.commit(weight.empty_at(stage))
            return
        e = arith.remainder(following, g.cluster_e)
        t = arith.remainder(following, g.cluster_t)
        of_hidden = g.cta_rank(e, cta.k_rank, cta.t_rank)
        of_weight = g.cta_rank(cta.e_rank, cta.k_rank, t)
        tcgen05.commit_multicast(hidden.empty_at(stage), Int32(1) << of_hidden)
        tcgen05.commit_multicast(weight.empty_at(stage), Int32(1) << of_weight)

    # --- the consumer warps -----------------------------------------------------------------------

    def rows(self, warp: Int32) -> tuple[Int32, Int32]:
        """Return (accumulator's 128 experts, first of 16 rows of it) that a warp adds."""
        group = arith.quotient(warp, WARPGROUP // LANES)
        lanes = tcgen05_layout.first_lane(
            arith.remainder(warp, WARPGROUP // LANES), arith.remainder(group, HALVES)
        )
        return arith.quotient(group, HALVES), lanes

    def first_row(self, warp: Int32) -> Int32:
        """Return the first of the 16 experts of the CTA whose sums a warp has."""
        tile, lanes = self.rows(warp)
        return tile * tcgen05_layout.MMA_M + lanes

    def bind(
        self, shared: Int32, hidden: Ring, weight: Ring, cta: Cta, warp: Int32, thread: Int32
    ) -> BoundTcgen05:
        """Return the multiplication of a consumer warp. All consumer threads call this first."""
        tile, lanes = self.rows(warp)
        tensor = tcgen05_accumulators.address(self.g, shared)
        return BoundTcgen05(
            self.g,
            tcgen05_accumulators.barriers(self.g, shared),
            tensor + tile * self.g.tile_tokens + (lanes << 16),
            cute.arch.lane_idx(),
        )


# Frozen, so that the DSL does not carry it through loops.
@dataclass(frozen=True)
class BoundTcgen05(BoundSwapAbMma):
    """What ``SwapAbTcgen05.bind`` returns.

    ``tensor`` is the address of the warp's rows in the first accumulator.
    """

    g: SwapAbTcgen05Geometry
    accumulators: Ring
    tensor: Int32
    lane: Int32

    def begin(self) -> RingState:
        """Return the state before the first chunk."""
        return RingState(ACCUMULATORS)

    def chunk(
        self, state: RingState, blocks: int, meanwhile: Callable[[], None] | None
    ) -> RingState:
        """Wait until the issuing warp's MMAs have completed the next chunk, whatever its size."""
        if meanwhile is not None:
            meanwhile()
        mbarrier.wait(self.accumulators.full_at(state.stage), state.phase)
        cute.arch.sync_warp()
        tcgen05.fence_after()
        return state.next()

    @cute.jit
    def add_to(self, state: RingState, sums: cute.Tensor) -> None:
        """Add the sums of the chunk before ``state`` to ``sums``, and release its accumulator."""
        g = self.g
        number = arith.remainder(state.stage + (ACCUMULATORS - 1), ACCUMULATORS)
        first = self.tensor + number * g.accumulator_columns
        for column in cutlass.range_constexpr(0, g.tile_tokens, LOADED):
            columns = min(LOADED, g.tile_tokens - column)
            own = range(column // 2, (column + columns) // 2)
            before = [Float32(sums[i]) for i in own]
            after = tcgen05.add(first + column, columns, before)
            for i in cutlass.range_constexpr(len(own)):
                sums[own[i]] = after[i]
        tcgen05.fence_before()
        cute.arch.sync_warp()
        if self.lane == 0:
            mbarrier.arrive(self.accumulators.empty_at(number))
