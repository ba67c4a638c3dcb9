"""A matmul in Triton, whose compiler chooses the instructions, layouts and swizzles."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

PACKAGE = "triton"


@dataclass(frozen=True)
class Form:
    """One way to compile the matmul.

    Attributes:
        kind: The type of A and B.
        tile: M, N and K of a CTA's step.
        a_rows: Whether a row of A is contiguous; otherwise a column is.
        b_columns: Whether a column of B is contiguous; otherwise a row is.
        warps: Of a CTA.
        stages: That Triton may have in flight.

    """

    kind: str
    tile: tuple[int, int, int]
    a_rows: bool = True
    b_columns: bool = True
    warps: int = 4
    stages: int = 3


#: Swizzles of 128, 64 and 32 bytes, every order of the operands, M = 64 and 128.
FORMS = (
    Form("bf16", (128, 64, 64)),
    Form("f16", (128, 128, 32)),
    Form("bf16", (128, 128, 16), stages=4),
    Form("f16", (64, 64, 64)),
    Form("bf16", (128, 256, 64), warps=8, stages=2),
    Form("bf16", (128, 64, 64), b_columns=False),
    Form("f16", (128, 32, 64), a_rows=False),
    Form("bf16", (64, 128, 32), a_rows=False, b_columns=False),
)


@triton.jit
def matmul(
    a,
    b,
    c,
    rows,
    columns,
    inner,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    step: tl.constexpr,
    a_rows: tl.constexpr,
    b_columns: tl.constexpr,
):
    """C = A B in FP32, for sizes that are multiples of the tile."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    k = tl.arange(0, step)
    if a_rows:
        of_a = a + row[:, None] * inner + k[None, :]
        next_a = step
    else:
        of_a = a + row[:, None] + k[None, :] * rows
        next_a = step * rows
    if b_columns:
        of_b = b + k[:, None] + column[None, :] * inner
        next_b = step
    else:
        of_b = b + k[:, None] * columns + column[None, :]
        next_b = step * columns
    total = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for _ in range(0, inner, step):
        total = tl.dot(tl.load(of_a), tl.load(of_b), total)
        of_a += next_a
        of_b += next_b
    tl.store(c + row[:, None] * columns + column[None, :], total)


def compiled(form: Form) -> CompiledKernel:
    """Return what Triton makes of a form for compute capability 10.0."""
    element = {"f16": "*fp16", "bf16": "*bf16"}[form.kind]
    pointers = {"a": element, "b": element, "c": "*fp32"}
    sizes = dict.fromkeys(("rows", "columns", "inner"), "i32")
    constants = {
        "tile_rows": form.tile[0],
        "tile_columns": form.tile[1],
        "step": form.tile[2],
        "a_rows": form.a_rows,
        "b_columns": form.b_columns,
    }
    source = ASTSource(
        fn=matmul,
        signature={**pointers, **sizes, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers) + len(sizes))},
    )
    # Line information has the path of this file.
    triton.knobs.compilation.disable_line_info = True
    options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 100, 32), options=options)
