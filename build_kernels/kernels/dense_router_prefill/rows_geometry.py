"""How the form with experts as MMA rows divides a batch among clusters, blocks and warpgroups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from build_kernels.kernels.dense_router_prefill.geometry import (
    K_BLOCK,
    LANES,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    ceil_div,
    screening_groups,
)

#: Tokens are handed over in columns of 8: what 32 lanes hold of them, 16 bytes a lane.
COLUMN = 8
COLUMN_BYTES = LANES * 16

#: Candidates of a token that a part of the experts sends at most, and that are ranked at most.
LISTED = 32
RANKED = 32

#: Stages that hide the way from memory to the ring.
MIN_STAGES = 4


@dataclass(frozen=True, slots=True)
class RowsGeometry:
    """A block multiplies ``tile_experts`` experts, 64 a warpgroup, by ``tile_tokens`` tokens.

    A cluster is ``cluster_e`` x ``split_k`` x ``cluster_t`` blocks, in this order of rank: parts of
    the experts of its group, shares of the chunks of the hidden dimension, tiles of tokens. Blocks
    that need the same weights or the same hidden states take turns in fetching them for all.
    Share s of the hidden dimension has the chunks s, s + split_k, ...; of every chunk's partial
    sums a block keeps the columns of tokens that it adds, and hands the others over.
    """

    hidden: int
    experts: int
    top_k: int
    k_chunk: int
    tile_experts: int
    tile_tokens: int
    cluster_t: int
    split_k: int

    @classmethod
    def of(cls, constants: Mapping[str, int | float]) -> RowsGeometry:
        g = cls(
            hidden=int(constants["HIDDEN"]),
            experts=int(constants["EXPERTS"]),
            top_k=int(constants["TOP_K"]),
            k_chunk=int(constants["K_CHUNK"]),
            tile_experts=int(constants["TILE_EXPERTS"]),
            tile_tokens=int(constants["TILE_TOKENS"]),
            cluster_t=int(constants["CLUSTER_T"]),
            split_k=int(constants["SPLIT_K"]),
        )
        if g.hidden % (g.k_chunk * g.split_k) or g.tile_tokens % COLUMN or g.tile_experts % MMA_M:
            raise ValueError(
                f"expected chunks of {g.k_chunk} that divide evenly among {g.split_k} blocks, "
                f"tiles of a multiple of {COLUMN} tokens and {MMA_M} experts, found hidden "
                f"{g.hidden}, {g.tile_tokens} tokens, {g.tile_experts} experts"
            )
        # A share that adds nothing would be ahead of those that wait for each other's sums.
        if g.columns < g.split_k:
            raise ValueError(
                f"expected tiles of at least {COLUMN} tokens for each of {g.split_k} shares, found "
                f"{g.tile_tokens} tokens"
            )
        if g.stages < 2 or g.epilogue_bytes > g.ring_bytes or g.cluster > 16:
            raise ValueError(
                f"expected two stages and the logits in {MAX_SHARED_BYTES} bytes, clusters of at "
                f"most 16, found {g.stages} stages, {g.epilogue_bytes} bytes, {g.cluster} blocks"
            )
        return g

    # --- blocks of a cluster ---
    @property
    def cluster_e(self) -> int:
        return ceil_div(self.experts, self.tile_experts)

    @property
    def cluster_x(self) -> int:
        return self.cluster_e * self.split_k

    @property
    def cluster(self) -> int:
        return self.cluster_x * self.cluster_t

    @property
    def padded_experts(self) -> int:
        return self.tile_experts * self.cluster_e

    # --- threads ---
    @property
    def warpgroups(self) -> int:
        """Those that multiply."""
        return self.tile_experts // MMA_M

    @property
    def consumers(self) -> int:
        return self.warpgroups * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        return self.consumers // LANES

    @property
    def threads(self) -> int:
        return self.consumers + WARPGROUP

    @property
    def producer_registers(self) -> int:
        return 24

    @property
    def consumer_registers(self) -> int:
        """What a block's registers leave each thread that multiplies, at most 240. A block has what
        its threads were launched with: asking for more would wait forever."""
        launched = 65536 // self.threads // 8 * 8 * self.threads
        left = launched - WARPGROUP * self.producer_registers
        return min(240, left // self.consumers // 8 * 8)

    # --- hidden dimension ---
    @property
    def chunk_blocks(self) -> int:
        return self.k_chunk // K_BLOCK

    @property
    def rounds(self) -> int:
        """Chunks of one share."""
        return self.hidden // self.k_chunk // self.split_k

    @property
    def blocks(self) -> int:
        """64-element blocks of one share: stages that a block consumes."""
        return self.rounds * self.chunk_blocks

    # --- tokens ---
    @property
    def columns(self) -> int:
        return self.tile_tokens // COLUMN

    @property
    def held_columns(self) -> int:
        """Columns that a block adds, at most."""
        return ceil_div(self.columns, self.split_k)

    @property
    def held_tokens(self) -> int:
        return self.held_columns * COLUMN

    def first_column(self, share: int) -> int:
        whole, more = divmod(self.columns, self.split_k)
        return share * whole + min(share, more)

    def column_count(self, share: int) -> int:
        return self.first_column(share + 1) - self.first_column(share)

    @property
    def owned_tokens(self) -> int:
        """Tokens whose experts one block ranks, at most: the parts of the experts divide those that
        they hold."""
        return ceil_div(self.held_tokens, self.cluster_e)

    # --- selection ---
    @property
    def token_threads(self) -> int:
        """Threads that screen the experts of one token."""
        fitting = [n for n in (2, 4, 8, 16) if self.tile_experts % (4 * n) == 0]
        return min(fitting, key=self.screen_cost)

    def screen_cost(self, token_threads: int) -> float:
        """Clocks, as fitted to measurements: a warp issues 17 instructions an expert and 200 more
        for its tokens, one in 1.9 clocks of its scheduler, or in 3.3 where it is alone there."""
        turns = ceil_div(self.held_tokens * token_threads, LANES)
        instructions = 17 * self.tile_experts // token_threads + 200
        busiest = max(1.9 * ceil_div(turns, 4), 3.3 * ceil_div(turns, self.consumer_warps))
        return instructions * busiest

    @property
    def thread_experts(self) -> int:
        return self.tile_experts // self.token_threads

    @property
    def thread_words(self) -> int:
        """Words of one thread's mask of candidates."""
        return ceil_div(self.thread_experts, 32)

    @property
    def bounds(self) -> int:
        """Groups of a part's experts whose largest bounds give a token's threshold."""
        return screening_groups(self.top_k)

    @property
    def rank_threads(self) -> int:
        """Threads that rank one token's candidates."""
        fitting = [n for n in (4, 8, 16, 32) if self.owned_tokens * n <= self.consumers]
        return max(fitting, default=4)

    @property
    def rank_round(self) -> int:
        """Candidates of a token that are ranked at a time: more than that are few."""
        return max(RANKED // 2, self.rank_threads)

    @property
    def rank_passes(self) -> int:
        return ceil_div(self.owned_tokens * self.rank_threads, self.consumers)

    # --- shared memory, in bytes: the ring of stages ---
    @property
    def weight_stage_bytes(self) -> int:
        return self.tile_experts * K_BLOCK * 2

    @property
    def hidden_stage_bytes(self) -> int:
        return self.tile_tokens * K_BLOCK * 2

    @property
    def stage_bytes(self) -> int:
        return self.weight_stage_bytes + self.hidden_stage_bytes

    @property
    def stages(self) -> int:
        return self.stages_beside(self.buffers)

    def stages_beside(self, buffers: int) -> int:
        """How many stages there is room for beside so many buffers of sums."""
        room = MAX_SHARED_BYTES - buffers * self.exchange_bytes - self.bias_bytes - 512
        return min(self.blocks, room // self.stage_bytes)

    @property
    def ring_bytes(self) -> int:
        return self.stages * self.stage_bytes

    # --- then the sums that come from the other shares ---
    @property
    def buffers(self) -> int:
        """Chunks whose sums may be on their way. From one hand-over of a buffer to the next lie a
        copy to the other shares and their answer, some 2000 clocks: longer than a chunk's MMAs, so
        two buffers where the ring keeps enough stages."""
        roomy = self.split_k > 1 and self.rounds > 1 and self.stages_beside(2) >= MIN_STAGES
        return 2 if roomy else 1

    @property
    def slot_bytes(self) -> int:
        """Sums of one warp for one share."""
        return self.held_columns * COLUMN_BYTES

    @property
    def warp_bytes(self) -> int:
        return (self.split_k - 1) * self.slot_bytes

    @property
    def exchange_bytes(self) -> int:
        return self.consumer_warps * self.warp_bytes

    @property
    def received_offset(self) -> int:
        return self.ring_bytes

    @property
    def bias_bytes(self) -> int:
        return self.padded_experts * 4

    @property
    def bias_offset(self) -> int:
        return self.received_offset + self.buffers * self.exchange_bytes

    @property
    def barrier_offset(self) -> int:
        return self.bias_offset + self.bias_bytes

    @property
    def barriers(self) -> int:
        return 3 * self.stages + 2 * self.buffers * self.consumer_warps

    @property
    def shared_bytes(self) -> int:
        return self.barrier_offset + ceil_div(8 * self.barriers, 16) * 16

    # --- the epilogue, in the place of the ring ---
    @property
    def logit_row_bytes(self) -> int:
        """Padded: two tokens further is 8 banks further, so that a warp's stores never collide."""
        return (self.tile_experts + 4) * 4

    @property
    def image_bias_offset(self) -> int:
        """Biases of image tokens."""
        return self.held_tokens * self.logit_row_bytes

    @property
    def count_offset(self) -> int:
        """How many candidates each part has sent for a token."""
        return self.image_bias_offset + self.bias_bytes

    @property
    def list_offset(self) -> int:
        return ceil_div(self.count_offset + self.owned_tokens * self.cluster_e * 4, 16) * 16

    @property
    def list_row_bytes(self) -> int:
        """(logit, expert) of a token's candidates, LISTED for each part. Rows are padded, so that
        neighbouring ones start in different banks."""
        return self.cluster_e * LISTED * 8 + 16

    @property
    def slot_offset(self) -> int:
        return self.list_offset + self.owned_tokens * self.list_row_bytes

    @property
    def slot_row_bytes(self) -> int:
        """(~expert, key) of a token's candidates: its ranks, as 64-bit numbers; then their scores.
        There is one row more than tokens, for threads that have none; and one of records."""
        return RANKED * 12 + 16

    @property
    def record_offset(self) -> int:
        """(expert, score) of a token's ranks, 16 bytes each."""
        return self.slot_offset + (self.owned_tokens + 1) * self.slot_row_bytes

    @property
    def epilogue_bytes(self) -> int:
        return self.record_offset + (self.owned_tokens + 1) * self.top_k * 16
