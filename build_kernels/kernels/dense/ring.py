"""Rings of stages in shared memory: a producer fills a stage, consumers read and release it.

Every stage has a full barrier, which counts the bytes of its content, and an empty barrier, which
counts the consumers' releases. A thread goes through a ring with a state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlass import Int32

from build_kernels.kernels.common.ptx import arith, mbarrier
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES


# Frozen, so that the DSL does not carry a ring through loops and branches.
@dataclass(frozen=True)
class Ring:
    """Addresses of ``stages`` stages of ``stage_bytes`` bytes, and of their barriers.

    The stages begin ``offset`` bytes behind the shared address ``base``, the full barriers at
    ``full`` and the empty ones at ``empty``.
    """

    base: Int32
    offset: int
    stage_bytes: int
    stages: int
    full: Int32
    empty: Int32

    @classmethod
    def of(cls, base: Int32, offset: int, stage_bytes: int, stages: int, full: Int32) -> Ring:
        """Return a ring whose empty barriers lie behind its full ones."""
        return cls(base, offset, stage_bytes, stages, full, full + BARRIER_BYTES * stages)

    @property
    def data(self) -> Int32:
        """Address of the first stage."""
        return self.base + self.offset

    def init(self, releases: int) -> None:
        """Initialise the barriers. One thread calls this, then ``mbarrier.fence_init``.

        A phase of a full barrier has one arrival, that of the thread that expects the bytes; a
        phase of an empty barrier has ``releases``.
        """
        for stage in range(self.stages):
            mbarrier.init(self.full_at(stage), 1)
            mbarrier.init(self.empty_at(stage), releases)

    def data_at(self, stage: Int32 | int) -> Int32:
        """Return the address of a stage."""
        return self.data + stage * self.stage_bytes

    def full_at(self, stage: Int32 | int) -> Int32:
        """Return the address of a stage's full barrier."""
        return self.full + BARRIER_BYTES * stage

    def empty_at(self, stage: Int32 | int) -> Int32:
        """Return the address of a stage's empty barrier."""
        return self.empty + BARRIER_BYTES * stage


class RingState:
    """Where a thread is in a ring: the stage, and the parity of the phase to wait for.

    A consumer starts with ``phase`` 0: it waits for the first filling. A producer starts with 1: a
    wait for the phase before the first passes at once, as every stage is empty.
    """

    def __init__(self, stages: int, phase: Int32 | int = 0, stage: Int32 | int = 0) -> None:
        self.stages = stages
        self.stage, self.phase = Int32(stage), Int32(phase)

    def next(self) -> RingState:
        """Return the state at the next stage."""
        wraps = arith.equal(self.stage, Int32(self.stages - 1))
        stage = arith.select(wraps, Int32(0), self.stage + 1)
        phase = arith.select(wraps, self.phase ^ 1, self.phase)
        return RingState(self.stages, phase, stage)

    # The DSL carries objects with these two methods through loops and branches.
    def __extract_mlir_values__(self) -> list[Any]:
        return [value.ir_value() for value in (self.stage, self.phase)]

    def __new_from_mlir_values__(self, values: list[Any]) -> RingState:
        stage, phase = (Int32(value) for value in values)
        return RingState(self.stages, phase, stage)


class CountedRingState:
    """A consumer's RingState that also counts the fillings before this one."""

    def __init__(
        self, stages: int, phase: Int32 | int = 0, stage: Int32 | int = 0, count: Int32 | int = 0
    ) -> None:
        self.stages = stages
        self.stage, self.phase, self.count = Int32(stage), Int32(phase), Int32(count)

    def next(self) -> CountedRingState:
        """Return the state at the next stage."""
        wraps = arith.equal(self.stage, Int32(self.stages - 1))
        phase = arith.select(wraps, self.phase ^ 1, self.phase)
        stage = arith.select(wraps, Int32(0), self.stage + 1)
        return CountedRingState(self.stages, phase, stage, self.count + 1)

    def __extract_mlir_values__(self) -> list[Any]:
        return [value.ir_value() for value in (self.stage, self.phase, self.count)]

    def __new_from_mlir_values__(self, values: list[Any]) -> CountedRingState:
        stage, phase, count = (Int32(value) for value in values)
        return CountedRingState(self.stages, phase, stage, count)


class TurnState:
    """Where a producer is in a ring whose stages several producers fill in turn.

    It waits only for the empty barriers of the stages that it fills, so every stage has a phase of
    its own: bit s of ``phases``. A ring has at most 32 stages.
    """

    def __init__(self, stages: int, stage: Int32 | int = 0, phases: Int32 | int = 0) -> None:
        self.stages, self.stage, self.phases = stages, Int32(stage), Int32(phases)

    def next(self) -> TurnState:
        """Return the state at the next stage."""
        wraps = arith.equal(self.stage, Int32(self.stages - 1))
        stage = arith.select(wraps, Int32(0), self.stage + 1)
        return TurnState(self.stages, stage, self.phases)

    def phase(self) -> Int32:
        """Return the parity of the phase to wait for at this stage."""
        return (self.phases >> self.stage) & 1

    def released(self) -> TurnState:
        """Return the state after a wait at this stage."""
        return TurnState(self.stages, self.stage, self.phases ^ (Int32(1) << self.stage))

    def __extract_mlir_values__(self) -> list[Any]:
        return [value.ir_value() for value in (self.phases, self.stage)]

    def __new_from_mlir_values__(self, values: list[Any]) -> TurnState:
        phases, stage = (Int32(value) for value in values)
        return TurnState(self.stages, stage, phases)
