"""The machine code of a kernel, compiled here: names and operands of its instructions, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from build_kernels.compile import instructions, toolchain
from build_kernels.compile.job import Job
from build_kernels.compile.worker_process import WorkerProcess

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parsed(listing: str) -> list[tuple[str, str]]:
    """Each instruction of nvdisasm's listing: its name with all suffixes, and its operands."""
    return _INSTRUCTION.findall(listing)


class Compilers:
    """A worker process for each target, for as long as a test needs it."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._workers = {target: WorkerProcess(target) for target in targets}

    def machine_code(self, job: Job) -> list[tuple[str, str]]:
        cubin = self._workers[job.target].compile(job)
        return parsed(instructions.sass(cubin, toolchain.nvdisasm()))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


@contextmanager
def compilers(targets: Iterable[str]) -> Iterator[Compilers]:
    found = Compilers(targets)
    try:
        yield found
    finally:
        found.close()
