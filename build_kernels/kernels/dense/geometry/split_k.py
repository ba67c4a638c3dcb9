"""How the split-K form divides a batch among clusters, CTAs and warpgroups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    LANES,
    MAX_CLUSTER,
    MAX_SHARED_BYTES,
    MMA_M,
    WARPGROUP,
    GroupedGeometry,
    ceil_div,
)
from router_runtime.format.contract import Constants

#: What ``search`` may choose: more threads would leave too few registers for a tile's sums.
MAX_GROUPS = 8
MAX_THREADS = 512

#: Tokens of a tile that ``search`` chooses.
SEARCHED_TILE = 32


@dataclass(frozen=True)
class SplitKGeometry(GroupedGeometry):
    """``groups`` clusters of ``cluster_k`` CTAs route one tile of ``tokens_tile`` tokens.

    A cluster holds a group of 64 * ``m_tiles`` experts over the whole hidden dimension; a CTA holds
    a share, which is some of its chunks; a warpgroup multiplies 64 experts over one chunk: 32 KiB
    of weights, in shared memory before the hidden states exist. A token's chunks are added by one
    CTA of the cluster.

    All operands of a CTA are in shared memory at once. The partial sums, received and staged, then
    take their place.
    """

    cluster_k: int
    tokens_tile: int

    #: ``tokens_tile`` is a multiple of this, ``m_tiles`` of that.
    token_step: ClassVar[int] = 8
    m_tile_step: ClassVar[int] = 1

    def check(self) -> None:
        """Raise ValueError unless all stages, and the staged sums, fit shared memory."""
        self.check_division()
        # Several warpgroups that share a ring side by side could take the phase before the last one
        # of a stage for the one that they wait for.
        if self.hidden_stages < self.k_blocks:
            raise ValueError(
                f"expected a tile of which all {self.k_blocks} stages of hidden states fit at "
                f"once, found {self.tokens_tile} tokens, {self.hidden_stages} stages"
            )
        if self.staged_bytes > self.staging_room:
            raise ValueError(
                f"expected sums that fit {MAX_SHARED_BYTES} bytes, found {self.tokens_tile} tokens "
                f"of {self.group_experts} experts"
            )

    def check_division(self) -> None:
        """Raise ValueError unless CTAs have equal chunks and the MMA can do the tile's tokens."""
        if self.hidden % (self.k_chunk * self.cluster_k) or self.tokens_tile % self.token_step:
            raise ValueError(
                f"expected chunks of {self.k_chunk} that divide evenly among {self.cluster_k} CTAs "
                f"and tiles of a multiple of {self.token_step} tokens, "
                f"found hidden {self.hidden}, tokens {self.tokens_tile}"
            )

    @classmethod
    def search(cls, constants: Constants) -> Self | None:
        """Return the division for a model that the catalog does not tune.

        It has the fewest groups of experts, then the fewest hidden elements per CTA, that fit. None
        if there is no such division.
        """
        chunks = int(constants["HIDDEN"]) // int(constants["K_CHUNK"])
        for groups in range(1, MAX_GROUPS + 1):
            for cluster_k in reversed(range(1, MAX_CLUSTER + 1)):
                if chunks % cluster_k:
                    continue
                division = {
                    "GROUPS": groups,
                    "CLUSTER_K": cluster_k,
                    "TOKENS_TILE": SEARCHED_TILE,
                }
                try:
                    g = cls.of({**constants, **division})
                except ValueError:
                    continue
                if g.threads <= MAX_THREADS:
                    return g
        return None

    # --- experts ---
    @property
    def m_tiles(self) -> int:
        """Tiles of 64 experts of a group."""
        return ceil_div(self.experts, MMA_M * self.groups * self.m_tile_step) * self.m_tile_step

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
        """Consumer warpgroups: one for each m-tile and chunk of the share."""
        return self.m_tiles * self.cta_chunks

    @property
    def consumer_threads(self) -> int:
        """Threads of the consumer warpgroups."""
        return self.warpgroups * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        """Warps of the consumer warpgroups."""
        return self.consumer_threads // LANES

    @property
    def producer_warp(self) -> int:
        """The warp that requests operands. It is a consumer too: nothing has to be waited for, and
        one more warp would shrink the registers of every thread."""
        return 0

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.consumer_threads

    # --- tokens ---
    @property
    def slots(self) -> int:
        """Tokens whose chunks one CTA adds: token t of the tile goes to the CTA of k rank
        t % cluster_k, into slot t // cluster_k."""
        return ceil_div(self.tokens_tile, self.cluster_k)

    @property
    def score_passes(self) -> int:
        """(token, expert) pairs that a thread adds and scores."""
        return ceil_div(self.slots * self.group_experts, self.consumer_threads)

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
    def room(self) -> int:
        """What biases and barriers leave."""
        return MAX_SHARED_BYTES - self.bias_bytes - 512

    @property
    def hidden_stages(self) -> int:
        """Stages of hidden states that fit besides the weights, at most ``k_blocks``."""
        return min(self.k_blocks, (self.room - self.weight_bytes) // self.hidden_stage_bytes)

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
    def staging_room(self) -> int:
        """What the received sums leave for staged ones."""
        return self.room - self.staged_offset

    @property
    def part_tokens(self) -> int:
        """Tokens whose sums are staged at a time."""
        return self.tokens_tile

    @property
    def parts(self) -> int:
        """Parts in which the tile's sums are staged and sent."""
        return self.tokens_tile // self.part_tokens

    @property
    def staged_bytes(self) -> int:
        """Bytes of the staged sums."""
        return self.part_tokens * self.sums_row_bytes

    # --- then biases and barriers ---
    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases of the group's experts, FP32."""
        return self.group_experts * 4

    @property
    def bias_offset(self) -> int:
        """Offset of the biases, behind the operands and the sums that take their place."""
        operands = self.weight_bytes + self.hidden_stages * self.hidden_stage_bytes
        return max(operands, self.staged_offset + self.staged_bytes)

    @property
    def barrier_offset(self) -> int:
        """Full barriers of the weights; full, then empty barriers of the hidden states; then those
        that count received sums."""
        return self.bias_offset + self.bias_bytes

    @property
    def hidden_barrier_offset(self) -> int:
        """Offset of the full barriers of the hidden states."""
        return self.barrier_offset + BARRIER_BYTES * self.k_blocks

    @property
    def sums_barrier_offset(self) -> int:
        """Offset of the barriers that count received sums."""
        return self.hidden_barrier_offset + 2 * BARRIER_BYTES * self.hidden_stages

    @property
    def sums_barriers(self) -> int:
        """Barriers that count received sums, one per part."""
        return self.parts

    @property
    def end_offset(self) -> int:
        """The end of the barriers above."""
        return self.sums_barrier_offset + BARRIER_BYTES * self.sums_barriers

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        return self.barrier_offset + ceil_div(self.end_offset - self.barrier_offset, 16) * 16
