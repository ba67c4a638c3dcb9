"""Operations that all 32 lanes of a warp execute together."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Int32
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.ptx.arith import select
from build_kernels.kernels.common.ptx.inline import asm, pure


def ballot(condition: Boolean) -> Int32:
    """Return the mask of the lanes for which the condition holds."""
    text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return Int32(asm(T.i32(), [select(condition, Int32(1), Int32(0))], text, "=r,r"))


def lower_lanes() -> Int32:
    """Return the mask of the lanes below this one."""
    return Int32(pure(T.i32(), [], "mov.u32 $0, %lanemask_lt;", "=r"))


def zero_behind(values: Sequence[Int32]) -> Int32:
    """Return 0, as a number that exists only when all the values do.

    Add it to the address that an instruction uses, and that instruction cannot be issued before the
    values have been computed. Otherwise the assembler may move the computation of the values behind
    the instruction. The result is bit 31 of the values and of the mask of lower lanes. That mask
    never has bit 31, because no lane is above lane 31. The assembler does not know this, so it
    keeps the dependency on the values.
    """
    seen = values[0]
    for value in values[1:]:
        seen = seen | value
    return seen & lower_lanes() & Int32(-0x80000000)


def redux_max_u32(value: Int32) -> Int32:
    """Return the largest value of the warp, compared as unsigned numbers."""
    return Int32(asm(T.i32(), [value], "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r"))


def broadcast(value: Int32, lane: Int32) -> Int32:
    """Return the value that lane ``lane`` has."""
    return Int32(
        asm(T.i32(), [value, lane], "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r")
    )


def shuffle_xor(value: Int32, lanes: int) -> Int32:
    """Return the value of the lane whose number differs by ``lanes``, an exclusive or."""
    text = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"
    return Int32(asm(T.i32(), [value], text, "=r,r"))


def exit_thread() -> None:
    """End this thread here."""
    asm(None, [], "exit;", "~{memory}")
