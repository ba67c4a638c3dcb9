"""Exchange of the split-K form with ``tcgen05``: tiles whose sums are staged in parts."""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import async_copy, mbarrier
from build_kernels.kernels.dense.exchange.split_k import SumsExchange
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES
from build_kernels.kernels.dense.geometry.tcgen05 import SplitKTcgen05Geometry
from build_kernels.kernels.dense.mma.interface import SplitKMma


class SumsExchangeInParts(SumsExchange):
    """The tile's tokens are sent in parts, each with a barrier of its own.

    Shared memory has room for ``staged_parts`` parts at a time. A later part is staged where an
    earlier one was, after a cluster barrier: then all CTAs have received the earlier part.
    """

    g: SplitKTcgen05Geometry

    def __init__(self, geometry: SplitKTcgen05Geometry, mma: SplitKMma) -> None:
        SumsExchange.__init__(self, geometry, mma)

    @cute.jit
    def run(
        self,
        sums: Sequence[Float32],
        shared: Int32,
        sums_full: Int32,
        k_rank: Int32,
        tile_tokens: Int32,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Send this warp's partial sums part by part, and wait for those sent to this CTA.

        All consumer warps call this. It begins with a cluster barrier, after which every CTA has
        read its operands. Another one comes before each part that takes the place of an earlier
        part. It ends with an arrival at a cluster barrier, whose wait is left to the caller.
        """
        g = self.g
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        for part in cutlass.range_constexpr(g.parts):
            if cutlass.const_expr(part >= g.staged_parts):
                mbarrier.wait_first(sums_full + BARRIER_BYTES * (part - g.staged_parts))
                cute.arch.cluster_arrive_relaxed()
                cute.arch.cluster_wait()
            buffer = shared + g.staged_offset + part % g.staged_parts * g.part_bytes
            full = sums_full + BARRIER_BYTES * part
            begin = part * g.part_tokens
            self.stage(sums, buffer, begin, g.part_tokens, warp, lane)
            async_copy.fence_async_shared()
            self.sync_consumers()
            self.send(buffer, shared, full, begin, g.part_tokens, k_rank, tile_tokens, warp, lane)
        for part in cutlass.range_constexpr(g.parts - g.staged_parts, g.parts):
            mbarrier.wait_first(sums_full + BARRIER_BYTES * part)
        cute.arch.cluster_arrive_relaxed()

    def follow(self) -> None:
        """Go through the cluster barriers of ``run``, up to the arrival at the last.

        The producer warp calls this if it is no consumer, because a cluster barrier counts all
        warps. It does nothing if there is no such warp.
        """
        if not self.g.rings:
            return
        for _ in range(1 + self.g.parts - self.g.staged_parts):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.cluster_arrive_relaxed()
