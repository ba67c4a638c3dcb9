"""What the geometry of swap_ab has more with ``tcgen05``: tensor memory.

One MMA takes 128 experts. The partial sums are accumulators in tensor memory, columns of 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from build_kernels.kernels.common.ptx import tcgen05_layout
from build_kernels.kernels.dense.geometry.common import (
    BARRIER_BYTES,
    ceil_div,
)
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry

#: Accumulators: one is multiplied into while the other is added to the sums.
ACCUMULATORS = 2

#: Columns of an MMA are a multiple of this, and at most that many.
COLUMN_STEP = 16
MAX_COLUMNS = 256


@dataclass(frozen=True)
class SwapAbTcgen05Geometry(SwapAbGeometry):
    """The swap-A/B form with two accumulators that take turns, of all experts of the CTA."""

    #: The issuing warp keeps the descriptors of four stages.
    producer_registers: ClassVar[int] = 40

    def check(self) -> None:
        """Raise ValueError unless the MMA and the tensor memory can do the tile, too."""
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
        SwapAbGeometry.check(self)

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
