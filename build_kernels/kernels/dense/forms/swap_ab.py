"""The swap-A/B form: experts are the rows of the MMA, tokens its columns (CuTe DSL).

So tiles can have any multiple of 8 tokens, and one wave of CTAs covers a batch of a few hundred to
a few thousand tokens. Steps 1 to 7 of the router, in the summation order that all forms share.

A cluster (geometry/swap_ab.py) is parts of the experts x shares of the hidden dimension x tiles of
tokens. A launch:

1. two producer warps fill a ring of stages, 64 hidden elements each: the tile's weights by bulk
   copies of the packed image, already before the wait on the previous kernel, and its hidden states
   by the tensor map. CTAs that need the same data fetch it in turns and multicast;
2. the MMA object multiplies the experts by all tokens of the tile, one chunk at a time, each from
   zero; a consumer warp has the sums of 16 experts;
3. the partial sums of a chunk are added to those of its slice, and the slices to the totals
   (summation.py). If the hidden dimension is split, the CTAs of the k ranks multiply neighbouring
   slices at a time and exchange their sums: each adds some of the tokens (exchange/swap_ab.py);
4. screening, ranking and storing: epilogue/swap_ab.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, cluster, share
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.epilogue.swap_ab import SwapAbEpilogue
from build_kernels.kernels.dense.exchange.swap_ab import (
    SliceExchange,
    exchange_barriers,
    first_n_tile,
)
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.swap_ab import N_TILE, SwapAbGeometry
from build_kernels.kernels.dense.hidden_map import hidden_map
from build_kernels.kernels.dense.mma.interface import BoundSwapAbMma, SwapAbMma
from build_kernels.kernels.dense.ring import Ring, TurnState


class SwapAb:
    """The host function of the form, when called, and its device code."""

    def __init__(self, geometry: SwapAbGeometry, mma: SwapAbMma, rule: Scoring) -> None:
        self.g, self.mma = geometry, mma
        self.epilogue = SwapAbEpilogue(geometry, rule)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        """Launch the kernel for ``routing.tokens`` tokens. Traced as host code.

        Args:
            hidden_states: BF16 [tokens, hidden], rows ``row_stride`` elements apart.
            packed_weight: BF16, laid out by contract.stage_image.
            bias: FP32 [experts], the biases that experts are selected with.
            logits_out: FP32 [tokens, experts]; null if the logits are not wanted.
            row_stride: Elements between the starts of two rows of ``hidden_states``.
            routing: The parameters that all dense kernels share.

        """
        g = self.g
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.tile_tokens)
        tiles = arith.quotient(
            tokens + (g.tile_tokens * g.cluster_t - 1), g.tile_tokens * g.cluster_t
        )
        self.kernel(
            tensor_map,
            packed_weight,
            bias,
            logits_out,
            routing,
        ).launch(
            grid=(g.cluster_x, tiles * g.cluster_t, 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_x, g.cluster_t, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        hidden_states: cute.CopyAtom,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        routing: Routing,
    ) -> None:
        """Route ``cluster_t`` tiles of ``tile_tokens`` tokens per cluster.

        Grid: (``cluster_x``, tiles of tokens), ``threads`` threads, of which the last warpgroup
        produces; clusters of ``cluster_x`` x ``cluster_t`` CTAs. ``hidden_states`` is the tensor
        map; the other arguments are those of ``__call__``.
        """
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(arith.quotient(thread, LANES))
        lane = cute.arch.lane_idx()
        e_rank = arith.remainder(cute.arch.block_idx()[0], g.cluster_e)
        k_rank = arith.quotient(cute.arch.block_idx()[0], g.cluster_e)
        tile = cute.arch.block_idx()[1]
        t_rank = arith.remainder(tile, g.cluster_t)
        cta = Cta(e_rank, k_rank, t_rank)
        first_token = tile * g.tile_tokens

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        bias_row = shared + g.bias_offset
        full = shared + g.barrier_offset
        hidden = Ring.of(shared, g.weight_stage_bytes, g.stage_bytes, g.stages, full)
        weight_empty = hidden.empty + BARRIER_BYTES * g.stages
        weight = Ring(shared, 0, g.stage_bytes, g.stages, full, weight_empty)
        exchange_full = shared + g.exchange_barrier_offset

        cute.arch.griddepcontrol_launch_dependents()

        if thread == 0:
            for stage in cutlass.range_constexpr(g.stages):
                mbarrier.init(full + BARRIER_BYTES * stage, 1)
                mbarrier.init(hidden.empty_at(stage), self.mma.hidden_releases * g.cluster_e)
                mbarrier.init(weight.empty_at(stage), self.mma.weight_releases * g.cluster_t)
            if cutlass.const_expr(g.split_k > 1):
                for buffer in cutlass.range_constexpr(g.buffers):
                    for number in cutlass.range_constexpr(g.consumer_warps):
                        sums_full, sums_empty = exchange_barriers(g, exchange_full, buffer, number)
                        mbarrier.init(sums_full, 1)
                        mbarrier.init(sums_empty, g.split_k - 1)
            mbarrier.fence_init()
            # The first filling of every stage that has one; thread 0 expects later ones in time.
            for stage in cutlass.range_constexpr(g.stages):
                if stage < share.k_blocks(g, k_rank):
                    mbarrier.arrive_expect_tx(full + BARRIER_BYTES * stage, Int32(g.stage_bytes))
        self.mma.allocate(shared, warp)
        biases.load(
            bias.toint(),
            bias_row,
            Int32(0),
            g.padded_experts,
            g.experts,
            biases.LOWEST,
            thread,
            g.threads,
        )
        # Relaxed: the fence has published the barriers, and nothing else crosses CTAs yet.
        if cutlass.const_expr(g.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()

        if warp >= g.consumer_warps:
            cute.arch.setmaxregister_decrease(g.producer_registers)
            self.mma.issue(shared, hidden, weight, cta, warp)
            if warp == g.consumer_warps:
                if lane == 0:
                    tensor_map = async_copy.tensor_map_address(hidden_states)
                    async_copy.prefetch_tensor_map(tensor_map)
                    cute.arch.griddepcontrol_wait()
                    self.load_hidden(tensor_map, hidden, first_token, cta)
            elif warp == g.consumer_warps + 1 and lane == 0:
                first = packed_weight.toint() + Int64(e_rank * g.weight_stage_bytes)
                self.load_weight(first, weight, cta)
            self.arrive_ring_free()
            self.wait_ring_free()
            cluster.wait_for_logits(g.cluster_e, g.cluster)
            cluster.wait_before_exit(g.cluster_e, g.cluster)
        else:
            cute.arch.setmaxregister_increase(g.consumer_registers)
            totals = self.multiply(shared, hidden, weight, cta, warp, lane, thread)
            # From here on the epilogue uses the ring's place: all stages have arrived and been
            # read.
            self.epilogue.sync_consumers()
            self.arrive_ring_free()
            self.epilogue.lay_out_logits(totals, shared, self.mma.first_row(warp), lane)
            self.epilogue.sync_consumers()
            # It returns at once, because the producer has waited already. Each thread waits for
            # itself, so that it may read global memory (masks, counts, ids) from here on.
            cute.arch.griddepcontrol_wait()
            images = Int32(0)
            if routing.serving != 0 and routing.image_mask.toint() != 0:
                images = Int32(1)
                biases.load(
                    routing.image_bias.toint(),
                    shared + g.image_bias_offset,
                    Int32(0),
                    g.padded_experts,
                    g.experts,
                    biases.LOWEST,
                    # ``thread``, anew: no address lives through the multiplication for this.
                    warp * LANES + lane,
                    g.consumer_threads,
                )
                self.epilogue.sync_consumers()
            first_held = first_token + first_n_tile(g, k_rank) * N_TILE
            end_held = arith.min_s32(
                routing.tokens, first_token + first_n_tile(g, k_rank + 1) * N_TILE
            )
            if logits_out.toint() != 0:
                self.epilogue.store_logits(
                    shared, logits_out.toint(), first_held, end_held, e_rank, thread
                )
            self.wait_ring_free()
            self.epilogue.screen(routing, shared, first_held, images, cta, thread)
            cluster.wait_for_logits(g.cluster_e, g.cluster)
            if cutlass.const_expr(g.cluster_e == 1):
                self.epilogue.sync_consumers()
            self.epilogue.rank(routing, shared, first_held, end_held, cta, thread)
            cluster.wait_before_exit(g.cluster_e, g.cluster)

    def arrive_ring_free(self) -> None:
        """Tell the peers that they may write to this CTA's ring. All threads call this.

        Relaxed: the CTA's own reads of the ring have completed.
        """
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive_relaxed()

    def wait_ring_free(self) -> None:
        """Wait until candidates may be written to every ring of the cluster. All threads."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_wait()

    # --- producers ------------------------------------------------------------------------------

    @cute.jit
    def load_hidden(self, tensor_map: Int64, ring: Ring, first_token: Int32, cta: Cta) -> None:
        """Fetch the tile's hidden states for all e ranks, every ``cluster_e``-th block of 64:
        the CTAs of the e ranks take turns.

        One thread calls this.
        """
        g = self.g
        peers = Int32((1 << g.cluster_e) - 1) << g.cta_rank(Int32(0), cta.k_rank, cta.t_rank)
        state = TurnState(g.stages)
        for number in cutlass.range(share.k_blocks(g, cta.k_rank), unroll=1):
            if arith.remainder(number, g.cluster_e) == cta.e_rank:
                if number >= g.stages:
                    mbarrier.wait(ring.empty_at(state.stage), state.phase())
                    state = state.released()
                place = ring.data_at(state.stage)
                x = share.k_block_of(g, number, cta.k_rank) * K_BLOCK
                full = ring.full_at(state.stage)
                if cutlass.const_expr(g.cluster_e > 1):
                    async_copy.tile_multicast(place, tensor_map, x, first_token, full, peers)
                else:
                    async_copy.tile(place, tensor_map, x, first_token, full)
            state = state.next()

    @cute.jit
    def load_weight(self, first: Int64, ring: Ring, cta: Cta) -> None:
        """Fetch this CTA's weights of every ``cluster_t``-th stage, for all t ranks.

        One thread calls this. ``first`` is the global address of this CTA's experts in the first
        block of the packed image.
        """
        g = self.g
        peers = Int32(sum(1 << (i * g.cluster_x) for i in range(g.cluster_t)))
        peers = peers << g.cta_rank(cta.e_rank, cta.k_rank, Int32(0))
        size = Int32(g.weight_stage_bytes)
        state = TurnState(g.stages)
        for number in cutlass.range(share.k_blocks(g, cta.k_rank), unroll=1):
            if arith.remainder(number, g.cluster_t) == cta.t_rank:
                if number >= g.stages:
                    mbarrier.wait(ring.empty_at(state.stage), state.phase())
                    state = state.released()
                place = ring.data_at(state.stage)
                k_block = share.k_block_of(g, number, cta.k_rank)
                address = first + Int64(k_block) * (g.padded_experts * K_BLOCK * 2)
                full = ring.full_at(state.stage)
                if cutlass.const_expr(g.cluster_t > 1):
                    async_copy.bulk_multicast(place, address, size, full, peers)
                else:
                    async_copy.bulk(place, address, size, full)
            state = state.next()

    # --- step 1: the multiplication ---------------------------------------------------------------

    @cute.jit
    def multiply(
        self,
        shared: Int32,
        hidden: Ring,
        weight: Ring,
        cta: Cta,
        warp: Int32,
        lane: Int32,
        thread: Int32,
    ) -> cute.Tensor:
        """Return this thread's logits of the n-tiles that the CTA adds, four per n-tile.

        All consumer threads call this. On return this warp has read all stages.
        """
        g = self.g
        mma = self.mma.bind(shared, hidden, weight, cta, warp, thread)
        totals = cute.make_rmem_tensor(4 * g.held_n_tiles, Float32)
        sums = cute.make_rmem_tensor(4 * g.n_tiles, Float32)
        state = mma.begin()
        self.clear(totals)
        if cutlass.const_expr(g.split_k == 1):
            for run in g.runs:
                for number in cutlass.range(run.start, run.stop, unroll=1):
                    self.clear(sums)
                    whole, short = share.chunks_of_slice(g, run, number)
                    state = self.chunks(mma, state, sums, whole, short)
                    for i in cutlass.range_constexpr(4 * g.n_tiles):
                        totals[i] = arith.add_rn(Float32(totals[i]), Float32(sums[i]))
        else:
            exchange = SliceExchange(g, shared, cta, warp, lane)
            for turn in cutlass.range_constexpr(g.cta_slices):
                whole, short = share.chunks_of_turn(g, turn, cta.k_rank)
                self.clear(sums)
                if cutlass.const_expr(turn >= g.buffers):
                    # The peers' sums that the buffer held before are added under the first chunk.
                    add = partial(exchange.add, totals, turn - g.buffers)
                    state = mma.chunk(state, g.chunk_k_blocks, add)
                    mma.add_to(state, sums)
                    state = self.chunks(mma, state, sums, whole - 1, short)
                else:
                    state = self.chunks(mma, state, sums, whole, short)
                exchange.send(sums, turn)
            for turn in cutlass.range_constexpr(g.cta_slices - g.buffers, g.cta_slices):
                exchange.add(totals, turn)
        return totals

    def clear(self, sums: cute.Tensor) -> None:
        """Set sums to -0: -0 + x is x for every x, so they start from what is added first."""
        for i in range(cute.size(sums)):
            sums[i] = Float32(-0.0)

    def chunks(
        self,
        mma: BoundSwapAbMma,
        state: Any,
        sums: cute.Tensor,
        whole: Int32 | int,
        short: Int32 | int,
    ) -> Any:
        """Multiply ``whole`` chunks, then ``short`` (0 or 1) short ones, and add each to ``sums``.

        Returns the state behind them. No code is made for a short chunk that no CTA has.
        """
        state = self.alike(mma, state, sums, whole, self.g.chunk_k_blocks)
        if isinstance(short, int) and short == 0:
            return state
        return self.alike(mma, state, sums, short, self.g.last_k_blocks)

    @cute.jit
    def alike(
        self,
        mma: BoundSwapAbMma,
        state: Any,
        sums: cute.Tensor,
        count: Int32,
        blocks: cutlass.Constexpr[int],
    ) -> Any:
        """Multiply that many chunks of ``blocks`` blocks and add each to ``sums``."""
        for _ in cutlass.range(count, unroll=1):
            state = mma.chunk(state, blocks, None)
            mma.add_to(state, sums)
        return state
