"""The split form of dense_router_prefill, for batches that the other form cannot spread over the
GPU.

The hidden dimension is divided among the blocks of a cluster (split_geometry.py). A launch is

1. before the wait on the previous kernel: a block requests its weights, all of them, by bulk copies
   of the packed image;
2. after it: the block's slice of the tile's hidden states, by the tensor map, 64 elements a stage;
3. each warpgroup multiplies 64 experts by all tokens of the tile over one chunk: experts are the
   rows of the MMA, tokens its columns, k ascending, one accumulator;
4. when every block of the cluster has read its operands, their place takes the partial sums: those
   of a token go to one block of the cluster, as one bulk copy from each, staged in parts where they
   do not fit at once;
5. that block adds the chunks in ascending order, scores, and one warp a token selects;
6. with several groups of experts, the last to finish a token merges (common/finish.py).

An mbarrier of the receiver counts the bytes of each part. A part takes the place of an earlier one
when a cluster barrier says that all have received that. A block leaves only after everything sent
to it has arrived and everything it sent has been received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from build_kernels.kernels.common import bulk, finish, ptx, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.dense_router_prefill.geometry import (
    K_BLOCK,
    LANES,
    MMA_K,
    MMA_M,
    WARPGROUP,
)
from build_kernels.kernels.dense_router_prefill.hidden_map import hidden_map
from build_kernels.kernels.dense_router_prefill.split_geometry import SplitGeometry

#: Named barrier of the warps that multiply.
CONSUMERS = 1


class SplitPrefill:
    def __init__(self, geometry: SplitGeometry) -> None:
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
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.tokens_tile)
        self.dense_router_prefill(
            tensor_map,
            packed_weight,
            bias,
            logits_out,
            workspace,
            routing,
        ).launch(
            grid=(g.cluster_k, ptx.quotient(tokens + (g.tokens_tile - 1), g.tokens_tile), g.groups),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_k, 1, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def dense_router_prefill(
        self,
        hidden_states: cute.CopyAtom,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        routing: Routing,
    ) -> None:
        g = self.g
        tokens = routing.tokens
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(ptx.quotient(thread, LANES))
        lane = ptx.remainder(thread, LANES)
        part_k = cute.arch.block_idx()[0]
        first_token = cute.arch.block_idx()[1] * g.tokens_tile
        group = cute.arch.block_idx()[2]
        tile_tokens = ptx.min_s32(tokens - first_token, Int32(g.tokens_tile))

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        ring = shared + g.weight_bytes
        staged = shared + g.staged_offset
        biases = shared + g.bias_offset
        weight_full = shared + g.barrier_offset
        hidden_full = weight_full + 8 * g.blocks
        hidden_empty = hidden_full + 8 * g.hidden_stages
        sums_full = hidden_empty + 8 * g.hidden_stages

        cute.arch.griddepcontrol_launch_dependents()

        # --- 1. Before the wait on the previous kernel: only what the router owns. ---
        if warp == g.feeder and lane == 0:
            bulk.prefetch_tensor_map(bulk.tensor_map_address(hidden_states))
            self.start(weight_full, hidden_full, hidden_empty, sums_full, part_k, tile_tokens)
            self.feed_weight(packed_weight.toint(), shared, weight_full, part_k, group)
        for i in cutlass.range_constexpr(-(-g.group_experts // g.threads)):
            place = thread + i * g.threads
            if place < g.group_experts:
                expert = group * g.group_experts + place
                value = Float32(0.0)
                if expert < g.experts:
                    value = ptx.load_global_f32(bias.toint() + Int64(expert) * 4)
                ptx.store_shared_f32(biases + place * 4, value)
        self.acquire(shared, warp)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()

        # --- 2. hidden states -> shared memory ---
        if warp == g.feeder:
            if lane == 0:
                self.feed_hidden(
                    bulk.tensor_map_address(hidden_states),
                    ring,
                    hidden_full,
                    hidden_empty,
                    first_token,
                    part_k,
                )
            cute.arch.sync_warp()
        if g.rings and warp == g.feeder:
            self.keep_company()
        if warp < g.consumer_warps:
            # --- 3. multiply ---
            sums = self.multiply(shared, ring, weight_full, hidden_full, hidden_empty, warp, lane)
            # --- 4. hand the partial sums to the block that adds them ---
            # Relaxed: it orders reads that are complete, and publishes nothing.
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
            for part in cutlass.range_constexpr(g.parts):
                if cutlass.const_expr(part >= g.sums_buffers):
                    ptx.barrier_wait(sums_full + 8 * (part - g.sums_buffers))
                    cute.arch.cluster_arrive_relaxed()
                    cute.arch.cluster_wait()
                buffer = staged + part % g.sums_buffers * (g.part_tokens * g.sums_row_bytes)
                self.stage(sums, buffer, part, warp, lane)
                ptx.fence_async_shared()
                self.sync_consumers()
                self.send(
                    buffer, shared, sums_full + 8 * part, part, part_k, tile_tokens, warp, lane
                )
            for part in cutlass.range_constexpr(max(0, g.parts - g.sums_buffers), g.parts):
                ptx.barrier_wait(sums_full + 8 * part)
            # The peers may leave once everybody has what they staged; awaited at the end.
            cute.arch.cluster_arrive_relaxed()

            # --- 5. add the chunks, score, select ---
            slots = self.owned(tile_tokens, part_k)
            self.score(
                shared, biases, logits_out.toint(), slots, first_token, part_k, group, thread
            )
            self.sync_consumers()
            self.give_back(shared, warp)

            def locate(slot: Int32) -> tuple[Int32, Int32, Int32]:
                row = shared + slot * g.slot_bytes
                return row, row + g.group_experts * 8, first_token + slot * g.cluster_k + part_k

            finish.route_all(
                routing,
                workspace.toint(),
                (warp, slots, g.consumer_warps),
                locate,
                group,
                self.division,
                lane,
                cute.arch.cluster_wait,
            )
        else:
            cute.arch.cluster_wait()

    def keep_company(self) -> None:
        """The cluster barriers of the others, but for the last wait."""
        for _ in range(1 + self.g.parts - self.g.sums_buffers):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.cluster_arrive_relaxed()

    def sync_consumers(self) -> None:
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=self.g.consumers)

    def owned(self, tokens: Int32, part_k: Int32) -> Int32:
        """How many of the tile's first ``tokens`` tokens this block adds."""
        g = self.g
        return ptx.quotient(tokens + (g.cluster_k - 1) - part_k, g.cluster_k)

    # --- the feeding thread -----------------------------------------------------------------------

    def start(
        self,
        weight_full: Int32,
        hidden_full: Int32,
        hidden_empty: Int32,
        sums_full: Int32,
        part_k: Int32,
        tile_tokens: Int32,
    ) -> None:
        """Make the barriers, and expect what will come: bytes from the peers, and a warp's arrivals
        for the own sums of each token that this block adds."""
        g = self.g
        for stage in range(g.blocks):
            ptx.barrier_init(weight_full + 8 * stage, 1)
        for stage in range(g.hidden_stages):
            ptx.barrier_init(hidden_full + 8 * stage, 1)
            ptx.barrier_init(hidden_empty + 8 * stage, 1)
        owned, before = [], Int32(0)
        for part in range(g.parts):
            until = ptx.min_s32(tile_tokens, Int32((part + 1) * g.part_tokens))
            owned.append(self.owned(until, part_k) - before)
            before = before + owned[part]
            ptx.barrier_init(sums_full + 8 * part, owned[part] * LANES + 1)
        ptx.barrier_init_fence()
        for part in range(g.parts):
            of_peers = owned[part] * (g.slot_bytes - g.sums_bytes)
            ptx.barrier_expect(sums_full + 8 * part, of_peers)

    def feed_weight(
        self, weight: Int64, shared: Int32, weight_full: Int32, part_k: Int32, group: Int32
    ) -> None:
        """Request all weights, in the order in which the hidden states will come."""
        g = self.g
        first = weight + Int64(group * g.weight_stage_bytes)
        for order in range(g.blocks):
            stage = self.stage_of(order)
            block = Int64(part_k * g.blocks + stage)
            ptx.barrier_expect(weight_full + 8 * stage, Int32(g.weight_stage_bytes))
            ptx.copy_bulk(
                shared + stage * g.weight_stage_bytes,
                first + block * (g.padded_experts * K_BLOCK * 2),
                Int32(g.weight_stage_bytes),
                weight_full + 8 * stage,
            )

    def feed_hidden(
        self,
        tensor_map: Int64,
        ring: Int32,
        full: Int32,
        empty: Int32,
        first_token: Int32,
        part_k: Int32,
    ) -> None:
        """Request the slice of the hidden states, 64 elements of one chunk after the other's."""
        g = self.g
        for order in range(g.blocks):
            place = order % g.hidden_stages
            if order >= g.hidden_stages:
                bulk.wait(empty + 8 * place, Int32((order // g.hidden_stages - 1) % 2))
            ptx.barrier_expect(full + 8 * place, Int32(g.hidden_stage_bytes))
            bulk.copy_tile(
                ring + place * g.hidden_stage_bytes,
                tensor_map,
                (part_k * g.blocks + self.stage_of(order)) * K_BLOCK,
                first_token,
                full + 8 * place,
            )

    def stage_of(self, order: int) -> int:
        """The block of the slice that is requested so late: the chunks take turns, since different
        warpgroups wait for them."""
        g = self.g
        return order % g.block_chunks * g.chunk_blocks + order // g.block_chunks

    # --- the warpgroups ---------------------------------------------------------------------------

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
    ) -> cute.Tensor:
        """This warpgroup's partial sums: the accumulator of 64 experts x the tile's tokens."""
        g = self.g
        m_tile, chunk = self.task(warp)
        op = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (MMA_M, g.tokens_tile, MMA_K),
            warpgroup.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        start = cute.make_tiled_mma(cute.make_mma_atom(op))
        start.set(warpgroup.Field.ACCUMULATE, False)
        go_on = cute.make_tiled_mma(cute.make_mma_atom(op))
        go_on.set(warpgroup.Field.ACCUMULATE, True)

        smem = cute.AddressSpace.smem
        own = (
            shared
            + chunk * (g.chunk_blocks * g.weight_stage_bytes)
            + m_tile * (MMA_M * K_BLOCK * 2)
        )
        weight = cute.make_tensor(
            cute.make_ptr(BFloat16, own, smem, assumed_align=1024),
            cute.make_layout(
                ((8, MMA_M // 8), (8, K_BLOCK // 8), g.chunk_blocks),
                stride=((8, 8 * K_BLOCK), (1, 64), g.group_experts * K_BLOCK),
            ),
        )
        hidden = cute.make_tensor(
            cute.recast_ptr(
                cute.make_ptr(BFloat16, ring, smem, assumed_align=1024),
                cute.make_swizzle(3, 4, 3),
                dtype=BFloat16,
            ),
            cute.make_layout(
                (g.tokens_tile, K_BLOCK, g.hidden_stages),
                stride=(K_BLOCK, 1, g.tokens_tile * K_BLOCK),
            ),
        )
        slice_ = start.get_slice(0)
        a = start.make_fragment_A(slice_.partition_A(weight))
        b = start.make_fragment_B(slice_.partition_B(hidden))
        sums = cute.make_rmem_tensor(slice_.partition_shape_C((MMA_M, g.tokens_tile)), Float32)
        for block in cutlass.range_constexpr(g.chunk_blocks):
            place = chunk + block * g.block_chunks
            bulk.wait(weight_full + 8 * (chunk * g.chunk_blocks + block), Int32(0))
            bulk.wait(hidden_full + 8 * place, Int32(0))
            warpgroup.fence()
            for step in cutlass.range_constexpr(K_BLOCK // MMA_K):
                cute.gemm(
                    start if block == 0 and step == 0 else go_on,
                    sums,
                    a[None, None, step, block],
                    b[None, None, step, place],
                    sums,
                )
            warpgroup.commit_group()
        warpgroup.wait_group(0)
        return sums

    def acquire(self, shared: Int32, warp: Int32) -> None:
        """Before the block's first barrier: what ``multiply`` needs beside registers."""

    def give_back(self, shared: Int32, warp: Int32) -> None:
        """After a barrier that follows ``multiply``: what ``acquire`` took."""

    def first_row(self, warp: Int32) -> Int32:
        """The first of the 16 experts whose sums a warp has: lane l those of l / 4 and 8 more."""
        return self.task(warp)[0] * MMA_M + ptx.remainder(warp, 4) * 16

    def task(self, warp: Int32) -> tuple[Int32, Int32]:
        """(m-tile, chunk of the slice) of a warp's warpgroup."""
        number = ptx.quotient(warp, WARPGROUP // LANES)
        return ptx.remainder(number, self.g.m_tiles), ptx.quotient(number, self.g.m_tiles)

    def stage(self, sums: cute.Tensor, buffer: Int32, part: int, warp: Int32, lane: Int32) -> None:
        """Store the sums of a part's tokens as rows: chunk, m-tile, expert.

        A lane holds the experts lane / 4 and lane / 4 + 8 of 16, of two neighbouring tokens in 8;
        the two experts of a token become neighbours in memory.
        """
        g = self.g
        chunk = self.task(warp)[1]
        place = self.first_row(warp) + ptx.quotient(lane, 4) * 2
        target = buffer + (lane & 3) * (2 * g.sums_row_bytes)
        target = target + (chunk * g.group_experts + place) * 4
        for eight in range(g.part_tokens // 8):
            for column in range(2):
                first = 4 * (part * (g.part_tokens // 8) + eight) + column
                ptx.store_shared_v2(
                    target + (8 * eight + column) * g.sums_row_bytes,
                    ptx.bits(Float32(sums[first])),
                    ptx.bits(Float32(sums[first + 2])),
                )

    @cute.jit
    def send(
        self,
        buffer: Int32,
        received: Int32,
        full: Int32,
        part: cutlass.Constexpr[int],
        part_k: Int32,
        tile_tokens: Int32,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Copy the rows of a part to the blocks that add them, a warp each."""
        g = self.g
        begin = part * g.part_tokens
        end = ptx.min_s32(tile_tokens, Int32(begin + g.part_tokens))
        for token in cutlass.range(begin + warp, end, g.consumer_warps, unroll=1):
            slot = received + ptx.quotient(token, g.cluster_k) * g.slot_bytes
            bulk.copy_to_block(
                slot + part_k * g.sums_bytes,
                buffer + (token - begin) * g.sums_row_bytes,
                g.sums_bytes,
                full,
                ptx.remainder(token, g.cluster_k),
                part_k,
                lane,
            )

    @cute.jit
    def score(
        self,
        received: Int32,
        biases: Int32,
        logits_out: Int64,
        slots: Int32,
        first_token: Int32,
        part_k: Int32,
        group: Int32,
        thread: Int32,
    ) -> None:
        """Add the chunks of every (slot, expert) in ascending order; leave key and score of a
        slot's experts in its row, ``lane_keys`` for each lane of a warp, 32 pairs apart.

        ``logits_out`` is 0 where nobody asked for the logits.
        """
        g = self.g
        items = slots * g.group_experts
        results = []
        for turn in cutlass.range_constexpr(g.turns):
            item = thread + turn * g.consumers
            inside = ptx.min_s32(item, Int32(g.slots * g.group_experts - 1))
            slot = ptx.quotient(inside, g.group_experts)
            place = ptx.remainder(inside, g.group_experts)
            # Undo the order that the accumulators gave the experts.
            column = (place & -16) | (place & 1) << 3 | (place & 15) >> 1
            start = received + slot * g.slot_bytes + place * 4
            terms = [
                ptx.load_shared_f32(start + chunk * (g.group_experts * 4))
                for chunk in range(g.chunks)
            ]
            logit = terms[0]
            for term in terms[1:]:
                logit = ptx.add_rn(logit, term)
            score = scoring.score(logit)
            expert = group * g.group_experts + column
            real = ptx.less(expert, Int32(g.experts))
            key = scoring.ordered_key(logit, score, ptx.load_shared_f32(biases + column * 4))
            key = ptx.select(real, key, Int32(0))
            if logits_out != 0 and item < items and real:
                token = Int64(first_token + slot * g.cluster_k + part_k)
                ptx.store_global_b32(
                    logits_out + (token * g.experts + expert) * 4, scoring.stored_logit(logit)
                )
            pair = ptx.remainder(column, g.lane_keys) * LANES + ptx.quotient(column, g.lane_keys)
            results.append((item, received + slot * g.slot_bytes + pair * 8, key, score))
        # The pairs take the place of sums: of chunk 0 and 1, which all have read by then.
        self.sync_consumers()
        for item, target, key, score in results:
            if item < items:
                ptx.store_shared_v2(target, key, ptx.bits(score))


def program(
    constants: Mapping[str, int | float], form: type[SplitPrefill] = SplitPrefill
) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    kinds = ("ptr:bf16", "ptr:bf16", "ptr:f32", "ptr:f32", "ptr:u32", "i64")
    return form(SplitGeometry.of(constants)), finish.arguments(*kinds)
