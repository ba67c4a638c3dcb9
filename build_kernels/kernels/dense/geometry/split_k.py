"""How the split-K form divides a batch among clusters, CTAs and warpgroups."""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.kernels.common.ptx import tcgen05_layout
from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    LANES,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    GroupedGeometry,
    ceil_div,
)

#: ``tokens_tile`` is a multiple of the first, ``m_tiles`` of the second: an MMA takes a multiple
#: of 16 tokens, and 128 experts.
TOKEN_STEP = 16
M_TILE_STEP = tcgen05_layout.MMA_M // MMA_M


@dataclass(frozen=True)
class SplitKGeometry(GroupedGeometry):
    """``groups`` clusters of ``cluster_k`` CTAs route one tile of ``tokens_tile`` tokens.

    A cluster holds a group of 64 * ``m_tiles`` experts over the whole hidden dimension; a CTA holds
    a share, which is some of its chunks; a warpgroup has the sums of 64 experts over one chunk,
    whose 32 KiB of weights are in shared memory before the hidden states exist. A pair of
    warpgroups shares the accumulator of 128 experts, in tensor memory. A token's chunks are added
    by one CTA of the cluster.

    All operands of a CTA are in shared memory at once. The partial sums, received and staged, then
    take their place.
    """

    cluster_k: int
    tokens_tile: int

    def check(self) -> None:
        """Raise ValueError unless CTAs have equal chunks and all fits shared memory."""
        if self.hidden % (self.k_chunk * self.cluster_k) or self.tokens_tile % TOKEN_STEP:
            raise ValueError(
                f"expected chunks of {self.k_chunk} that divide evenly among {self.cluster_k} CTAs "
                f"and tiles of a multiple of {TOKEN_STEP} tokens, "
                f"found hidden {self.hidden}, tokens {self.tokens_tile}"
            )
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"expected operands and sums that fit {MAX_SHARED_BYTES} bytes, found "
                f"{self.shared_bytes}: {self.tokens_tile} tokens, {self.group_experts} experts"
            )

    # --- experts ---
    @property
    def m_tiles(self) -> int:
        """Tiles of 64 experts of a group."""
        return ceil_div(self.experts, MMA_M * self.groups * M_TILE_STEP) * M_TILE_STEP

    @property
    def group_experts(self) -> int:
        """Experts of one group, padding included."""
        return MMA_M * self.m_tiles

    # --- hidden dimension ---
    @property
    def chunks(self) -> int:
        """Chunks of the hidden dimension, hence partial sums of one logit."""
        return self.hidden // self.k_chunk

    @property
    def cta_chunks(self) -> int:
        """Chunks of one CTA's share of the hidden dimension."""
        return self.chunks // self.cluster_k

    @property
    def k_blocks(self) -> int:
        """64-element blocks of a CTA's share."""
        return self.cta_chunks * self.chunk_k_blocks

    def stage_of(self, number: int) -> int:
        """Return the block of the share that is requested as number ``number``. The chunks take
        turns, since different warpgroups wait for them."""
        return number % self.cta_chunks * self.chunk_k_blocks + number // self.cta_chunks

    # --- threads ---
    @property
    def warpgroups(self) -> int:
        """Warpgroups: one for each m-tile and chunk of the share."""
        return self.m_tiles * self.cta_chunks

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warpgroups * WARPGROUP

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.threads // LANES

    # --- tensor memory ---
    @property
    def pairs(self) -> int:
        """Tiles of 128 experts of a group."""
        return self.group_experts // tcgen05_layout.MMA_M

    @property
    def tensor_columns(self) -> int:
        """An accumulator of ``tokens_tile`` columns for every pair and chunk of the share.

        All CTAs that share a multiprocessor get theirs: 64 KiB of weights come with each
        accumulator, so shared memory runs out first.
        """
        return tcgen05_layout.allocation(self.pairs * self.cta_chunks * self.tokens_tile)

    # --- tokens ---
    @property
    def slots(self) -> int:
        """Tokens whose chunks one CTA adds: token t of the tile goes to the CTA of k rank
        t % cluster_k, into slot t // cluster_k."""
        return ceil_div(self.tokens_tile, self.cluster_k)

    @property
    def score_passes(self) -> int:
        """(token, expert) pairs that a thread adds and scores."""
        return ceil_div(self.slots * self.group_experts, self.threads)

    # --- shared memory, in bytes: first the operands ---
    @property
    def weight_stage_bytes(self) -> int:
        """The group's experts x 64 hidden elements."""
        return self.group_experts * K_BLOCK * 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a CTA, all in shared memory at once."""
        return self.k_blocks * self.weight_stage_bytes

    @property
    def hidden_stage_bytes(self) -> int:
        """Bytes of a stage of hidden states: the tile's tokens x 64 hidden elements."""
        return self.tokens_tile * K_BLOCK * 2

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of a CTA, all in shared memory at once."""
        return self.k_blocks * self.hidden_stage_bytes

    # --- then, in the same place, the sums that were received, and those staged to be sent ---
    @property
    def sums_bytes(self) -> int:
        """One CTA's partial sums of one token."""
        return self.cta_chunks * self.group_experts * 4

    @property
    def sums_row_bytes(self) -> int:
        """Padded: two rows further is 8 banks further, so that a warp's stores never collide."""
        return self.sums_bytes + 16

    @property
    def slot_bytes(self) -> int:
        """All partial sums of one token."""
        return self.chunks * self.group_experts * 4

    @property
    def staged_offset(self) -> int:
        """Offset of the staged sums, behind the received ones."""
        return self.slots * self.slot_bytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of the staged sums."""
        return self.tokens_tile * self.sums_row_bytes

    # --- then biases and barriers ---
    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases of the group's experts, FP32."""
        return self.group_experts * 4

    @property
    def bias_offset(self) -> int:
        """Offset of the biases, behind the operands and the sums that take their place."""
        operands = self.weight_bytes + self.hidden_bytes
        return max(operands, self.staged_offset + self.staged_bytes)

    @property
    def barrier_offset(self) -> int:
        """Full barriers of the weights, then of the hidden states; then the one that counts
        received sums, and those of finished accumulators."""
        return self.bias_offset + self.bias_bytes

    @property
    def hidden_barrier_offset(self) -> int:
        """Offset of the full barriers of the hidden states."""
        return self.barrier_offset + BARRIER_BYTES * self.k_blocks

    @property
    def sums_barrier_offset(self) -> int:
        """Offset of the barrier that counts received sums."""
        return self.hidden_barrier_offset + BARRIER_BYTES * self.k_blocks

    @property
    def accumulated_offset(self) -> int:
        """Barriers of finished accumulators, one per chunk of the share."""
        return self.sums_barrier_offset + BARRIER_BYTES

    @property
    def tensor_address_offset(self) -> int:
        """Where the address of the tensor memory is stored."""
        return self.accumulated_offset + BARRIER_BYTES * self.cta_chunks

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        size = self.tensor_address_offset + 8 - self.barrier_offset
        return self.barrier_offset + ceil_div(size, 16) * 16
