"""CuTe DSL program + target -> cubin or PTX. Runs only in a worker process of its own target.

The DSL reads its target from the environment when it is first imported and writes files to the
working directory, so the worker sets ``CUTE_DSL_ARCH`` before the import and works in a temporary
directory; see ``worker.py``.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from build_kernels.errors import BuildError
from router_runtime.format.contract import Constants

#: The options of ``cute.compile`` besides the target and the request to keep the cubin.
FLAGS = ("OptLevel(3)",)

#: Raise it by one when the same source, constants and flags are to give another cubin: evidence of
#: one target then no longer counts for another. ``FLAGS`` need no version, they are in the digest.
RECIPE_VERSION = 1


def compile_cubin(module: str, constants: Constants, target: str) -> bytes:
    """Return the cubin of what ``module.program(constants)`` returns: a ``@cute.jit`` function and
    the arguments to trace it with.

    Raises BuildError in a process that was started for another target.
    """
    cubin = _compiled(module, constants, target, "KeepCUBIN").__cubin__
    if not isinstance(cubin, bytes):
        raise BuildError(f"expected the bytes of a cubin, found {cubin!r}")
    return cubin


def compile_ptx(module: str, constants: Constants, target: str) -> str:
    """Return the PTX that ``compile_cubin`` hands to the assembler."""
    ptx = _compiled(module, constants, target, "KeepCUBIN", "KeepPTX").__ptx__
    if not isinstance(ptx, str):
        raise BuildError(f"expected the text of a PTX module, found {ptx!r}")
    return ptx


def _compiled(module: str, constants: Constants, target: str, *kept: str) -> Any:
    """Return the DSL's own object for a compiled program, with what ``kept`` names in it."""
    if os.environ.get("CUTE_DSL_ARCH") != target:
        raise BuildError(
            f"expected a process with CUTE_DSL_ARCH={target}, "
            f"found {os.environ.get('CUTE_DSL_ARCH')!r}; next: build through build-kernels"
        )
    from cutlass import cute

    function, arguments = importlib.import_module(module).program(constants)
    options = [cute.OptLevel(3), cute.GPUArch(target)]
    options += [getattr(cute, name)(True) for name in kept]
    return cute.compile[tuple(options)](function, *arguments)
