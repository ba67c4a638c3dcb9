"""``mma.sync`` and the load of its operands from shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.ptx.inline import asm, struct, unpack


def mma_m16n8k16(acc: list[Float32], a: Sequence[Int32], b: Sequence[Int32]) -> list[Float32]:
    """Return A B + C for bf16 A (16 x 16), bf16 B (16 x 8) and FP32 C (``acc``): one k16 step.

    The compiler takes it for a side effect. As pure arithmetic, it would be hoisted out of branches
    that are not taken.
    """
    result = asm(
        struct(T.f32(), 4),
        [*a, *b, *acc],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )
    return unpack(result, Float32, T.f32(), 4)


def ldmatrix_x4(address: Int32) -> list[Int32]:
    """Load four 8 x 8 matrices of 16-bit elements.

    Lane l gives the address of row l % 8 of matrix l / 8.
    """
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
    )
    return unpack(result, Int32, T.i32(), 4)
