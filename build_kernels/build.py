"""Jobs -> cubins checked against their contracts -> entries -> one folder.

A cubin of an earlier build is used again only if exactly the same goes into it (``reuse.py``) and
its bytes have the digest that its manifest names. Nothing is published unless every job succeeded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_kernels import plan, publish
from build_kernels.compile import instructions, pool, toolchain
from build_kernels.compile.instructions import Census
from build_kernels.compile.job import Job
from build_kernels.entries import identify, inspect
from build_kernels.errors import BuildError
from build_kernels.reuse import INPUTS_NAME, Reuse, inputs_text
from router_runtime.format.cubin import Cubin
from router_runtime.format.manifest import Entry, Manifest

#: Called with one line for each job that has ended.
Progress = Callable[[str], None]


def build(
    jobs: Sequence[Job],
    out: Path,
    processes: int,
    progress: Progress,
    reuse: Sequence[Path] = (),
) -> Manifest:
    """Build ``jobs`` into the folder ``out`` and return the manifest that was published.

    Args:
        jobs: The plan.
        out: Created if it does not exist. Its cubins are used again where they are the same.
        processes: The most worker processes at a time.
        progress: Called with one line for each job that has ended.
        reuse: More build folders whose cubins may be used again.

    Raises:
        BuildError: With every job that failed; nothing is published then.

    """
    if not jobs:
        raise BuildError(
            "expected a plan with entries, found an empty plan; "
            "next: .venv/bin/python -m build_kernels list"
        )
    tools = toolchain.check()
    before = plan.files_digest()
    with publish.locked(out):
        entries, cubins = [], {}
        for entry, data in make(jobs, Reuse((out, *reuse), tools), processes, progress):
            entries.append(entry)
            cubins[entry.file] = data
        if plan.files_digest() != before:
            raise BuildError(
                "expected the sources to stay as they were during the build, found them changed; "
                "next: run the command again"
            )
        entries.sort(key=lambda entry: entry.key)
        manifest = Manifest(plan.tree_digest(), tools, tuple(entries))
        by_key = {entry.key: entry for entry in entries}
        inputs = inputs_text((job, by_key[job.key]) for job in jobs)
        publish.publish(out, manifest, cubins, {INPUTS_NAME: inputs})
    return manifest


@dataclass(frozen=True, slots=True)
class Compiled:
    """A job, its cubin and what the cubin says about itself."""

    job: Job
    data: bytes
    facts: Cubin


def make(
    jobs: Sequence[Job], reuse: Reuse, processes: int, progress: Progress
) -> list[tuple[Entry, bytes]]:
    """Return the entry and the cubin of every job. Raises BuildError with every failure."""
    compiled, failures = compile_all(jobs, reuse, processes, progress)
    made = []
    for found, counts in _counted(compiled, processes):
        try:
            if isinstance(counts, BuildError):
                raise counts
            made.append((inspect(found.job, found.data, found.facts, counts), found.data))
        except BuildError as error:
            failures.append(str(error))
    if failures:
        raise BuildError(
            "\n\n".join(sorted(failures))
            + f"\n\n{len(failures)} of {len(jobs)} failed; nothing was published"
        )
    return made


def compile_all(
    jobs: Sequence[Job], reuse: Reuse, processes: int, progress: Progress
) -> tuple[list[Compiled], list[str]]:
    """Return every job that has a cubin, and the errors of the others. Raises BuildError if any is
    to be compiled and the toolchain's files are not those that were installed.
    """
    if any(reuse.cubin(job) is None for job in jobs):
        toolchain.check_files()
    made: list[Compiled] = []
    failures: list[str] = []
    finished = threading.Lock()

    def work(job: Job, worker: pool.Worker) -> None:
        started = time.monotonic()
        data = reuse.cubin(job)
        how = "reused" if data is not None else "compiled"
        outcome: Compiled | BuildError
        try:
            if data is None:
                data = worker.compile(job)
            outcome = Compiled(job, data, identify(job, data))
        except BuildError as error:
            outcome, how = error, "FAILED"
        with finished:
            if isinstance(outcome, BuildError):
                failures.append(str(outcome))
            else:
                made.append(outcome)
            progress(
                f"[{len(made) + len(failures):3}/{len(jobs)}] {job.key}  {how}  "
                f"{time.monotonic() - started:.2f} s"
            )

    pool.run(jobs, min(processes, len(jobs)), work)
    return made, failures


def _counted(
    compiled: Sequence[Compiled], processes: int
) -> Iterator[tuple[Compiled, Census | BuildError]]:
    """Yield each with its instruction census, or with why there is none. The targets are
    disassembled in parallel.
    """
    targets: dict[str, list[Compiled]] = {}
    for found in compiled:
        targets.setdefault(found.facts.target, []).append(found)
    # The largest first: the others fit beside it.
    groups = sorted(targets.items(), key=lambda group: len(group[1]), reverse=True)

    def census(group: tuple[str, list[Compiled]]) -> Sequence[Census | BuildError]:
        target, members = group
        try:
            return instructions.censuses(
                [found.data for found in members], target, toolchain.nvdisasm()
            )
        except BuildError as error:
            return [BuildError(f"{found.job.key}: {error}") for found in members]

    with ThreadPoolExecutor(processes) as executor:
        for (_, members), counts in zip(groups, executor.map(census, groups), strict=True):
            yield from zip(members, counts, strict=True)
