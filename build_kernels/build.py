"""Jobs -> cubins checked against their contracts -> entries -> one folder.

A cubin is taken from the previous build only if everything that went into it is the same (sources,
constants, flags, target, toolchain) and its bytes still have the digest that the manifest gives.
Nothing is published unless every job succeeded.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from build_kernels import plan, publish
from build_kernels.compile import cubin, toolchain
from build_kernels.compile.cubin import Cubin
from build_kernels.compile.job import Job
from build_kernels.compile.worker import Worker
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format.contract import Contract, validate_contract
from router_runtime.format.manifest import Entry, Manifest, Toolchain, artifact_name
from router_runtime.format.target import Target

#: Limits of a block on every target: opt-in shared memory (static and dynamic) and registers, which
#: a warp gets in units of 8 a thread.
SHARED_MEMORY_LIMIT = 227 * 1024
REGISTER_FILE = 65536

#: What ``griddepcontrol.wait`` becomes in machine code.
_DEPENDENCY_WAIT = "ACQBULK"

Progress = Callable[[str], None]


def build(jobs: Sequence[Job], out: Path, processes: int, progress: Progress) -> Manifest:
    """Build ``jobs`` into the folder ``out`` and return the manifest that was published."""
    if not jobs:
        raise BuildError(
            "expected a plan with entries, found an empty plan; next: build-kernels list"
        )
    tools = toolchain.check()
    before = plan.tree_digest()
    with publish.locked(out):
        entries, cubins = [], {}
        for entry, data in _make(jobs, _Previous(out, tools), processes, progress):
            entries.append(entry)
            cubins[entry.file] = data
        if plan.tree_digest() != before:
            raise BuildError(
                "expected the sources to stay as they were during the build, found them changed; "
                "next: run the command again"
            )
        entries.sort(key=lambda entry: entry.key)
        manifest = Manifest(source_sha256=before, toolchain=tools, entries=tuple(entries))
        publish.publish(out, manifest, cubins)
    return manifest


def identify(job: Job, data: bytes) -> Cubin:
    """The facts of a compiled job. Raises BuildError if the cubin is not what was asked for."""
    facts = cubin.read(data, job.key)
    if facts.target != job.target:
        raise BuildError(f"{job.key}: expected a cubin for {job.target}, found {facts.target}")
    if job.language == "cuda" and facts.symbol != job.kernel:
        raise BuildError(
            f'{job.key}: expected extern "C" __global__ {job.kernel}, found {facts.symbol}'
        )
    return facts


def inspect(job: Job, data: bytes, facts: Cubin, counts: Mapping[str, int]) -> Entry:
    """The manifest entry of a compiled job whose code has these instructions. Raises BuildError if
    the cubin does not fit its contract, or if its MMAs wait for each other.
    """
    contract, numerics = declared(job)
    check_contract(contract, facts, counts, job.key)
    if cubin.serialised(counts):
        raise BuildError(
            f"{job.key}: expected wgmma instructions that overlap, found a barrier before each; "
            "next: let nothing read an accumulator, and no loop begin again, while MMAs that "
            "write one are under way"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    return Entry(
        kernel=job.kernel,
        model=job.model,
        target=job.target,
        variant=job.variant,
        constants=job.constants,
        file=artifact_name(job.kernel, job.model, job.target, job.variant, sha256),
        sha256=sha256,
        size=len(data),
        symbol=facts.symbol,
        contract=contract,
        source_sha256=job.source_sha256,
        numerics=numerics,
        resources=cubin.resources(facts, counts),
        latency=job.latency,
    )


def declared(job: Job) -> tuple[Contract, str | None]:
    """The contract and the numerics tag that a kernel declares for these constants."""
    module = importlib.import_module(f"build_kernels.kernels.{job.kernel}.contract")
    try:
        contract = module.contract(job.constants)
        tag = module.numerics(job.constants) if hasattr(module, "numerics") else None
    except (ValueError, KeyError, ArithmeticError) as error:
        raise BuildError(
            f"{job.key}: expected a contract for these constants, found {error!r}; "
            f"next: see build_kernels/kernels/{job.kernel}/contract.py for what it serves"
        ) from error
    if not isinstance(contract, Contract):
        raise BuildError(f"{job.key}: expected a Contract, found {contract!r}")
    return contract, tag


def check_contract(contract: Contract, facts: Cubin, counts: Mapping[str, int], where: str) -> None:
    """Raise BuildError naming everything in which a cubin differs from its contract."""
    try:
        validate_contract(contract, where)
    except FormatError as error:
        raise BuildError(f"{error}; next: correct the kernel's contract.py") from error
    wrong = list(_mismatches(contract, facts, counts))
    if wrong:
        raise BuildError(
            f"{where}: the contract does not match the cubin:\n  "
            + "\n  ".join(wrong)
            + "\nnext: correct the kernel or its contract.py"
        )


def _mismatches(contract: Contract, facts: Cubin, counts: Mapping[str, int]) -> Iterator[str]:
    layout = contract.parameter_layout(Target.parse(facts.target))
    if len(layout) != len(facts.parameters):
        names = [parameter.name for parameter in contract.parameters]
        yield f"expected {len(layout)} parameters {names}, found {len(facts.parameters)}"
    for parameter, expected, found in zip(
        contract.parameters, layout, facts.parameters, strict=False
    ):
        if expected != found:
            yield (
                f"parameter {parameter.name}: expected offset {expected[0]} and size {expected[1]} "
                f"({parameter.type}), found offset {found[0]} and size {found[1]}"
            )
    integers = {p.name for p in contract.parameters if p.type in ("i32", "i64")}
    for axis in contract.grid:
        if axis.argument is not None and axis.argument not in integers:
            yield (
                f"grid argument {axis.argument!r}: expected an integer parameter of "
                f"{sorted(integers)}"
            )
    threads = contract.block[0] * contract.block[1] * contract.block[2]
    if facts.required_block not in (None, contract.block):
        yield (
            f"block: expected {contract.block}, found that the cubin requires "
            f"{facts.required_block}"
        )
    if facts.max_threads is not None and threads > facts.max_threads:
        yield f"block: expected {threads} threads to be allowed, found at most {facts.max_threads}"
    if facts.required_cluster not in (None, contract.cluster):
        yield (
            f"cluster: expected {contract.cluster}, found that the cubin requires "
            f"{facts.required_cluster}"
        )
    registers = -(-threads // 32) * 32 * (-(-facts.registers // 8) * 8)
    if registers > REGISTER_FILE:
        yield f"registers: expected at most {REGISTER_FILE} a block, found {registers}"
    shared = facts.static_shared_memory + contract.dynamic_shared_memory
    if shared > SHARED_MEMORY_LIMIT:
        yield f"shared memory: expected at most {SHARED_MEMORY_LIMIT} bytes a block, found {shared}"
    waits = any(instruction.split(".")[0] == _DEPENDENCY_WAIT for instruction in counts)
    if waits != contract.programmatic_dependent_launch:
        yield (
            "programmatic dependent launch: expected "
            f"{'a' if contract.programmatic_dependent_launch else 'no'} griddepcontrol.wait, "
            f"found {'one' if waits else 'none'}"
        )
    tensor = cubin.tensor_core(counts)
    if bool(tensor.allocations) != bool(tensor.releases):
        yield (
            "tensor memory: expected every allocation to be given back, found "
            f"{tensor.allocations} instructions that allocate and {tensor.releases} that release"
        )
    if tensor.multiplications and not (tensor.allocations and tensor.commits and tensor.loads):
        yield (
            "tensor memory: expected accumulators to be allocated, committed and loaded, found "
            f"{tensor}"
        )


class _Previous:
    """The build that lies in the folder, as far as this toolchain made it."""

    def __init__(self, folder: Path, tools: Toolchain) -> None:
        manifest = publish.current(folder)
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        if manifest is not None and manifest.toolchain == tools:
            self._entries = {entry.key: entry for entry in manifest.entries}

    def cubin(self, job: Job) -> bytes | None:
        entry = self._entries.get(job.key)
        if entry is None or entry.source_sha256 != job.source_sha256:
            return None
        return publish.verified(self._folder, entry.file, entry.sha256)


#: The kind of worker that compiles CUDA C++; one that compiles CuTe DSL is called by its target.
_CUDA = "cuda"


class _Queue:
    """Jobs by the kind of worker they need. A worker is kept busy with its own kind first. A new
    one begins a target of the CuTe DSL that none is at, for its jobs are the longest and starting
    on them costs a second; else it takes the kind with the most jobs left. What remains for the
    end is CUDA C++, in small pieces for everyone.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._lock = threading.Lock()
        self._begun = {_CUDA}
        self._waiting: dict[str, list[Job]] = {}
        for job in reversed(jobs):
            self._waiting.setdefault(_kind(job), []).append(job)

    def take(self, kind: str | None) -> Job | None:
        """The next job for a worker of this kind; None says that there is no worker yet."""
        with self._lock:
            if kind not in self._waiting:
                kind = max(
                    self._waiting,
                    key=lambda k: (k not in self._begun, len(self._waiting[k])),
                    default=None,
                )
            if kind is None:
                return None
            self._begun.add(kind)
            job = self._waiting[kind].pop()
            if not self._waiting[kind]:
                del self._waiting[kind]
            return job

    def drop(self) -> None:
        """Forget what nobody has taken."""
        with self._lock:
            self._waiting.clear()


def _kind(job: Job) -> str:
    return job.target if job.language == "cutedsl" else _CUDA


@dataclass(frozen=True, slots=True)
class _Compiled:
    job: Job
    data: bytes
    facts: Cubin


def _make(
    jobs: Sequence[Job], previous: _Previous, processes: int, progress: Progress
) -> list[tuple[Entry, bytes]]:
    """Compile (or reuse) and inspect every job. Raises BuildError with every failure."""
    compiled, failures = _compile(jobs, previous, processes, progress)
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


def _compile(
    jobs: Sequence[Job], previous: _Previous, processes: int, progress: Progress
) -> tuple[list[_Compiled], list[str]]:
    """The cubin of every job that has one, and what is wrong with the others."""
    queue = _Queue(jobs)
    made: list[_Compiled] = []
    failures: list[str] = []
    finished = threading.Lock()

    def work(workers: _Workers) -> None:
        while job := queue.take(workers.kind):
            started = time.monotonic()
            data = previous.cubin(job)
            how = "reused" if data is not None else "compiled"
            outcome: _Compiled | BuildError
            try:
                if data is None:
                    data = workers.of_kind(_kind(job)).compile(job)
                outcome = _Compiled(job, data, identify(job, data))
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

    with _pool(queue, min(processes, len(jobs))) as (executor, workers):
        for future in [executor.submit(work, own) for own in workers]:
            future.result()
    return made, failures


def _counted(
    compiled: Sequence[_Compiled], processes: int
) -> Iterator[tuple[_Compiled, Mapping[str, int] | BuildError]]:
    """Each with its instruction census, or why there is none. Targets are disassembled side by
    side.
    """
    targets: dict[str, list[_Compiled]] = {}
    for found in compiled:
        targets.setdefault(found.facts.target, []).append(found)
    # The largest first: the others fit beside it.
    groups = sorted(targets.items(), key=lambda group: len(group[1]), reverse=True)

    def census(group: tuple[str, list[_Compiled]]) -> Sequence[Mapping[str, int] | BuildError]:
        target, members = group
        try:
            return cubin.censuses([found.data for found in members], target, toolchain.nvdisasm())
        except BuildError as error:
            return [BuildError(f"{found.job.key}: {error}") for found in members]

    with ThreadPoolExecutor(processes) as executor:
        for (_, members), counts in zip(groups, executor.map(census, groups), strict=True):
            yield from zip(members, counts, strict=True)


class _Workers:
    """The one worker process of a thread, replaced when another kind is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._ended = False
        #: None until there is one.
        self.kind: str | None = None

    def of_kind(self, kind: str) -> Worker:
        with self._lock:
            if self._ended:
                raise BuildError("interrupted")
            if self._worker is None or self.kind != kind:
                self._close()
                self._worker = Worker(None if kind == _CUDA else kind)
                self.kind = kind
            return self._worker

    def end(self) -> None:
        """End the process, also one that a thread is waiting for, and start no other."""
        with self._lock:
            self._ended = True
            self._close()

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@contextmanager
def _pool(queue: _Queue, size: int) -> Iterator[tuple[ThreadPoolExecutor, list[_Workers]]]:
    """Threads that drive worker processes. Leaving, by whatever way, ends the processes first, so
    that no thread waits for an answer or begins another job.
    """
    workers = [_Workers() for _ in range(size)]
    executor = ThreadPoolExecutor(size)
    try:
        yield executor, workers
    finally:
        queue.drop()
        for own in workers:
            own.end()
        executor.shutdown()
