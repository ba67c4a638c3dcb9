"""Exchange of the split-K form: all partial sums of a token go to one CTA of the cluster.

The sums are staged in shared memory, a row per token, in the place of the operands; one bulk copy
per row sends them. The tile's tokens are sent in parts, each with an mbarrier of the receiver that
counts the bytes that its peers send. A row that a CTA keeps is copied by one warp, whose 32 lanes
arrive at the same mbarrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier, memory
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, LANES
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.mma.interface import SplitKMma

#: Named barrier of the consumer warps.
CONSUMERS = 1


class SumsExchange:
    """The exchange of one CTA.

    Shared memory has room for ``staged_parts`` parts at a time. A later part is staged where an
    earlier one was, after a cluster barrier: then all CTAs have received the earlier part.
    """

    def __init__(self, geometry: SplitKGeometry, mma: SplitKMma) -> None:
        self.g, self.mma = geometry, mma

    def owned(self, tokens: Int32, k_rank: Int32) -> Int32:
        """Return how many of the tile's first ``tokens`` tokens the CTA of ``k_rank`` adds."""
        return arith.quotient(tokens + (self.g.cluster_k - 1) - k_rank, self.g.cluster_k)

    def sync_consumers(self) -> None:
        """Wait for all consumer warps."""
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=self.g.consumer_threads)

    def init(self, sums_full: Int32, k_rank: Int32, tile_tokens: Int32) -> list[Int32]:
        """Initialise the barriers from ``sums_full`` on, one per part of the tile's tokens.

        One thread calls this, before ``fence_init``. Returns how many tokens of each part this CTA
        adds, for ``expect``.
        """
        g = self.g
        owned, before = [], Int32(0)
        for part in range(g.parts):
            until = arith.min_s32(tile_tokens, Int32((part + 1) * g.part_tokens))
            owned.append(self.owned(until, k_rank) - before)
            before = before + owned[part]
            mbarrier.init(sums_full + BARRIER_BYTES * part, owned[part] * LANES + 1)
        return owned

    def expect(self, sums_full: Int32, owned: list[Int32]) -> None:
        """Expect the peers' bytes. The same thread, after ``fence_init``."""
        peer_bytes = self.g.slot_bytes - self.g.sums_bytes
        for part, tokens in enumerate(owned):
            mbarrier.arrive_expect_tx(sums_full + BARRIER_BYTES * part, tokens * peer_bytes)

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

        All consumer warps call this. Received sums lie from ``shared`` on: for each slot, chunk and
        expert an FP32 number. It begins with a cluster barrier, after which every CTA has
        read its operands. Another one comes before each part that takes the place of an earlier
        part. It ends with an arrival at a cluster barrier, whose wait is left to the caller:
        until then the copies to peers may still read what this CTA has staged.
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

    def stage(
        self,
        sums: Sequence[Float32],
        buffer: Int32,
        begin: int,
        tokens: int,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Store this warp's sums of ``tokens`` tokens from ``begin`` on, a row per token: chunk,
        m-tile, expert.

        A lane holds the experts lane / 4 and lane / 4 + 8 of 16, of two neighbouring tokens in 8.
        The two experts of a token become neighbours in memory.
        """
        g = self.g
        chunk = self.mma.task(warp)[1]
        place = self.mma.first_row(warp) + arith.quotient(lane, 4) * 2
        target = buffer + (lane & 3) * (2 * g.sums_row_bytes)
        target = target + (chunk * g.group_experts + place) * 4
        for n_tile in range(tokens // 8):
            for column in range(2):
                first = 4 * (begin // 8 + n_tile) + column
                memory.store_shared_v2(
                    target + (8 * n_tile + column) * g.sums_row_bytes,
                    arith.bits(Float32(sums[first])),
                    arith.bits(Float32(sums[first + 2])),
                )

    @cute.jit
    def send(
        self,
        buffer: Int32,
        received: Int32,
        full: Int32,
        begin: cutlass.Constexpr[int],
        tokens: cutlass.Constexpr[int],
        k_rank: Int32,
        tile_tokens: Int32,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Copy the staged rows to the CTAs that add them, one warp per row."""
        g = self.g
        end = arith.min_s32(tile_tokens, Int32(begin + tokens))
        for token in cutlass.range(begin + warp, end, g.consumer_warps, unroll=1):
            slot = received + arith.quotient(token, g.cluster_k) * g.slot_bytes
            async_copy.to_cta(
                slot + k_rank * g.sums_bytes,
                buffer + (token - begin) * g.sums_row_bytes,
                g.sums_bytes,
                full,
                arith.remainder(token, g.cluster_k),
                k_rank,
                lane,
            )
