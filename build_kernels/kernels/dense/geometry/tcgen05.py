"""What the geometries of swap_ab and tile have more with ``tcgen05``: tensor memory.

One MMA takes 128 experts. The partial sums are accumulators in tensor memory, columns of 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from build_kernels.kernels.common.ptx import tcgen05_layout
from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    K_BLOCK,
    MAX_SHARED_BYTES,
    ceil_div,
)
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry

#: Accumulators: one is multiplied into while the other is added to the sums.
ACCUMULATORS = 2

#: Tiles of 128 experts whose sums of a slice and totals for 128 tokens fit the registers of two
#: warpgroups.
MAX_ROW_TILES = 1


#: Columns of an MMA are a multiple of this, and at most that many.
COLUMN_STEP = 16
MAX_COLUMNS = 256


@dataclass(frozen=True)
class SwapAbTcgen05Geometry(SwapAbGeometry):
    """The swap-A/B form with two accumulators that take turns, of all experts of the CTA."""

    def check(self) -> None:
        """Raise ValueError unless the MMA and the tensor memory can do the tile, too."""
        SwapAbGeometry.check(self)
        if (
            self.tile_experts % tcgen05_layout.MMA_M
            or self.tile_tokens % COLUMN_STEP
            or self.tile_tokens > MAX_COLUMNS
            or ACCUMULATORS * self.accumulator_columns > tcgen05_layout.COLUMNS
        ):
            raise ValueError(
                f"expected tiles of a multiple of {tcgen05_layout.MMA_M} experts and {COLUMN_STEP} "
                f"tokens, at most {MAX_COLUMNS}, {ACCUMULATORS} of which fit "
                f"{tcgen05_layout.COLUMNS} columns of tensor memory, found {self.tile_experts} "
                f"experts, {self.tile_tokens} tokens"
            )

    @property
    def cta_chunks(self) -> int:
        """Chunks that one CTA multiplies."""
        return sum(self.slice_chunks)

    # --- tensor memory ---
    @property
    def row_tiles(self) -> int:
        """MMAs of 128 experts that the CTA's experts take."""
        return self.tile_experts // tcgen05_layout.MMA_M

    @property
    def accumulator_columns(self) -> int:
        """Columns of tensor memory of one accumulator."""
        return self.row_tiles * self.tile_tokens

    @property
    def tensor_columns(self) -> int:
        """Columns of tensor memory to allocate for both accumulators."""
        return tcgen05_layout.allocation(ACCUMULATORS * self.accumulator_columns)

    # --- shared memory, in bytes ---
    @property
    def accumulator_offset(self) -> int:
        """Full, then empty barriers of the accumulators, behind all others."""
        return self.barrier_offset + BARRIER_BYTES * self.barriers

    @property
    def tensor_address_offset(self) -> int:
        """Where the address of the tensor memory is stored."""
        return self.accumulator_offset + 2 * BARRIER_BYTES * ACCUMULATORS

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a CTA requests."""
        return ceil_div(self.tensor_address_offset + 8, 16) * 16


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
