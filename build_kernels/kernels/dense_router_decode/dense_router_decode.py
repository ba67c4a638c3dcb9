"""dense_router_decode: the whole dense router for a few tokens, in one launch (CuTe DSL).

Mathematics: steps 1 to 7 of the router; the reduction order is the canonical one, so a token's
result does not depend on its neighbours, its row or their number.

How it runs. A launch is a few clusters for every tile of tokens (geometry.py). A warp keeps one
slab of the hidden dimension of a few expert tiles in registers: with all warps of a tile's blocks,
every weight is requested once, 16 bytes a lane, before the wait on the previous kernel. Then

1. the block's slice of the hidden states arrives by bulk copies, one a token; blocks that need the
   same slice share the copies (multicast), since a cluster's inlet is what bounds this step;
2. each warp multiplies: experts are the rows of the MMA, tokens its columns, k ascending, one
   accumulator a chunk;
3. the partial sums of a token go to one block of the cluster, which adds the chunks in ascending
   order, scores the logits and forms the keys;
4. keys and scores of a token go to its owner, one block of the cluster, where one warp selects;
5. with several clusters a tile, the last one to leave its candidates of a token merges them
   (finish.py): no block waits for one that may not have started, so launches can overlap freely.

Steps 3 and 4 cross blocks by asynchronous stores; an mbarrier of the receiver counts the bytes. A
block leaves only after everything sent to it has arrived and every copy it requested has landed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common import finish, ptx, scoring, selection
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.dense_router_decode.geometry import (
    LANES,
    MMA_K,
    MMA_M,
    MMA_N,
    Geometry,
)
from build_kernels.kernels.dense_router_prefill import split_tcgen05


class DenseRouterDecode:
    def __init__(self, geometry: Geometry) -> None:
        self.g = geometry
        self.division = finish.Division(
            geometry.groups,
            geometry.group_experts,
            geometry.experts,
            geometry.top_k,
            geometry.ticket_bytes,
        )

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
        g = self.g
        self.dense_router_decode(
            hidden_states,
            packed_weight,
            bias,
            logits_out,
            workspace,
            row_stride,
            routing,
        ).launch(
            grid=(g.blocks, ptx.quotient(routing.tokens + (g.tokens_tile - 1), g.tokens_tile), 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_e * g.cluster_k, 1, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def dense_router_decode(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(ptx.quotient(thread, LANES))
        lane = ptx.remainder(thread, LANES)
        block = cute.arch.block_idx()[0]
        rank = ptx.remainder(block, g.cluster_e * g.cluster_k)
        group = ptx.quotient(block, g.cluster_e * g.cluster_k)
        part_e = ptx.remainder(rank, g.cluster_e)
        part_k = ptx.quotient(rank, g.cluster_e)
        own_slab = ptx.quotient(warp, g.m_tiles // g.warp_m)
        slab = part_k * g.block_slabs + own_slab
        m_tile = ptx.remainder(warp, g.m_tiles // g.warp_m) * g.warp_m
        first_expert = (group * g.cluster_e + part_e) * g.block_experts

        # The tiles are of one size, so that few tokens spread evenly.
        tiles = cute.arch.grid_dim()[1]
        tile = ptx.quotient(routing.tokens + (tiles - 1), tiles)
        first_token = cute.arch.block_idx()[1] * tile
        tokens = ptx.min_s32(routing.tokens - first_token, tile)

        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        rows = ptx.kept(Int32(shared))
        partials = rows + g.hidden_bytes
        key_rows = partials + g.partial_bytes
        scratch = key_rows + g.key_bytes + warp * (g.top_k * selection.RECORD_BYTES)
        biases = key_rows + g.key_bytes + g.scratch_bytes
        partials_full = biases + g.bias_bytes
        keys_full = partials_full + 8
        rows_full = keys_full + 8

        # Tokens whose partial sums come here, and tokens that this block owns.
        slots_k = ptx.quotient(tokens + (g.cluster_k - 1) - part_k, g.cluster_k)
        slots = ptx.quotient(slots_k + (g.cluster_e - 1) - part_e, g.cluster_e)

        cute.arch.griddepcontrol_launch_dependents()

        # --- Before the wait on the previous kernel: only what the router owns. ---
        if thread == 0:
            ptx.barrier_init(partials_full, 1)
            ptx.barrier_init(keys_full, 1)
            ptx.barrier_init(rows_full, 1)
            ptx.barrier_init_fence()
            ptx.barrier_expect(rows_full, tokens * self.slice_bytes(part_k))
            ptx.barrier_expect(partials_full, slots_k * (g.chunks * g.block_experts * 4))
            if cutlass.const_expr(g.cluster_e > 1):
                ptx.barrier_expect(keys_full, slots * (g.group_experts * 8))
        # Relaxed, and before the loads: a release would wait for every load in flight.
        cute.arch.cluster_arrive_relaxed()
        weights = self.request_weights(
            packed_weight, ptx.quotient(first_expert, MMA_M) + m_tile, slab, lane
        )
        for i in cutlass.range_constexpr(-(-g.block_experts // g.threads)):
            expert = thread + i * g.threads
            if expert < g.block_experts:
                value = Float32(0.0)
                if first_expert + expert < g.experts:
                    value = ptx.load_global_f32(bias.toint() + Int64(first_expert + expert) * 4)
                ptx.store_shared_f32(biases + expert * 4, value)
        if cutlass.const_expr(g.group_experts < g.lane_keys * LANES):
            self.clear_key_padding(key_rows, thread)
        # Where this warp's first copy starts, ready when the wait ends.
        own_token = part_e + warp * g.cluster_e
        source = hidden_states.toint() + Int64(part_k * g.block_hidden) * 2
        source = ptx.kept_wide(source + Int64(first_token + own_token) * row_stride * 2)
        cute.arch.sync_threads()
        cute.arch.cluster_wait()

        cute.arch.griddepcontrol_wait()

        # --- 1. hidden states -> shared memory ---
        if lane == 0:
            self.request_rows(source, rows, rows_full, part_k, own_token, tokens, row_stride)

        # --- 2. multiply, and 3. hand the partial sums to the block that adds them ---
        slab_rows = rows + own_slab * (g.slab * 2)
        steps_left = g.hidden_steps - slab * g.slab_steps
        ptx.barrier_wait(rows_full)
        # The peers may leave once everybody has what they requested; awaited below.
        cute.arch.cluster_arrive_relaxed()
        if slab < g.slabs:
            for n_tiles in cutlass.range_constexpr(1, -(-g.tokens_tile // MMA_N) + 1):
                if ptx.quotient(tokens + (MMA_N - 1), MMA_N) == n_tiles:
                    sums = self.multiply(weights, slab_rows, n_tiles, steps_left, lane)
                    self.send(sums, partials, partials_full, slab, m_tile, part_e, tokens, lane)
        if slots_k > 0:
            ptx.barrier_wait(partials_full)

        # --- 3. add the chunks in ascending order, score, and 4. hand over to the token's owner ---
        items = slots_k * g.block_experts
        for item in cutlass.range(thread, items, g.threads, unroll=1):
            self.score(
                item,
                partials,
                biases,
                key_rows,
                keys_full,
                logits_out.toint(),
                first_expert,
                first_token,
                part_k,
                part_e,
            )
        cute.arch.cluster_wait()
        if cutlass.const_expr(g.cluster_e > 1):
            if slots > 0:
                ptx.barrier_wait(keys_full)
        else:
            cute.arch.sync_threads()

        # --- 4. select: one warp a token ---
        def locate(slot: Int32) -> tuple[Int32, Int32, Int32]:
            token = first_token + (slot * g.cluster_e + part_e) * g.cluster_k + part_k
            return key_rows + slot * g.key_row_bytes, scratch, token

        finish.route_all(
            routing,
            workspace.toint(),
            (warp, slots, g.warps),
            locate,
            group,
            self.division,
            lane,
        )

    def request_weights(
        self, packed_weight: cute.Pointer, m_tile: Int32, slab: Int32, lane: Int32
    ) -> list[list[list[Int32]]]:
        """Start loading this warp's A fragments, [m-tile][step][register].

        The recipe in contract.py lays them out as the lanes read them: a k16 step of an m-tile is
        32 lanes x 16 bytes, the steps follow each other.
        """
        g = self.g
        step = slab * g.slab_steps
        fragments = []
        for tile in range(g.warp_m):
            first = (Int64(m_tile + tile) * g.hidden_steps + step) * LANES + lane
            steps = []
            for i in range(g.slab_steps):
                # A short last slab reads its last step again; multiply skips it.
                inside = g.hidden % g.slab == 0
                offset = Int32(i) if inside else ptx.min_s32(Int32(i), g.hidden_steps - 1 - step)
                address = packed_weight.toint() + (first + offset * LANES) * 16
                steps.append(ptx.load_weight_v4(address))
            fragments.append(steps)
        return fragments

    def key_place(self, column: Int32) -> Int32:
        """Offset of a column in a key row: a lane's keys are 32 apart, so that lanes never
        collide."""
        g = self.g
        lane = ptx.quotient(column, g.lane_keys)
        return (ptx.remainder(column, g.lane_keys) * LANES + lane) * 8

    @cute.jit
    def clear_key_padding(self, key_rows: Int32, thread: Int32) -> None:
        """Columns past the group's experts hold key 0: no candidate."""
        g = self.g
        padding = g.lane_keys * LANES - g.group_experts
        for item in range(thread, g.slots * padding, g.threads):
            column = g.group_experts + ptx.remainder(item, padding)
            row = key_rows + ptx.quotient(item, padding) * g.key_row_bytes
            ptx.store_shared_v2(row + self.key_place(column), Int32(0), Int32(0))

    def slice_bytes(self, part_k: Int32) -> Int32:
        """Bytes of a token that this block needs."""
        g = self.g
        return ptx.min_s32(Int32(g.block_hidden), g.hidden - part_k * g.block_hidden) * 2

    @cute.jit
    def request_rows(
        self,
        source: Int64,
        rows: Int32,
        rows_full: Int32,
        part_k: Int32,
        own_token: Int32,
        tokens: Int32,
        row_stride: Int64,
    ) -> None:
        """Copy a slice of the tokens to shared memory, shared out among the blocks that need it.

        One lane of every warp asks: the copies of one warp would be issued one after the other.
        ``source`` is where the slice of ``own_token``, the warp's first, starts.
        """
        g = self.g
        size = self.slice_bytes(part_k)
        for token in cutlass.range(own_token, tokens, g.warps * g.cluster_e, unroll=1):
            target = rows + token * g.row_bytes
            if cutlass.const_expr(g.cluster_e > 1):
                peers = Int32((1 << g.cluster_e) - 1) << (part_k * g.cluster_e)
                ptx.copy_bulk_multicast(target, source, size, rows_full, peers)
            else:
                ptx.copy_bulk(target, source, size, rows_full)
            source = source + row_stride * (g.warps * g.cluster_e * 2)

    @cute.jit
    def send(
        self,
        sums: list[list[list[list[Float32]]]],
        partials: Int32,
        partials_full: Int32,
        slab: Int32,
        m_tile: Int32,
        part_e: Int32,
        tokens: Int32,
        lane: Int32,
    ) -> None:
        """Store accumulators where the chunks are added.

        A lane holds the experts lane / 4 and lane / 4 + 8 of each m-tile, of two neighbouring
        tokens; those of a token become neighbours in memory.
        """
        g = self.g
        place = m_tile * MMA_M + ptx.quotient(lane, 4) * (2 * g.warp_m)
        for tile in cutlass.range_constexpr(len(sums[0][0])):
            for column in cutlass.range_constexpr(2):
                token = tile * MMA_N + (lane & 3) * 2 + column
                slot = ptx.quotient(token, g.cluster_k)
                owner = ptx.remainder(token, g.cluster_k) * g.cluster_e + part_e
                barrier = ptx.map_shared(partials_full, owner)
                for part in cutlass.range_constexpr(g.slab_chunks):
                    chunk = slab * g.slab_chunks + part
                    target = partials + ((slot * g.chunks + chunk) * g.block_experts + place) * 4
                    remote = ptx.map_shared(target, owner)
                    words = [
                        ptx.bits(sums[m][part][tile][register])
                        for m in range(g.warp_m)
                        for register in (column, column + 2)
                    ]
                    if token < tokens and chunk < g.chunks:
                        ptx.store_remote(remote, barrier, words)

    @cute.jit
    def score(
        self,
        item: Int32,
        partials: Int32,
        biases: Int32,
        key_rows: Int32,
        keys_full: Int32,
        logits_out: Int64,
        first_expert: Int32,
        first_token: Int32,
        part_k: Int32,
        part_e: Int32,
    ) -> None:
        """Add the chunks of one (slot, expert) item, score it, hand key and score over.

        ``logits_out`` is 0 where nobody asked for the logits.
        """
        g = self.g
        slot = ptx.quotient(item, g.block_experts)
        place = ptx.remainder(item, g.block_experts)
        start = partials + (slot * (g.chunks * g.block_experts) + place) * 4
        terms = [
            ptx.load_shared_f32(start + chunk * (g.block_experts * 4)) for chunk in range(g.chunks)
        ]
        # Undo the order that the accumulators gave a warp's experts.
        width = 2 * g.warp_m
        in_warp = ptx.remainder(place, MMA_M * g.warp_m)
        expert = ptx.remainder(in_warp, width) * 8 + ptx.quotient(in_warp, width)
        expert = expert + (place - in_warp)
        bias = ptx.load_shared_f32(biases + expert * 4)
        logit = terms[0]
        for term in terms[1:]:
            logit = ptx.add_rn(logit, term)
        score = scoring.score(logit)
        real = ptx.less(first_expert + expert, Int32(g.experts))
        key = ptx.select(real, scoring.ordered_key(logit, score, bias), Int32(0))
        pair = [key, ptx.bits(score)]
        target = key_rows + ptx.quotient(slot, g.cluster_e) * g.key_row_bytes
        target = target + self.key_place(part_e * g.block_experts + expert)
        if cutlass.const_expr(g.cluster_e > 1):
            owner = part_k * g.cluster_e + ptx.remainder(slot, g.cluster_e)
            barrier = ptx.map_shared(keys_full, owner)
            ptx.store_remote(ptx.map_shared(target, owner), barrier, pair)
        else:
            ptx.store_shared_v2(target, *pair)
        if logits_out != 0 and real:
            token = Int64(first_token + slot * g.cluster_k + part_k)
            ptx.store_global_b32(
                logits_out + (token * g.experts + first_expert + expert) * 4,
                scoring.stored_logit(logit),
            )

    def multiply(
        self,
        weights: list[list[list[Int32]]],
        rows: Int32,
        n_tiles: int,
        steps_left: Int32,
        lane: Int32,
    ) -> list[list[list[list[Float32]]]]:
        """This warp's partial sums: [m-tile][chunk][token tile][accumulator register]."""
        g = self.g
        sums = [
            [[[Float32(0.0)] * 4 for _ in range(n_tiles)] for _ in range(g.slab_chunks)]
            for _ in range(g.warp_m)
        ]
        # ldmatrix: lanes 0-7 address the tokens' first 8 elements of two steps, 8-15 the next 8,
        # ...
        row = rows + (lane & 7) * g.row_bytes + ptx.quotient(lane, 8) * 16

        def request(step: int) -> list[list[Int32]]:
            return [
                ptx.ldmatrix_x4(row + (tile * MMA_N * g.row_bytes + step * (MMA_K * 2)))
                for tile in range(n_tiles)
            ]

        # The order of issue is the order here: the next loads first, and neighbours that do not
        # depend on each other, since a chain's next MMA would wait for some 35 cycles.
        ahead = request(0)
        for step in range(g.slab_steps):
            if step % 2 == 0:
                fragments = ahead
                if step + 2 < g.slab_steps:
                    ahead = request(step + 2)
            chunk = step // (g.k_chunk // MMA_K)
            for tile in range(n_tiles):
                for m in range(g.warp_m):
                    before = sums[m][chunk][tile]
                    b = fragments[tile][step % 2 * 2 : step % 2 * 2 + 2]
                    after = ptx.mma_m16n8k16(before, weights[m][step], b)
                    if g.hidden % g.slab:
                        inside = ptx.less(Int32(step), steps_left)
                        after = [
                            ptx.select(inside, new, old)
                            for new, old in zip(after, before, strict=True)
                        ]
                    sums[m][chunk][tile] = after
        return sums


def program(constants: Mapping[str, int | float]) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    if "TCGEN05" in constants:
        return split_tcgen05.program(constants)
    kinds = ("ptr:bf16", "ptr:bf16", "ptr:f32", "ptr:f32", "ptr:u32", "i64")
    return DenseRouterDecode(Geometry.of(constants)), finish.arguments(*kinds)
