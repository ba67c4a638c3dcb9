"""How the decode kernel divides a router among blocks and warps; shared by contract and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MMA_M = 16
MMA_N = 8
MMA_K = 16
LANES = 32

#: Tokens that a cluster can take: enough independent chains of MMAs, few enough registers.
MAX_TILE = 32

#: Dynamic shared memory of one block on every target, in bytes.
MAX_SHARED_BYTES = 227 * 1024

#: What a block asks for at least: more than the largest split but one of the memory that shared
#: memory and L1 share. A multiprocessor changes its split only when it is idle, so a kernel that
#: made do with less would wait for its predecessors to end.
LEAST_SHARED_BYTES = 200 * 1024

#: Registers of a multiprocessor, and what a thread needs beside its weights.
REGISTERS = 65536
OTHER_REGISTERS = 64


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Geometry:
    """``groups`` clusters route ``tokens_tile`` tokens; a cluster is ``cluster_e`` x ``cluster_k``
    blocks.

    Each block holds 16 * ``m_tiles`` experts over a slice of the hidden dimension. A warp keeps
    ``warp_m`` of these m-tiles over one slab of the hidden dimension (one or two chunks) in
    registers.
    """

    hidden: int
    experts: int
    top_k: int
    k_chunk: int
    max_tokens: int
    tokens_tile: int
    groups: int
    cluster_e: int
    cluster_k: int
    warp_m: int

    @classmethod
    def of(cls, constants: Mapping[str, int | float]) -> Geometry:
        return cls(
            hidden=int(constants["HIDDEN"]),
            experts=int(constants["EXPERTS"]),
            top_k=int(constants["TOP_K"]),
            k_chunk=int(constants["K_CHUNK"]),
            max_tokens=int(constants["MAX_TOKENS"]),
            tokens_tile=int(constants["TOKENS_TILE"]),
            groups=int(constants["GROUPS"]),
            cluster_e=int(constants["CLUSTER_E"]),
            cluster_k=int(constants["CLUSTER_K"]),
            warp_m=int(constants["WARP_M"]),
        )

    @classmethod
    def search(
        cls, hidden: int, experts: int, top_k: int, k_chunk: int, max_tokens: int, tokens_tile: int
    ) -> Geometry:
        """A geometry for a model that nobody has tuned: the fewest blocks that hold its weights.

        Raises ValueError where no cluster of at most 16 blocks fits the registers and shared
        memory.
        """
        model = (hidden, experts, top_k, k_chunk, max_tokens, tokens_tile)
        candidates = (
            cls(*model, groups, cluster_e, cluster_k, warp_m)
            for groups in range(1, 17)
            for cluster_e in (1, 2, 4)
            for cluster_k in range(1, 16 // cluster_e + 1)
            for warp_m in (1, 2)
        )
        fitting = [candidate for candidate in candidates if candidate.fits]
        if not fitting:
            raise ValueError(
                "expected a router whose weights fit 16 clusters of 16 blocks, "
                f"found hidden {hidden}, experts {experts}"
            )
        return min(fitting, key=lambda g: (g.groups, g.blocks, g.padded_experts, g.warp_m))

    def constants(self) -> dict[str, int]:
        """The geometry as compile-time constants; ``of`` reads them back."""
        return {
            "HIDDEN": self.hidden,
            "EXPERTS": self.experts,
            "TOP_K": self.top_k,
            "K_CHUNK": self.k_chunk,
            "MAX_TOKENS": self.max_tokens,
            "TOKENS_TILE": self.tokens_tile,
            "GROUPS": self.groups,
            "CLUSTER_E": self.cluster_e,
            "CLUSTER_K": self.cluster_k,
            "WARP_M": self.warp_m,
        }

    @property
    def fits(self) -> bool:
        """Whether a block's weights fit its registers and the rest its shared memory."""
        registers = self.warp_m * self.slab // 4 + OTHER_REGISTERS
        # The four schedulers of a multiprocessor have a quarter of the registers each.
        share = ceil_div(self.warps, 4) * 4 * LANES * registers
        return (
            registers <= 255
            and share <= REGISTERS
            and self.tokens_tile <= MAX_TILE
            and self.shared_bytes <= MAX_SHARED_BYTES
            and (self.cluster_k - 1) * self.block_slabs < self.slabs
        )

    # --- experts ---
    @property
    def blocks(self) -> int:
        return self.groups * self.cluster_e * self.cluster_k

    @property
    def m_tiles(self) -> int:
        """Expert tiles of a block: whole warps' worth of them."""
        tiles = ceil_div(self.experts, MMA_M * self.groups * self.cluster_e)
        return ceil_div(tiles, self.warp_m) * self.warp_m

    @property
    def block_experts(self) -> int:
        return MMA_M * self.m_tiles

    @property
    def group_experts(self) -> int:
        return self.block_experts * self.cluster_e

    @property
    def padded_experts(self) -> int:
        return self.group_experts * self.groups

    # --- hidden dimension ---
    @property
    def slab(self) -> int:
        """Hidden elements that one warp holds in registers, for 16 * ``warp_m`` experts."""
        return max(self.k_chunk, 256)

    @property
    def slab_steps(self) -> int:
        return self.slab // MMA_K

    @property
    def slab_chunks(self) -> int:
        return self.slab // self.k_chunk

    @property
    def slabs(self) -> int:
        return ceil_div(self.hidden, self.slab)

    @property
    def chunks(self) -> int:
        return ceil_div(self.hidden, self.k_chunk)

    @property
    def block_slabs(self) -> int:
        return ceil_div(self.slabs, self.cluster_k)

    @property
    def block_hidden(self) -> int:
        return self.block_slabs * self.slab

    @property
    def hidden_steps(self) -> int:
        return self.hidden // MMA_K

    # --- threads ---
    @property
    def warps(self) -> int:
        return self.block_slabs * self.m_tiles // self.warp_m

    @property
    def threads(self) -> int:
        return self.warps * LANES

    # --- tokens ---
    @property
    def slots_k(self) -> int:
        """Tokens whose partial sums one block receives: token t goes to block t % cluster_k."""
        return ceil_div(self.tokens_tile, self.cluster_k)

    @property
    def slots(self) -> int:
        """Tokens that one block owns: of its ``slots_k``, slot i goes to block i % cluster_e."""
        return ceil_div(self.slots_k, self.cluster_e)

    @property
    def lane_keys(self) -> int:
        return ceil_div(self.group_experts, LANES)

    # --- shared memory, in bytes ---
    @property
    def row_bytes(self) -> int:
        """A token's slice, padded by 16 bytes: 8 neighbouring rows start in 8 bank groups."""
        return self.block_hidden * 2 + 16

    @property
    def hidden_bytes(self) -> int:
        return ceil_div(self.tokens_tile, MMA_N) * MMA_N * self.row_bytes

    @property
    def partial_bytes(self) -> int:
        return self.chunks * self.slots_k * self.block_experts * 4

    @property
    def key_row_bytes(self) -> int:
        """A row of (key, score) pairs, padded to ``lane_keys`` pairs a lane."""
        return self.lane_keys * LANES * 8

    @property
    def key_bytes(self) -> int:
        return self.slots * self.key_row_bytes

    @property
    def scratch_bytes(self) -> int:
        """A warp's selected candidates, 16 bytes each (selection.RECORD_BYTES)."""
        return self.warps * self.top_k * 16

    @property
    def bias_bytes(self) -> int:
        return self.block_experts * 4

    @property
    def shared_bytes(self) -> int:
        total = self.hidden_bytes + self.partial_bytes + self.key_bytes + self.scratch_bytes
        total += self.bias_bytes + 3 * 8
        return max(LEAST_SHARED_BYTES, ceil_div(total, 16) * 16)

    # --- the merge across groups ---
    @property
    def ticket_bytes(self) -> int:
        return ceil_div(self.max_tokens * 4, 16) * 16

    @property
    def workspace_bytes(self) -> int:
        """One ticket a token, then one 16-byte record a token, group and rank."""
        if self.groups == 1:
            return 0
        return self.ticket_bytes + self.max_tokens * self.groups * self.top_k * 16
