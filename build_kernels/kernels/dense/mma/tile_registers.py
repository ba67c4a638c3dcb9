"""The tile form's multiplication by MMAs whose sums are in registers: ``wgmma`` and ``mma.sync``.

Tokens are the rows of the MMA, 16 for each warp, and experts its columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.numerics import SLICES
from build_kernels.kernels.common.ptx import arith, mbarrier, memory
from build_kernels.kernels.dense import summation
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, LANES
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.mma.interface import TileMma
from build_kernels.kernels.dense.ring import Ring, RingState

#: The rings of hidden states and weights, and where and by which lane their stages are released.
Rings = tuple[Ring, Ring, tuple[Int32, Int32, Int32]]


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

    def zero_behind_reads(self, accumulator: cute.Tensor) -> Int32 | int:
        """Return 0, to be added to the address of the release of the stages that ``accumulator``
        has the sums of. Where no instruction of ``wait`` waits for them, it is computed from these
        sums, so that the release cannot precede what was read.
        """


# Frozen, so that the DSL does not carry it through loops.
@dataclass(frozen=True)
class Parking:
    """A thread's totals of the slices so far: in shared memory, in places that no other thread
    reaches, and in registers (``kept``) where they do not fit there.

    Attributes:
        g: The form's division.
        place: Shared address of this thread's first four totals.
        width: Sums of one pass.
        kept: The totals that are in registers.

    """

    g: TileGeometry
    place: Int32
    width: int
    kept: cute.Tensor

    @classmethod
    def of(
        cls, g: TileGeometry, shared: Int32, thread: Int32, sums: Sequence[cute.Tensor]
    ) -> Parking:
        """Return the totals of a thread whose slices' sums are in ``sums``, one tensor per pass.

        They start at -0: -0 + x is x for every x.
        """
        kept = cute.make_rmem_tensor(max(1, g.sums - g.parked_sums), Float32)
        parking = cls(g, shared + g.parked_offset + thread * 16, cute.size(sums[0]), kept)
        for i in range(g.sums - g.parked_sums):
            kept[i] = Float32(-0.0)
        for first in range(0, g.parked_sums, 4):
            memory.store_shared_v4(parking._at(first), [arith.bits(Float32(-0.0))] * 4)
        return parking

    def _at(self, first: int) -> Int32:
        """Return the address of four of this thread's totals. Those of a warp are neighbours."""
        return self.place + first // 4 * (16 * self.g.consumer_threads)

    def add(self, sums: Sequence[cute.Tensor]) -> None:
        """Add a slice's sums to the totals."""
        for first in range(0, self.g.parked_sums, 4):
            totals = self._added(first, sums)
            memory.store_shared_v4(self._at(first), [arith.bits(value) for value in totals])
        for i in range(self.g.parked_sums, self.g.sums):
            kept = Float32(self.kept[i - self.g.parked_sums])
            self.kept[i - self.g.parked_sums] = arith.add_rn(kept, self._of(sums, i))

    def add_to(self, sums: Sequence[cute.Tensor]) -> None:
        """Replace the last slice's sums by the totals with them."""
        for first in range(0, self.g.parked_sums, 4):
            for i, value in enumerate(self._added(first, sums), first):
                sums[i // self.width][i % self.width] = value
        for i in range(self.g.parked_sums, self.g.sums):
            kept = Float32(self.kept[i - self.g.parked_sums])
            sums[i // self.width][i % self.width] = arith.add_rn(kept, self._of(sums, i))

    def _of(self, sums: Sequence[cute.Tensor], i: int) -> Float32:
        return Float32(sums[i // self.width][i % self.width])

    def _added(self, first: int, sums: Sequence[cute.Tensor]) -> list[Float32]:
        """Return four parked totals with a slice's sums added."""
        parked = memory.load_shared_v4(self._at(first))
        return [
            arith.add_rn(arith.from_bits(word), self._of(sums, first + i))
            for i, word in enumerate(parked)
        ]


class TileInRegisters(TileMma):
    """A chunk is multiplied from zero, then added to the sums of its slice while other warps keep
    the tensor core busy.
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
        sums = [mma.accumulator() for _ in range(g.passes)]
        partial = [mma.accumulator()] * g.passes
        parking = Parking.of(g, shared, thread, sums)
        rings = (hidden, weight, release)
        states = (RingState(g.hidden_stages), RingState(g.weight_stages))
        slices = min(SLICES, g.chunks)
        for number in range(slices - 1):
            first = summation.slice_end(number - 1, g.chunks)
            chunks = summation.slice_end(number, g.chunks) - first
            states = self._slice(mma, rings, sums, partial, chunks, g.chunk_k_blocks, states)
            parking.add(sums)
        chunks = len(summation.slice_chunks(g.chunks)[-1])
        last_blocks = g.last_k_blocks or g.chunk_k_blocks
        self._slice(mma, rings, sums, partial, chunks, last_blocks, states)
        parking.add_to(sums)
        return sums

    def _slice(
        self,
        mma: TileStages,
        rings: Rings,
        sums: list[cute.Tensor],
        partial: list[cute.Tensor],
        chunks: Int32 | int,
        last_blocks: int,
        states: tuple[RingState, RingState],
    ) -> tuple[RingState, RingState]:
        """Multiply a slice of that many chunks, the last one of ``last_blocks`` stages, into
        ``sums``. Returns the states of the two rings behind it.
        """
        # -0 + x is x for every x: the sums start from the first chunk's.
        for tensor in sums:
            tensor.fill(-0.0)
        short = last_blocks < self.g.chunk_k_blocks
        states = self._chunks(mma, rings, sums, partial, chunks - short, states)
        if short:
            states = self._chunk(mma, rings, sums, partial, last_blocks, *states)
        return states

    @cute.jit
    def _chunks(
        self,
        mma: TileStages,
        rings: Rings,
        sums: list[cute.Tensor],
        partial: list[cute.Tensor],
        chunks: Int32,
        states: tuple[RingState, RingState],
    ) -> tuple[RingState, RingState]:
        """Multiply that many whole chunks and add each to ``sums``. Returns the rings' states."""
        h, w = states
        for _ in range(chunks):
            h, w = self._chunk(mma, rings, sums, partial, self.g.chunk_k_blocks, h, w)
        return h, w

    def _chunk(
        self,
        mma: TileStages,
        rings: Rings,
        sums: list[cute.Tensor],
        partial: list[cute.Tensor],
        blocks: int,
        h: RingState,
        w: RingState,
    ) -> tuple[RingState, RingState]:
        """Multiply a chunk of ``blocks`` stages into ``partial``, and add that to ``sums``.

        Returns the states of the two rings behind the chunk. A stage is released one block later,
        when its MMAs are known to have completed.
        """
        hidden, weight, release = rings
        start = h
        for number, (total, target) in enumerate(zip(sums, partial, strict=True)):
            h = start
            last_pass = number == self.g.passes - 1
            pending: list[tuple[Int32, Int32]] = []
            for block in range(blocks):
                if number == 0:
                    mbarrier.wait(hidden.full_at(h.stage), h.phase)
                mbarrier.wait(weight.full_at(w.stage), w.phase)
                zero = mma.zero_behind_reads(target)
                mma.multiply(target, h.stage, w.stage, starts=block == 0)
                pending.append((h.stage, w.stage))
                if len(pending) > 1:
                    mma.wait(1)
                    self._release(release, *pending.pop(0), last_pass, zero)
                h, w = h.next(), w.next()
            mma.wait(0)
            self._release(release, *pending.pop(0), last_pass, mma.zero_behind_reads(target))
            total.store(total.load() + target.load())
        return h, w

    @cute.jit
    def _release(
        self,
        release: tuple[Int32, Int32, Int32],
        hidden_stage: Int32,
        weight_stage: Int32,
        last_pass: cutlass.Constexpr[bool],
        zero: Int32 | int,
    ) -> None:
        """Release a stage of each ring; one of hidden states only in the last pass over it.

        ``zero`` is what ``TileStages.zero_behind_reads`` returned behind its MMAs.
        """
        hidden_empty, weight_empty, lane = release
        if last_pass and lane < self.g.cluster_e:
            mbarrier.arrive_remote(hidden_empty + BARRIER_BYTES * hidden_stage + zero)
        if lane < self.weight_lanes:
            mbarrier.arrive_remote(weight_empty + BARRIER_BYTES * weight_stage + zero)

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
