"""Worker processes: one compiler, one target, a fixed environment, a directory of their own.

A worker is started with nothing of the caller's environment: variables that configure a compiler,
a cache, a locale or a time zone cannot reach it. It answers requests, one JSON object a line on a
private copy of standard output, until its standard input closes; it therefore ends with its parent,
however the parent ends. It stays for several kernels because importing the DSL costs a second.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from build_kernels.catalog.kernels import Language
from build_kernels.compile import cutedsl, nvrtc, toolchain
from build_kernels.compile.job import Job
from build_kernels.compile.sources import KERNELS, PACKAGE, SUFFIXES
from build_kernels.errors import BuildError
from router_runtime.format.contract import Constants


class Worker:
    """The parent's side. ``target`` is what the CuTe DSL of this process compiles for; None makes a
    worker for CUDA C++, which takes every target.
    """

    def __init__(self, target: str | None) -> None:
        self.target = target
        self._folder = tempfile.mkdtemp(prefix="build-kernels-")
        # A file, not a pipe: nobody has to read it while the compiler prints.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = {
            "PATH": os.defpath,
            "HOME": self._folder,
            "TMPDIR": self._folder,
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(PACKAGE.parent),
        }
        if target is not None:
            environment["CUTE_DSL_ARCH"] = target
        try:
            # -P: the working directory is not searched for modules. -s: nor is the user's folder.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-m", "build_kernels.compile.worker", self._folder],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
            )
        except BaseException:
            self._said.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def compile(self, job: Job) -> bytes:
        """The cubin of a job. Raises BuildError with what the compiler said."""
        request = {
            "kernel": job.kernel,
            "language": job.language,
            "target": job.target,
            "constants": dict(job.constants),
        }
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
            self._said.seek(0)
            raise BuildError(
                f"{job.key}: expected an answer from the compiler, found that its process ended "
                f"with status {status}:\n{self._said.read().decode(errors='replace').strip()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise BuildError(f"{job.key}: {answer['error']}")
        return base64.b64decode(answer["cubin"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def main(arguments: Sequence[str]) -> None:
    """The child's side: answer requests until standard input ends."""
    # Named by the parent, which made it: whoever starts a worker by hand keeps their folder.
    if len(arguments) != 1:
        raise SystemExit(
            f"expected to be started by a build, found {len(arguments)} arguments; "
            "next: make build-cubins"
        )
    try:
        _serve()
    finally:
        # The parent removes it too; this is for a parent that was killed.
        shutil.rmtree(arguments[0], ignore_errors=True)


def _serve() -> None:
    # Compilers print. Whatever they print goes to standard error; answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    toolchain.check()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        cubin = _compile(**request)
    except BuildError as error:
        return {"error": str(error)}
    except Exception:
        return {"error": f"the compiler failed:\n{traceback.format_exc().strip()}"}
    return {"cubin": base64.b64encode(cubin).decode("ascii")}


def _compile(kernel: str, language: Language, target: str, constants: Constants) -> bytes:
    if language == "cutedsl":
        return cutedsl.compile_cubin(f"build_kernels.kernels.{kernel}.{kernel}", constants, target)
    return nvrtc.compile_cubin(
        name=kernel,
        source=(KERNELS / kernel / f"{kernel}.cu").read_text(encoding="utf-8"),
        headers=_headers(kernel),
        constants=constants,
        target=target,
        include_directories=toolchain.include_directories(),
    )


def _headers(kernel: str) -> dict[str, str]:
    """The headers that a source can include: ``"<name>.cuh"`` of its own folder,
    ``"common/<name>.cuh"`` of the shared one.
    """
    headers = {}
    for prefix, folder in (("", KERNELS / kernel), ("common/", KERNELS / "common")):
        for path in sorted(folder.glob(f"*{SUFFIXES['cuda'][1]}")):
            headers[prefix + path.name] = path.read_text(encoding="utf-8")
    return headers


if __name__ == "__main__":
    main(sys.argv[1:])
