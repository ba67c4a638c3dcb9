"""The machine code of a kernel, compiled here: names and operands of its instructions, in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

from build_kernels.compile import instructions, toolchain
from build_kernels.compile.job import Job
from build_kernels.compile.worker_process import WorkerProcess

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")

Code = list[tuple[str, str]]


def parsed(listing: str) -> Code:
    """Each instruction of nvdisasm's listing: its name with all suffixes, and its operands."""
    return _INSTRUCTION.findall(listing)


@contextmanager
def compiler() -> Iterator[Callable[[Job], Code]]:
    """A function that returns the machine code of a job; its processes end with the context."""
    workers: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:

        def machine_code(job: Job) -> Code:
            if job.target not in workers:
                workers[job.target] = stack.enter_context(closing(WorkerProcess(job.target)))
            cubin = workers[job.target].compile(job)
            return parsed(instructions.sass(cubin, toolchain.nvdisasm()))

        yield machine_code
