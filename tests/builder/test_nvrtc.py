"""nvrtc.py: what reaches the compiler, and which of its messages end a build."""

from __future__ import annotations

import struct

import pytest

from build_kernels.compile import instructions, nvrtc, toolchain
from build_kernels.errors import BuildError
from tests.builder.conftest import Compile

EMPTY = 'extern "C" __global__ void empty() {}\n'


def _census(data: bytes) -> dict[str, int]:
    return instructions.census(instructions.sass(data, toolchain.nvdisasm()))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-7, "-7"),
        (2**31 - 1, "2147483647"),
        (0x80000000, "2147483648u"),
        (2**32, "4294967296ull"),
        (1.5, "0x1.8000000000000p+0f"),
        (-0.0, "-0x0.0p+0f"),
    ],
)
def test_literals(value: float, text: str) -> None:
    assert nvrtc.literal("NAME", value) == text


def test_a_string_becomes_a_name_of_the_source(compile_cuda: Compile) -> None:
    source = (
        "enum class Kind { plain, other };\nstatic_assert(Kind::KIND == Kind::other);\n" + EMPTY
    )
    compile_cuda(source, constants={"KIND": "other"})


@pytest.mark.parametrize("text", ["", "swap-ab", "1a", "a b", "a;b", "\u00e9"])
def test_a_string_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"constant FORM: .* found the string .*; next:"):
        nvrtc.literal("FORM", text)


@pytest.mark.parametrize("value", [1e-20, 3.4028234663852886e38, 1.0 / 3.0, 1e-45])
def test_float_macros_arrive_as_the_nearest_single(compile_cuda: Compile, value: float) -> None:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    source = f"static_assert(__builtin_bit_cast(unsigned, VALUE) == {bits}u);\n" + EMPTY
    compile_cuda(source, constants={"VALUE": value})
    with pytest.raises(BuildError, match="static assertion failed"):
        compile_cuda(source, constants={"VALUE": -value})


def test_headers_come_from_memory_under_their_include_name(compile_cuda: Compile) -> None:
    source = '#include "common/a.cuh"\n' + EMPTY
    compile_cuda(source, headers={"common/a.cuh": "#pragma once\n"})
    with pytest.raises(BuildError, match="cannot open source file"):
        compile_cuda(source, headers={"a.cuh": "#pragma once\n"})


def test_cuda_and_cccl_headers_are_found(compile_cuda: Compile) -> None:
    compile_cuda("#include <cuda_bf16.h>\n#include <cuda/std/cstdint>\n" + EMPTY)


@pytest.mark.parametrize(
    ("line", "word"), [("#warning careful", "careful"), ('#pragma message("hello")', "hello")]
)
def test_any_word_of_the_compiler_is_an_error_that_shows_it(
    compile_cuda: Compile, line: str, word: str
) -> None:
    with pytest.raises(BuildError, match=rf"(?s)test\.cu .*sm_90a.*{word}"):
        compile_cuda(f"{line}\n{EMPTY}")


def test_an_error_names_the_line(compile_cuda: Compile) -> None:
    with pytest.raises(BuildError, match=r'test\.cu\(2\): error: identifier "missing"'):
        compile_cuda("\nint f() { return missing; }")


def test_an_unknown_target_is_an_error(compile_cuda: Compile) -> None:
    with pytest.raises(BuildError, match="--gpu-architecture"):
        compile_cuda(EMPTY, "sm_1")


def test_arithmetic_is_neither_contracted_nor_flushed(compile_cuda: Compile) -> None:
    plain = """extern "C" __global__ void f(float* x) { *x = x[0] * x[1] + x[2]; }"""
    counts = _census(compile_cuda(plain))
    assert counts["FMUL"] == counts["FADD"] == 1
    assert not any(name.startswith("FFMA") or ".FTZ" in name for name in counts)
    asked = """extern "C" __global__ void f(float* x) { *x = __fmaf_rn(x[0], x[1], x[2]); }"""
    assert _census(compile_cuda(asked))["FFMA"] == 1


def test_compiling_is_a_pure_function(compile_cuda: Compile) -> None:
    assert compile_cuda(EMPTY) == compile_cuda(EMPTY)
    assert compile_cuda(EMPTY, "sm_100a") != compile_cuda(EMPTY, "sm_100f")
