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

from build_kernels import out_folder, plan, publish
from build_kernels.compile import instructions, pool, toolchain
from build_kernels.compile.instructions import Census
from build_kernels.compile.job import Job
from build_kernels.compile.sources import PACKAGE
from build_kernels.contracts import declared
from build_kernels.entries import identify, inspect
from build_kernels.errors import BuildError, JobError
from build_kernels.evidence import read_records, write_records
from build_kernels.failures import report
from build_kernels.out_folder import EMULATION_NAME
from build_kernels.plan import Selection
from build_kernels.reuse import INPUTS_NAME, Reuse, inputs_text
from router_runtime.format.cubin import Cubin
from router_runtime.format.manifest import Entry, Manifest, Toolchain
from router_runtime.format.source_note import SOURCES_NAME, note


@dataclass(frozen=True, slots=True)
class Step:
    """A job that has ended.

    Attributes:
        done: How many have ended, this one included.
        total: How many there are.
        key: Of the job.
        how: ``compiled``, ``reused`` or ``FAILED``.
        seconds: How long it took.

    """

    done: int
    total: int
    key: str
    how: str
    seconds: float


#: Called for each job that has ended, in one thread at a time.
Progress = Callable[[Step], None]


def build(
    jobs: Sequence[Job],
    out: Path,
    processes: int,
    progress: Progress,
    reuse: Sequence[Path] = (),
    beside: Selection | None = None,
    evidence: Path | None = None,
    keep_going: bool = False,
) -> Manifest:
    """Build ``jobs`` into the folder ``out`` and return the manifest that was published.

    Args:
        jobs: The plan.
        out: Created if it does not exist. Its cubins are used again where they are the same.
        processes: The most worker processes at a time.
        progress: Called for each job that has ended.
        reuse: More build folders whose cubins may be used again.
        beside: What ``jobs`` is the plan of. Entries in ``out`` that it does not cover stay there,
            and a folder that is no build folder is refused. None: ``out`` is the caller's own, and
            what it holds is replaced.
        evidence: A folder of evidence, of which ``out`` gets the records about its cubins.
        keep_going: Whether to compile the other jobs after one has failed.

    Raises:
        BuildError: With each distinct error; nothing is published then.

    """
    if not jobs:
        raise BuildError(
            "expected a plan with entries, found an empty plan; "
            "next: .venv/bin/python -m build_kernels list"
        )
    tools = toolchain.check()
    before = plan.files_digest()
    if beside is not None:
        # Before the folder is locked: a lock creates it.
        out_folder.require_ours(out, EMULATION_NAME)
    with publish.locked(out):
        jobs = [*jobs, *_kept(out, beside, tools)]
        out_folder.require_room(out, jobs)
        check_declared(jobs)
        records = read_records(evidence)
        entries, cubins = [], {}
        for entry, data in make(jobs, Reuse((out, *reuse), tools), processes, progress, keep_going):
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
        sources = note(PACKAGE.parent, plan.sources(jobs))
        publish.publish(out, manifest, cubins, {INPUTS_NAME: inputs, SOURCES_NAME: sources})
        write_records(out, manifest, records)
    return manifest


def _kept(out: Path, beside: Selection | None, tools: Toolchain) -> list[Job]:
    manifest = None if beside is None else out_folder.require_ours(out, EMULATION_NAME)
    if manifest is None or beside is None:
        return []
    return out_folder.kept_jobs(out, manifest, beside, tools)


def check_declared(jobs: Sequence[Job]) -> None:
    """Raise BuildError with what is wrong with the contracts of these jobs."""
    failures = []
    for job in jobs:
        try:
            declared(job)
        except JobError as error:
            failures.append(error)
    if failures:
        raise BuildError(f"{report(failures)}\n\nnothing was compiled")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A job, its cubin and what the cubin says about itself."""

    job: Job
    data: bytes
    facts: Cubin


def make(
    jobs: Sequence[Job],
    reuse: Reuse,
    processes: int,
    progress: Progress,
    keep_going: bool = False,
) -> list[tuple[Entry, bytes]]:
    """Return the entry and the cubin of every job. Raises BuildError with each distinct error."""
    compiled, failures = compile_all(jobs, reuse, processes, progress, keep_going)
    untried = len(jobs) - len(compiled) - len(failures)
    made: list[tuple[Entry, bytes]] = []
    if not failures or keep_going:
        made, refused = examine(compiled, processes)
        failures += refused
    if failures:
        left = f", {untried} were not tried (build --keep-going tries them)" if untried else ""
        raise BuildError(
            f"{report(failures)}\n\n{len(failures)} of {len(jobs)} failed{left}; nothing was "
            "published; next: correct the sources and run the command again"
        )
    return made


def examine(
    compiled: Sequence[Compiled], processes: int
) -> tuple[list[tuple[Entry, bytes]], list[JobError]]:
    """Return the entry and the cubin of every job whose cubin is what its contract declares, and
    the errors of the others.
    """
    made, failures = [], []
    for found, counts in _counted(compiled, processes):
        try:
            if isinstance(counts, BuildError):
                raise counts
            made.append((inspect(found.job, found.data, found.facts, counts), found.data))
        except BuildError as error:
            failures.append(_of_job(found.job, error))
    return made, failures


def compile_all(
    jobs: Sequence[Job], reuse: Reuse, processes: int, progress: Progress, keep_going: bool
) -> tuple[list[Compiled], list[JobError]]:
    """Return every job that has a cubin, and the errors of the others.

    After an error only those jobs end that have begun, unless ``keep_going`` is true. Raises
    BuildError if any is to be compiled and the toolchain's files are not those that were installed.
    """
    if any(reuse.cubin(job) is None for job in jobs):
        toolchain.check_files()
    made: list[Compiled] = []
    failures: list[JobError] = []
    finished = threading.Lock()

    def work(job: Job, worker: pool.Worker) -> bool:
        started = time.monotonic()
        data = reuse.cubin(job)
        how = "reused" if data is not None else "compiled"
        outcome: Compiled | JobError
        try:
            if data is None:
                data = worker.compile(job)
            outcome = Compiled(job, data, identify(job, data))
        except BuildError as error:
            outcome, how = _of_job(job, error), "FAILED"
        with finished:
            if isinstance(outcome, JobError):
                failures.append(outcome)
            else:
                made.append(outcome)
            done = len(made) + len(failures)
            progress(Step(done, len(jobs), job.key, how, time.monotonic() - started))
        return keep_going or not isinstance(outcome, JobError)

    pool.run(jobs, min(processes, len(jobs)), work)
    return made, failures


def _of_job(job: Job, error: BuildError) -> JobError:
    """Return ``error`` as a JobError of ``job``. A job key at the start of its text is removed."""
    if isinstance(error, JobError):
        return error
    return JobError(job.key, str(error).removeprefix(f"{job.key}: "))


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
