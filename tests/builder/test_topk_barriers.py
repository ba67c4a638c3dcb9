"""In the streamed kernels of topk_indices, a barrier is between zeroing bins and counting in them.

A warp could else count before another one has zeroed: the bound would follow from wrong counts.
Results would be right all the same, so neither the oracle suite nor racecheck has seen it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from build_kernels import plan
from build_kernels.compile.job import Job
from tests.builder.machine_code import Code

TARGET = "sm_90a"
JOBS = {
    job.key: job
    for job in plan.plan(targets=(TARGET,), kernels=("topk_indices",))
    if not job.constants["HELD"]
}


@pytest.mark.parametrize("key", sorted(JOBS))
def test_no_count_precedes_the_first_barrier(machine_code: Callable[[Job], Code], key: str) -> None:
    names = [name for name, _ in machine_code(JOBS[key])]
    barrier = next(at for at, name in enumerate(names) if name.startswith("BAR.SYNC"))
    count = next(at for at, name in enumerate(names) if name.startswith("ATOMS"))
    assert barrier < count


def test_the_streamed_kernels_exist() -> None:
    assert len(JOBS) >= 7
