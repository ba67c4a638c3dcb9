"""The tile form's multiplication by MMAs whose sums are in registers: ``wgmma`` and ``mma.sync``.

Tokens are the rows of the MMA, 16 for each warp, and experts its columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mbarrier, memory
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, LANES
from build_kernels.kernels.dense.mma.interface import TileMma
from build_kernels.kernels.dense.ring import Ring, RingState


class TileStages(Protocol):
    """The multiplication of stages that have arrived, by a warpgroup or a warp."""

    def accumulator(self) -> cute.Tensor:
        """Return new registers for the sums of one pass, in the layout of mma.m16n8."""

    def multiply(
        self, accumulator: cute.Tensor, a_stage: Int32, b_stage: Int32, starts: bool
    ) -> None:
        """Begin to multiply a stage of hidden states by one of weights; ``starts`` from zero."""

    def wait(self, pending: int) -> None:
        """Wait until all but the last ``pending`` calls of ``multiply`` have completed."""


class TileInRegisters(TileMma):
    """A chunk is multiplied from zero, then added to the totals while other warps keep the tensor
    core busy.
    """

    @abstractmethod
    def stages(self, hidden: Ring, weight: Ring, thread: Int32) -> TileStages:
        """Return the multiplication of the stages of two rings, for this thread's tokens."""

    @property
    def releases(self) -> int:
        """Arrivals of one CTA that release a stage: one per consumer warp."""
        return int(self.g.consumer_warps)

    @property
    def weight_lanes(self) -> int:
        """Lanes of a warp that release a stage of weights, in turn at each CTA that fills it."""
        return int(self.g.cluster_t)

    @property
    def weight_releases(self) -> int:
        """Arrivals of all CTAs that release a stage of weights."""
        return int(self.g.consumer_warps) * self.weight_lanes

    @cute.jit
    def multiply(
        self, shared: Int32, hidden: Ring, weight: Ring, e_rank: Int32, t_rank: Int32, thread: Int32
    ) -> list[cute.Tensor]:
        """Return this thread's logits of its warp's 16 tokens x ``mma_n`` experts, for each pass.

        All consumer threads call this. It waits at the full barriers of both rings. Each warp
        releases a stage by an arrival at the empty barrier of every CTA that fills it.
        """
        g = self.g
        lane = arith.remainder(thread, LANES)
        # Lane i of a warp releases a stage at the i-th CTA that fills it.
        release = (
            memory.map_shared(hidden.empty, t_rank * g.cluster_e + lane % g.cluster_e),
            memory.map_shared(weight.empty, lane % g.cluster_t * g.cluster_e + e_rank),
            lane,
        )
        mma = self.stages(hidden, weight, thread)
        totals = [mma.accumulator() for _ in range(g.passes)]
        sums = [mma.accumulator()] * g.passes

        # The first chunk's sums are the first totals.
        states = (RingState(g.hidden_stages), RingState(g.weight_stages))
        blocks = min(g.chunk_k_blocks, g.k_blocks)
        h, w = self._chunk(mma, hidden, weight, release, totals, totals, blocks, *states)
        for _ in range(g.full_chunks - 1):
            h, w = self._chunk(mma, hidden, weight, release, totals, sums, g.chunk_k_blocks, h, w)
        if cutlass.const_expr(g.last_k_blocks > 0 and g.full_chunks > 0):
            self._chunk(mma, hidden, weight, release, totals, sums, g.last_k_blocks, h, w)
        return totals

    def _chunk(
        self,
        mma: TileStages,
        hidden: Ring,
        weight: Ring,
        release: tuple[Int32, Int32, Int32],
        totals: list[cute.Tensor],
        targets: list[cute.Tensor],
        blocks: int,
        h: RingState,
        w: RingState,
    ) -> tuple[RingState, RingState]:
        """Multiply a chunk of ``blocks`` stages into ``targets``; add them to ``totals``, unless
        they are the totals.

        Returns the states of the two rings behind the chunk. A stage is released one block later,
        when its MMAs are known to have completed.
        """
        start = h
        for number, (total, target) in enumerate(zip(totals, targets, strict=True)):
            h = start
            last_pass = number == self.g.passes - 1
            pending: list[tuple[Int32, Int32]] = []
            for block in range(blocks):
                if number == 0:
                    mbarrier.wait(hidden.full_at(h.stage), h.phase)
                mbarrier.wait(weight.full_at(w.stage), w.phase)
                mma.multiply(target, h.stage, w.stage, starts=block == 0)
                pending.append((h.stage, w.stage))
                if len(pending) > 1:
                    mma.wait(1)
                    self._release(release, *pending.pop(0), last_pass)
                h, w = h.next(), w.next()
            mma.wait(0)
            self._release(release, *pending.pop(0), last_pass)
            if target is not total:
                total.store(total.load() + target.load())
        return h, w

    @cute.jit
    def _release(
        self,
        release: tuple[Int32, Int32, Int32],
        hidden_stage: Int32,
        weight_stage: Int32,
        last_pass: cutlass.Constexpr[bool],
    ) -> None:
        """Release a stage of each ring; one of hidden states only in the last pass over it."""
        hidden_empty, weight_empty, lane = release
        if last_pass and lane < self.g.cluster_e:
            mbarrier.arrive_remote(hidden_empty + BARRIER_BYTES * hidden_stage)
        if lane < self.weight_lanes:
            mbarrier.arrive_remote(weight_empty + BARRIER_BYTES * weight_stage)

    def store_logits(
        self, totals: Sequence[Sequence[Float32]], shared: Int32, thread: Int32
    ) -> None:
        """Store this thread's logits as rows of tokens, from ``shared`` on.

        All consumer threads call this when the rings are no longer needed. No barrier.
        """
        g = self.g
        lane = arith.remainder(thread, LANES)
        row = arith.quotient(thread, LANES) * 16 + arith.quotient(lane, 4)
        pairs = g.mma_n // 8
        for half in range(2):
            place = shared + (row + 8 * half) * g.logit_row_bytes + (lane & 3) * 8
            for pair in range(g.cta_experts // 8):
                first = 2 * half + 4 * (pair % pairs)
                values = [Float32(totals[pair // pairs][first + i]) for i in range(2)]
                memory.store_shared_f32x2(place + pair * 32, *values)
