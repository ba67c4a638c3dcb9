"""The decode form: the whole dense router for a few tokens, weights in registers (CuTe DSL).

Steps 1 to 7 of the router. The summation order is the one that all forms share, so a token's result
does not depend on its neighbours, its row or their number.

A launch has ``groups`` clusters for every tile of tokens (geometry/decode.py). A slab is a range of
the hidden dimension of one or more whole chunks. Each warp holds the weights of one slab, for a few
tiles of 16 experts, in registers. Over all warps of a tile's CTAs,
every weight is requested once, 16 bytes per lane, before the wait on the previous kernel. Then

1. the CTA's share of the hidden states arrives by bulk copies, one per token. CTAs that need the
   same share share the copies (multicast), because the bandwidth into a cluster bounds this step;
2. each warp multiplies: experts are the rows of the MMA, tokens its columns, k ascending, one
   accumulator per chunk;
3. for each part of the cluster's experts (e rank), the partial sums of a token go to one of the
   CTAs with that part. It adds the chunks (summation.py), scores the logits and forms the keys;
4. keys and scores of a token go to one CTA of the cluster, where one warp selects;
5. with several clusters per tile, the last one to write its candidates of a token merges them
   (common/epilogue.py). No CTA waits for one that may not have started, so launches can overlap.

In steps 3 and 4 data crosses CTAs by asynchronous stores; an mbarrier of the receiver counts the
bytes. A CTA exits only after all that is sent to it has arrived and every copy that it requested
has completed.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from build_kernels.kernels.common import epilogue, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier, memory
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, summation
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, LANES
from build_kernels.kernels.dense.geometry.decode import MMA_SYNC_M, MMA_SYNC_N, DecodeGeometry
from build_kernels.kernels.dense.mma.mma_sync import DecodeMmaSync, Sums


class Decode:
    """The host function of the form, when called, and its device code."""

    def __init__(self, geometry: DecodeGeometry, mma: DecodeMmaSync, rule: Scoring) -> None:
        self.g, self.mma, self.rule = geometry, mma, rule
        self.expert_groups = epilogue.ExpertGroups.of(geometry)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        """Launch the kernel for ``routing.tokens`` tokens. Traced as host code.

        Args:
            hidden_states: BF16 [tokens, hidden], rows ``row_stride`` elements apart.
            packed_weight: BF16, laid out by contract.fragment_image.
            bias: FP32 [experts], the biases that experts are selected with.
            logits_out: FP32 [tokens, experts]; null if the logits are not wanted.
            workspace: Tickets and candidates (common/epilogue.py), zero before and after the
                launch; not read with one group.
            row_stride: Elements between the starts of two rows of ``hidden_states``.
            routing: The parameters that all dense kernels share.

        """
        g = self.g
        self.kernel(
            hidden_states,
            packed_weight,
            bias,
            logits_out,
            workspace,
            row_stride,
            routing,
        ).launch(
            grid=(g.ctas, arith.quotient(routing.tokens + (g.tokens_tile - 1), g.tokens_tile), 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster, 1, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        """Route one tile of at most ``tokens_tile`` tokens, with a group of experts per cluster.

        Grid: (``ctas``, tiles of tokens), ``threads`` threads, clusters of ``cluster`` CTAs. The
        rank of a CTA in its cluster is its e rank + ``cluster_e`` * its k rank. The arguments are
        those of ``__call__``.
        """
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(arith.quotient(thread, LANES))
        lane = arith.remainder(thread, LANES)
        cta = cute.arch.block_idx()[0]
        rank = arith.remainder(cta, g.cluster)
        group = arith.quotient(cta, g.cluster)
        e_rank = arith.remainder(rank, g.cluster_e)
        k_rank = arith.quotient(rank, g.cluster_e)
        own_slab = arith.quotient(warp, g.m_tiles // g.warp_m)
        slab = k_rank * g.cta_slabs + own_slab
        m_tile = arith.remainder(warp, g.m_tiles // g.warp_m) * g.warp_m
        first_expert = (group * g.cluster_e + e_rank) * g.cta_experts

        # Tiles of equal size (the last may be smaller), so that few tokens are spread evenly.
        tiles = cute.arch.grid_dim()[1]
        tile = arith.quotient(routing.tokens + (tiles - 1), tiles)
        first_token = cute.arch.block_idx()[1] * tile
        tokens = arith.min_s32(routing.tokens - first_token, tile)

        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        rows = arith.kept(Int32(shared))
        received = rows + g.hidden_bytes
        key_rows = received + g.sums_bytes
        scratch = key_rows + g.key_bytes + warp * g.warp_scratch_bytes
        bias_row = key_rows + g.key_bytes + g.scratch_bytes
        sums_full = bias_row + g.bias_bytes
        keys_full = sums_full + BARRIER_BYTES
        rows_full = keys_full + BARRIER_BYTES

        # slots_k: how many tokens' partial sums this CTA receives; slots: how many it selects for.
        slots_k = arith.quotient(tokens + (g.cluster_k - 1) - k_rank, g.cluster_k)
        slots = arith.quotient(slots_k + (g.cluster_e - 1) - e_rank, g.cluster_e)

        cute.arch.griddepcontrol_launch_dependents()

        # --- Before the wait on the previous kernel: only buffers that the router owns. ---
        if thread == 0:
            mbarrier.init(sums_full, 1)
            mbarrier.init(keys_full, 1)
            mbarrier.init(rows_full, 1)
            mbarrier.fence_init()
            mbarrier.arrive_expect_tx(rows_full, tokens * self.k_slice_bytes(k_rank))
            mbarrier.arrive_expect_tx(sums_full, slots_k * (g.chunks * g.cta_experts * 4))
            if cutlass.const_expr(g.cluster_e > 1):
                mbarrier.arrive_expect_tx(keys_full, slots * (g.group_experts * 8))
        # Relaxed, and before the loads: a release would wait for every load in flight.
        cute.arch.cluster_arrive_relaxed()
        weights = self.mma.load_weight(
            packed_weight, arith.quotient(first_expert, MMA_SYNC_M) + m_tile, slab, lane
        )
        biases.load(
            bias.toint(),
            bias_row,
            group * g.cluster_e + e_rank,
            g.cta_experts,
            g.experts,
            0.0,
            thread,
            g.threads,
        )
        if cutlass.const_expr(g.group_experts < g.lane_keys * LANES):
            self.clear_key_padding(key_rows, thread)
        # The address of this warp's first copy, computed before the wait ends.
        own_token = e_rank + warp * g.cluster_e
        source = hidden_states.toint() + Int64(k_rank * g.cta_hidden) * 2
        source = arith.kept_wide(source + Int64(first_token + own_token) * row_stride * 2)
        cute.arch.sync_threads()
        cute.arch.cluster_wait()

        cute.arch.griddepcontrol_wait()

        # --- 1. hidden states -> shared memory ---
        if lane == 0:
            self.load_hidden(source, rows, rows_full, k_rank, own_token, tokens, row_stride)

        # --- 2. multiply, and 3. send the partial sums to the CTA that adds them ---
        slab_rows = rows + own_slab * (g.slab * 2)
        steps_left = g.hidden_steps - slab * g.slab_steps
        mbarrier.wait_first(rows_full)
        # A CTA may exit only when its multicast copies have arrived in every peer: each CTA says so
        # here, and the cluster_wait before the exit waits for all of them.
        cute.arch.cluster_arrive_relaxed()
        if slab < g.slabs:
            for n_tiles in cutlass.range_constexpr(1, -(-g.tokens_tile // MMA_SYNC_N) + 1):
                if arith.quotient(tokens + (MMA_SYNC_N - 1), MMA_SYNC_N) == n_tiles:
                    sums = self.mma.multiply(weights, slab_rows, n_tiles, steps_left, lane)
                    self.send(sums, received, sums_full, slab, m_tile, e_rank, tokens, lane)
        if slots_k > 0:
            mbarrier.wait_first(sums_full)

        # --- 3. add the chunks, score, and 4. send to the CTA that selects ---
        items = slots_k * g.cta_experts
        for item in cutlass.range(thread, items, g.threads, unroll=1):
            self.score(
                item,
                received,
                bias_row,
                key_rows,
                keys_full,
                logits_out.toint(),
                first_expert,
                first_token,
                k_rank,
                e_rank,
            )
        cute.arch.cluster_wait()
        if cutlass.const_expr(g.cluster_e > 1):
            if slots > 0:
                mbarrier.wait_first(keys_full)
        else:
            cute.arch.sync_threads()

        # --- 4. select: one warp per token ---
        def locate(slot: Int32) -> tuple[Int32, Int32, Int32]:
            token = first_token + (slot * g.cluster_e + e_rank) * g.cluster_k + k_rank
            return key_rows + slot * g.key_row_bytes, scratch, token

        epilogue.route_all(
            routing,
            workspace.toint(),
            (warp, slots, g.warps),
            locate,
            group,
            self.expert_groups,
            lane,
        )

    def key_place(self, column: Int32) -> Int32:
        """Return the offset of a column's (key, score) pair in a key row.

        A lane's pairs are 32 apart, so that the lanes of a warp read without bank conflicts.
        """
        g = self.g
        lane = arith.quotient(column, g.lane_keys)
        return (arith.remainder(column, g.lane_keys) * LANES + lane) * 8

    @cute.jit
    def clear_key_padding(self, key_rows: Int32, thread: Int32) -> None:
        """Store key 0, no candidate, behind the group's experts. All threads call this."""
        g = self.g
        padding = g.lane_keys * LANES - g.group_experts
        for item in range(thread, g.slots * padding, g.threads):
            column = g.group_experts + arith.remainder(item, padding)
            row = key_rows + arith.quotient(item, padding) * g.key_row_bytes
            memory.store_shared_v2(row + self.key_place(column), Int32(0), Int32(0))

    def k_slice_bytes(self, k_rank: Int32) -> Int32:
        """Return the bytes of one token's hidden states that this CTA needs."""
        g = self.g
        return arith.min_s32(Int32(g.cta_hidden), g.hidden - k_rank * g.cta_hidden) * 2

    @cute.jit
    def load_hidden(
        self,
        source: Int64,
        rows: Int32,
        rows_full: Int32,
        k_rank: Int32,
        own_token: Int32,
        tokens: Int32,
        row_stride: Int64,
    ) -> None:
        """Copy this CTA's share of the tile's hidden states to shared memory.

        One lane of every warp calls this, because the copies of one warp would be issued one after
        the other. CTAs that need the same share divide the tokens and multicast. ``source`` is the
        global address of the share of ``own_token``, the warp's first. The barrier ``rows_full``
        counts the bytes.
        """
        g = self.g
        size = self.k_slice_bytes(k_rank)
        for token in cutlass.range(own_token, tokens, g.warps * g.cluster_e, unroll=1):
            target = rows + token * g.row_bytes
            if cutlass.const_expr(g.cluster_e > 1):
                peers = Int32((1 << g.cluster_e) - 1) << (k_rank * g.cluster_e)
                async_copy.bulk_multicast(target, source, size, rows_full, peers)
            else:
                async_copy.bulk(target, source, size, rows_full)
            source = source + row_stride * (g.warps * g.cluster_e * 2)

    @cute.jit
    def send(
        self,
        sums: Sums,
        received: Int32,
        sums_full: Int32,
        slab: Int32,
        m_tile: Int32,
        e_rank: Int32,
        tokens: Int32,
        lane: Int32,
    ) -> None:
        """Store this warp's partial sums in the CTAs that add them; their ``sums_full`` counts.

        A lane holds the experts lane / 4 and lane / 4 + 8 of each m-tile, for two neighbouring
        tokens. A token's values become neighbours in memory.
        """
        g = self.g
        place = m_tile * MMA_SYNC_M + arith.quotient(lane, 4) * (2 * g.warp_m)
        for tile in cutlass.range_constexpr(len(sums[0][0])):
            for column in cutlass.range_constexpr(2):
                token = tile * MMA_SYNC_N + (lane & 3) * 2 + column
                slot = arith.quotient(token, g.cluster_k)
                owner = arith.remainder(token, g.cluster_k) * g.cluster_e + e_rank
                barrier = memory.map_shared(sums_full, owner)
                for part in cutlass.range_constexpr(g.slab_chunks):
                    chunk = slab * g.slab_chunks + part
                    target = received + ((slot * g.chunks + chunk) * g.cta_experts + place) * 4
                    remote = memory.map_shared(target, owner)
                    words = [
                        arith.bits(sums[m][part][tile][register])
                        for m in range(g.warp_m)
                        for register in (column, column + 2)
                    ]
                    if token < tokens and chunk < g.chunks:
                        async_copy.store_async(remote, barrier, words)

    @cute.jit
    def score(
        self,
        item: Int32,
        received: Int32,
        bias_row: Int32,
        key_rows: Int32,
        keys_full: Int32,
        logits_out: Int64,
        first_expert: Int32,
        first_token: Int32,
        k_rank: Int32,
        e_rank: Int32,
    ) -> None:
        """Add the chunks of one (slot, expert) item, score it, and send key and score on.

        The barrier ``keys_full`` of the CTA that selects counts the bytes; with one e rank, plain
        stores to this CTA's key rows suffice. ``logits_out`` is 0 if the logits are not wanted.
        """
        g = self.g
        slot = arith.quotient(item, g.cta_experts)
        place = arith.remainder(item, g.cta_experts)
        start = received + (slot * (g.chunks * g.cta_experts) + place) * 4
        terms = [
            memory.load_shared_f32(start + chunk * (g.cta_experts * 4)) for chunk in range(g.chunks)
        ]
        # Undo the order in which ``send`` stored a warp's experts.
        width = 2 * g.warp_m
        in_warp = arith.remainder(place, MMA_SYNC_M * g.warp_m)
        expert = arith.remainder(in_warp, width) * 8 + arith.quotient(in_warp, width)
        expert = expert + (place - in_warp)
        bias = memory.load_shared_f32(bias_row + expert * 4)
        logit = summation.add_chunks(terms, arith.add_rn)
        score = self.rule.score(logit)
        real = arith.less(first_expert + expert, Int32(g.experts))
        key = arith.select(real, scoring.ordered_key(logit, score, bias), Int32(0))
        pair = [key, arith.bits(score)]
        target = key_rows + arith.quotient(slot, g.cluster_e) * g.key_row_bytes
        target = target + self.key_place(e_rank * g.cta_experts + expert)
        if cutlass.const_expr(g.cluster_e > 1):
            owner = k_rank * g.cluster_e + arith.remainder(slot, g.cluster_e)
            barrier = memory.map_shared(keys_full, owner)
            async_copy.store_async(memory.map_shared(target, owner), barrier, pair)
        else:
            memory.store_shared_v2(target, *pair)
        if logits_out != 0 and real:
            token = Int64(first_token + slot * g.cluster_k + k_rank)
            memory.store_global_b32(
                logits_out + (token * g.experts + first_expert + expert) * 4,
                scoring.stored_logit(logit),
            )
