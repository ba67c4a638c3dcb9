"""Steps 2 to 4 of the router on one logit, in the operation sequence of numerics.py."""

from __future__ import annotations

from cutlass import Float32, Int32

from build_kernels.kernels.common import ptx
from build_kernels.kernels.common.numerics import CONSTANTS


def constant(name: str) -> Float32:
    return Float32(CONSTANTS[name])


def score(logit: Float32) -> Float32:
    """sqrt(softplus(logit)); 0 for a NaN logit."""
    linear = ptx.min_f32(ptx.max_f32(logit, Float32(0.0)), constant("LOGIT_MAX"))
    magnitude = ptx.min_f32(ptx.abs_f32(logit), constant("EXP_CLAMP"))
    shifted = ptx.fma_rn(magnitude, constant("EXP_NEG_LOG2E"), constant("EXP_SHIFT"))
    multiple = ptx.add_rn(shifted, Float32(-CONSTANTS["EXP_SHIFT"]))
    rest = ptx.fma_rn(multiple, constant("EXP_NEG_LN2_HI"), ptx.neg_f32(magnitude))
    rest = ptx.fma_rn(multiple, constant("EXP_NEG_LN2_LO"), rest)
    power = _horner("EXP_C", rest)
    scaled = ptx.from_bits(ptx.bits(power) + (ptx.bits(shifted) << 23))
    exponential = ptx.mul_rn(scaled, constant("EXP_UNSCALE"))
    return square_root(ptx.fma_rn(exponential, _horner("LOG1P_C", exponential), linear))


def square_root(a: Float32) -> Float32:
    """sqrt.rn.f32 of a number that is not negative and finite, without its branch, around which
    nothing else can be scheduled: the refinement that ptxas emits for numbers from 2^-101 on, to
    which smaller ones are scaled."""
    # Their bits are in their order.
    small = ptx.less(ptx.bits(a), ptx.bits(Float32(2.0**-100)))
    scaled = ptx.mul_rn(a, ptx.select(small, Float32(2.0**64), Float32(1.0)))
    # Of 0 it is infinite; any number serves.
    inverse = ptx.min_f32(ptx.rsqrt_approx(scaled), Float32(2.0**100))
    root = ptx.mul_rn(scaled, inverse)
    rest = ptx.fma_rn(ptx.neg_f32(root), root, scaled)
    root = ptx.fma_rn(rest, ptx.mul_rn(inverse, Float32(0.5)), root)
    return ptx.mul_rn(root, ptx.select(small, Float32(2.0**-32), Float32(1.0)))


def ordered_key(logit: Float32, score_of_logit: Float32, bias: Float32) -> Int32:
    """fl32(score + bias), or -inf for a NaN, as an unsigned pattern that orders like the number.

    The smallest pattern of a number is that of -inf, 0x007fffff: 0 is left for "no candidate". A
    score is never -0, so the key never is.
    """
    key = ptx.add_rn(score_of_logit, bias)
    pattern = ptx.select(ptx.unordered(logit, key), Int32(-0x00800000), ptx.bits(key))
    return pattern ^ ((pattern >> 31) | Int32(-0x80000000))


def stored_logit(logit: Float32) -> Int32:
    """The bits of a logit in a result: one NaN for all of them."""
    nan = Int32(int(CONSTANTS["NAN_LOGIT_BITS"]))
    return ptx.select(ptx.unordered(logit, logit), nan, ptx.bits(logit))


def _horner(prefix: str, x: Float32) -> Float32:
    degree = sum(name.removeprefix(prefix).isdecimal() for name in CONSTANTS) - 1
    value = constant(f"{prefix}{degree}")
    for power in reversed(range(degree)):
        value = ptx.fma_rn(value, x, constant(f"{prefix}{power}"))
    return value
