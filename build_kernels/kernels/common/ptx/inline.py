"""Inline PTX: how the functions of this folder turn a line of it into a Python call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass._mlir.dialects import llvm


def asm(result: Any, operands: Sequence[Any], text: str, constraints: str) -> Any:
    return llvm.inline_asm(
        result,
        [operand.ir_value() for operand in operands],
        text,
        constraints,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def pure(result: Any, operands: Sequence[Any], text: str, constraints: str) -> Any:
    """Arithmetic without side effects, which the compiler may move or drop."""
    return llvm.inline_asm(
        result,
        [operand.ir_value() for operand in operands],
        text,
        constraints,
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def unpack(value: Any, kind: Any, element: Any, count: int) -> list[Any]:
    return [kind(llvm.extractvalue(element, value, [i])) for i in range(count)]


def struct(element: Any, count: int) -> Any:
    return llvm.StructType.get_literal([element] * count)
