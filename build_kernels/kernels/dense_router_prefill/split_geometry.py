"""How the split form divides a batch among clusters, blocks and warpgroups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from build_kernels.kernels.common import tcgen05_layout
from build_kernels.kernels.dense_router_prefill.geometry import (
    K_BLOCK,
    LANES,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    ceil_div,
)

#: What a search may choose: more threads would leave too few registers for a tile's sums.
MAX_GROUPS = 8
MAX_CLUSTER = 16
MAX_THREADS = 512


@dataclass(frozen=True, slots=True)
class SplitGeometry:
    """``groups`` clusters of ``cluster_k`` blocks route one tile of ``tokens_tile`` tokens.

    A cluster holds a group of 64 * ``m_tiles`` experts over the whole hidden dimension, a block a
    slice of some chunks of it, a warpgroup 64 experts over one chunk: a tile of weights of 32 KiB,
    in shared memory before the hidden states exist. A token's chunks are added by one block of its
    cluster; where there are several groups, the last one to finish a token merges.

    With ``tcgen05`` one MMA takes 128 experts: a pair of warpgroups shares its accumulator.
    """

    hidden: int
    experts: int
    top_k: int
    k_chunk: int
    max_tokens: int
    groups: int
    cluster_k: int
    tokens_tile: int
    tcgen05: bool = False

    @classmethod
    def of(cls, constants: Mapping[str, int | float]) -> SplitGeometry:
        g = cls(
            hidden=int(constants["HIDDEN"]),
            experts=int(constants["EXPERTS"]),
            top_k=int(constants["TOP_K"]),
            k_chunk=int(constants["K_CHUNK"]),
            max_tokens=int(constants["MAX_TOKENS"]),
            groups=int(constants["GROUPS"]),
            cluster_k=int(constants["CLUSTER_K"]),
            tokens_tile=int(constants["TOKENS_TILE"]),
            tcgen05=bool(constants.get("TCGEN05", 0)),
        )
        step = 16 if g.tcgen05 else 8
        if g.hidden % (g.k_chunk * g.cluster_k) or g.tokens_tile % step:
            raise ValueError(
                f"expected chunks of {g.k_chunk} that divide evenly among {g.cluster_k} blocks and "
                f"tiles of a multiple of {step} tokens, "
                f"found hidden {g.hidden}, tokens {g.tokens_tile}"
            )
        # A stage is released when the chunk's next one is being multiplied.
        if g.hidden_stages < min(g.block_chunks + 1, g.blocks) or g.sums_buffers < 1:
            raise ValueError(
                f"expected a tile that fits {MAX_SHARED_BYTES} bytes, found {g.tokens_tile} "
                f"tokens, {g.warpgroups} warpgroups"
            )
        # Warpgroups that go through a ring side by side could take a stage's last phase for this.
        if g.rings and not g.tcgen05:
            raise ValueError(
                f"expected a tile of which all {g.blocks} stages of hidden states fit at once, "
                f"found {g.tokens_tile} tokens, {g.hidden_stages} stages"
            )
        return g

    @classmethod
    def search(cls, constants: Mapping[str, int | float]) -> SplitGeometry | None:
        """The division with the fewest groups of experts, then the fewest hidden elements a block,
        that fits; None where there is none."""
        chunks = int(constants["HIDDEN"]) // int(constants["K_CHUNK"])
        for groups in range(1, MAX_GROUPS + 1):
            for cluster_k in reversed(range(1, MAX_CLUSTER + 1)):
                if chunks % cluster_k:
                    continue
                division = {"GROUPS": groups, "CLUSTER_K": cluster_k, "TOKENS_TILE": 32}
                try:
                    g = cls.of({**constants, **division})
                except ValueError:
                    continue
                if g.threads <= MAX_THREADS:
                    return g
        return None

    def constants(self) -> dict[str, int]:
        """What ``search`` chooses, as compile-time constants."""
        return {
            "GROUPS": self.groups,
            "CLUSTER_K": self.cluster_k,
            "TOKENS_TILE": self.tokens_tile,
        }

    # --- experts ---
    @property
    def m_tiles(self) -> int:
        together = tcgen05_layout.MMA_M // MMA_M if self.tcgen05 else 1
        return ceil_div(self.experts, MMA_M * self.groups * together) * together

    @property
    def group_experts(self) -> int:
        return MMA_M * self.m_tiles

    @property
    def padded_experts(self) -> int:
        return self.group_experts * self.groups

    @property
    def lane_keys(self) -> int:
        return self.group_experts // LANES

    # --- hidden dimension ---
    @property
    def chunks(self) -> int:
        return self.hidden // self.k_chunk

    @property
    def block_chunks(self) -> int:
        return self.chunks // self.cluster_k

    @property
    def chunk_blocks(self) -> int:
        return self.k_chunk // K_BLOCK

    @property
    def blocks(self) -> int:
        """64-element blocks of a slice."""
        return self.block_chunks * self.chunk_blocks

    # --- threads ---
    @property
    def warpgroups(self) -> int:
        """Those that multiply: one an m-tile and chunk of the slice."""
        return self.m_tiles * self.block_chunks

    @property
    def consumers(self) -> int:
        return self.warpgroups * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        return self.consumers // LANES

    @property
    def rings(self) -> bool:
        """Whether stages of hidden states take the place of earlier ones."""
        return self.hidden_stages < self.blocks

    @property
    def feeder(self) -> int:
        """The warp that requests operands: one more, if it has to wait for stages to be released.

        Otherwise that warp would only cost: the registers of a thread shrink from 128 to 96.
        """
        return self.consumer_warps if self.rings else 0

    @property
    def threads(self) -> int:
        return self.consumers + (LANES if self.rings else 0)

    # --- tensor memory ---
    @property
    def pairs(self) -> int:
        """Groups of 128 experts."""
        return self.group_experts // tcgen05_layout.MMA_M

    @property
    def tensor_columns(self) -> int:
        """An accumulator of ``tokens_tile`` columns for every pair and chunk of the slice.

        All blocks that share a multiprocessor get theirs: 64 KiB of weights come with each
        accumulator, so shared memory runs out first.
        """
        return tcgen05_layout.allocation(self.pairs * self.block_chunks * self.tokens_tile)

    # --- tokens ---
    @property
    def slots(self) -> int:
        """Tokens whose chunks one block adds: token t of the tile goes to block t % cluster_k."""
        return ceil_div(self.tokens_tile, self.cluster_k)

    @property
    def turns(self) -> int:
        """(token, expert) pairs that a thread adds."""
        return ceil_div(self.slots * self.group_experts, self.consumers)

    # --- shared memory, in bytes: first the operands ---
    @property
    def weight_stage_bytes(self) -> int:
        """The group's experts x 64 hidden elements."""
        return self.group_experts * K_BLOCK * 2

    @property
    def weight_bytes(self) -> int:
        return self.blocks * self.weight_stage_bytes

    @property
    def hidden_stage_bytes(self) -> int:
        return self.tokens_tile * K_BLOCK * 2

    @property
    def room(self) -> int:
        """What biases and barriers leave."""
        return MAX_SHARED_BYTES - self.bias_bytes - 512

    @property
    def hidden_stages(self) -> int:
        return min(self.blocks, (self.room - self.weight_bytes) // self.hidden_stage_bytes)

    # --- then, in the same place, the sums that came and those that go, staged in parts ---
    @property
    def sums_bytes(self) -> int:
        """One block's partial sums of one token."""
        return self.block_chunks * self.group_experts * 4

    @property
    def sums_row_bytes(self) -> int:
        """Padded: two rows further is 8 banks further, so that a warp's stores never collide."""
        return self.sums_bytes + 16

    @property
    def slot_bytes(self) -> int:
        """All partial sums of one token."""
        return self.chunks * self.group_experts * 4

    @property
    def part_tokens(self) -> int:
        """Tokens staged at a time: all of them, or as many as fit twice."""
        left = self.room - self.slots * self.slot_bytes
        if self.tokens_tile * self.sums_row_bytes <= left:
            return self.tokens_tile
        fitting = (
            tokens
            for tokens in range(8, self.tokens_tile, 8)
            if self.tokens_tile % tokens == 0 and 2 * tokens * self.sums_row_bytes <= left
        )
        return max(fitting, default=self.tokens_tile)

    @property
    def parts(self) -> int:
        return self.tokens_tile // self.part_tokens

    @property
    def sums_buffers(self) -> int:
        left = self.room - self.slots * self.slot_bytes
        return min(self.parts, left // (self.part_tokens * self.sums_row_bytes))

    @property
    def staged_offset(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def bias_bytes(self) -> int:
        return self.group_experts * 4

    @property
    def bias_offset(self) -> int:
        operands = self.weight_bytes + self.hidden_stages * self.hidden_stage_bytes
        staged = self.sums_buffers * self.part_tokens * self.sums_row_bytes
        return max(operands, self.staged_offset + staged)

    @property
    def barrier_offset(self) -> int:
        return self.bias_offset + self.bias_bytes

    @property
    def barriers(self) -> int:
        """Full ones of weights, full and empty ones of hidden states, of the sums that come; with
        ``tcgen05`` those of accumulators, one a chunk."""
        chunks = self.block_chunks if self.tcgen05 else 0
        return self.blocks + 2 * self.hidden_stages + self.parts + chunks

    @property
    def accumulated_offset(self) -> int:
        return self.barrier_offset + 8 * (self.barriers - self.block_chunks)

    @property
    def tensor_address_offset(self) -> int:
        """Where the address of the tensor memory is left: behind the barriers."""
        return self.barrier_offset + 8 * self.barriers

    @property
    def shared_bytes(self) -> int:
        address = 8 if self.tcgen05 else 0
        return self.barrier_offset + ceil_div(8 * self.barriers + address, 16) * 16

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
