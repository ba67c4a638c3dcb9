"""CUDA C++ source + headers + constants + target -> cubin or PTX, by NVRTC. Pure functions.

NVRTC sees the program under a fixed name and the project's headers in memory, so the output does
not depend on the source's folder. Only the CUDA headers are read from disk, from locked packages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from build_kernels.errors import BuildError
from router_runtime.format.contract import Constants

#: Everything but the target, the constants and the include directories. Rounding is spelled out:
#: no contraction (kernels write ``__fmaf_rn`` where they use one), no flushing, IEEE division and
#: square root. A warning is an error.
FLAGS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--device-as-default-execution-space",
    "--warning-as-error=all-warnings",
)

#: Raise it by one when the same source, constants and flags are to give another cubin: evidence of
#: one target then no longer counts for another. ``FLAGS`` need no version, they are in the digest.
RECIPE_VERSION = 1


def compile_cubin(
    name: str,
    source: str,
    headers: Mapping[str, str],
    constants: Constants,
    target: str,
    include_directories: Sequence[Path],
) -> bytes:
    """Compile ``source``, the program called ``name``, for a real architecture such as sm_90a.
    ``headers`` maps what an ``#include`` says to the text it gets.
    """
    options = [f"--gpu-architecture={target}"]
    options += [f"--include-path={directory}" for directory in include_directories]
    return _compiled("CUBIN", name, source, headers, constants, options)


def compile_ptx(
    name: str, source: str, headers: Mapping[str, str], constants: Constants, architecture: str
) -> str:
    """Compile ``source`` for a virtual architecture such as compute_90a and return its PTX, with
    all of its functions and variables. It includes nothing but ``headers``.
    """
    options = [f"--gpu-architecture={architecture}", "--relocatable-device-code=true"]
    ptx = _compiled("PTX", name, source, headers, constants, options)
    return ptx.rstrip(b"\0").decode("ascii")


def _compiled(
    kind: Literal["CUBIN", "PTX"],
    name: str,
    source: str,
    headers: Mapping[str, str],
    constants: Constants,
    own_options: Sequence[str],
) -> bytes:
    """Return what NVRTC makes of a program, with the options that every program has."""
    from cuda.bindings import nvrtc

    options = [*own_options[:1], *FLAGS, *own_options[1:]]
    options += [f"--define-macro={key}={literal(key, value)}" for key, value in constants.items()]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            f"{name}.cu".encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [include.encode() for include in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        size = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        buffer = bytearray(size)
        _checked(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = bytes(buffer).rstrip(b"\0").decode(errors="replace").strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or log:
            raise BuildError(
                f"expected {name}.cu to compile with {own_options[0]} without a word, found:\n"
                f"{log or status.name}\nnext: correct the source and run the command again"
            )
        size = _checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
        buffer = bytearray(size)
        _checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer))
        return bytes(buffer)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def literal(name: str, value: int | float | str) -> str:
    """What the macro ``name`` stands for: an int in decimal, a float in hex, rounded to fp32, or a
    C++ name as it is, to which the source gives a meaning (an enumerator, for example).

    Raises BuildError for a string that is no name of C++.
    """
    if isinstance(value, str):
        if not (value.isascii() and value.isidentifier()):
            raise BuildError(
                f"constant {name}: expected a number or a name for a CUDA C++ kernel, found the "
                f"string {value!r}; next: give it one in build_kernels/catalog"
            )
        return value
    if isinstance(value, int):
        return str(value) if value < 2**31 else f"{value}u" if value < 2**32 else f"{value}ull"
    (single,) = struct.unpack("<f", struct.pack("<f", value))
    return f"{single.hex()}f"


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call, which returns (status, value...)."""
    if result[0] != 0:
        raise BuildError(f"expected NVRTC to succeed, found {result[0].name}")
    return result[1] if len(result) > 1 else None
