"""The program of a worker process: compile what the parent requests.

A request is one JSON object per line of standard input, an answer one JSON object per line of what
was standard output when the process started. The process ends when its standard input closes, so it
ends with its parent, however the parent ends.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from build_kernels.compile import cutedsl, nvrtc, toolchain
from build_kernels.compile.languages import LANGUAGES, Language
from build_kernels.compile.sources import KERNELS, headers
from build_kernels.errors import BuildError
from build_kernels.source_error import explained
from router_runtime.format.contract import Constants


def main(arguments: Sequence[str]) -> None:
    """Answer requests until standard input ends, then remove the folder that is named."""
    # A folder is removed only if it is named: a worker that is started by hand removes nothing.
    if len(arguments) != 1:
        raise SystemExit(
            f"expected to be started by a build, found {len(arguments)} arguments; "
            "next: make build-cubins"
        )
    try:
        _serve()
    finally:
        # The parent removes it too, unless it was killed.
        shutil.rmtree(arguments[0], ignore_errors=True)


def _serve() -> None:
    # Compilers print to standard output: that goes to standard error, and answers elsewhere.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    toolchain.check()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        result = _TASKS[request["task"]](**request["arguments"])
    except BuildError as error:
        return {"error": str(error)}
    except Exception as error:
        found = explained(error)
        return {"error": found.text, "trace": found.trace}
    return {"result": base64.b64encode(result).decode("ascii")}


def _cubin(kernel: str, language: Language, target: str, constants: Constants) -> bytes:
    if language == "cutedsl":
        return cutedsl.compile_cubin(f"build_kernels.kernels.{kernel}.{kernel}", constants, target)
    source, _ = LANGUAGES["cuda"].suffixes
    return nvrtc.compile_cubin(
        name=kernel,
        source=(KERNELS / kernel / f"{kernel}{source}").read_text(encoding="utf-8"),
        headers=headers(kernel),
        constants=constants,
        target=target,
        include_directories=toolchain.include_directories(),
    )


def _ptx(kernel: str, language: Language, target: str, constants: Constants) -> bytes:
    if language != "cutedsl":
        raise BuildError(f"expected a kernel in CuTe DSL, found {kernel} in {language}")
    module = f"build_kernels.kernels.{kernel}.{kernel}"
    return cutedsl.compile_ptx(module, constants, target).encode("ascii")


def _library(
    name: str, source: str, headers: dict[str, str], constants: Constants, architecture: str
) -> bytes:
    return nvrtc.compile_ptx(name, source, headers, constants, architecture).encode("ascii")


#: What a request can have done, by its name: each returns bytes.
_TASKS: Mapping[str, Callable[..., bytes]] = {"cubin": _cubin, "ptx": _ptx, "library": _library}


if __name__ == "__main__":
    main(sys.argv[1:])
