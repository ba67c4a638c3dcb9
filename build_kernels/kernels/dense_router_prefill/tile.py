"""The tile form of dense_router_prefill: a block owns 128 tokens and a part of the experts.

Mathematics: steps 1 to 7 of the router; the reduction order is the canonical one, so a token's
result does not depend on its neighbours, its row or their number, and equals the decode kernel's.

How it runs. A block owns 128 tokens and a part of the experts (geometry.py). Two warps feed two
rings of shared-memory stages, one of hidden states (by a tensor map), one of weights (bulk copies
of the packed image); blocks of a cluster that need the same stage each fetch a share of it and
multicast. Two warpgroups, 64 tokens each, multiply: tokens are the rows of the MMA, experts its
columns. The MMA accumulates one chunk of the hidden dimension from zero; then its partial sums are
added to the totals while the other warpgroup keeps the tensor cores busy.

Selection works on few experts. Every thread bounds the keys it holds from above and below, by
hardware approximations with a rigorous margin; a lower bound of the token's k-th key follows, and
whatever may reach it becomes a candidate, some seven a token. Only candidates get their exact score
and key. The blocks of a tile divide its tokens; the owner of a token reads the others' logits and
candidates through the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from build_kernels.kernels.common import bulk, finish, ptx, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.dense_router_prefill import screening
from build_kernels.kernels.dense_router_prefill.geometry import (
    K_BLOCK,
    LANES,
    MMA_K,
    MMA_M,
    WARPGROUP,
    Geometry,
)
from build_kernels.kernels.dense_router_prefill.hidden_map import hidden_map

#: Named barrier of the consumers.
CONSUMERS = 1


@dataclass(frozen=True)
class Rings:
    """What a consumer needs of the two rings: barriers, operand descriptors, the two forms of
    MMA."""

    hidden_full: Int32
    weight_full: Int32
    hidden_release: Int32
    weight_release: Int32
    hidden: cute.Tensor
    weight: cute.Tensor
    start: cute.TiledMma
    go_on: cute.TiledMma
    lane: Int32


class DenseRouterPrefill:
    #: Registers of a thread that multiplies, and of one that feeds.
    consumer_registers = 240
    producer_registers = 24

    def __init__(self, geometry: Geometry) -> None:
        self.g = geometry

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        g = self.g
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.owned_tokens)
        tiles = ptx.quotient(
            tokens + (g.tokens_tile * g.cluster_t - 1), g.tokens_tile * g.cluster_t
        )
        self.dense_router_prefill(
            tensor_map,
            packed_weight,
            bias,
            routing,
        ).launch(
            grid=(g.cluster_e, tiles * g.cluster_t, 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_e, g.cluster_t, 1),
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
        routing: Routing,
    ) -> None:
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(ptx.quotient(thread, LANES))
        lane = ptx.remainder(thread, LANES)
        part_e = cute.arch.block_idx()[0]
        tile = cute.arch.block_idx()[1]
        part_t = ptx.remainder(tile, g.cluster_t)
        first_token = tile * g.tokens_tile

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        biases = shared + g.bias_offset
        hidden_full = shared + g.barrier_offset
        hidden_empty = hidden_full + 8 * g.hidden_stages
        weight_full = hidden_empty + 8 * g.hidden_stages
        weight_empty = weight_full + 8 * g.weight_stages

        cute.arch.griddepcontrol_launch_dependents()

        if thread == 0:
            for stage in cutlass.range_constexpr(g.hidden_stages):
                ptx.barrier_init(hidden_full + 8 * stage, 1)
                ptx.barrier_init(hidden_empty + 8 * stage, self.releases * g.cluster_e)
            for stage in cutlass.range_constexpr(g.weight_stages):
                ptx.barrier_init(weight_full + 8 * stage, 1)
                ptx.barrier_init(weight_empty + 8 * stage, self.releases * g.cluster_t)
            ptx.barrier_init_fence()
        self.acquire(shared, warp)
        for i in cutlass.range_constexpr(-(-g.padded_experts // g.threads)):
            expert = thread + i * g.threads
            if expert < g.padded_experts:
                # A padding expert loses every tie: its id is above all real ones.
                value = Float32(float("-inf"))
                if expert < g.experts:
                    value = ptx.load_global_f32(bias.toint() + Int64(expert) * 4)
                ptx.store_shared_f32(biases + expert * 4, value)
        # Relaxed: the fence above has published the barriers, and nothing else crosses blocks yet.
        if cutlass.const_expr(g.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()

        if warp >= g.consumer_warps:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            self.assist(
                shared, hidden_full, hidden_empty, weight_full, weight_empty, part_e, part_t, warp
            )
            if warp == g.consumer_warps:
                if lane == 0:
                    tensor_map = bulk.tensor_map_address(hidden_states)
                    bulk.prefetch_tensor_map(tensor_map)
                    cute.arch.griddepcontrol_wait()
                    self.feed_hidden(
                        tensor_map, shared, hidden_full, hidden_empty, first_token, part_e, part_t
                    )
            elif warp == g.consumer_warps + 1 and lane == 0:
                self.feed_weight(
                    packed_weight.toint(),
                    shared + g.weight_offset,
                    weight_full,
                    weight_empty,
                    part_e,
                    part_t,
                )
            self.meet()
            self.part()
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            totals = self.multiply(
                shared, hidden_full, hidden_empty, weight_full, weight_empty, part_e, part_t, thread
            )
            # The rings become the epilogue's: everything sent to them has arrived and been read.
            cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumers * WARPGROUP)
            # The hidden states' arrival implies it; it stands here for what is read from here on.
            cute.arch.griddepcontrol_wait()
            own = part_e * (g.block_experts * 4)
            images = Int32(0)
            if routing.serving != 0 and routing.image_mask.toint() != 0:
                images = Int32(1)
            if images == 0:
                self.screen(totals, shared, [biases + own], thread)
            else:
                self.fetch_image_biases(routing.image_bias.toint(), shared, thread)
                chosen = [
                    self.biases_of(routing, shared, first_token + row)
                    for row in self.screened_rows(thread)
                ]
                self.screen(totals, shared, [place + own for place in chosen], thread)
            self.meet()
            if cutlass.const_expr(g.cluster_e == 1):
                cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=g.consumers * WARPGROUP)
            self.select(routing, shared, first_token, part_e, part_t, thread)
            self.part()

    @property
    def releases(self) -> int:
        """Arrivals of a block that release a stage: of every warp that multiplies."""
        return self.g.consumer_warps

    def acquire(self, shared: Int32, warp: Int32) -> None:
        """Before the block's first barrier: what ``multiply`` needs beside registers."""

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
        """What the warps beside the multiplying and the feeding ones do meanwhile."""

    def meet(self) -> None:
        """Every block of the cluster has multiplied, and its logits and masks can be read."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        elif self.g.cluster > 1:
            cute.arch.cluster_arrive_relaxed()

    def part(self) -> None:
        """Leave only after the others have read this block's logits, and have released its
        stages."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive_relaxed()
        if self.g.cluster > 1:
            cute.arch.cluster_wait()

    # --- producers ------------------------------------------------------------------------------

    @cute.jit
    def feed_hidden(
        self,
        tensor_map: Int64,
        ring: Int32,
        full: Int32,
        empty: Int32,
        first_token: Int32,
        part_e: Int32,
        part_t: Int32,
    ) -> None:
        """Fill the ring with 64 hidden elements of the tile's tokens a stage; each block of the
        tile fetches its share of the rows for all of them."""
        g = self.g
        share = g.hidden_stage_bytes // g.cluster_e
        peers = Int32((1 << g.cluster_e) - 1) << (part_t * g.cluster_e)
        row = first_token + part_e * g.owned_tokens
        stage, parity = Int32(0), Int32(1)
        for block in cutlass.range(g.blocks, unroll=1):
            bulk.wait(empty + 8 * stage, parity)
            ptx.barrier_expect(full + 8 * stage, Int32(g.hidden_stage_bytes))
            place = ring + stage * g.hidden_stage_bytes + part_e * share
            if cutlass.const_expr(g.cluster_e > 1):
                bulk.copy_tile_multicast(
                    place, tensor_map, block * K_BLOCK, row, full + 8 * stage, peers
                )
            else:
                bulk.copy_tile(place, tensor_map, block * K_BLOCK, row, full + 8 * stage)
            stage, parity = self.following(stage, parity, g.hidden_stages)

    @cute.jit
    def feed_weight(
        self,
        weight: Int64,
        ring: Int32,
        full: Int32,
        empty: Int32,
        part_e: Int32,
        part_t: Int32,
    ) -> None:
        """Fill the ring with 64 hidden elements of a pass's experts a stage, in the order in which
        the consumers read: chunk, pass, block."""
        g = self.g
        share = g.weight_stage_bytes // g.cluster_t
        peers = Int32(sum(1 << (i * g.cluster_e) for i in range(g.cluster_t))) << part_e
        first = weight + Int64(part_e * (g.block_experts * K_BLOCK * 2) + part_t * share)
        stage, parity = Int32(0), Int32(1)
        for item in cutlass.range(g.blocks * g.passes, unroll=1):
            # The last chunk may be short; the others have chunk_blocks blocks a pass.
            chunk = ptx.quotient(item, g.chunk_blocks * g.passes)
            within = item - chunk * (g.chunk_blocks * g.passes)
            length = Int32(g.chunk_blocks)
            if cutlass.const_expr(g.last_blocks > 0):
                length = ptx.min_s32(length, g.blocks - chunk * g.chunk_blocks)
            turn, block = Int32(0), within
            for _ in cutlass.range_constexpr(g.passes - 1):
                over = ptx.less(block, length)
                turn = ptx.select(over, turn, turn + 1)
                block = ptx.select(over, block, block - length)
            place = chunk * g.chunk_blocks + block
            address = (
                first
                + Int64(place) * (g.padded_experts * K_BLOCK * 2)
                + turn * g.weight_stage_bytes
            )
            bulk.wait(empty + 8 * stage, parity)
            ptx.barrier_expect(full + 8 * stage, Int32(g.weight_stage_bytes))
            target = ring + stage * g.weight_stage_bytes + part_t * share
            if cutlass.const_expr(g.cluster_t > 1):
                ptx.copy_bulk_multicast(target, address, Int32(share), full + 8 * stage, peers)
            else:
                ptx.copy_bulk(target, address, Int32(share), full + 8 * stage)
            stage, parity = self.following(stage, parity, g.weight_stages)

    def following(self, stage: Int32, parity: Int32, stages: int) -> tuple[Int32, Int32]:
        """The ring's next stage and the parity to wait for there."""
        wraps = ptx.equal(stage, Int32(stages - 1))
        return (
            ptx.select(wraps, Int32(0), stage + 1),
            ptx.select(wraps, parity ^ 1, parity),
        )

    # --- step 1: the multiplication ---------------------------------------------------------------

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
    ) -> list[cute.Tensor]:
        """This warpgroup's logits: for each pass, the accumulator of 64 tokens x mma_n experts."""
        g = self.g
        group = cute.arch.make_warp_uniform(ptx.quotient(thread, WARPGROUP))
        lane = ptx.remainder(thread, LANES)
        # A warp releases a stage at every block that fills it: lane i at the i-th of them.
        hidden_release = ptx.map_shared(hidden_empty, part_t * g.cluster_e + lane % g.cluster_e)
        weight_release = ptx.map_shared(weight_empty, lane % g.cluster_t * g.cluster_e + part_e)

        op = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (MMA_M, g.mma_n, MMA_K),
            warpgroup.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        start = cute.make_tiled_mma(cute.make_mma_atom(op))
        start.set(warpgroup.Field.ACCUMULATE, False)
        go_on = cute.make_tiled_mma(cute.make_mma_atom(op))
        go_on.set(warpgroup.Field.ACCUMULATE, True)

        smem = cute.AddressSpace.smem
        hidden = cute.make_tensor(
            cute.recast_ptr(
                cute.make_ptr(
                    BFloat16,
                    shared + group * (MMA_M * K_BLOCK * 2),
                    smem,
                    assumed_align=1024,
                ),
                cute.make_swizzle(3, 4, 3),
                dtype=BFloat16,
            ),
            cute.make_layout(
                (MMA_M, K_BLOCK, g.hidden_stages), stride=(K_BLOCK, 1, g.tokens_tile * K_BLOCK)
            ),
        )
        weight = cute.make_tensor(
            cute.make_ptr(BFloat16, shared + g.weight_offset, smem, assumed_align=1024),
            cute.make_layout(
                ((8, g.mma_n // 8), (8, K_BLOCK // 8), g.weight_stages),
                stride=((8, 8 * K_BLOCK), (1, 64), g.mma_n * K_BLOCK),
            ),
        )
        slice_ = start.get_slice(0)
        a = start.make_fragment_A(slice_.partition_A(hidden))
        b = start.make_fragment_B(slice_.partition_B(weight))
        shape = slice_.partition_shape_C((MMA_M, g.mma_n))
        totals = [cute.make_rmem_tensor(shape, Float32) for _ in range(g.passes)]
        partial = cute.make_rmem_tensor(shape, Float32)

        rings = Rings(
            hidden_full, weight_full, hidden_release, weight_release, a, b, start, go_on, lane
        )
        h, hp, w, wp = self.chunk(
            rings,
            totals,
            totals,
            min(g.chunk_blocks, g.blocks),
            (Int32(0), Int32(0), Int32(0), Int32(0)),
        )
        for _ in range(g.full_chunks - 1):
            h, hp, w, wp = self.chunk(
                rings, totals, [partial] * g.passes, g.chunk_blocks, (h, hp, w, wp)
            )
        if cutlass.const_expr(g.last_blocks > 0 and g.full_chunks > 0):
            self.chunk(rings, totals, [partial] * g.passes, g.last_blocks, (h, hp, w, wp))
        return totals

    def chunk(
        self,
        rings: Rings,
        totals: list[cute.Tensor],
        targets: list[cute.Tensor],
        blocks: int,
        state: tuple[Int32, ...],
    ) -> tuple[Int32, ...]:
        """Multiply a chunk of so many blocks into the targets; add them to totals that are others.

        ``state`` is stage and parity of the two rings, before and after. A stage is released one
        block later, when its MMAs are known to have finished.
        """
        g = self.g
        hidden_start, hidden_parity, w, wp = state
        h, hp = hidden_start, hidden_parity
        for turn, (total, target) in enumerate(zip(totals, targets, strict=True)):
            h, hp = hidden_start, hidden_parity
            pending: list[tuple[Int32, Int32]] = []
            for block in range(blocks):
                if turn == 0:
                    bulk.wait(rings.hidden_full + 8 * h, hp)
                bulk.wait(rings.weight_full + 8 * w, wp)
                warpgroup.fence()
                for step in range(K_BLOCK // MMA_K):
                    cute.gemm(
                        rings.start if block == 0 and step == 0 else rings.go_on,
                        target,
                        rings.hidden[None, None, step, h],
                        rings.weight[None, None, step, w],
                        target,
                    )
                warpgroup.commit_group()
                pending.append((h, w))
                if len(pending) > 1:
                    warpgroup.wait_group(1)
                    self.release(rings, *pending.pop(0), turn == g.passes - 1)
                h, hp = self.following(h, hp, g.hidden_stages)
                w, wp = self.following(w, wp, g.weight_stages)
            warpgroup.wait_group(0)
            self.release(rings, *pending.pop(0), turn == g.passes - 1)
            if target is not total:
                total.store(total.load() + target.load())
        return h, hp, w, wp

    @cute.jit
    def release(
        self, rings: Rings, hidden: Int32, weight: Int32, last_pass: cutlass.Constexpr[bool]
    ) -> None:
        g = self.g
        if last_pass and rings.lane < g.cluster_e:
            bulk.arrive_remote(rings.hidden_release + 8 * hidden)
        if rings.lane < g.cluster_t:
            bulk.arrive_remote(rings.weight_release + 8 * weight)

    # --- steps 2 to 5: candidates -----------------------------------------------------------------

    @cute.jit
    def fetch_image_biases(self, image_bias: Int64, shared: Int32, thread: Int32) -> None:
        """Copy the biases of image tokens behind the masks."""
        g = self.g
        threads = g.consumers * WARPGROUP
        for i in cutlass.range_constexpr(-(-g.padded_experts // threads)):
            expert = thread + i * threads
            if expert < g.padded_experts:
                value = Float32(float("-inf"))
                if expert < g.experts:
                    value = ptx.load_global_f32(image_bias + Int64(expert) * 4)
                ptx.store_shared_f32(shared + g.image_bias_offset + expert * 4, value)
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=threads)

    @cute.jit
    def biases_of(self, routing: Routing, shared: Int32, token: Int32) -> Int32:
        """Where the biases lie that a token is selected by."""
        image = Int32(0)
        if token < routing.tokens:
            image = finish.is_image(routing, token)
        usual = ptx.equal(image, Int32(0))
        return ptx.select(usual, shared + self.g.bias_offset, shared + self.g.image_bias_offset)

    def screened_rows(self, thread: Int32) -> list[Int32]:
        """The two rows of the tile whose logits this thread holds."""
        row = ptx.quotient(thread, LANES) * 16 + ptx.quotient(ptx.remainder(thread, LANES), 4)
        return [row, row + 8]

    def store_logits(
        self, totals: Sequence[Sequence[Float32]], shared: Int32, thread: Int32
    ) -> None:
        """Store this thread's logits as the rows that ``select`` reads."""
        g = self.g
        quad = ptx.remainder(thread, LANES) & 3
        row = self.screened_rows(thread)[0]
        pairs = g.mma_n // 8
        for half in range(2):
            place = shared + (row + 8 * half) * g.logit_row_bytes + quad * 8
            for pair in range(g.block_experts // 8):
                first = 2 * half + 4 * (pair % pairs)
                values = [Float32(totals[pair // pairs][first + i]) for i in range(2)]
                bulk.store_shared_f32x2(place + pair * 32, *values)

    def screen(
        self,
        totals: Sequence[Sequence[Float32]],
        shared: Int32,
        biases: Sequence[Int32],
        thread: Int32,
    ) -> None:
        """Store this thread's logits, and for each of its two tokens the mask of candidates among
        them: bit p stands for column 8 (p / 2) + 2 quad + p % 2 of the block's experts.

        ``biases`` has one address for both tokens, or one each."""
        g = self.g
        lane = ptx.remainder(thread, LANES)
        quad = lane & 3
        row = self.screened_rows(thread)[0]
        pairs = g.mma_n // 8

        def biases_of_pair(pair: int) -> list[list[Float32]]:
            loaded = [bulk.load_shared_f32x2(place + quad * 8 + pair * 32) for place in biases]
            return loaded * (2 // len(loaded))

        def logit(half: int, pair: int, i: int) -> Float32:
            return Float32(totals[pair // pairs][i + 2 * half + 4 * (pair % pairs)])

        self.store_logits(totals, shared, thread)
        groups = g.bounds // 4
        best = [[Float32(float("-inf"))] * groups for _ in range(2)]
        highs: list[list[Float32]] = [[], []]
        for pair in range(g.block_experts // 8):
            bias = biases_of_pair(pair)
            group = pair % groups
            for half in range(2):
                for i in range(2):
                    score = screening.screened(logit(half, pair, i))
                    low, high = screening.bounds(score, bias[half][i])
                    best[half][group] = ptx.max_f32(best[half][group], low)
                    highs[half].append(high)
        thresholds = [screening.threshold(own, 4, g.top_k, g.bounds) for own in best]
        masks = [screening.near(*own) for own in zip(highs, thresholds, strict=True)]
        for half in range(2):
            place = (
                shared
                + g.mask_offset
                + (row + 8 * half) * g.mask_row_bytes
                + quad * (4 * g.mask_words)
            )
            for word in range(g.mask_words):
                ptx.store_shared_b32(place + 4 * word, masks[half][word])

    # --- steps 2 to 7: the candidates' exact scores, ranks and weights ----------------------------

    @cute.jit
    def select(
        self,
        routing: Routing,
        shared: Int32,
        first_token: Int32,
        part_e: Int32,
        part_t: Int32,
        thread: Int32,
    ) -> None:
        """Rank the candidates of this block's tokens, ``token_threads`` threads a token."""
        g = self.g
        member = ptx.remainder(thread, g.token_threads)
        row = part_e * g.owned_tokens + ptx.quotient(thread, g.token_threads)
        token = first_token + row
        valid = ptx.less(token, routing.tokens)
        biases = shared + g.bias_offset
        # Whether somebody else has chosen the experts: the caller, or nobody for a padding token.
        given, padding = Int32(0), Int32(0)
        if routing.serving != 0 and valid:
            biases = self.biases_of(routing, shared, token)
            given = finish.replays(routing)
            padding = finish.is_padding(routing, token)
        ranked = ptx.both(valid, ptx.equal(given | padding, Int32(0)))
        own_part = ptx.quotient(member, 2)
        own_pair = ptx.remainder(member, 2)
        logits = shared + row * g.logit_row_bytes
        own_logits = self.at_part(logits, own_part, part_t)
        masks = self.at_part(
            shared + g.mask_offset + row * g.mask_row_bytes, own_part, part_t
        ) + own_pair * (8 * g.mask_words)
        words = cute.make_rmem_tensor(2 * g.mask_words, Int32)
        for i in cutlass.range_constexpr(2 * g.mask_words):
            words[i] = ptx.select(ranked, bulk.load_cluster_b32(masks + 4 * i), Int32(0))
        ranks = cute.make_rmem_tensor(g.top_k, Int64)
        for i in cutlass.range_constexpr(g.top_k):
            ranks[i] = Int64(0)

        # One candidate ahead: the loads of the next one hide behind the arithmetic of this one.
        column = self.take(words, own_pair)
        logit = self.load_if(column, own_logits)
        while column >= 0:
            expert = own_part * g.block_experts + column
            following = self.take(words, own_pair)
            ahead = self.load_if(following, own_logits)
            key = scoring.ordered_key(
                logit, scoring.score(logit), ptx.load_shared_f32(biases + expert * 4)
            )
            screening.insert(ranks, bulk.pack(key, ~expert), g.top_k)
            column = following
            logit = ahead
        best = screening.merge_lanes([Int64(ranks[i]) for i in range(g.top_k)], g.token_threads)

        # Member i answers for the ranks i, i + token_threads, ...
        turns = -(-g.top_k // g.token_threads)
        experts = [ptx.select(ranked, ~bulk.halves(rank)[1], Int32(0)) for rank in best]
        own_experts, own_scores = [], []
        for turn in cutlass.range_constexpr(turns):
            expert = screening.own_rank(
                experts[turn * g.token_threads :][: g.token_threads], member
            )
            rank = ptx.min_s32(turn * g.token_threads + member, Int32(g.top_k - 1))
            if given != 0:
                expert = finish.given_id(routing, token, rank, g.top_k, g.experts)
            if padding != 0:
                expert = Int32(-1)
            column = ptx.max_s32(expert, Int32(0))
            part = ptx.quotient(column, g.block_experts)
            place = self.at_part(logits, part, part_t) + ptx.remainder(column, g.block_experts) * 4
            score = scoring.score(bulk.load_cluster_f32(place))
            own_experts.append(expert)
            own_scores.append(ptx.select(ptx.less(expert, Int32(0)), Float32(0.0), score))
        screening.weigh(
            routing,
            own_experts,
            own_scores,
            g.top_k,
            token,
            valid,
            ptx.remainder(thread, LANES) - member,
            member,
            g.token_threads,
        )

    def at_part(self, address: Int32, part_e: Int32, part_t: Int32) -> Int32:
        """The same shared address in the tile's block that holds this part of the experts."""
        if self.g.cluster_e == 1:
            return address
        return ptx.map_shared(address, part_t * self.g.cluster_e + part_e)

    def take(self, words: cute.Tensor, pair: Int32) -> Int32:
        """Remove the first candidate from the two masks; its column, or -1 if there is none."""
        g = self.g
        left = [Int32(words[i]) for i in range(2 * g.mask_words)]
        column = Int32(-1)
        word = Int32(0)
        for i in reversed(range(len(left))):
            some = ptx.equal(left[i], Int32(0))
            word = ptx.select(some, word, left[i])
            # Mask i / mask_words of this pair: quad 2 pair + i / mask_words, from bit 32 (i % ...).
            base = (2 * pair + i // g.mask_words) * 2 + (i % g.mask_words) * 128
            column = ptx.select(some, column, base)
        for i in range(len(left)):
            # Only the word that was taken loses its lowest bit.
            earlier = Int32(0)
            for j in range(i):
                earlier = earlier | left[j]
            mine = ptx.equal(earlier, Int32(0))
            words[i] = ptx.select(mine, left[i] & (left[i] - 1), left[i])
        bit = bulk.lowest_bit(word)
        found = column + ((bit >> 1) * 8 + (bit & 1))
        return ptx.select(ptx.less(column, Int32(0)), column, found)

    def load_if(self, column: Int32, logits: Int32) -> Float32:
        """The logit in that column; of the first one where there is no column."""
        safe = ptx.select(ptx.less(column, Int32(0)), Int32(0), column)
        return bulk.load_cluster_f32(logits + safe * 4)
