"""Exchange of the split-K form: all partial sums of a token go to one CTA of the cluster.

The sums are staged in shared memory, a row per token, in the place of the operands; one bulk copy
per row sends them. An mbarrier of the receiver counts the bytes that its peers send. A row that a
CTA keeps is copied by one warp, whose 32 lanes arrive at the same mbarrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier, memory
from build_kernels.kernels.dense.geometry.common import LANES
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.mma.interface import SplitKMma


class SumsExchange:
    """The exchange of one CTA."""

    def __init__(self, geometry: SplitKGeometry, mma: SplitKMma) -> None:
        self.g, self.mma = geometry, mma

    def owned(self, tokens: Int32, k_rank: Int32) -> Int32:
        """Return how many of the tile's first ``tokens`` tokens the CTA of ``k_rank`` adds."""
        return arith.quotient(tokens + (self.g.cluster_k - 1) - k_rank, self.g.cluster_k)

    def init(self, sums_full: Int32, k_rank: Int32, tile_tokens: Int32) -> Int32:
        """Initialise the barrier ``sums_full``, for the tile's first ``tile_tokens`` tokens.

        One thread calls this, before ``fence_init``. Returns how many tokens this CTA adds, for
        ``expect``.
        """
        owned = self.owned(tile_tokens, k_rank)
        mbarrier.init(sums_full, owned * LANES + 1)
        return owned

    def expect(self, sums_full: Int32, owned: Int32) -> None:
        """Expect the peers' bytes. The same thread, after ``fence_init``."""
        peer_bytes = self.g.slot_bytes - self.g.sums_bytes
        mbarrier.arrive_expect_tx(sums_full, owned * peer_bytes)

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
        """Send this warp's sums, and wait until this CTA has received the sums of its tokens.

        All threads call this when they have read their operands. Received sums lie from ``shared``
        on: for each slot, chunk and expert an FP32 number. This arrives at the cluster barrier once
        more at its end, and the caller waits on that barrier before it exits: until then the copies
        to peers may still read what this CTA has staged.
        """
        # Every CTA has read its operands. Relaxed: it orders completed reads, publishes nothing.
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        staged = shared + self.g.staged_offset
        self.stage(sums, staged, warp, lane)
        async_copy.fence_async_shared()
        cute.arch.sync_threads()
        self.send(staged, shared, sums_full, k_rank, tile_tokens, warp, lane)
        mbarrier.wait_first(sums_full)
        cute.arch.cluster_arrive_relaxed()

    def stage(self, sums: Sequence[Float32], buffer: Int32, warp: Int32, lane: Int32) -> None:
        """Store this warp's sums, a row per token: chunk, m-tile, expert.

        A lane holds the experts lane / 4 and lane / 4 + 8 of 16, of two neighbouring tokens in 8.
        The two experts of a token become neighbours in memory.
        """
        g = self.g
        chunk = self.mma.task(warp)[1]
        place = self.mma.first_row(warp) + arith.quotient(lane, 4) * 2
        target = buffer + (lane & 3) * (2 * g.sums_row_bytes)
        target = target + (chunk * g.group_experts + place) * 4
        for n_tile in range(g.tokens_tile // 8):
            for column in range(2):
                first = 4 * n_tile + column
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
        k_rank: Int32,
        tile_tokens: Int32,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Copy the staged rows to the CTAs that add them, one warp per row."""
        g = self.g
        for token in cutlass.range(warp, tile_tokens, g.warps, unroll=1):
            slot = received + arith.quotient(token, g.cluster_k) * g.slot_bytes
            async_copy.to_cta(
                slot + k_rank * g.sums_bytes,
                buffer + token * g.sums_row_bytes,
                g.sums_bytes,
                full,
                arith.remainder(token, g.cluster_k),
                k_rank,
                lane,
            )
