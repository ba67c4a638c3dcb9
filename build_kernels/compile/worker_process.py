"""A worker process as its parent sees it.

A worker starts with nothing of the caller's environment, so no variable that configures a compiler,
a cache, a locale or a time zone can reach it, and in a temporary folder of its own. It stays for
several kernels because importing the CuTe DSL takes a second. ``worker.py`` is its program.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from build_kernels.compile.environment import isolated
from build_kernels.compile.job import Job
from build_kernels.compile.sources import PACKAGE
from build_kernels.errors import JobError
from router_runtime.format.contract import Constants


class WorkerProcess:
    """A process that compiles one kernel at a time.

    Args:
        target: What the CuTe DSL of this process compiles for. None: a worker for CUDA C++, which
            compiles for every target.

    """

    def __init__(self, target: str | None) -> None:
        self.target = target
        self._folder = tempfile.mkdtemp(prefix="build-kernels-")
        # A file, not a pipe: it need not be read while the compiler prints.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = {**isolated(self._folder), "PYTHONPATH": str(PACKAGE.parent)}
        if target is not None:
            environment["CUTE_DSL_ARCH"] = target
        try:
            # -P: do not search the working directory for modules. -s: nor the user's folder.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-m", "build_kernels.compile.worker", self._folder],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
            )
        except BaseException:
            self._printed.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def compile(self, job: Job) -> bytes:
        """Return the cubin of a job. Raises JobError with what the compiler printed."""
        return self._result("cubin", job.key, _arguments(job))

    def ptx(self, job: Job) -> str:
        """Return the PTX of a job in CuTe DSL: what its cubin is assembled from."""
        return self._result("ptx", job.key, _arguments(job)).decode("ascii")

    def library(
        self,
        name: str,
        source: str,
        headers: Mapping[str, str],
        constants: Constants,
        architecture: str,
    ) -> str:
        """Return the PTX of a CUDA C++ source that is none of a kernel of ours.

        Args:
            name: Of the source, for messages.
            source: Its text.
            headers: What an ``#include`` says -> the text that it gets.
            constants: Macros.
            architecture: A virtual one, such as compute_90a.

        """
        arguments = {
            "name": name,
            "source": source,
            "headers": dict(headers),
            "constants": dict(constants),
            "architecture": architecture,
        }
        return self._result("library", name, arguments).decode("ascii")

    def _result(self, task: str, what: str, arguments: Mapping[str, object]) -> bytes:
        """Return the worker's answer to a request. Raises JobError, with ``what`` as its key."""
        request = {"task": task, "arguments": arguments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = self._process.wait()
            self._printed.seek(0)
            raise JobError(
                what,
                "expected an answer from the compiler, found that its process ended "
                f"with status {status}:\n{self._printed.read().decode(errors='replace').strip()}",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise JobError(what, answer["error"], answer.get("trace", ""))
        return base64.b64decode(answer["result"])

    def close(self) -> None:
        """End the process, whatever it is doing, and remove its folder."""
        self._process.kill()
        self._process.communicate()
        self._printed.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _arguments(job: Job) -> dict[str, object]:
    return {
        "kernel": job.kernel,
        "language": job.language,
        "target": job.target,
        "constants": dict(job.constants),
    }
