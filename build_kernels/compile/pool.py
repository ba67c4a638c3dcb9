"""Threads that drive worker processes, and the order in which jobs are given to them.

Workers are of kinds (``Job.worker``): those for the CuTe DSL compile for one target each, and their
kind is that target; those for CUDA C++ compile for every target.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from build_kernels.compile.job import Job
from build_kernels.compile.languages import LANGUAGES
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.errors import BuildError


class Queue:
    """Jobs that wait, by the kind of worker that they need.

    A thread keeps its worker as long as there are jobs for it. Otherwise it starts on a target of
    the CuTe DSL that no thread has started on, because those jobs are the longest and starting
    costs a second, or else on the kind with the most jobs. So the short jobs of CUDA C++ come last
    and are spread over all threads.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._lock = threading.Lock()
        self._started: set[str] = {name for name, f in LANGUAGES.items() if not f.worker_per_target}
        self._waiting: dict[str, list[Job]] = {}
        for job in reversed(jobs):
            self._waiting.setdefault(job.worker, []).append(job)

    def take(self, kind: str | None) -> Job | None:
        """Return the next job for a thread with a worker of this kind, None if no job is left.

        ``kind`` None: the thread has no worker yet.
        """
        with self._lock:
            if kind not in self._waiting:
                kind = max(
                    self._waiting,
                    key=lambda k: (k not in self._started, len(self._waiting[k])),
                    default=None,
                )
            if kind is None:
                return None
            self._started.add(kind)
            job = self._waiting[kind].pop()
            if not self._waiting[kind]:
                del self._waiting[kind]
            return job

    def clear(self) -> None:
        """Drop the jobs that no thread has taken."""
        with self._lock:
            self._waiting.clear()


class Worker:
    """The worker process of one thread, replaced when a job needs one for another target."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: WorkerProcess | None = None
        self._ended = False
        #: The process's kind; None until there is a process.
        self.kind: str | None = None

    def compile(self, job: Job) -> bytes:
        """Return the cubin of a job. Raises BuildError if it fails, or after ``end``."""
        return self._process_for(job).compile(job)

    def ptx(self, job: Job) -> str:
        """Return the PTX of a job in CuTe DSL. Raises BuildError as ``compile`` does."""
        return self._process_for(job).ptx(job)

    def end(self) -> None:
        """End the process, even if a thread waits for its answer, and start no other."""
        with self._lock:
            self._ended = True
            self._close()

    def _process_for(self, job: Job) -> WorkerProcess:
        with self._lock:
            if self._ended:
                raise BuildError("interrupted")
            if self._process is None or self.kind != job.worker:
                self._close()
                per_target = LANGUAGES[job.language].worker_per_target
                self._process = WorkerProcess(job.target if per_target else None)
                self.kind = job.worker
            return self._process

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


def run(jobs: Sequence[Job], size: int, work: Callable[[Job, Worker], bool]) -> None:
    """Call ``work`` once for each job, in ``size`` threads with one worker each.

    Once ``work`` has returned False, no other job begins; those that have begun end.
    However this ends, the processes end first, so that no thread waits for an answer or starts on
    another job.
    """
    queue = Queue(jobs)
    workers = [Worker() for _ in range(size)]
    executor = ThreadPoolExecutor(size)

    def drive(worker: Worker) -> None:
        while job := queue.take(worker.kind):
            if not work(job, worker):
                queue.clear()

    try:
        for future in [executor.submit(drive, worker) for worker in workers]:
            future.result()
    finally:
        queue.clear()
        for worker in workers:
            worker.end()
        executor.shutdown()
