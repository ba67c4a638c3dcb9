"""The form of dense_router_prefill for many tokens on the tensor core of sm_100a and sm_103a.

The rings, the feeding warps and the epilogue are those of dense_router_prefill.py. Between them,
one more warp issues the MMAs: experts are their rows, as in the other tcgen05 kernels, and the
tile's 128 tokens their columns. A chunk of the hidden dimension goes into one of two accumulators
in tensor memory, from zero; meanwhile the two warpgroups add the other one to their totals, in
registers. At the end the totals pass through shared memory, where the epilogue wants the logits
anyway, into the registers from which it screens: two tokens a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common import bulk, ptx, tcgen05, tcgen05_layout
from build_kernels.kernels.common.tcgen05_layout import PACKED_STAGE, SWIZZLED_ROWS
from build_kernels.kernels.dense_router_prefill.geometry import (
    ACCUMULATORS,
    K_BLOCK,
    LANES,
    MMA_K,
    WARPGROUP,
    Geometry,
)
from build_kernels.kernels.dense_router_prefill.tile import (
    CONSUMERS,
    DenseRouterPrefill,
)

#: Columns that are read from tensor memory at a time: few registers beside the totals.
LOADED = 32


class TileTcgen05(DenseRouterPrefill):
    @property
    def releases(self) -> int:
        return 1

    @property
    def issuer(self) -> int:
        """The warp that allocates, issues the MMAs, and gives back."""
        return self.g.consumer_warps + 2

    @cute.jit
    def acquire(self, shared: Int32, warp: Int32) -> None:
        g = self.g
        if warp == self.issuer:
            full = shared + g.accumulator_offset
            if cute.arch.lane_idx() == 0:
                for place in cutlass.range_constexpr(ACCUMULATORS):
                    ptx.barrier_init(full + 8 * place, 1)
                    ptx.barrier_init(full + 8 * (ACCUMULATORS + place), g.consumer_warps)
            ptx.barrier_init_fence()
            tcgen05.allocate(shared + g.tensor_address_offset, g.tensor_columns)
            tcgen05.relinquish()
        tcgen05.fence_before()

    def tensor_address(self, shared: Int32) -> Int32:
        tcgen05.fence_after()
        return ptx.load_shared_b32(shared + self.g.tensor_address_offset)

    # --- the warp that multiplies -----------------------------------------------------------------

    @cute.jit
    def assist(
        self,
        shared: Int32,
        hidden_full: Int32,
        hidden_empty: Int32,
        weight_full: Int32,
        weight_empty: Int32,
        part_e: Int32,
        part_t: Int32,
        warp: Int32,
    ) -> None:
        """Multiply all chunks, then give the tensor memory back when it has been read."""
        g = self.g
        if warp == self.issuer:
            tensor = self.tensor_address(shared)
            full = shared + g.accumulator_offset
            empty = full + 8 * ACCUMULATORS
            tile = Int32((1 << g.cluster_e) - 1) << (part_t * g.cluster_e)
            part = Int32(sum(1 << (i * g.cluster_e) for i in range(g.cluster_t))) << part_e
            rings = (hidden_full, weight_full, hidden_empty, weight_empty, tile, part)
            places = (Int32(0), Int32(0), Int32(0), Int32(0))
            for chunk in cutlass.range(g.full_chunks, unroll=1):
                places = self.multiply_chunk(chunk, g.chunk_blocks, tensor, shared, rings, *places)
            if cutlass.const_expr(g.last_blocks > 0):
                self.multiply_chunk(
                    Int32(g.full_chunks), g.last_blocks, tensor, shared, rings, *places
                )
            self.drain(empty, ACCUMULATORS, g.chunks)
            if cutlass.const_expr(g.cluster > 1):
                # A commit of another block may still be under way: leave no sooner than it comes.
                self.drain(hidden_empty, g.hidden_stages, g.blocks)
                self.drain(weight_empty, g.weight_stages, g.blocks)
            cute.arch.sync_warp()
            tcgen05.fence_after()
            tcgen05.deallocate(tensor, g.tensor_columns)

    def drain(self, empty: Int32, places: int, fills: int) -> None:
        """Wait until all places of a ring that was filled so many times have been released."""
        for place in range(min(places, fills)):
            last = (fills - 1 - place) // places
            bulk.wait(empty + 8 * place, Int32(last % 2))

    def multiply_chunk(
        self,
        chunk: Int32,
        blocks: int,
        tensor: Int32,
        shared: Int32,
        rings: tuple[Int32, ...],
        h: Int32,
        hp: Int32,
        w: Int32,
        wp: Int32,
    ) -> tuple[Int32, ...]:
        """Issue the MMAs of a chunk of so many blocks, k ascending, the first one from zero.

        A stage is released at all blocks that fill it, by a commit; the last commit hands the
        accumulator over. Of either ring, a stage and its parity come in and go out.
        """
        g = self.g
        hidden_full, weight_full, hidden_empty, weight_empty, tile, part = rings
        place, turn = ptx.remainder(chunk, ACCUMULATORS), ptx.quotient(chunk, ACCUMULATORS)
        full = shared + g.accumulator_offset + 8 * place
        bulk.wait(full + 8 * ACCUMULATORS, ptx.remainder(turn, 2) ^ 1)
        accumulator = tensor + place * g.accumulator_columns
        instruction = tcgen05_layout.instruction_descriptor(g.tokens_tile)
        for block in range(blocks):
            bulk.wait(hidden_full + 8 * h, hp)
            bulk.wait(weight_full + 8 * w, wp)
            cute.arch.sync_warp()
            tcgen05.fence_after()
            a = tcgen05.operand(
                PACKED_STAGE.descriptor, shared + g.weight_offset + w * g.weight_stage_bytes
            )
            b = tcgen05.operand(SWIZZLED_ROWS.descriptor, shared + h * g.hidden_stage_bytes)
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
                tcgen05.commit_multicast(hidden_empty + 8 * h, tile)
                tcgen05.commit_multicast(weight_empty + 8 * w, part)
            else:
                tcgen05.commit(hidden_empty + 8 * h)
                tcgen05.commit(weight_empty + 8 * w)
            h, hp = self.following(h, hp, g.hidden_stages)
            w, wp = self.following(w, wp, g.weight_stages)
        tcgen05.commit(full)
        return h, hp, w, wp

    # --- the warps that add -----------------------------------------------------------------------

    @cute.jit
    def multiply(
        self,
        shared: Int32,
        hidden_full: Int32,
        hidden_empty: Int32,
        weight_full: Int32,
        weight_empty: Int32,
        part_e: Int32,
        part_t: Int32,
        thread: Int32,
    ) -> list[StoredLogits]:
        """This thread's logits: two tokens, a quarter of the block's experts, as ``screen`` takes
        them."""
        g = self.g
        tensor = self.tensor_address(shared)
        warp = cute.arch.make_warp_uniform(ptx.quotient(thread, LANES))
        lane = ptx.remainder(thread, LANES)
        lanes = self.first_lane(warp)
        full = shared + g.accumulator_offset
        sums = cute.make_rmem_tensor(g.accumulator_columns // 2, Float32)
        # The sum of -0 and anything is that thing: the sums start from the first chunk's.
        for i in cutlass.range_constexpr(g.accumulator_columns // 2):
            sums[i] = Float32(-0.0)
        for chunk in cutlass.range(g.chunks, unroll=1):
            place = ptx.remainder(chunk, ACCUMULATORS)
            bulk.wait(full + 8 * place, ptx.remainder(ptx.quotient(chunk, ACCUMULATORS), 2))
            cute.arch.sync_warp()
            tcgen05.fence_after()
            first = tensor + place * g.accumulator_columns + (lanes << 16)
            for column in cutlass.range_constexpr(0, g.accumulator_columns, LOADED):
                self.add(sums, first, column)
            tcgen05.fence_before()
            cute.arch.sync_warp()
            if lane == 0:
                bulk.arrive(full + 8 * (ACCUMULATORS + place))
        # All warps have added: every stage has been read, and the logits take the rings' place.
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumers * WARPGROUP)
        self.leave(sums, shared, lanes, lane)
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumers * WARPGROUP)
        return [StoredLogits(g, shared, thread)]

    def first_lane(self, warp: Int32) -> Int32:
        """The first of the 16 rows of every 128 experts that a warp adds: the two warpgroups divide
        the 32 that a warp can reach."""
        return tcgen05_layout.first_lane(ptx.remainder(warp, 4), ptx.quotient(warp, 4))

    def add(self, sums: cute.Tensor, accumulator: Int32, column: int) -> None:
        """Add one chunk's partial sums of some columns."""
        first, count = column // 2, LOADED // 2
        before = [Float32(sums[first + i]) for i in range(count)]
        for i, value in enumerate(tcgen05.add(accumulator + column, LOADED, before)):
            sums[first + i] = value

    @cute.jit
    def leave(self, sums: cute.Tensor, shared: Int32, lanes: Int32, lane: Int32) -> None:
        """Store the logits as rows, a token each."""
        g = self.g
        for rows in cutlass.range_constexpr(g.row_tiles):
            expert = rows * tcgen05_layout.MMA_M + lanes
            # Idle rows have no column; 16 rows are idle together.
            if expert < g.block_experts:
                place = shared + (lane & 3) * (2 * g.logit_row_bytes)
                place = place + (expert + ptx.quotient(lane, 4)) * 4
                self.leave_rows(sums, rows * (g.tokens_tile // 2), place)

    def leave_rows(self, sums: cute.Tensor, first: int, place: Int32) -> None:
        g = self.g
        for register in range(g.tokens_tile // 2):
            row, column = tcgen05_layout.fragment(0, register)
            ptx.store_shared_f32(
                place + column * g.logit_row_bytes + row * 4, Float32(sums[first + register])
            )

    def store_logits(
        self, totals: Sequence[Sequence[Float32]], shared: Int32, thread: Int32
    ) -> None:
        """They are stored: ``totals`` reads them."""


class StoredLogits(Sequence[Float32]):
    """An accumulator fragment, tokens its rows and experts its columns, that is read from the
    stored logits value by value: it takes no registers."""

    def __init__(self, geometry: Geometry, shared: Int32, thread: Int32) -> None:
        self.g = geometry
        lane = ptx.remainder(thread, LANES)
        row = ptx.quotient(thread, LANES) * 16 + ptx.quotient(lane, 4)
        self.place = shared + row * geometry.logit_row_bytes + (lane & 3) * 8

    def __len__(self) -> int:
        return self.g.block_experts // 2

    def __getitem__(self, register: Any) -> Any:
        row, column = tcgen05_layout.fragment(0, register)
        if register >= len(self):
            raise IndexError(register)
        return ptx.load_shared_f32(self.place + row * self.g.logit_row_bytes + column * 4)
