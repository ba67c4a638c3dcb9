"""Inline PTX: helpers with which this folder's functions become PTX instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass._mlir.dialects import llvm


def asm(result: Any, operands: Sequence[Any], text: str, constraints: str) -> Any:
    """Run PTX that the compiler neither drops nor reorders with other such PTX.

    Args:
        result: MLIR type of the result; None if there is none.
        operands: DSL values, numbered in ``text`` behind the results.
        text: The instructions, with operands ``$0``, ``$1`` and so on.
        constraints: LLVM's constraint of each operand, results first (``=r``: 32-bit integer,
            ``=f``: float, ``=l``: 64-bit integer); ``~{memory}`` if memory is read or written.

    """
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
    """Run PTX without side effects, which the compiler may move or drop. Arguments as ``asm``."""
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
    """Return the first ``count`` values of a result of type ``struct``, each as a ``kind``."""
    return [kind(llvm.extractvalue(element, value, [i])) for i in range(count)]


def struct(element: Any, count: int) -> Any:
    """Return the MLIR type of ``count`` results of one type, which ``unpack`` separates."""
    return llvm.StructType.get_literal([element] * count)
