"""How the prefill kernel divides a batch among clusters, blocks and warps; shared by contract and
source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from build_kernels.kernels.common import tcgen05_layout

#: One pipeline stage holds this many hidden elements: 128 bytes, the width of the swizzle.
K_BLOCK = 64
MMA_M = 64
MMA_K = 16
LANES = 32
WARPGROUP = 128

#: Accumulators in tensor memory: one is multiplied into while the other is added to the totals.
ACCUMULATORS = 2

#: Tiles of 128 experts whose totals for 128 tokens fit the registers of two warpgroups.
MAX_ROW_TILES = 2

#: Dynamic shared memory of one block on every target, in bytes.
MAX_SHARED_BYTES = 227 * 1024


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def screening_groups(top_k: int) -> int:
    """Groups of experts, of which the ``top_k`` largest bounds give a threshold: a power of two, at
    least four times as many. For 6 ranks of 128 experts, 6.4 are candidates on average; with half
    as many groups 7.1, with a quarter 10."""
    return 1 << (4 * top_k - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Geometry:
    """A cluster is ``cluster_e`` x ``cluster_t`` blocks and routes ``cluster_t`` tiles of tokens.

    The ``cluster_e`` blocks of one tile share its hidden states and divide the experts among them;
    the ``cluster_t`` blocks of one part of the experts share its weights. A block multiplies its
    part of the experts in ``passes`` passes over each chunk, so that only one pass's partial sums
    need registers beside the totals.

    With ``tcgen05`` the partial sums lie in tensor memory: two accumulators take turns, each of
    ``row_tiles`` times 128 experts by the tile's tokens, and one pass is enough.
    """

    hidden: int
    experts: int
    top_k: int
    k_chunk: int
    cluster_e: int
    cluster_t: int
    passes: int
    tcgen05: bool = False

    @classmethod
    def of(cls, constants: Mapping[str, int | float]) -> Geometry:
        g = cls(
            hidden=int(constants["HIDDEN"]),
            experts=int(constants["EXPERTS"]),
            top_k=int(constants["TOP_K"]),
            k_chunk=int(constants["K_CHUNK"]),
            cluster_e=int(constants["CLUSTER_E"]),
            cluster_t=int(constants["CLUSTER_T"]),
            passes=int(constants["PASSES"]),
            tcgen05="TCGEN05" in constants,
        )
        if g.tcgen05 and (g.passes > 1 or g.row_tiles > MAX_ROW_TILES):
            raise ValueError(
                f"expected one pass over at most {MAX_ROW_TILES * tcgen05_layout.MMA_M} experts a "
                f"block, found {g.passes} over {g.block_experts}"
            )
        return g

    # --- tiles ---
    @property
    def consumers(self) -> int:
        """Warpgroups that multiply, 64 tokens each."""
        return 2

    @property
    def tokens_tile(self) -> int:
        return self.consumers * MMA_M

    @property
    def mma_n(self) -> int:
        """Experts of one pass: the N of the MMA, divisible among the blocks that share its
        weights."""
        step = max(8 * self.cluster_t, 16 if self.tcgen05 else 8)
        return ceil_div(self.experts, self.cluster_e * self.passes * step) * step

    @property
    def block_experts(self) -> int:
        return self.mma_n * self.passes

    @property
    def padded_experts(self) -> int:
        return self.block_experts * self.cluster_e

    @property
    def cluster(self) -> int:
        return self.cluster_e * self.cluster_t

    # --- tensor memory ---
    @property
    def row_tiles(self) -> int:
        """MMAs of 128 experts that a block's part takes; the last one may have idle rows."""
        return ceil_div(self.block_experts, tcgen05_layout.MMA_M)

    @property
    def accumulator_columns(self) -> int:
        return self.row_tiles * self.tokens_tile

    @property
    def tensor_columns(self) -> int:
        return tcgen05_layout.allocation(ACCUMULATORS * self.accumulator_columns)

    # --- hidden dimension ---
    @property
    def blocks(self) -> int:
        return self.hidden // K_BLOCK

    @property
    def chunk_blocks(self) -> int:
        return self.k_chunk // K_BLOCK

    @property
    def full_chunks(self) -> int:
        return self.blocks // self.chunk_blocks

    @property
    def chunks(self) -> int:
        return ceil_div(self.blocks, self.chunk_blocks)

    @property
    def last_blocks(self) -> int:
        """K blocks of the last, short chunk; 0 where there is none."""
        return self.blocks % self.chunk_blocks

    # --- threads ---
    @property
    def threads(self) -> int:
        return (self.consumers + 1) * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        return self.consumers * WARPGROUP // LANES

    # --- selection ---
    @property
    def token_threads(self) -> int:
        """Threads that rank one token's candidates; each takes two of its masks."""
        return 2 * self.cluster_e

    @property
    def owned_tokens(self) -> int:
        """Tokens of the tile whose result one block writes."""
        return self.tokens_tile // self.cluster_e

    @property
    def mask_bits(self) -> int:
        """Experts of a token that one thread of a quad holds."""
        return self.block_experts // 4

    @property
    def mask_words(self) -> int:
        return ceil_div(self.mask_bits, 32)

    @property
    def bounds(self) -> int:
        """Groups of a part's experts whose largest bounds give a token's threshold."""
        return screening_groups(self.top_k)

    # --- shared memory, in bytes ---
    @property
    def hidden_stage_bytes(self) -> int:
        return self.tokens_tile * K_BLOCK * 2

    @property
    def weight_stage_bytes(self) -> int:
        return self.mma_n * K_BLOCK * 2

    @property
    def bias_bytes(self) -> int:
        return self.padded_experts * 4

    @property
    def ring_bytes(self) -> int:
        return MAX_SHARED_BYTES - self.bias_bytes - 512 - self.idle_bytes

    @property
    def idle_bytes(self) -> int:
        """What the idle rows read beyond the last stage of weights: anything, but there."""
        if not self.tcgen05:
            return 0
        return (self.row_tiles * tcgen05_layout.MMA_M - self.block_experts) * K_BLOCK * 2

    @property
    def hidden_stages(self) -> int:
        """With several passes the hidden states of a whole chunk stay, and the next ones arrive."""
        if self.passes > 1:
            return self.chunk_blocks + 2
        return self.ring_bytes // (self.hidden_stage_bytes + self.weight_stage_bytes)

    @property
    def weight_stages(self) -> int:
        left = self.ring_bytes - self.hidden_stages * self.hidden_stage_bytes
        return left // self.weight_stage_bytes

    @property
    def weight_offset(self) -> int:
        return self.hidden_stages * self.hidden_stage_bytes

    @property
    def bias_offset(self) -> int:
        return self.weight_offset + self.weight_stages * self.weight_stage_bytes

    @property
    def barrier_offset(self) -> int:
        return self.bias_offset + self.bias_bytes

    @property
    def accumulator_offset(self) -> int:
        """With ``tcgen05``: full and empty barriers of the accumulators, then their address."""
        return self.barrier_offset + 16 * (self.hidden_stages + self.weight_stages)

    @property
    def tensor_address_offset(self) -> int:
        return self.accumulator_offset + 16 * ACCUMULATORS

    @property
    def shared_bytes(self) -> int:
        if not self.tcgen05:
            return self.accumulator_offset
        return max(self.tensor_address_offset + 16, self.bias_offset + self.idle_bytes)

    # After the multiplication the rings hold the logits and the masks of candidates.
    @property
    def logit_row_bytes(self) -> int:
        """Padded so that the rows of a warp's accumulator fragment start 8 banks apart."""
        return (ceil_div(self.block_experts, 32) * 32 + 8) * 4

    @property
    def mask_offset(self) -> int:
        return self.tokens_tile * self.logit_row_bytes

    @property
    def mask_row_bytes(self) -> int:
        return 4 * 4 * self.mask_words

    @property
    def image_bias_offset(self) -> int:
        return self.mask_offset + self.tokens_tile * self.mask_row_bytes
