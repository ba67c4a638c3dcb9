"""What the geometries of split-K and tile have more with ``tcgen05``: tensor memory.

One MMA takes 128 experts. The partial sums are accumulators in tensor memory, columns of 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from build_kernels.kernels.common.ptx import tcgen05_layout
from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    LANES,
    MAX_SHARED_BYTES,
    MMA_M,
    ceil_div,
)
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry

#: Accumulators of the tile form: one is multiplied into while the other is added to the totals.
ACCUMULATORS = 2

#: Tiles of 128 experts whose sums of a slice and totals for 128 tokens fit the registers of two
#: warpgroups.
MAX_ROW_TILES = 1


@dataclass(frozen=True)
class SplitKTcgen05Geometry(SplitKGeometry):
    """Split-K whose tiles may be too large for shared memory.

    Then hidden states pass through a ring, whose producer is a warp of its own, and the partial
    sums are staged and sent in parts, of which at most ``staged_parts`` are in flight. A pair of
    warpgroups shares the accumulator of 128 experts.
    """

    token_step: ClassVar[int] = 16
    m_tile_step: ClassVar[int] = tcgen05_layout.MMA_M // MMA_M

    def check(self) -> None:
        """Raise ValueError unless the ring and one part of the sums fit shared memory."""
        self.check_division()
        # A stage for each chunk and one in flight, and room for a part of the sums.
        if self.hidden_stages < min(self.cta_chunks + 1, self.k_blocks) or self.staged_parts < 1:
            raise ValueError(
                f"expected a tile that fits {MAX_SHARED_BYTES} bytes, found {self.tokens_tile} "
                f"tokens, {self.warpgroups} warpgroups"
            )

    # --- threads ---
    @property
    def rings(self) -> bool:
        """Whether stages of hidden states take the place of earlier ones."""
        return self.hidden_stages < self.k_blocks

    @property
    def producer_warp(self) -> int:
        """One more warp if it has to wait for stages to be released. Otherwise a consumer: one more
        warp would shrink the registers of a thread from 128 to 96."""
        return self.consumer_warps if self.rings else 0

    @property
    def threads(self) -> int:
        """Threads of a CTA: the consumers, and a producer warp if stages are filled again."""
        return self.consumer_threads + (LANES if self.rings else 0)

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

    # --- sums in parts ---
    @property
    def part_tokens(self) -> int:
        """Tokens staged at a time: all of them, or the most that fit twice."""
        if self.tokens_tile * self.sums_row_bytes <= self.staging_room:
            return self.tokens_tile
        fitting = (
            tokens
            for tokens in range(8, self.tokens_tile, 8)
            if self.tokens_tile % tokens == 0
            and 2 * tokens * self.sums_row_bytes <= self.staging_room
        )
        return max(fitting, default=self.tokens_tile)

    @property
    def part_bytes(self) -> int:
        """Bytes of one part's staged sums."""
        return self.part_tokens * self.sums_row_bytes

    @property
    def staged_parts(self) -> int:
        """Parts that are staged at a time."""
        return min(self.parts, self.staging_room // self.part_bytes)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the parts that are staged at a time."""
        return self.staged_parts * self.part_bytes

    # --- shared memory behind the other barriers ---
    @property
    def accumulated_offset(self) -> int:
        """Barriers of finished accumulators, one per chunk of the share."""
        return self.end_offset

    @property
    def tensor_address_offset(self) -> int:
        """Where the address of the tensor memory is stored."""
        return self.accumulated_offset + BARRIER_BYTES * self.cta_chunks

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        size = self.tensor_address_offset + 8 - self.barrier_offset
        return self.barrier_offset + ceil_div(size, 16) * 16


@dataclass(frozen=True)
class TileTcgen05Geometry(TileGeometry):
    """The tile form with two accumulators that take turns.

    Each has ``row_tiles`` times 128 experts x the tile's tokens, and one pass is enough. Rows of
    the last 128 experts that the CTA does not have are idle.
    """

    most_experts: ClassVar[int] = MAX_ROW_TILES * tcgen05_layout.MMA_M
    expert_step: ClassVar[int] = 16

    def check(self) -> None:
        """Raise ValueError unless one pass covers the CTA's experts."""
        if self.passes > 1 or self.row_tiles > MAX_ROW_TILES:
            raise ValueError(
                f"expected one pass over at most {self.most_experts} experts per CTA, "
                f"found {self.passes} over {self.cta_experts}"
            )

    @property
    def parked_sums(self) -> int:
        """None: the sums of a slice and the totals are in registers, chunks in tensor memory."""
        return 0

    # --- tensor memory ---
    @property
    def row_tiles(self) -> int:
        """MMAs of 128 experts that the CTA's experts take."""
        return ceil_div(self.cta_experts, tcgen05_layout.MMA_M)

    @property
    def accumulator_columns(self) -> int:
        """Columns of tensor memory of one accumulator."""
        return self.row_tiles * self.tokens_tile

    @property
    def tensor_columns(self) -> int:
        """Columns of tensor memory to allocate for both accumulators."""
        return tcgen05_layout.allocation(ACCUMULATORS * self.accumulator_columns)

    # --- shared memory, in bytes ---
    @property
    def idle_bytes(self) -> int:
        """What idle rows read behind the last stage of weights, whatever lies there."""
        return (self.row_tiles * tcgen05_layout.MMA_M - self.cta_experts) * K_BLOCK * 2

    @property
    def ring_bytes(self) -> int:
        """Bytes for the two rings: what biases, barriers and idle rows leave."""
        return MAX_SHARED_BYTES - self.bias_bytes - 512 - self.idle_bytes

    @property
    def accumulator_offset(self) -> int:
        """Full, then empty barriers of the accumulators."""
        return self.end_offset

    @property
    def tensor_address_offset(self) -> int:
        """Where the address of the tensor memory is stored."""
        return self.accumulator_offset + 2 * BARRIER_BYTES * ACCUMULATORS

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests, what idle rows read included."""
        return max(self.tensor_address_offset + 16, self.bias_offset + self.idle_bytes)
