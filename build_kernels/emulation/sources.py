"""The kernels that are emulated, and their PTX."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from build_kernels import plan
from build_kernels.catalog.targets import BLACKWELL, DEFAULT_TARGETS
from build_kernels.compile import pool
from build_kernels.compile.job import Job
from build_kernels.emulation.translate import TARGET

#: The targets whose kernels are emulated. The others with tcgen05 have the same PTX.
EMULATED = tuple(target for target in DEFAULT_TARGETS if target in BLACKWELL)

_TARGET_LINE = re.compile(r"^\.target \w+", re.M)


def without_target(ptx: str) -> str:
    """Return PTX without its ``.target`` line: the rest may be the same for several targets."""
    return _TARGET_LINE.sub("", ptx)


@dataclass(frozen=True, slots=True)
class Source:
    """The PTX of one kernel, the same for all of its targets.

    Attributes:
        jobs: Of the targets that share it, in the catalog's order.
        ptx: For the first of them.

    """

    jobs: tuple[Job, ...]
    ptx: str


def emulated_jobs(targets: Sequence[str] = EMULATED) -> list[Job]:
    """Return the jobs of these targets that sm_90a has no counterpart of: their kernels use
    instructions that it lacks.
    """
    common = {_name(job) for job in plan.plan(targets=[TARGET])}
    return [job for job in plan.plan(targets=targets) if _name(job) not in common]


def sources(jobs: Sequence[Job], processes: int) -> list[Source]:
    """Return the PTX of the jobs. Raises BuildError with what the compiler printed."""
    found: dict[str, str] = {}
    lock = threading.Lock()

    def work(job: Job, worker: pool.Worker) -> bool:
        ptx = worker.ptx(job)
        with lock:
            found[job.key] = ptx
        return True

    pool.run(jobs, min(processes, len(jobs)), work)
    together: dict[tuple[object, str], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: BLACKWELL.index(job.target)):
        body = without_target(found[job.key])
        together.setdefault((_name(job), body), []).append(job)
    return [Source(tuple(shared), found[shared[0].key]) for shared in together.values()]


def _name(job: Job) -> tuple[str, str | None, str]:
    return job.kernel, job.model, job.variant
