"""The portable kernels release a stage of the ring only when what they loaded from it is here.

A load from shared memory and an arrival at a barrier do not wait for each other, and the assembler
may move the MMAs, which wait for the loaded fragments, behind the arrival.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from build_kernels import plan
from build_kernels.compile.job import Job
from tests.builder.machine_code import Code, parsed

TARGETS = ("sm_90a", "sm_100f")
#: A form each, and those whose weights four CTAs fetch in turns. Before releases waited for loads,
#: results of the last one were wrong in one launch of 8,000 (NOTES.md of dense_router_prefill).
KERNELS = (
    *("dsv4-flash/portable", "dsv4-flash/portable_512"),
    *("dsv4-pro/portable_1024", "dsv41-flash/portable_1024"),
)
JOBS = {
    job.key: job
    for job in plan.plan(targets=TARGETS, kernels=("dense_router_prefill",))
    if f"{job.model}/{job.variant}" in KERNELS
}
#: A block of 64 hidden elements releases the stage of the block before it, by an arrival for the
#: weights and one for the hidden states. The last block of a chunk then releases its own stage. (A
#: tile variant of several passes would arrive for the weights alone in all but the last; none of
#: these has more than one.)
ARRIVALS = 2


def registers(operand: str, count: int) -> set[int]:
    """``count`` registers from the one that an operand names; none for the zero register."""
    match = re.match(r"R(\d+)", operand.strip())
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def unused_at_releases(code: Code) -> Iterator[int]:
    """For each arrival that releases a stage: how many fragments that were loaded from the stage
    no MMA has waited for.
    """
    loads: list[tuple[int, set[int]]] = []
    block = arrivals = 0
    for instruction, text in code:
        operands = text.replace(".reuse", "").split(",")
        if instruction.startswith("SYNCS.PHASECHK"):
            block, arrivals = block + 1, 0
        elif instruction.startswith("LDSM"):
            loads.append((block, registers(operands[0], 4)))
        elif instruction.startswith("HMMA"):
            used = registers(operands[1], 4) | registers(operands[2], 2)
            loads = [(at, left) for at, load in loads if (left := load - used)]
        elif "ARRIVE" in instruction and "A1T0" in instruction:  # at a barrier of any CTA
            arrivals += 1
            newest = block - 1 if arrivals <= ARRIVALS else block
            yield sum(at <= newest for at, _ in loads)


def test_the_kernels_exist() -> None:
    assert len(JOBS) == len(TARGETS) * len(KERNELS)


@pytest.mark.parametrize("key", sorted(JOBS))
def test_a_stage_is_released_when_all_of_it_has_been_used(
    machine_code: Callable[[Job], Code], key: str
) -> None:
    code = machine_code(JOBS[key])
    assert any(name.startswith("LDSM") for name, _ in code)
    found = list(unused_at_releases(code))
    # Each copy of the code of a chunk, which has four blocks, releases four stages.
    assert found
    assert len(found) % (4 * ARRIVALS) == 0
    assert set(found) == {0}


def test_a_release_before_the_use_is_seen() -> None:
    arrival = "/*30*/ @P1 SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R3], RZ ;"
    wait, load = "/*10*/ SYNCS.PHASECHK P0, [R1], R2 ;", "/*20*/ LDSM.16.M88.4 R8, [R2] ;"
    use = "/*40*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
    # The first two arrivals are for the block before, the third is for this one.
    late, early = [wait, load, use, *[arrival] * 3], [wait, load, *[arrival] * 3, use]
    assert list(unused_at_releases(parsed("\n".join(late)))) == [0, 0, 0]
    assert list(unused_at_releases(parsed("\n".join(early)))) == [0, 0, 1]
