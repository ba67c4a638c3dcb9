"""Epilogue of the swap-A/B form: screening, exchange of candidates, ranking, weights, stores.

The logits of the tokens that a CTA has added lie in shared memory, a row per token. A few threads
per token screen them; the candidates go to the CTA that ranks the token. That CTA scores them
exactly, ranks them by counting, and stores. A token with more candidates than its list holds, which
ties can cause, is ranked from all its logits.
"""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from build_kernels.kernels.common import epilogue, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, memory, warp_ops
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, ranking, screening
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.geometry.common import LANES, screening_groups
from build_kernels.kernels.dense.geometry.swap_ab import LIST_STEP, N_TILE, SwapAbGeometry

#: Named barrier of the consumer warps.
CONSUMERS = 1


class SwapAbEpilogue:
    """All consumer threads call ``lay_out_logits``, ``store_logits``, ``screen`` and ``rank``.

    Held tokens are those that the CTA has added: rows from 0 on. Owned tokens are those of them
    that it ranks. ``shared`` is the address of the CTA's shared memory.
    """

    def __init__(self, geometry: SwapAbGeometry, rule: Scoring) -> None:
        self.g, self.rule = geometry, rule

    def sync_consumers(self) -> None:
        """Wait for all consumer warps."""
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=self.g.consumer_threads)

    def biases_of(self, routing: Routing, shared: Int32, images: Int32, token: Int32) -> Int32:
        """Return the address of the biases that a token is selected by."""
        g = self.g
        return biases.of_token(
            routing, images, token, shared + g.bias_offset, shared + g.image_bias_offset
        )

    def lay_out_logits(
        self, totals: cute.Tensor, shared: Int32, first_row: Int32, lane: Int32
    ) -> None:
        """Store this thread's logits in the rows of the held tokens.

        ``first_row`` is the first of the CTA's experts whose logits this warp has.
        """
        g = self.g
        for i in range(4):
            expert = first_row + arith.quotient(lane, 4) + 8 * (i // 2)
            token = (lane & 3) * 2 + i % 2
            place = shared + token * g.logit_row_bytes + expert * 4
            for n_tile in range(g.held_n_tiles):
                memory.store_shared_f32(
                    place + n_tile * (N_TILE * g.logit_row_bytes), Float32(totals[4 * n_tile + i])
                )

    def bank_swizzle(self, member: Int32) -> Int32:
        """Return what a thread's numbers of groups of 4 experts are exclusive-ored with.

        So neighbouring threads read different banks. Threads whose number of groups is no power of
        two need no swizzle.
        """
        g = self.g
        quads = g.thread_experts // 4
        if quads & (quads - 1):
            return Int32(0)
        spread = member * max(1, 8 // g.token_threads)
        return arith.quotient(spread, max(1, g.token_threads // 4)) & (quads - 1)

    @cute.jit
    def store_logits(
        self,
        shared: Int32,
        logits_out: Int64,
        first_token: Int32,
        end_token: Int32,
        e_rank: Int32,
        thread: Int32,
    ) -> None:
        """Store the held logits to global memory, one warp per token."""
        g = self.g
        lane = arith.remainder(thread, LANES)
        rows = end_token - first_token
        for row in range(arith.quotient(thread, LANES), rows, g.consumer_warps):
            for i in cutlass.range_constexpr(g.tile_experts // LANES):
                column = i * LANES + lane
                expert = e_rank * g.tile_experts + column
                if expert < g.experts:
                    place = shared + row * g.logit_row_bytes + column * 4
                    target = logits_out + (Int64(first_token + row) * g.experts + expert) * 4
                    memory.store_global_b32(
                        target, scoring.stored_logit(memory.load_shared_f32(place))
                    )

    @cute.jit
    def screen(
        self,
        routing: Routing,
        shared: Int32,
        first_held: Int32,
        images: Int32,
        cta: Cta,
        thread: Int32,
    ) -> None:
        """Send the candidates of the held tokens to the CTAs that rank them.

        ``token_threads`` threads work on each token. A CTA sends up to ``list_max`` of its
        candidates, and how many there are. ``images`` is not 0 if there may be image tokens.
        """
        g = self.g
        lane = arith.remainder(thread, LANES)
        for first in cutlass.range(
            thread - lane, g.held_tokens * g.token_threads, g.consumer_threads, unroll=1
        ):
            index = first + lane
            held = arith.less(index, Int32(g.held_tokens * g.token_threads))
            token = arith.min_s32(arith.quotient(index, g.token_threads), Int32(g.held_tokens - 1))
            bias_row = self.biases_of(routing, shared, images, first_held + token)
            bias_row = bias_row + cta.e_rank * (g.tile_experts * 4)
            member = arith.remainder(index, g.token_threads)
            masks = self.candidates(shared, bias_row, token, member)
            self.send(shared, held, token, member, masks, cta)

    @cute.jit
    def send(
        self,
        shared: Int32,
        held: Boolean,
        token: Int32,
        member: Int32,
        masks: list[Int32],
        cta: Cta,
    ) -> None:
        """Send this thread's candidates of a token to the CTA that ranks it.

        ``masks`` are those of ``candidates``; nothing is sent unless ``held``.
        """
        g = self.g
        owner = g.cta_rank(arith.quotient(token, g.owned_tokens), cta.k_rank, cta.t_rank)
        row = arith.remainder(token, g.owned_tokens)
        count = arith.population(masks[0])
        for word in cutlass.range_constexpr(1, g.thread_words):
            count = count + arith.population(masks[word])
        place, total = self.before(count, member, g.token_threads)
        if held:
            if member == 0:
                target = shared + g.count_offset + (row * g.cluster_e + cta.e_rank) * 4
                memory.store_cluster_b32(memory.map_shared(target, owner), total)
            target = shared + g.list_offset + row * g.list_row_bytes + cta.e_rank * (g.list_max * 8)
            target = memory.map_shared(target, owner)
            logits = shared + token * g.logit_row_bytes
            for word in cutlass.range_constexpr(g.thread_words):
                mask = masks[word]
                while mask != 0 and place < g.list_max:
                    number = arith.lowest_bit(mask) + 32 * word
                    column = member * g.thread_experts + (number ^ (self.bank_swizzle(member) * 4))
                    logit = memory.load_shared_f32(logits + column * 4)
                    expert = cta.e_rank * g.tile_experts + column
                    memory.store_cluster_v2(target + place * 8, arith.bits(logit), expert)
                    mask = mask & (mask - 1)
                    place = place + 1

    def before(self, count: Int32, member: Int32, members: int) -> tuple[Int32, Int32]:
        """Return the sum of the counts of a token's threads before this one, and the sum of all.

        ``members`` neighbouring threads work on the token; this is number ``member`` of them.
        """
        before, total = Int32(0), count
        distance = 1
        while distance < members:
            other = warp_ops.shuffle_xor(total, distance)
            later = arith.equal(member & distance, Int32(distance))
            before = arith.select(later, before + other, before)
            total = total + other
            distance *= 2
        return before, total

    def candidates(
        self, shared: Int32, bias_row: Int32, token: Int32, member: Int32
    ) -> list[Int32]:
        """Return the mask of one thread's candidates among its experts of its token."""
        g = self.g
        own = member * (g.thread_experts * 4)
        row = shared + token * g.logit_row_bytes + own
        flip = self.bank_swizzle(member)
        quads = g.thread_experts // 4
        offsets = [(flip ^ quad) * 16 for quad in range(quads)]

        def four(address: Int32) -> list[Float32]:
            return [arith.from_bits(value) for value in memory.load_shared_v4(address)]

        highs: list[Float32] = []
        bounds = screening_groups(g.top_k)
        groups = max(1, bounds // g.token_threads)
        best = [Float32(float("-inf"))] * groups
        for offset in offsets:
            for logit, bias in zip(four(row + offset), four(bias_row + own + offset), strict=True):
                low, high = screening.bounds(screening.screened(logit, self.rule), bias)
                group = len(highs) % groups
                best[group] = arith.max_f32(best[group], low)
                highs.append(high)
        threshold = screening.threshold(best, g.token_threads, g.top_k, bounds)
        return screening.near(highs, threshold)

    # --- steps 2 to 7: the candidates' exact scores, ranks and weights ----------------------------

    @cute.jit
    def rank(
        self,
        routing: Routing,
        shared: Int32,
        first_held: Int32,
        end_held: Int32,
        cta: Cta,
        thread: Int32,
    ) -> None:
        """Rank the candidates of this CTA's tokens, and store ids and weights.

        ``rank_threads`` threads work on each token. The rank of a candidate is the number of those
        above it.
        """
        g = self.g
        member = arith.remainder(thread, g.rank_threads)
        leader = arith.remainder(thread, LANES) - member
        for number in cutlass.range(g.rank_passes, unroll=1):
            place = arith.quotient(thread + number * g.consumer_threads, g.rank_threads)
            row = arith.min_s32(place, Int32(g.owned_tokens - 1))
            held = arith.min_s32(cta.e_rank * g.owned_tokens + row, Int32(g.held_tokens - 1))
            token = first_held + cta.e_rank * g.owned_tokens + place
            valid = arith.both(
                arith.less(place, Int32(g.owned_tokens)), arith.less(token, end_held)
            )
            bias_row = shared + g.bias_offset
            # Whether the caller gives the experts, and whether the token has none.
            given, padding = Int32(0), Int32(0)
            if routing.serving != 0 and valid:
                images = Int32(0)
                if routing.image_mask.toint() != 0:
                    images = Int32(1)
                bias_row = self.biases_of(routing, shared, images, token)
                given = epilogue.is_given(routing, token)
                padding = epilogue.is_padding(routing, token)
            ranked = arith.both(valid, arith.equal(given | padding, Int32(0)))
            logits = []
            for e_rank in cutlass.range_constexpr(g.cluster_e):
                peer = g.cta_rank(Int32(e_rank), cta.k_rank, cta.t_rank)
                logits.append(memory.map_shared(shared + held * g.logit_row_bytes, peer))
            counts = [
                memory.load_shared_b32(shared + g.count_offset + (row * g.cluster_e + e_rank) * 4)
                for e_rank in range(g.cluster_e)
            ]
            # Lists that do not hold all candidates, as with many ties, count as none: all experts
            # of the token are ranked.
            total, most = counts[0], counts[0]
            for count in counts[1:]:
                total, most = total + count, arith.max_s32(most, count)
            fits = arith.both(
                arith.less(total, Int32(g.rank_max + 1)), arith.less(most, Int32(g.list_max + 1))
            )
            total = arith.select(arith.both(ranked, fits), total, Int32(0))
            # Threads without a token have a row of their own.
            own_row = arith.min_s32(place, Int32(g.owned_tokens))
            slots = shared + g.slot_offset + own_row * g.slot_row_bytes
            records = shared + g.record_offset + own_row * (g.top_k * 16)
            listed = shared + g.list_offset + row * g.list_row_bytes
            rounds = self.rounds(total)
            self.score_listed(listed, bias_row, counts, total, slots, rounds, member)
            cute.arch.sync_warp()
            left = total
            if cutlass.const_expr(g.rank_max > LIST_STEP):
                left = self.narrow(total, slots, member)
                rounds = self.rounds(left)
            self.rank_listed(left, slots, records, rounds, member)
            lacking = arith.both(ranked, arith.equal(total, Int32(0)))
            if warp_ops.ballot(lacking) != 0:
                self.rank_all(lacking, bias_row, logits, records, member)
            cute.arch.sync_warp()
            own_experts, own_scores = [], []
            for first in cutlass.range_constexpr(0, g.top_k, g.rank_threads):
                number = arith.min_s32(first + member, Int32(g.top_k - 1))
                expert, score = memory.load_shared_v2(records + number * 16)
                own_experts.append(expert)
                own_scores.append(arith.from_bits(score))
            ranking.weigh_or_replay(
                routing,
                own_experts,
                own_scores,
                g.top_k,
                logits,
                g.tile_experts,
                token,
                valid,
                given,
                padding,
                leader,
                member,
                g.rank_threads,
                g.experts,
                self.rule,
            )

    def rounds(self, total: Int32) -> Int32:
        """Return how many rounds rank the ``total`` candidates of each token of a warp."""
        size = self.g.rank_round
        return arith.quotient(warp_ops.redux_max_u32(total) + (size - 1), size)

    @cute.jit
    def score_listed(
        self,
        listed: Int32,
        bias_row: Int32,
        counts: list[Int32],
        total: Int32,
        slots: Int32,
        rounds: Int32,
        member: Int32,
    ) -> None:
        """Score a token's listed candidates exactly; store (~expert, key) and score in its slots.

        Slots behind the last candidate get key 0, no candidate.
        """
        g = self.g
        for round_ in cutlass.range(rounds, unroll=1):
            for i in cutlass.range_constexpr(g.rank_round // g.rank_threads):
                number = round_ * g.rank_round + i * g.rank_threads + member
                some = arith.less(number, total)
                entry = arith.select(some, self.entry(number, counts), Int32(0))
                logit, expert = memory.load_shared_v2(listed + entry * 8)
                logit = arith.from_bits(logit)
                expert = arith.select(some, expert, Int32(0))
                score = self.rule.score(logit)
                bias = memory.load_shared_f32(bias_row + expert * 4)
                key = arith.select(some, scoring.ordered_key(logit, score, bias), Int32(0))
                memory.store_shared_v2(slots + number * 8, ~expert, key)
                memory.store_shared_f32(slots + (g.rank_max * 8 + number * 4), score)

    @cute.jit
    def narrow(self, total: Int32, slots: Int32, member: Int32) -> Int32:
        """Keep only the scored candidates that can still be among the best. Returns how many.

        Every e rank has sent those that can be among its own best, and ranking compares each with
        each. Those that are kept move to the first slots, those behind them get key 0. Whole warps
        call it, after a warp barrier behind ``score_listed``; it ends with one.
        """
        g = self.g
        numbers = [first + member for first in range(0, g.rank_max, g.rank_threads)]
        found = [memory.load_shared_v2(slots + number * 8) for number in numbers]
        scores = [
            memory.load_shared_b32(slots + (g.rank_max * 8 + number * 4)) for number in numbers
        ]
        keys = [
            arith.select(arith.less(number, total), key, Int32(0))
            for number, (_, key) in zip(numbers, found, strict=True)
        ]
        least = screening.least_kept(keys, g.rank_threads, g.top_k, screening_groups(g.top_k))
        kept = [arith.at_least_u32(key, least) for key in keys]
        count = Int32(0)
        for each in kept:
            count = count + arith.select(each, Int32(1), Int32(0))
        place, left = self.before(count, member, g.rank_threads)
        # All have read their slots.
        cute.arch.sync_warp()
        for number, (inverse, _), key, score, each in zip(
            numbers, found, keys, scores, kept, strict=True
        ):
            if each:
                memory.store_shared_v2(slots + place * 8, inverse, key)
                memory.store_shared_b32(slots + (g.rank_max * 8 + place * 4), score)
                place = place + 1
            if number >= left:
                memory.store_shared_v2(slots + number * 8, Int32(0), Int32(0))
        cute.arch.sync_warp()
        return left

    @cute.jit
    def rank_listed(
        self, total: Int32, slots: Int32, records: Int32, rounds: Int32, member: Int32
    ) -> None:
        """Store (expert, score) of the best listed candidates in the records of their ranks."""
        g = self.g
        for round_ in cutlass.range(rounds, unroll=1):
            numbers, ranks = [], []
            for i in cutlass.range_constexpr(g.rank_round // g.rank_threads):
                numbers.append(round_ * g.rank_round + i * g.rank_threads + member)
                inverse, key = memory.load_shared_v2(slots + numbers[i] * 8)
                ranks.append(arith.pack(key, inverse))
            above = [Int32(0) for _ in ranks]
            for pair in cutlass.range(arith.quotient(total + 1, 2), unroll=4):
                words = memory.load_shared_v4(slots + pair * 16)
                for low, high in ((words[0], words[1]), (words[2], words[3])):
                    other = arith.pack(high, low)
                    above = [
                        count + arith.select(arith.above(other, rank), Int32(1), Int32(0))
                        for count, rank in zip(above, ranks, strict=True)
                    ]
            for i in cutlass.range_constexpr(len(ranks)):
                key, inverse = arith.halves(ranks[i])
                if key != 0 and above[i] < g.top_k:
                    score_bits = memory.load_shared_b32(slots + (g.rank_max * 8 + numbers[i] * 4))
                    memory.store_shared_v2(records + above[i] * 16, ~inverse, score_bits)

    def entry(self, number: Int32, counts: list[Int32]) -> Int32:
        """Return where a token's candidate of that number lies. Every e rank has its own list."""
        entry = number
        for part in range(len(counts) - 1):
            beyond = arith.less(counts[part] - 1, number)
            # In the next list, or in one behind it.
            later = (part + 1) * self.g.list_max + number - counts[part]
            entry = arith.select(beyond, later, entry)
            number = arith.select(beyond, number - counts[part], Int32(-1))
        return entry

    @cute.jit
    def rank_all(
        self,
        wanted: Boolean,
        bias_row: Int32,
        logits: list[Int32],
        records: Int32,
        member: Int32,
    ) -> None:
        """Store the records of tokens that have more candidates than are listed.

        Whole warps call this; ``wanted`` says whether this thread's token is one of them.
        """
        g = self.g
        ranks = cute.make_rmem_tensor(g.top_k, Int64)
        for i in cutlass.range_constexpr(g.top_k):
            ranks[i] = Int64(0)
        for expert in cutlass.range(member, g.experts, g.rank_threads, unroll=1):
            logit = ranking.logit_at(expert, logits, g.tile_experts)
            bias = memory.load_shared_f32(bias_row + expert * 4)
            key = scoring.ordered_key(logit, self.rule.score(logit), bias)
            ranking.insert(ranks, arith.pack(key, ~expert), g.top_k)
        best = ranking.merge_lanes([Int64(ranks[i]) for i in range(g.top_k)], g.rank_threads)
        if wanted and member == 0:
            for i in cutlass.range_constexpr(g.top_k):
                expert = ~arith.halves(best[i])[1]
                score = self.rule.score(ranking.logit_at(expert, logits, g.tile_experts))
                memory.store_shared_v2(records + i * 16, expert, arith.bits(score))
