"""Arithmetic on scalars, one PTX instruction each.

The functions fix the rounding (``.rn``, subnormals kept). The DSL would otherwise contract
``a * b + c`` to one fma, which the router's arithmetic forbids (spec.py, steps 2 to 6). Functions
named ``*_approx`` are the hardware's approximations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from cutlass import Boolean, Float32, Int32, Int64
from cutlass._mlir.dialects import arith
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.ptx.inline import asm, pure, struct, unpack

Number = TypeVar("Number", Int32, Float32)


def add_rn(a: Float32, b: Float32) -> Float32:
    """Return fl32(a + b)."""
    return Float32(pure(T.f32(), [a, b], "add.rn.f32 $0, $1, $2;", "=f,f,f"))


def mul_rn(a: Float32, b: Float32) -> Float32:
    """Return fl32(a * b), which the compiler does not contract with a later addition."""
    return Float32(pure(T.f32(), [a, b], "mul.rn.f32 $0, $1, $2;", "=f,f,f"))


def fma_rn(a: Float32, b: Float32, c: Float32) -> Float32:
    """Return fl32(a * b + c), rounded once."""
    return Float32(pure(T.f32(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"))


def div_rn(a: Float32, b: Float32) -> Float32:
    """Return fl32(a / b)."""
    return Float32(pure(T.f32(), [a, b], "div.rn.f32 $0, $1, $2;", "=f,f,f"))


def rsqrt_approx(a: Float32) -> Float32:
    """Return about 1 / sqrt(a); subnormals count as zero, whose result is infinite."""
    return Float32(pure(T.f32(), [a], "rsqrt.approx.ftz.f32 $0, $1;", "=f,f"))


def rcp_approx(a: Float32) -> Float32:
    """Return about 1 / a; subnormals count as zero, whose result is infinite."""
    return Float32(pure(T.f32(), [a], "rcp.approx.ftz.f32 $0, $1;", "=f,f"))


def exp2_approx(a: Float32) -> Float32:
    """Return about 2**a; subnormals count as zero."""
    return Float32(pure(T.f32(), [a], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))


def sqrt_approx(a: Float32) -> Float32:
    """Return about sqrt(a); subnormals count as zero."""
    return Float32(pure(T.f32(), [a], "sqrt.approx.ftz.f32 $0, $1;", "=f,f"))


def max_f32(a: Float32, b: Float32) -> Float32:
    """Return the larger number; of a NaN and a number, the number."""
    return Float32(pure(T.f32(), [a, b], "max.f32 $0, $1, $2;", "=f,f,f"))


def min_f32(a: Float32, b: Float32) -> Float32:
    """Return the smaller number; of a NaN and a number, the number."""
    return Float32(pure(T.f32(), [a, b], "min.f32 $0, $1, $2;", "=f,f,f"))


def abs_f32(a: Float32) -> Float32:
    """Return ``a`` with the sign bit cleared."""
    return Float32(pure(T.f32(), [a], "abs.f32 $0, $1;", "=f,f"))


def neg_f32(a: Float32) -> Float32:
    """Return ``a`` with the sign bit flipped."""
    return Float32(pure(T.f32(), [a], "neg.f32 $0, $1;", "=f,f"))


def unordered(a: Float32, b: Float32) -> Boolean:
    """Return whether a or b is a NaN."""
    return Boolean(arith.cmpf(arith.CmpFPredicate.UNO, a.ir_value(), b.ir_value()))


def not_negative(a: Float32) -> Boolean:
    """Return whether a >= 0, which is true of both zeros and false of a NaN."""
    zero = Float32(0.0)
    return Boolean(arith.cmpf(arith.CmpFPredicate.OGE, a.ir_value(), zero.ir_value()))


def bits(a: Float32) -> Int32:
    """Return the 32 bits of a float as an integer; ``from_bits`` is the inverse."""
    return Int32(pure(T.i32(), [a], "mov.b32 $0, $1;", "=r,f"))


def from_bits(a: Int32) -> Float32:
    """Return the float that has these 32 bits."""
    return Float32(pure(T.f32(), [a], "mov.b32 $0, $1;", "=f,r"))


def bf16_bits(a: Float32) -> Int32:
    """Return the 16 bits of the bfloat16 next to ``a``, ties to even, with zeros above them."""
    text = "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }"
    return Int32(pure(T.i32(), [a], text, "=r,f"))


def max_u32(a: Int32, b: Int32) -> Int32:
    """Return the larger of two words, compared as unsigned numbers."""
    return Int32(pure(T.i32(), [a, b], "max.u32 $0, $1, $2;", "=r,r,r"))


def max_of(values: Sequence[Int32]) -> Int32:
    """Return the largest value, compared as unsigned numbers, by a tree."""
    level = list(values)
    while len(level) > 1:
        paired = [max_u32(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def min_s32(a: Int32, b: Int32) -> Int32:
    """Return the smaller of two signed numbers."""
    return Int32(pure(T.i32(), [a, b], "min.s32 $0, $1, $2;", "=r,r,r"))


def max_s32(a: Int32, b: Int32) -> Int32:
    """Return the larger of two signed numbers."""
    return Int32(pure(T.i32(), [a, b], "max.s32 $0, $1, $2;", "=r,r,r"))


def quotient(a: Int32, b: int | Int32) -> Int32:
    """Return a // b, for a >= 0 and b > 0."""
    return Int32(arith.divui(a.ir_value(), Int32(b).ir_value()))


def remainder(a: Int32, b: int) -> Int32:
    """Return a % b, for a >= 0 and b > 0."""
    return Int32(arith.remui(a.ir_value(), Int32(b).ir_value()))


def modulo(a: Int32, b: Int32) -> Int32:
    """Return a % b as unsigned numbers; b is neither 0 nor a constant."""
    return Int32(arith.remui(a.ir_value(), b.ir_value()))


def equal(a: Int32, b: Int32) -> Boolean:
    """Return whether two words are equal, without a branch."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.eq, a.ir_value(), b.ir_value()))


def at_least_u32(a: Int32, b: Int32) -> Boolean:
    """Return whether a >= b as unsigned numbers."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.uge, a.ir_value(), b.ir_value()))


def less(a: Int32, b: Int32) -> Boolean:
    """Return whether a < b as signed numbers, without a branch."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.slt, a.ir_value(), b.ir_value()))


def both(a: Boolean, b: Boolean) -> Boolean:
    """Return ``a`` and ``b``; both are evaluated, without a branch."""
    return Boolean(arith.andi(a.ir_value(), b.ir_value()))


def select(condition: Boolean, if_true: Number, if_false: Number) -> Number:
    """Return one of two values, without a branch."""
    return type(if_true)(
        arith.select(condition.ir_value(), if_true.ir_value(), if_false.ir_value())
    )


def kept(a: Int32) -> Int32:
    """Return ``a``, kept in a register instead of computed again at every use."""
    return Int32(asm(T.i32(), [a], "mov.b32 $0, $1;", "=r,r"))


def kept_wide(a: Int64) -> Int64:
    """Do what ``kept`` does, for 64 bits."""
    return Int64(asm(T.i64(), [a], "mov.b64 $0, $1;", "=l,l"))


def read_now(value: Float32) -> Float32:
    """Return ``value``, read at this point: later MMAs may overwrite the accumulator."""
    return Float32(asm(T.f32(), [value], "mov.f32 $0, $1;", "=f,f"))


def shift_in_sign(mask: Int32, a: Float32) -> Int32:
    """Return the mask, shifted left by one, with the sign of ``a`` as its lowest bit."""
    return Int32(pure(T.i32(), [a, mask], "shf.l.wrap.b32 $0, $1, $2, 1;", "=r,f,r"))


def pack(high: Int32, low: Int32) -> Int64:
    """Return the 64 bits whose upper and lower words these are."""
    return Int64(pure(T.i64(), [low, high], "mov.b64 $0, {$1,$2};", "=l,r,r"))


def halves(value: Int64) -> tuple[Int32, Int32]:
    """Return (high, low), the two words of 64 bits."""
    result = pure(struct(T.i32(), 2), [value], "mov.b64 {$0,$1}, $2;", "=r,=r,l")
    low, high = unpack(result, Int32, T.i32(), 2)
    return high, low


def above(a: Int64, b: Int64) -> Boolean:
    """Return whether a > b as unsigned numbers of 64 bits."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.ugt, a.ir_value(), b.ir_value()))


def lowest_bit(mask: Int32) -> Int32:
    """Return the index of the lowest set bit of a mask that is not zero."""
    text = "{ .reg .b32 t; brev.b32 t, $1; bfind.shiftamt.u32 $0, t; }"
    return Int32(pure(T.i32(), [mask], text, "=r,r"))


def population(mask: Int32) -> Int32:
    """Return the number of bits that are set."""
    return Int32(pure(T.i32(), [mask], "popc.b32 $0, $1;", "=r,r"))
