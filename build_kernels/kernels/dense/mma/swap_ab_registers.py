"""The swap-A/B form's multiplication by MMAs whose sums are in registers: wgmma and mma.sync.

Every consumer warp multiplies 16 experts by the tile's tokens, and releases the stages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, mbarrier, memory
from build_kernels.kernels.dense import share
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, LANES
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.mma.interface import BoundSwapAbMma, SwapAbMma
from build_kernels.kernels.dense.ring import CountedRingState, Ring


class SwapAbStages(Protocol):
    """The multiplication of stages that have arrived, by a warpgroup or a warp."""

    def multiply(self, stage: Int32, starts: bool) -> None:
        """Begin to multiply a stage; ``starts`` the chunk's sums from zero."""

    def wait(self, pending: int) -> None:
        """Wait until all but the last ``pending`` stages have been read and added."""

    def zero_behind_reads(self) -> Int32 | int:
        """Return 0, to be added to the address of the release of the stages begun so far. Where no
        instruction of ``wait`` waits for them, it is computed from their sums, so that the release
        cannot precede what was read.
        """

    def n_tile(self, n_tile: int) -> list[Float32]:
        """Return this thread's four sums of an n-tile of 8 tokens, in the layout of mma.m16n8."""


class SwapAbInRegisters(SwapAbMma):
    """Consumer warps issue the MMAs of their own 16 experts."""

    @abstractmethod
    def stages(self, shared: Int32, warp: Int32) -> SwapAbStages:
        """Return the multiplication of a warp, with stages from the address ``shared`` on."""

    @property
    def all_lanes_release(self) -> bool:
        """Whether every lane of a warp releases the weights of a stage, and not one for all."""
        return False

    @property
    def hidden_releases(self) -> int:
        """Arrivals of one CTA that release the hidden states of a stage: one per consumer warp."""
        return int(self.g.consumer_warps)

    @property
    def weight_releases(self) -> int:
        """Arrivals of one CTA that release the weights of a stage."""
        return int(self.g.consumer_warps) * (LANES if self.all_lanes_release else 1)

    def first_row(self, warp: Int32) -> Int32:
        """Return the first of the 16 experts of the CTA whose sums a warp has."""
        return warp * 16

    def bind(
        self, shared: Int32, hidden: Ring, weight: Ring, cta: Cta, warp: Int32, thread: Int32
    ) -> BoundInRegisters:
        """Return the multiplication of a consumer warp."""
        return BoundInRegisters(
            self.g,
            self.stages(shared, warp),
            hidden,
            weight,
            cta,
            share.k_blocks(self.g, cta.k_rank),
            thread,
            cute.arch.lane_idx(),
            self.all_lanes_release,
        )


# Frozen, so that the DSL does not carry it through loops.
@dataclass(frozen=True)
class BoundInRegisters(BoundSwapAbMma):
    """What ``SwapAbInRegisters.bind`` returns, for the thread ``thread``.

    ``k_blocks`` counts the fillings of the CTA's ring; ``all_lanes_release`` is that of the MMA
    object.
    """

    g: SwapAbGeometry
    stages: SwapAbStages
    hidden: Ring
    weight: Ring
    cta: Cta
    k_blocks: Int32 | int
    thread: Int32
    lane: Int32
    all_lanes_release: bool

    def begin(self) -> CountedRingState:
        """Return the state of the ring before the first chunk."""
        return CountedRingState(self.g.stages)

    def chunk(
        self, state: CountedRingState, blocks: int, meanwhile: Callable[[], None] | None
    ) -> CountedRingState:
        """Multiply a chunk of ``blocks`` stages, from the ring's ``state`` on. Returns the state
        behind it.

        ``meanwhile`` runs under the chunk's MMAs. A stage is released one block later, when its
        MMAs are known to have completed.
        """
        g = self.g
        before = state
        # The block in which to add the sums that other CTAs have sent. With two buffers these sums
        # were sent a whole slice ago and have arrived: the first block. With one buffer they were
        # sent just before this chunk: the middle block, so that this warp need not wait for them.
        moment = 0 if g.buffers > 1 else blocks // 2
        for block in range(blocks):
            mbarrier.wait(self.hidden.full_at(state.stage), state.phase)
            self.expect(state.stage, state.count)
            zero = self.stages.zero_behind_reads()
            self.stages.multiply(state.stage, starts=block == 0)
            if block > 0:
                self.stages.wait(1)
                self.release(before.stage, before.count, zero)
            if block == moment and meanwhile is not None:
                meanwhile()
            before, state = state, state.next()
        self.stages.wait(0)
        self.release(before.stage, before.count, self.stages.zero_behind_reads())
        return state

    def add_to(self, state: CountedRingState, sums: cute.Tensor) -> None:
        """Add the sums of the chunk before ``state`` to ``sums``."""
        for n_tile in range(self.g.n_tiles):
            for i, term in enumerate(self.stages.n_tile(n_tile), 4 * n_tile):
                sums[i] = arith.add_rn(Float32(sums[i]), term)

    @cute.jit
    def expect(self, stage: Int32, number: Int32) -> None:
        """Announce the bytes of a stage's next filling to its full barrier.

        Called when the present filling has arrived, and before the stage is released.
        """
        g = self.g
        if self.thread == 0 and number + g.stages < self.k_blocks:
            mbarrier.arrive_expect_tx(self.hidden.full_at(stage), Int32(g.stage_bytes))

    @cute.jit
    def release(self, stage: Int32, number: Int32, zero: Int32 | int) -> None:
        """Release a stage to the two CTAs that will fill it again, after filling ``number``.

        ``zero`` is what ``SwapAbStages.zero_behind_reads`` returned behind its MMAs.
        """
        g, cta = self.g, self.cta
        following = number + g.stages
        e = arith.remainder(following, g.cluster_e)
        t = arith.remainder(following, g.cluster_t)
        if following < self.k_blocks:
            if cutlass.const_expr(self.all_lanes_release):
                rank = g.cta_rank(cta.e_rank, cta.k_rank, t)
                weight_empty = self.weight.empty_at(stage) + zero
                mbarrier.arrive_remote(memory.map_shared(weight_empty, rank))
                if self.lane == 0:
                    rank = g.cta_rank(e, cta.k_rank, cta.t_rank)
                    hidden_empty = self.hidden.empty_at(stage) + zero
                    mbarrier.arrive_remote(memory.map_shared(hidden_empty, rank))
            elif self.lane < 2:
                # Lane 0 releases the hidden states, lane 1 the weights.
                first = arith.equal(self.lane, Int32(0))
                empty = arith.select(first, self.hidden.empty, self.weight.empty)
                e = arith.select(first, e, cta.e_rank)
                t = arith.select(first, cta.t_rank, t)
                rank = g.cta_rank(e, cta.k_rank, t)
                empty = empty + BARRIER_BYTES * stage + zero
                mbarrier.arrive_remote(memory.map_shared(empty, rank))
