"""Epilogue of the tile form: screening, ranking, weights, stores.

Each thread screens the logits of two tokens, which it also stores. The CTAs of a tile divide its
tokens; the CTA that ranks a token reads the other CTAs' logits and masks of candidates through the
cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common import epilogue, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, memory
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, ranking, screening
from build_kernels.kernels.dense.geometry.common import LANES, screening_groups
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.mma.interface import TileMma

#: Named barrier of the consumer warps.
CONSUMERS = 1


class TileEpilogue:
    """All consumer threads call the methods. ``shared`` is the address of the shared memory."""

    def __init__(self, geometry: TileGeometry, mma: TileMma, rule: Scoring) -> None:
        self.g, self.mma, self.rule = geometry, mma, rule

    def sync_consumers(self) -> None:
        """Wait for all consumer warps."""
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=self.g.consumer_threads)

    # --- steps 2 to 5: candidates -----------------------------------------------------------------

    @cute.jit
    def load_image_biases(self, image_bias: Int64, shared: Int32, thread: Int32) -> None:
        """Load the biases of image tokens behind the masks. All consumer threads call this."""
        g = self.g
        biases.load(
            image_bias,
            shared + g.image_bias_offset,
            Int32(0),
            g.padded_experts,
            g.experts,
            biases.LOWEST,
            thread,
            g.consumer_threads,
        )
        self.sync_consumers()

    def biases_of(self, routing: Routing, shared: Int32, token: Int32) -> Int32:
        """Return the address of the biases that a token is selected by."""
        g = self.g
        return biases.of_token(
            routing, Int32(1), token, shared + g.bias_offset, shared + g.image_bias_offset
        )

    def screened_rows(self, thread: Int32) -> list[Int32]:
        """Return the two rows of the tile whose logits this thread screens."""
        row = arith.quotient(thread, LANES) * 16 + arith.quotient(arith.remainder(thread, LANES), 4)
        return [row, row + 8]

    def screen(
        self,
        totals: Sequence[Sequence[Float32]],
        shared: Int32,
        places: Sequence[Int32],
        thread: Int32,
    ) -> None:
        """Store this thread's logits, and the mask of candidates among them for each of its tokens.

        All consumer threads call this. ``places`` has one address of biases for both tokens, or one
        for each. Bit p of a mask is column 8 (p / 2) + 2 quad + p % 2 of the CTA's experts, where
        quad is the thread's place in its group of four lanes.
        """
        g = self.g
        lane = arith.remainder(thread, LANES)
        quad = lane & 3
        row = self.screened_rows(thread)[0]
        pairs = g.mma_n // 8

        def biases_of_pair(pair: int) -> list[list[Float32]]:
            loaded = [memory.load_shared_f32x2(place + quad * 8 + pair * 32) for place in places]
            return loaded * (2 // len(loaded))

        def logit(half: int, pair: int, i: int) -> Float32:
            return Float32(totals[pair // pairs][i + 2 * half + 4 * (pair % pairs)])

        self.mma.store_logits(totals, shared, thread)
        bounds = screening_groups(g.top_k)
        groups = bounds // 4
        best = [[Float32(float("-inf"))] * groups for _ in range(2)]
        highs: list[list[Float32]] = [[], []]
        for pair in range(g.cta_experts // 8):
            bias = biases_of_pair(pair)
            group = pair % groups
            for half in range(2):
                for i in range(2):
                    score = screening.screened(logit(half, pair, i), self.rule)
                    low, high = screening.bounds(score, bias[half][i])
                    best[half][group] = arith.max_f32(best[half][group], low)
                    highs[half].append(high)
        thresholds = [screening.threshold(own, 4, g.top_k, bounds) for own in best]
        masks = [screening.near(*own) for own in zip(highs, thresholds, strict=True)]
        for half in range(2):
            place = (
                shared
                + g.mask_offset
                + (row + 8 * half) * g.mask_row_bytes
                + quad * (4 * g.mask_words)
            )
            for word in range(g.mask_words):
                memory.store_shared_b32(place + 4 * word, masks[half][word])

    # --- steps 2 to 7: the candidates' exact scores, ranks and weights ----------------------------

    @cute.jit
    def select(
        self,
        routing: Routing,
        shared: Int32,
        first_token: Int32,
        e_rank: Int32,
        t_rank: Int32,
        thread: Int32,
    ) -> None:
        """Rank the candidates of the tokens that this CTA owns, and store ids and weights.

        All consumer threads call this, ``token_threads`` for each token.
        """
        g = self.g
        member = arith.remainder(thread, g.token_threads)
        row = e_rank * g.owned_tokens + arith.quotient(thread, g.token_threads)
        token = first_token + row
        valid = arith.less(token, routing.tokens)
        bias_row = shared + g.bias_offset
        # Whether the caller gives the experts, and whether the token has none.
        given, padding = Int32(0), Int32(0)
        if routing.serving != 0 and valid:
            bias_row = self.biases_of(routing, shared, token)
            given = epilogue.is_given(routing, token)
            padding = epilogue.is_padding(routing, token)
        ranked = arith.both(valid, arith.equal(given | padding, Int32(0)))
        own_e_rank = arith.quotient(member, 2)
        own_pair = arith.remainder(member, 2)
        logits = shared + row * g.logit_row_bytes
        own_logits = self.at_cta(logits, own_e_rank, t_rank)
        masks = self.at_cta(
            shared + g.mask_offset + row * g.mask_row_bytes, own_e_rank, t_rank
        ) + own_pair * (8 * g.mask_words)
        words = cute.make_rmem_tensor(2 * g.mask_words, Int32)
        for i in cutlass.range_constexpr(2 * g.mask_words):
            words[i] = arith.select(ranked, memory.load_cluster_b32(masks + 4 * i), Int32(0))
        ranks = cute.make_rmem_tensor(g.top_k, Int64)
        for i in cutlass.range_constexpr(g.top_k):
            ranks[i] = Int64(0)

        # One candidate ahead: the loads of the next one hide behind the arithmetic of this one.
        column = self.take(words, own_pair)
        logit = self.load_if(column, own_logits)
        while column >= 0:
            expert = own_e_rank * g.cta_experts + column
            following = self.take(words, own_pair)
            ahead = self.load_if(following, own_logits)
            key = scoring.ordered_key(
                logit, self.rule.score(logit), memory.load_shared_f32(bias_row + expert * 4)
            )
            ranking.insert(ranks, arith.pack(key, ~expert), g.top_k)
            column = following
            logit = ahead
        best = ranking.merge_lanes([Int64(ranks[i]) for i in range(g.top_k)], g.token_threads)

        # Member i has the ranks i, i + token_threads, ...
        experts = [arith.select(ranked, ~arith.halves(rank)[1], Int32(0)) for rank in best]
        own_experts, own_scores = [], []
        for first in cutlass.range_constexpr(0, g.top_k, g.token_threads):
            expert = ranking.own_rank(experts[first:][: g.token_threads], member)
            rank = arith.min_s32(first + member, Int32(g.top_k - 1))
            if given != 0:
                expert = epilogue.given_id(routing, token, rank, g.top_k, g.experts)
            if padding != 0:
                expert = Int32(-1)
            column = arith.max_s32(expert, Int32(0))
            owner = arith.quotient(column, g.cta_experts)
            place = self.at_cta(logits, owner, t_rank) + arith.remainder(column, g.cta_experts) * 4
            score = self.rule.score(memory.load_cluster_f32(place))
            own_experts.append(expert)
            own_scores.append(arith.select(arith.less(expert, Int32(0)), Float32(0.0), score))
        ranking.weigh(
            routing,
            own_experts,
            own_scores,
            g.top_k,
            token,
            valid,
            arith.remainder(thread, LANES) - member,
            member,
            g.token_threads,
        )

    def at_cta(self, address: Int32, e_rank: Int32, t_rank: Int32) -> Int32:
        """Return the same shared address in the CTA of that e rank of the same tile."""
        if self.g.cluster_e == 1:
            return address
        return memory.map_shared(address, t_rank * self.g.cluster_e + e_rank)

    def take(self, words: cute.Tensor, pair: Int32) -> Int32:
        """Remove the first candidate from the two masks. Return its column, or -1 without one."""
        g = self.g
        left = [Int32(words[i]) for i in range(2 * g.mask_words)]
        column = Int32(-1)
        word = Int32(0)
        for i in reversed(range(len(left))):
            some = arith.equal(left[i], Int32(0))
            word = arith.select(some, word, left[i])
            # Mask i / mask_words of this pair: quad 2 pair + i / mask_words, from bit 32 (i % ...).
            base = (2 * pair + i // g.mask_words) * 2 + (i % g.mask_words) * 128
            column = arith.select(some, column, base)
        for i in range(len(left)):
            # Only the word that was taken loses its lowest bit.
            earlier = Int32(0)
            for j in range(i):
                earlier = earlier | left[j]
            mine = arith.equal(earlier, Int32(0))
            words[i] = arith.select(mine, left[i] & (left[i] - 1), left[i])
        bit = arith.lowest_bit(word)
        found = column + ((bit >> 1) * 8 + (bit & 1))
        return arith.select(arith.less(column, Int32(0)), column, found)

    def load_if(self, column: Int32, logits: Int32) -> Float32:
        """Return the logit in that column, or the first one for column -1."""
        safe = arith.select(arith.less(column, Int32(0)), Int32(0), column)
        return memory.load_cluster_f32(logits + safe * 4)
