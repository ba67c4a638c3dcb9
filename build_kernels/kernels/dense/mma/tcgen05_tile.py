"""The tile form's multiplication by ``tcgen05`` (sm_100a, sm_103a).

A third producer warp issues the MMAs: experts are their rows, the tile's 128 tokens their columns.
A chunk of the hidden dimension goes into one of two accumulators in tensor memory, from zero;
meanwhile the two consumer warpgroups add the other one to their totals, in registers. At the end
the totals pass through shared memory, where the epilogue needs the logits anyway, to the threads
that screen them: two tokens per thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mbarrier, memory, tcgen05, tcgen05_layout
from build_kernels.kernels.common.ptx.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense import summation
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES, MMA_K
from build_kernels.kernels.dense.geometry.tcgen05 import ACCUMULATORS, TileTcgen05Geometry
from build_kernels.kernels.dense.mma import tcgen05_accumulators
from build_kernels.kernels.dense.mma.interface import TileMma
from build_kernels.kernels.dense.mma.tcgen05_accumulators import LOADED
from build_kernels.kernels.dense.ring import Ring, RingState

#: Named barrier of the consumer warps.
CONSUMERS = 1


class TileTcgen05(TileMma):
    """A producer warp issues, and the consumer warps add chunk by chunk."""

    @property
    def releases(self) -> int:
        """A stage is released by one commit."""
        return 1

    @property
    def issuer(self) -> int:
        """The warp that allocates, issues the MMAs, and frees."""
        return int(self.g.consumer_warps) + 2

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
    def issue(
        self, shared: Int32, hidden: Ring, weight: Ring, e_rank: Int32, t_rank: Int32, warp: Int32
    ) -> None:
        """Multiply all chunks, then free the tensor memory when it has been read."""
        g = self.g
        if warp == self.issuer:
            tensor = tcgen05_accumulators.address(g, shared)
            accumulators = tcgen05_accumulators.barriers(g, shared)
            peers = (
                Int32((1 << g.cluster_e) - 1) << (t_rank * g.cluster_e),
                Int32(sum(1 << (i * g.cluster_e) for i in range(g.cluster_t))) << e_rank,
            )
            h, w = RingState(g.hidden_stages), RingState(g.weight_stages)
            for chunk in cutlass.range(g.full_chunks, unroll=1):
                h, w = self.issue_chunk(
                    chunk, g.chunk_k_blocks, tensor, accumulators, hidden, weight, peers, h, w
                )
            if cutlass.const_expr(g.last_k_blocks > 0):
                self.issue_chunk(
                    Int32(g.full_chunks),
                    g.last_k_blocks,
                    tensor,
                    accumulators,
                    hidden,
                    weight,
                    peers,
                    h,
                    w,
                )
            tcgen05_accumulators.drain(accumulators, g.chunks)
            if cutlass.const_expr(g.cluster > 1):
                # A peer's commit may still be in flight; its target must not have exited.
                tcgen05_accumulators.drain(hidden, g.k_blocks)
                tcgen05_accumulators.drain(weight, g.k_blocks)
            tcgen05_accumulators.free(g, tensor)

    def issue_chunk(
        self,
        chunk: Int32,
        blocks: int,
        tensor: Int32,
        accumulators: Ring,
        hidden: Ring,
        weight: Ring,
        peers: tuple[Int32, Int32],
        h: RingState,
        w: RingState,
    ) -> tuple[RingState, RingState]:
        """Issue the MMAs of a chunk of ``blocks`` stages, k ascending, the first one from zero.

        Returns the states of the two rings behind the chunk. A stage is released at all CTAs that
        fill it, by a commit; ``peers`` are the masks of those CTAs for hidden states and weights.
        The last commit makes the accumulator full.
        """
        g = self.g
        number, turn = arith.remainder(chunk, ACCUMULATORS), arith.quotient(chunk, ACCUMULATORS)
        mbarrier.wait(accumulators.empty_at(number), arith.remainder(turn, 2) ^ 1)
        accumulator = tensor + number * g.accumulator_columns
        instruction = tcgen05_layout.instruction_descriptor(g.tokens_tile)
        for block in range(blocks):
            mbarrier.wait(hidden.full_at(h.stage), h.phase)
            mbarrier.wait(weight.full_at(w.stage), w.phase)
            cute.arch.sync_warp()
            tcgen05.fence_after()
            a = tcgen05.operand(PACKED_STAGE.descriptor, weight.data_at(w.stage))
            b = tcgen05.operand(SWIZZLED_ROWS.descriptor, hidden.data_at(h.stage))
            for rows in range(g.row_tiles):
                first = rows * (tcgen05_layout.MMA_M * K_BLOCK * 2)
                for step in range(K_BLOCK // MMA_K):
                    tcgen05.mma(
                        accumulator + rows * g.tokens_tile,
                        a + (first + step * PACKED_STAGE.step_bytes) // 16,
                        b + step * SWIZZLED_ROWS.step_bytes // 16,
                        instruction,
                        block > 0 or step > 0,
                    )
            if g.cluster > 1:
                tcgen05.commit_multicast(hidden.empty_at(h.stage), peers[0])
                tcgen05.commit_multicast(weight.empty_at(w.stage), peers[1])
            else:
                tcgen05.commit(hidden.empty_at(h.stage))
                tcgen05.commit(weight.empty_at(w.stage))
            h, w = h.next(), w.next()
        tcgen05.commit(accumulators.full_at(number))
        return h, w

    # --- the consumer warps -----------------------------------------------------------------------

    @cute.jit
    def multiply(
        self, shared: Int32, hidden: Ring, weight: Ring, e_rank: Int32, t_rank: Int32, thread: Int32
    ) -> list[StoredLogits]:
        """Add all chunks and store the logits. Returns a view of the stored ones, one pass."""
        g = self.g
        tensor = tcgen05_accumulators.address(g, shared)
        warp = cute.arch.make_warp_uniform(arith.quotient(thread, LANES))
        lane = arith.remainder(thread, LANES)
        lanes = self.first_lane(warp)
        accumulators = tcgen05_accumulators.barriers(g, shared)
        size = g.accumulator_columns // 2
        totals = cute.make_rmem_tensor(size, Float32)
        sums = cute.make_rmem_tensor(size, Float32)
        # -0 + x is x for every x: sums start from what is added first.
        for i in cutlass.range_constexpr(size):
            totals[i] = Float32(-0.0)
            sums[i] = Float32(-0.0)
        end = Int32(summation.slice_end(0, g.chunks))
        slice_number = Int32(0)
        for chunk in cutlass.range(g.chunks, unroll=1):
            number = arith.remainder(chunk, ACCUMULATORS)
            turn = arith.quotient(chunk, ACCUMULATORS)
            mbarrier.wait(accumulators.full_at(number), arith.remainder(turn, 2))
            cute.arch.sync_warp()
            tcgen05.fence_after()
            first = tensor + number * g.accumulator_columns + (lanes << 16)
            for column in cutlass.range_constexpr(0, g.accumulator_columns, LOADED):
                self.add(sums, first, column)
            tcgen05.fence_before()
            cute.arch.sync_warp()
            if lane == 0:
                mbarrier.arrive(accumulators.empty_at(number))
            if chunk + 1 == end:
                for i in cutlass.range_constexpr(size):
                    totals[i] = arith.add_rn(Float32(totals[i]), Float32(sums[i]))
                    sums[i] = Float32(-0.0)
                slice_number = slice_number + 1
                end = Int32(summation.slice_end(slice_number, g.chunks))
        # All warps have added: every stage has been read, and the logits take the rings' place.
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumer_threads)
        self.store_totals(totals, shared, lanes, lane)
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumer_threads)
        return [StoredLogits(g, shared, thread)]

    def first_lane(self, warp: Int32) -> Int32:
        """Return the first of the 16 rows of every 128 experts that a warp adds.

        A warp reaches 32 lanes of tensor memory; the two warpgroups divide them.
        """
        return tcgen05_layout.first_lane(arith.remainder(warp, 4), arith.quotient(warp, 4))

    def add(self, sums: cute.Tensor, accumulator: Int32, column: int) -> None:
        """Add one chunk's partial sums of LOADED columns from ``column`` on to those of a slice."""
        first, count = column // 2, LOADED // 2
        before = [Float32(sums[first + i]) for i in range(count)]
        for i, value in enumerate(tcgen05.add(accumulator + column, LOADED, before)):
            sums[first + i] = value

    @cute.jit
    def store_totals(self, totals: cute.Tensor, shared: Int32, lanes: Int32, lane: Int32) -> None:
        """Store the logits as rows, one per token."""
        g = self.g
        for rows in cutlass.range_constexpr(g.row_tiles):
            expert = rows * tcgen05_layout.MMA_M + lanes
            # Idle rows have no column; 16 rows are idle together.
            if expert < g.cta_experts:
                place = shared + (lane & 3) * (2 * g.logit_row_bytes)
                place = place + (expert + arith.quotient(lane, 4)) * 4
                self.store_rows(totals, rows * (g.tokens_tile // 2), place)

    def store_rows(self, totals: cute.Tensor, first: int, place: Int32) -> None:
        """Store this thread's logits of one tile of 128 experts."""
        g = self.g
        for register in range(g.tokens_tile // 2):
            row, column = tcgen05_layout.fragment(0, register)
            memory.store_shared_f32(
                place + column * g.logit_row_bytes + row * 4, Float32(totals[first + register])
            )

    def store_logits(
        self, totals: Sequence[Sequence[Float32]], shared: Int32, thread: Int32
    ) -> None:
        """Do nothing: ``totals`` reads logits that are stored."""


class StoredLogits(Sequence[Float32]):
    """A thread's accumulator fragment, tokens its rows and experts its columns, read from the
    stored logits value by value, so that it takes no registers."""

    def __init__(self, geometry: TileTcgen05Geometry, shared: Int32, thread: Int32) -> None:
        self.g = geometry
        lane = arith.remainder(thread, LANES)
        row = arith.quotient(thread, LANES) * 16 + arith.quotient(lane, 4)
        self.place = shared + row * geometry.logit_row_bytes + (lane & 3) * 8

    def __len__(self) -> int:
        return self.g.cta_experts // 2

    def __getitem__(self, register: Any) -> Any:
        row, column = tcgen05_layout.fragment(0, register)
        if register >= len(self):
            raise IndexError(register)
        return memory.load_shared_f32(self.place + row * self.g.logit_row_bytes + column * 4)
