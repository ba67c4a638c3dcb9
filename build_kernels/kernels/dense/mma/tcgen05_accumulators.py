"""Two accumulators in tensor memory that take turns: a warp multiplies into one while the consumer
warps add the other one to their sums.

A full barrier has one arrival per phase, that of the commit behind a chunk's last MMA; an empty one
has one per consumer warp.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Int32, cute

from build_kernels.kernels.common.ptx import mbarrier, memory, tcgen05
from build_kernels.kernels.dense.geometry.tcgen05 import ACCUMULATORS
from build_kernels.kernels.dense.ring import Ring

#: Columns that are loaded from tensor memory at a time: few registers beside the sums.
LOADED = 32


def barriers(g: Any, shared: Int32) -> Ring:
    """Return the barriers of the accumulators, a ring whose stages lie in tensor memory."""
    return Ring.of(shared, 0, 0, ACCUMULATORS, shared + g.accumulator_offset)


@cute.jit
def allocate(g: cutlass.Constexpr[Any], shared: Int32) -> None:
    """Allocate both accumulators and initialise their barriers. One warp calls this, before the
    CTA's first barrier."""
    ring = barriers(g, shared)
    if cute.arch.lane_idx() == 0:
        for stage in cutlass.range_constexpr(ACCUMULATORS):
            mbarrier.init(ring.full_at(stage), 1)
            mbarrier.init(ring.empty_at(stage), g.consumer_warps)
    mbarrier.fence_init()
    tcgen05.allocate(shared + g.tensor_address_offset, g.tensor_columns)
    tcgen05.relinquish()


def address(g: Any, shared: Int32) -> Int32:
    """Return the address of the accumulators, after the CTA's first barrier."""
    tcgen05.fence_after()
    return memory.load_shared_b32(shared + g.tensor_address_offset)


def drain(ring: Ring, fillings: Int32 | int) -> None:
    """Wait until all stages of a ring have been released, after ``fillings`` fillings."""
    for stage in range(ring.stages):
        # Fillings of the stage, and one more: the phase before the first counts as released.
        count = (fillings - 1 - stage + 2 * ring.stages) // ring.stages
        mbarrier.wait(ring.empty_at(stage), Int32(count % 2))


def free(g: Any, tensor: Int32) -> None:
    """Free the tensor memory at the address ``tensor``. The warp that has allocated it calls this,
    when the consumers have released both accumulators."""
    cute.arch.sync_warp()
    tcgen05.fence_after()
    tcgen05.deallocate(tensor, g.tensor_columns)
