"""How the decode form divides a router among CTAs and warps."""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    LANES,
    MAX_SHARED_BYTES,
    MMA_K,
    GroupedGeometry,
    ceil_div,
)

#: Rows (experts) and columns (tokens) of one ``mma.sync``.
MMA_SYNC_M = 16
MMA_SYNC_N = 8

#: Most tokens of a tile: enough independent chains of MMAs, few enough registers.
MAX_TILE = 32

#: Shared memory that a CTA requests at least. It is more than the largest split but one of the
#: memory that shared memory and L1 share. A multiprocessor changes its split only while it is idle,
#: so a kernel with a smaller request would wait until its predecessor has ended.
LEAST_SHARED_BYTES = 200 * 1024

#: Registers of a multiprocessor, and what a thread needs besides its weights.
REGISTERS = 65536
OTHER_REGISTERS = 64


@dataclass(frozen=True)
class DecodeGeometry(GroupedGeometry):
    """``groups`` clusters of ``cluster_e`` x ``cluster_k`` CTAs route ``tokens_tile`` tokens.

    Each CTA holds 16 * ``m_tiles`` experts over a share of the hidden dimension. A warp keeps
    ``warp_m`` of these m-tiles in registers over one slab, which is one or more chunks of the
    hidden dimension.
    """

    tokens_tile: int
    cluster_e: int
    cluster_k: int
    warp_m: int

    @property
    def fits(self) -> bool:
        """Whether a CTA's weights fit its registers, and the rest its shared memory."""
        registers = self.warp_m * self.slab // 4 + OTHER_REGISTERS
        # The four schedulers of a multiprocessor have a quarter of the registers each.
        needed = ceil_div(self.warps, 4) * 4 * LANES * registers
        return (
            registers <= 255
            and needed <= REGISTERS
            and self.tokens_tile <= MAX_TILE
            and self.shared_bytes <= MAX_SHARED_BYTES
            and (self.cluster_k - 1) * self.cta_slabs < self.slabs
        )

    # --- experts ---
    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_e * self.cluster_k

    @property
    def ctas(self) -> int:
        """CTAs of one tile of tokens."""
        return self.groups * self.cluster

    @property
    def m_tiles(self) -> int:
        """Tiles of 16 experts of a CTA, a multiple of ``warp_m``."""
        tiles = ceil_div(self.experts, MMA_SYNC_M * self.groups * self.cluster_e)
        return ceil_div(tiles, self.warp_m) * self.warp_m

    @property
    def cta_experts(self) -> int:
        """Experts of one CTA."""
        return MMA_SYNC_M * self.m_tiles

    @property
    def group_experts(self) -> int:
        """Experts of one cluster, padding included."""
        return self.cta_experts * self.cluster_e

    # --- hidden dimension ---
    @property
    def slab(self) -> int:
        """Hidden elements that one warp holds in registers, for 16 * ``warp_m`` experts."""
        return max(self.k_chunk, 256)

    @property
    def slab_steps(self) -> int:
        """k16 steps of a slab."""
        return self.slab // MMA_K

    @property
    def slab_chunks(self) -> int:
        """Chunks of one slab, each with an accumulator of its own."""
        return self.slab // self.k_chunk

    @property
    def slabs(self) -> int:
        """Slabs of the hidden dimension; the last one may be short."""
        return ceil_div(self.hidden, self.slab)

    @property
    def chunks(self) -> int:
        """Chunks of the hidden dimension, hence partial sums of one logit."""
        return ceil_div(self.hidden, self.k_chunk)

    @property
    def cta_slabs(self) -> int:
        """Slabs of one CTA's share of the hidden dimension."""
        return ceil_div(self.slabs, self.cluster_k)

    @property
    def cta_hidden(self) -> int:
        """Hidden elements of a CTA's share."""
        return self.cta_slabs * self.slab

    @property
    def hidden_steps(self) -> int:
        """k16 steps of the whole hidden dimension."""
        return self.hidden // MMA_K

    # --- threads ---
    @property
    def warps(self) -> int:
        """Warps of a CTA: one for each slab and ``warp_m`` m-tiles."""
        return self.cta_slabs * self.m_tiles // self.warp_m

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * LANES

    # --- tokens ---
    @property
    def slots_k(self) -> int:
        """Tokens whose partial sums one CTA receives: token t goes to the CTA with k rank
        t % cluster_k."""
        return ceil_div(self.tokens_tile, self.cluster_k)

    @property
    def slots(self) -> int:
        """Tokens that one CTA selects for: of its ``slots_k``, slot i goes to the CTA with e rank
        i % cluster_e."""
        return ceil_div(self.slots_k, self.cluster_e)

    # --- shared memory, in bytes ---
    @property
    def row_bytes(self) -> int:
        """A token's share, padded by 16 bytes: 8 neighbouring rows start in 8 bank groups."""
        return self.cta_hidden * 2 + 16

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the tile's hidden states, tokens rounded up to columns of whole MMAs."""
        return ceil_div(self.tokens_tile, MMA_SYNC_N) * MMA_SYNC_N * self.row_bytes

    @property
    def sums_bytes(self) -> int:
        """Partial sums that a CTA receives, FP32."""
        return self.chunks * self.slots_k * self.cta_experts * 4

    @property
    def key_row_bytes(self) -> int:
        """A row of (key, score) pairs, padded to ``lane_keys`` pairs per lane."""
        return self.lane_keys * LANES * 8

    @property
    def key_bytes(self) -> int:
        """Bytes of the key rows of all tokens that a CTA selects for."""
        return self.slots * self.key_row_bytes

    @property
    def warp_scratch_bytes(self) -> int:
        """A warp's selected candidates, 16 bytes each (selection.RECORD_BYTES)."""
        return self.top_k * 16

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the selected candidates of all warps."""
        return self.warps * self.warp_scratch_bytes

    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases of a CTA's experts, FP32."""
        return self.cta_experts * 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        total = self.hidden_bytes + self.sums_bytes + self.key_bytes + self.scratch_bytes
        total += self.bias_bytes + 3 * BARRIER_BYTES
        return max(LEAST_SHARED_BYTES, ceil_div(total, 16) * 16)
