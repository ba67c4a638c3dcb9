"""How the tile form divides a batch among clusters, CTAs and warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    LANES,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    Geometry,
    ceil_div,
)

#: Stages of a ring, at least.
MIN_STAGES = 3

#: Most registers of a thread for totals, if they do not all fit beside the other sums.
MOST_KEPT = 16


@dataclass(frozen=True)
class TileGeometry(Geometry):
    """A cluster of ``cluster_e`` x ``cluster_t`` CTAs routes ``cluster_t`` tiles of 128 tokens.

    The ``cluster_e`` CTAs of one tile share its hidden states and divide the experts among them;
    the ``cluster_t`` CTAs with the same experts share their weights. A CTA multiplies its experts
    in ``passes`` passes over each chunk, so that only the partial sums of one pass need registers
    besides the slice's sums. The sums of earlier slices are parked in shared memory meanwhile.
    """

    cluster_e: int
    cluster_t: int
    passes: int

    #: Most experts of a CTA whose sums of a chunk and of a slice fit the registers, in one pass.
    most_experts: ClassVar[int] = 192

    #: Registers of a thread that sums of a chunk and of a slice and totals may take together.
    most_sums: ClassVar[int] = 192

    #: The MMA's number of experts is a multiple of this.
    expert_step: ClassVar[int] = 8

    # --- tiles ---
    @property
    def consumer_warpgroups(self) -> int:
        """Warpgroups that hold totals, 64 tokens each."""
        return 2

    @property
    def consumer_threads(self) -> int:
        """Threads of the consumer warpgroups."""
        return self.consumer_warpgroups * WARPGROUP

    @property
    def tokens_tile(self) -> int:
        """Tokens of a tile."""
        return self.consumer_warpgroups * MMA_M

    @property
    def mma_n(self) -> int:
        """Experts of one pass, divisible among the CTAs that share its weights."""
        step = max(8 * self.cluster_t, self.expert_step)
        return ceil_div(self.experts, self.cluster_e * self.passes * step) * step

    @property
    def cta_experts(self) -> int:
        """Experts of one CTA, over all passes, padding included."""
        return self.mma_n * self.passes

    @property
    def padded_experts(self) -> int:
        """Experts of all CTAs of a tile, padding included: rows of the packed weights."""
        return self.cta_experts * self.cluster_e

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_e * self.cluster_t

    # --- hidden dimension ---
    @property
    def k_blocks(self) -> int:
        """64-element blocks of the hidden dimension."""
        return self.hidden // K_BLOCK

    @property
    def full_chunks(self) -> int:
        """Chunks that have all of their blocks."""
        return self.k_blocks // self.chunk_k_blocks

    @property
    def chunks(self) -> int:
        """Chunks of the hidden dimension, a short last one included."""
        return ceil_div(self.k_blocks, self.chunk_k_blocks)

    @property
    def last_k_blocks(self) -> int:
        """Blocks of the last chunk if it is short; 0 if every chunk is full."""
        return self.k_blocks % self.chunk_k_blocks

    # --- threads ---
    @property
    def threads(self) -> int:
        """Threads of a CTA: the consumers and a warpgroup of producers."""
        return self.consumer_threads + WARPGROUP

    @property
    def consumer_warps(self) -> int:
        """Warps of the consumer warpgroups."""
        return self.consumer_threads // LANES

    # --- selection ---
    @property
    def token_threads(self) -> int:
        """Threads that rank one token's candidates; each takes two of its masks."""
        return 2 * self.cluster_e

    @property
    def owned_tokens(self) -> int:
        """Tokens of the tile whose results one CTA writes."""
        return self.tokens_tile // self.cluster_e

    @property
    def mask_bits(self) -> int:
        """Experts of a token that one thread of a quad holds."""
        return self.cta_experts // 4

    @property
    def mask_words(self) -> int:
        """Words (32 bits) of the mask of one thread of a quad, for one token."""
        return ceil_div(self.mask_bits, 32)

    # --- shared memory, in bytes ---
    @property
    def hidden_stage_bytes(self) -> int:
        """Bytes of a stage of hidden states: the tile's tokens x 64 hidden elements."""
        return self.tokens_tile * K_BLOCK * 2

    @property
    def weight_stage_bytes(self) -> int:
        """Bytes of a stage of weights: the experts of one pass x 64 hidden elements."""
        return self.mma_n * K_BLOCK * 2

    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases of all experts, FP32."""
        return self.padded_experts * 4

    @property
    def sums(self) -> int:
        """Sums of a slice that one consumer thread has."""
        return self.tokens_tile * self.cta_experts // self.consumer_threads

    @property
    def parked_sums(self) -> int:
        """How many of a thread's ``sums`` have their totals in shared memory; the others have
        registers for their totals, too. 0 if all totals fit registers, else as many as the smallest
        rings leave room for.
        """
        chunk_sums = self.sums // self.passes
        if chunk_sums + 2 * self.sums <= self.most_sums:
            return 0
        stages = max(MIN_STAGES, self.chunk_k_blocks if self.passes > 1 else 0)
        least = stages * self.hidden_stage_bytes + MIN_STAGES * self.weight_stage_bytes
        room = (MAX_SHARED_BYTES - self.bias_bytes - 512 - least) // (4 * self.consumer_threads)
        return min(self.sums, room // 4 * 4)

    @property
    def parked_bytes(self) -> int:
        """Bytes of the parked sums of all consumer threads."""
        return self.parked_sums * self.consumer_threads * 4

    @property
    def ring_bytes(self) -> int:
        """What parked sums, biases and barriers leave for the two rings."""
        return MAX_SHARED_BYTES - self.parked_bytes - self.bias_bytes - 512

    @property
    def hidden_stages(self) -> int:
        """With several passes, a chunk's hidden states stay until the last pass has read them."""
        if self.passes > 1:
            return self.chunk_k_blocks
        return self.ring_bytes // (self.hidden_stage_bytes + self.weight_stage_bytes)

    @property
    def weight_stages(self) -> int:
        """Stages of weights that fit besides those of hidden states."""
        left = self.ring_bytes - self.hidden_stages * self.hidden_stage_bytes
        return left // self.weight_stage_bytes

    @property
    def weight_offset(self) -> int:
        """Offset of the ring of weights."""
        return self.hidden_stages * self.hidden_stage_bytes

    @property
    def parked_offset(self) -> int:
        """Offset of the parked sums."""
        return self.weight_offset + self.weight_stages * self.weight_stage_bytes

    @property
    def bias_offset(self) -> int:
        """Offset of the biases."""
        return self.parked_offset + self.parked_bytes

    @property
    def barrier_offset(self) -> int:
        """Full, then empty barriers of the hidden states, then those of the weights."""
        return self.bias_offset + self.bias_bytes

    @property
    def weight_barrier_offset(self) -> int:
        """Offset of the full, then empty barriers of the weights."""
        return self.barrier_offset + 2 * BARRIER_BYTES * self.hidden_stages

    @property
    def end_offset(self) -> int:
        """The end of the rings' barriers."""
        return self.weight_barrier_offset + 2 * BARRIER_BYTES * self.weight_stages

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        return self.end_offset

    # --- later, in the place of rings and parked sums: logits, and the candidates' masks ---
    @property
    def logit_row_bytes(self) -> int:
        """Padded so that the rows of a warp's accumulator fragment start 8 banks apart."""
        return (ceil_div(self.cta_experts, 32) * 32 + 8) * 4

    @property
    def mask_offset(self) -> int:
        """Offset of the masks of candidates, behind the logits."""
        return self.tokens_tile * self.logit_row_bytes

    @property
    def mask_row_bytes(self) -> int:
        """Bytes of one token's masks: those of the four threads of a quad."""
        return 4 * 4 * self.mask_words

    @property
    def image_bias_offset(self) -> int:
        """Offset of the biases that image tokens are selected with."""
        return self.mask_offset + self.tokens_tile * self.mask_row_bytes


@dataclass(frozen=True)
class TileMmaSyncGeometry(TileGeometry):
    """The tile form with ``mma.sync``, which needs registers for its operands, too."""

    most_experts: ClassVar[int] = 128
    most_sums: ClassVar[int] = 160
