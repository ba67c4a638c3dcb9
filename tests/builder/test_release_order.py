"""The portable kernels release a stage of the ring only when what they loaded from it is here.

A load from shared memory and an arrival at a barrier do not wait for each other, and the assembler
may move the MMAs, which wait for the loaded fragments, behind the arrival.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from build_kernels import plan
from build_kernels.compile import instructions, toolchain
from build_kernels.compile.worker_process import WorkerProcess

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
#: weights and one for the hidden states. The last block of a chunk then releases its own stage.
ARRIVALS = 2

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def registers(operand: str, count: int) -> set[int]:
    """``count`` registers from the one that an operand names; none for the zero register."""
    match = re.match(r"R(\d+)", operand.strip())
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def unused_at_releases(listing: str) -> Iterator[int]:
    """For each arrival that releases a stage: how many fragments that were loaded from the stage
    no MMA has waited for.
    """
    loads: list[tuple[int, set[int]]] = []
    block = arrivals = 0
    for instruction, text in _INSTRUCTION.findall(listing):
        operands = text.replace(".reuse", "").split(",")
        if instruction.startswith("SYNCS.PHASECHK"):
            block, arrivals = block + 1, 0
        elif instruction.startswith("LDSM"):
            loads.append((block, registers(operands[0], 4)))
        elif instruction.startswith("HMMA"):
            used = registers(operands[1], 4) | registers(operands[2], 2)
            loads = [(at, left) for at, load in loads if (left := load - used)]
        elif "ARRIVE" in instruction and "A1T0" in instruction:
            arrivals += 1
            newest = block - 1 if arrivals <= ARRIVALS else block
            yield sum(at <= newest for at, _ in loads)


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, WorkerProcess]]:
    found = {target: WorkerProcess(target) for target in TARGETS}
    yield found
    for worker in found.values():
        worker.close()


def test_the_kernels_exist() -> None:
    assert len(JOBS) == len(TARGETS) * len(KERNELS)


@pytest.mark.parametrize("key", sorted(JOBS))
def test_a_stage_is_released_when_all_of_it_has_been_used(
    workers: dict[str, WorkerProcess], key: str
) -> None:
    job = JOBS[key]
    cubin = workers[job.target].compile(job)
    found = list(unused_at_releases(instructions.sass(cubin, toolchain.nvdisasm())))
    assert len(found) > ARRIVALS
    assert set(found) == {0}
