"""How the swap-A/B form divides a batch among clusters, CTAs and warpgroups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from build_kernels.kernels.common.numerics import SLICES
from build_kernels.kernels.dense import summation
from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    LANES,
    MAX_CLUSTER,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    Geometry,
    ceil_div,
    screening_groups,
)

#: Partial sums are exchanged in n-tiles of 8 tokens: 4 registers of an accumulator, 16 bytes per
#: lane of a warp.
N_TILE = 8
N_TILE_BYTES = LANES * 16

#: A CTA's list, and the slots where candidates are ranked by counting, have SPARE times as many
#: places as candidates are expected (of independent logits), rounded up to a multiple of LIST_STEP.
#: A token with more candidates is ranked from all its logits, which takes far longer.
LIST_STEP = 32
SPARE = 1.3

#: Stages that hide the latency of memory.
MIN_STAGES = 4

#: Registers of a multiprocessor, and most that ``setmaxnreg`` gives a consumer thread here.
REGISTERS = 65536
MAX_CONSUMER_REGISTERS = 240


@dataclass(frozen=True)
class SwapAbGeometry(Geometry):
    """A CTA multiplies ``tile_experts`` experts, 64 per warpgroup, by ``tile_tokens`` tokens.

    A cluster is ``cluster_e`` x ``split_k`` x ``cluster_t`` CTAs, in this order of rank: parts of
    the experts, shares of the hidden dimension, tiles of tokens. CTAs that need the same weights or
    the same hidden states take turns in fetching them for all. The CTAs of the k ranks take one
    slice each, then the next ones (``shares``); of every slice's sums a CTA keeps the n-tiles of
    tokens that it adds, and sends the others to the CTAs of the other k ranks.
    """

    tile_experts: int
    tile_tokens: int
    cluster_t: int
    split_k: int

    #: Registers that a producer thread keeps.
    producer_registers: ClassVar[int] = 24

    def check(self) -> None:
        """Raise ValueError unless the tile divides evenly and fits cluster and shared memory."""
        g = self
        # A share of K has no slice without a whole chunk, under whose MMAs it adds other sums.
        least = g.k_chunk * SLICES if g.split_k > 1 else K_BLOCK
        if (
            g.hidden % K_BLOCK
            or g.hidden < least
            or SLICES % g.split_k
            or g.tile_tokens % N_TILE
            or g.tile_experts % MMA_M
        ):
            raise ValueError(
                f"expected a multiple of {K_BLOCK} hidden elements, at least {least}, a K split "
                f"that divides {SLICES}, tiles of a multiple of {N_TILE} tokens and {MMA_M} "
                f"experts, found hidden {g.hidden} in {g.split_k}, {g.tile_tokens} tokens, "
                f"{g.tile_experts} experts"
            )
        # A CTA that adds nothing would run ahead of those that wait for each other's sums.
        if g.n_tiles < g.split_k:
            raise ValueError(
                f"expected tiles of at least {N_TILE} tokens for each of {g.split_k} k ranks, "
                f"found {g.tile_tokens} tokens"
            )
        if g.stages < 2 or g.epilogue_bytes > g.ring_bytes or g.cluster > MAX_CLUSTER:
            raise ValueError(
                f"expected two stages and the logits in {MAX_SHARED_BYTES} bytes, clusters of at "
                f"most {MAX_CLUSTER}, found {g.stages} stages, {g.epilogue_bytes} bytes, "
                f"{g.cluster} CTAs"
            )
        if g.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"expected barriers besides {g.stages} stages in {MAX_SHARED_BYTES} bytes, "
                f"found {g.barriers} of them: {g.shared_bytes} bytes"
            )

    # --- CTAs of a cluster ---
    @property
    def cluster_e(self) -> int:
        """Parts that the experts are divided into, one per e rank."""
        return ceil_div(self.experts, self.tile_experts)

    @property
    def cluster_x(self) -> int:
        """CTAs of a cluster that route one tile of tokens."""
        return self.cluster_e * self.split_k

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_x * self.cluster_t

    def cta_rank(self, e_rank: Any, k_rank: Any, t_rank: Any) -> Any:
        """The rank of a CTA in its cluster, from integers or from values of the device code."""
        return e_rank + k_rank * self.cluster_e + t_rank * self.cluster_x

    @property
    def padded_experts(self) -> int:
        """Experts of a cluster, padding included: rows of the packed weights."""
        return self.tile_experts * self.cluster_e

    # --- threads ---
    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.tile_experts // MMA_M

    @property
    def consumer_threads(self) -> int:
        """Threads of the consumer warpgroups."""
        return self.warpgroups * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        """Warps of the consumer warpgroups."""
        return self.consumer_threads // LANES

    @property
    def threads(self) -> int:
        """Threads of a CTA: the consumers and a warpgroup of producers."""
        return self.consumer_threads + WARPGROUP

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer thread: what the producers leave of those that the CTA was
        launched with. A request for more would wait forever."""
        launched = REGISTERS // self.threads // 8 * 8 * self.threads
        left = launched - WARPGROUP * self.producer_registers
        return min(MAX_CONSUMER_REGISTERS, left // self.consumer_threads // 8 * 8)

    # --- hidden dimension: slices, as runs of its 64-element blocks ---
    @cached_property
    def slices(self) -> list[range]:
        """The 64-element blocks of each slice. The last slice can end with a short chunk."""
        blocks, whole = self.hidden // K_BLOCK, self.chunk_k_blocks
        chunks = summation.slice_chunks(ceil_div(blocks, whole))
        return [range(own.start * whole, min(own.stop * whole, blocks)) for own in chunks]

    @property
    def last_k_blocks(self) -> int:
        """Blocks of the last chunk if it is short; 0 if every chunk is full."""
        return self.hidden // K_BLOCK % self.chunk_k_blocks

    @property
    def even(self) -> bool:
        """Whether all slices have the same number of blocks."""
        return len({len(own) for own in self.slices}) == 1

    @property
    def runs(self) -> list[range]:
        """Numbers of slices: those without a short chunk, then the last one if it has one."""
        whole = len(self.slices) - (self.last_k_blocks > 0)
        return [run for run in (range(whole), range(whole, len(self.slices))) if run]

    @cached_property
    def shares(self) -> list[list[range]]:
        """The slices that each k rank multiplies, in its order.

        In each turn every k rank takes one of the next ``split_k`` slices: in ascending order,
        unless the largest share has fewer blocks when every second turn is in descending order.
        """
        in_order = [
            self.slices[first : first + self.split_k]
            for first in range(0, len(self.slices), self.split_k)
        ]
        there_and_back = [
            turn[::-1] if number % 2 else turn for number, turn in enumerate(in_order)
        ]

        def largest(turns: list[list[range]]) -> int:
            return max(sum(len(own) for own in share) for share in zip(*turns, strict=True))

        turns = min(in_order, there_and_back, key=largest)
        return [list(share) for share in zip(*turns, strict=True)]

    @property
    def cta_slices(self) -> int:
        """Slices that one CTA multiplies: its turns."""
        return len(self.shares[0])

    def ascending(self, turn: int) -> list[int]:
        """Return the k ranks in the ascending order of the slices that they take in a turn."""
        return sorted(range(self.split_k), key=lambda k_rank: self.shares[k_rank][turn].start)

    @cached_property
    def share_k_blocks(self) -> list[int]:
        """Blocks that the CTA of each k rank multiplies: fillings of its ring."""
        return [sum(len(own) for own in share) for share in self.shares]

    @property
    def k_blocks(self) -> int:
        """Most blocks that one CTA multiplies."""
        return max(self.share_k_blocks)

    # --- tokens ---
    @property
    def n_tiles(self) -> int:
        """n-tiles of 8 tokens of a tile."""
        return self.tile_tokens // N_TILE

    @property
    def held_n_tiles(self) -> int:
        """Most n-tiles whose sums one CTA adds."""
        return ceil_div(self.n_tiles, self.split_k)

    @property
    def held_tokens(self) -> int:
        """Most tokens whose sums one CTA adds, in whole n-tiles."""
        return self.held_n_tiles * N_TILE

    def first_n_tile(self, k_rank: int) -> int:
        """The first n-tile whose sums the CTA of that k rank adds."""
        whole, more = divmod(self.n_tiles, self.split_k)
        return k_rank * whole + min(k_rank, more)

    def n_tile_count(self, k_rank: int) -> int:
        """How many n-tiles that CTA adds."""
        return self.first_n_tile(k_rank + 1) - self.first_n_tile(k_rank)

    @property
    def owned_tokens(self) -> int:
        """Most tokens that one CTA ranks: the CTAs with the same tokens divide them."""
        return ceil_div(self.held_tokens, self.cluster_e)

    # --- selection ---
    @property
    def token_threads(self) -> int:
        """Threads that screen the experts of one token."""
        fitting = [n for n in (2, 4, 8, 16) if self.tile_experts % (4 * n) == 0]
        return min(fitting, key=self.screen_cost)

    def screen_cost(self, token_threads: int) -> float:
        """Return the clocks of screening with that many threads per token, fitted to measurements.

        A warp issues 17 instructions per expert and 200 more for its tokens, one in 1.9 clocks of
        its scheduler, or one in 3.3 if it is the scheduler's only warp.
        """
        warp_passes = ceil_div(self.held_tokens * token_threads, LANES)
        instructions = 17 * self.tile_experts // token_threads + 200
        passes = ceil_div(warp_passes, self.consumer_warps)
        busiest = max(1.9 * ceil_div(warp_passes, 4), 3.3 * passes)
        return instructions * busiest

    @property
    def thread_experts(self) -> int:
        """Experts of a token that one thread screens."""
        return self.tile_experts // self.token_threads

    @property
    def thread_words(self) -> int:
        """Words of one thread's mask of candidates."""
        return ceil_div(self.thread_experts, 32)

    def expected_candidates(self, e_rank: int) -> float:
        """Return how many candidates a token has among the experts of an e rank, on average, if
        logits are independent and alike.

        The threshold is the ``top_k``-th largest maximum of groups of ``size`` experts, so a share
        1 - q**size of the groups lies above it, where q is the share of experts below it.
        """
        real = max(0, min(self.tile_experts, self.experts - e_rank * self.tile_experts))
        size = self.tile_experts / screening_groups(self.top_k)
        groups = real / size
        if groups <= self.top_k - 0.5:
            return real
        return float(real * (1 - (1 - (self.top_k - 0.5) / groups) ** (1 / size)))

    @property
    def list_max(self) -> int:
        """Most candidates of a token that a CTA sends."""
        most = max(self.expected_candidates(e_rank) for e_rank in range(self.cluster_e))
        return ceil_div(math.ceil(SPARE * most), LIST_STEP) * LIST_STEP

    @property
    def candidates(self) -> float:
        """Candidates of a token that are expected of all e ranks together."""
        return sum(self.expected_candidates(e_rank) for e_rank in range(self.cluster_e))

    @property
    def rank_max(self) -> int:
        """Most candidates of a token that are ranked by counting."""
        return ceil_div(math.ceil(SPARE * self.candidates), LIST_STEP) * LIST_STEP

    @property
    def rank_threads(self) -> int:
        """Threads that rank one token's candidates."""
        fitting = [n for n in (4, 8, 16, 32) if self.owned_tokens * n <= self.consumer_threads]
        return max(fitting, default=4)

    @property
    def rank_round(self) -> int:
        """Candidates of a token that are scored or ranked at a time."""
        return max(LIST_STEP // 2, self.rank_threads)

    @property
    def rank_passes(self) -> int:
        """Tokens that a thread ranks for, one after the other."""
        return ceil_div(self.owned_tokens * self.rank_threads, self.consumer_threads)

    # --- shared memory, in bytes: the ring of stages ---
    @property
    def weight_stage_bytes(self) -> int:
        """Bytes of a stage's weights: the tile's experts x 64 hidden elements."""
        return self.tile_experts * K_BLOCK * 2

    @property
    def hidden_stage_bytes(self) -> int:
        """Bytes of a stage's hidden states: the tile's tokens x 64 hidden elements."""
        return self.tile_tokens * K_BLOCK * 2

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage: its weights, then its hidden states."""
        return self.weight_stage_bytes + self.hidden_stage_bytes

    @property
    def stages(self) -> int:
        """Stages of the ring, as many as fit besides the exchange buffers."""
        return self.stages_beside(self.buffers)

    def stages_beside(self, buffers: int) -> int:
        """Return the stages that fit besides ``buffers`` exchange buffers."""
        room = MAX_SHARED_BYTES - buffers * self.exchange_bytes - self.bias_bytes - 512
        return min(self.k_blocks, room // self.stage_bytes)

    @property
    def ring_bytes(self) -> int:
        """Bytes of all stages of the ring."""
        return self.stages * self.stage_bytes

    # --- then the exchange buffers: partial sums from the CTAs of the other k ranks ---
    @property
    def buffers(self) -> int:
        """Slices whose sums may be in flight. Two if the ring keeps enough stages: then a slice's
        sums are sent before all those of the slice before have been added."""
        roomy = self.split_k > 1 and self.cta_slices > 1 and self.stages_beside(2) >= MIN_STAGES
        return 2 if roomy else 1

    @property
    def slot_bytes(self) -> int:
        """Sums that one warp receives from one peer."""
        return self.held_n_tiles * N_TILE_BYTES

    @property
    def warp_bytes(self) -> int:
        """Sums of one slice that one warp receives."""
        return (self.split_k - 1) * self.slot_bytes

    @property
    def exchange_bytes(self) -> int:
        """One exchange buffer of a CTA."""
        return self.consumer_warps * self.warp_bytes

    @property
    def exchange_offset(self) -> int:
        """Offset of the exchange buffers."""
        return self.ring_bytes

    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases of all experts, FP32."""
        return self.padded_experts * 4

    @property
    def bias_offset(self) -> int:
        """Offset of the biases."""
        return self.exchange_offset + self.buffers * self.exchange_bytes

    @property
    def barrier_offset(self) -> int:
        """The ring's barriers: full ones, empty ones of hidden states, empty ones of weights."""
        return self.bias_offset + self.bias_bytes

    @property
    def exchange_barrier_offset(self) -> int:
        """Full, then empty barriers of the exchange buffers, one of each per buffer and warp."""
        return self.barrier_offset + 3 * BARRIER_BYTES * self.stages

    @property
    def barriers(self) -> int:
        """Barriers of the ring and of the exchange buffers."""
        return 3 * self.stages + 2 * self.buffers * self.consumer_warps

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        return self.barrier_offset + ceil_div(BARRIER_BYTES * self.barriers, 16) * 16

    # --- the epilogue, in the place of the ring ---
    @property
    def logit_row_bytes(self) -> int:
        """Padded: two tokens further is 8 banks further, so that a warp's stores never collide."""
        return (self.tile_experts + 4) * 4

    @property
    def image_bias_offset(self) -> int:
        """The biases that image tokens are selected by."""
        return self.held_tokens * self.logit_row_bytes

    @property
    def count_offset(self) -> int:
        """How many candidates each CTA has sent for a token."""
        return self.image_bias_offset + self.bias_bytes

    @property
    def list_offset(self) -> int:
        """Offset of the lists of candidates that a token's CTAs have sent."""
        return ceil_div(self.count_offset + self.owned_tokens * self.cluster_e * 4, 16) * 16

    @property
    def list_row_bytes(self) -> int:
        """(logit, expert) of a token's candidates, up to ``list_max`` from each CTA. Rows are
        padded, so that neighbouring ones start in different banks."""
        return self.cluster_e * self.list_max * 8 + 16

    @property
    def slot_offset(self) -> int:
        """Offset of the candidates that are ranked, one row per token."""
        return self.list_offset + self.owned_tokens * self.list_row_bytes

    @property
    def slot_row_bytes(self) -> int:
        """(~expert, key) of a token's candidates, 64-bit numbers, then their scores. There is one
        row more than tokens, for threads without a token; likewise of records."""
        return self.rank_max * 12 + 16

    @property
    def record_offset(self) -> int:
        """(expert, score) of a token's ranks, 16 bytes each."""
        return self.slot_offset + (self.owned_tokens + 1) * self.slot_row_bytes

    @property
    def epilogue_bytes(self) -> int:
        """Bytes of the epilogue's data, which have to fit the ring."""
        return self.record_offset + (self.owned_tokens + 1) * self.top_k * 16
