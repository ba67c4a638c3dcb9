"""Steps 2 to 4 of the router on one logit, in the operation sequence of numerics.py."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Float32, Int32

from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.common.ptx import arith
from router_runtime.format.contract import Constants


def constant(name: str) -> Float32:
    """Return a constant of numerics.py by its name, rounded to single precision."""
    return Float32(CONSTANTS[name])


@dataclass(frozen=True)
class Scoring:
    """How an entry scores: its constants SCORING and GATE_TEMPERATURE."""

    function: str = "sqrtsoftplus"
    temperature: float = 1.0

    @classmethod
    def of(cls, constants: Constants) -> Scoring:
        """Return that of an entry. Raises ValueError for a function without code."""
        found = cls(str(constants["SCORING"]), float(constants["GATE_TEMPERATURE"]))
        if found.function not in ("sqrtsoftplus", "sigmoid"):
            raise ValueError(
                f"expected SCORING to be sqrtsoftplus or sigmoid, found {found.function}"
            )
        return found

    def tempered(self, logit: Float32) -> Float32:
        """Return the logit divided by the gate temperature: multiplied by its fp32 reciprocal."""
        if self.temperature == 1.0:
            return logit
        return arith.mul_rn(logit, Float32(1.0 / self.temperature))

    def score(self, logit: Float32) -> Float32:
        """Return the score of a logit, 0 for a NaN logit."""
        z = self.tempered(logit)
        if self.function == "sigmoid":
            exponential = _exponential(z)
            numerator = arith.select(arith.not_negative(z), Float32(1.0), exponential)
            return divided(numerator, arith.add_rn(exponential, Float32(1.0)))
        linear = arith.min_f32(arith.max_f32(z, Float32(0.0)), constant("LOGIT_MAX"))
        exponential = _exponential(z)
        return square_root(arith.fma_rn(exponential, _horner("LOG1P_C", exponential), linear))


def _exponential(z: Float32) -> Float32:
    """Return exp(-abs(z)), 0 for a NaN."""
    magnitude = arith.min_f32(arith.abs_f32(z), constant("EXP_CLAMP"))
    shifted = arith.fma_rn(magnitude, constant("EXP_NEG_LOG2E"), constant("EXP_SHIFT"))
    multiple = arith.add_rn(shifted, Float32(-CONSTANTS["EXP_SHIFT"]))
    rest = arith.fma_rn(multiple, constant("EXP_NEG_LN2_HI"), arith.neg_f32(magnitude))
    rest = arith.fma_rn(multiple, constant("EXP_NEG_LN2_LO"), rest)
    power = _horner("EXP_C", rest)
    scaled = arith.from_bits(arith.bits(power) + (arith.bits(shifted) << 23))
    return arith.mul_rn(scaled, constant("EXP_UNSCALE"))


def divided(a: Float32, b: Float32) -> Float32:
    """Return fl32(a / b), for b = fl32(1 + u) with u in [0, 1], and a either u or 1.

    div.rn.f32 has a branch for quotients that are subnormal or of subnormals, around which nothing
    can be scheduled. Here such a quotient has b = 1: the inverse is 1, and the quotient exact. No
    other intermediate result is subnormal, so that one step of Newton each for the inverse and the
    quotient suffice, but for b = 2 - 2^-23: from the inverse 1/2 they come to a tie and stay there.
    So the inverse is at least that of this b, which also serves for b = 2. All pairs of a and b
    were tried, with inverses that are off by up to two last places.
    """
    inverse = arith.rcp_approx(b)
    opposite = arith.neg_f32(b)
    inverse = arith.fma_rn(arith.fma_rn(opposite, inverse, Float32(1.0)), inverse, inverse)
    inverse = arith.max_f32(inverse, Float32(0.5 + 2.0**-24))
    quotient = arith.mul_rn(a, inverse)
    return arith.fma_rn(arith.fma_rn(opposite, quotient, a), inverse, quotient)


def square_root(a: Float32) -> Float32:
    """Return the correctly rounded root of a finite number that is not negative.

    It is the refinement that ptxas emits for sqrt.rn.f32 of numbers from 2^-101 on; smaller numbers
    are scaled first. sqrt.rn.f32 itself has a branch, around which nothing can be scheduled.
    """
    # Bits of such numbers compare as the numbers do.
    small = arith.less(arith.bits(a), arith.bits(Float32(2.0**-100)))
    scaled = arith.mul_rn(a, arith.select(small, Float32(2.0**64), Float32(1.0)))
    # The inverse root of 0 is infinite; any finite number will do.
    inverse = arith.min_f32(arith.rsqrt_approx(scaled), Float32(2.0**100))
    root = arith.mul_rn(scaled, inverse)
    rest = arith.fma_rn(arith.neg_f32(root), root, scaled)
    root = arith.fma_rn(rest, arith.mul_rn(inverse, Float32(0.5)), root)
    return arith.mul_rn(root, arith.select(small, Float32(2.0**-32), Float32(1.0)))


def ordered_key(logit: Float32, score_of_logit: Float32, bias: Float32) -> Int32:
    """Return fl32(score + bias), or -inf for a NaN, as a pattern that orders like the number.

    Patterns compare as unsigned numbers. The smallest is that of -inf, 0x007fffff, so 0 can mean
    "no candidate". A score is never -0, so a key never is.
    """
    key = arith.add_rn(score_of_logit, bias)
    pattern = arith.select(arith.unordered(logit, key), Int32(-0x00800000), arith.bits(key))
    return ordered(pattern)


def ordered(pattern: Int32) -> Int32:
    """Return a pattern that orders, as an unsigned integer, like the number with these bits."""
    return pattern ^ ((pattern >> 31) | Int32(-0x80000000))


def from_ordered_key(pattern: Int32) -> Float32:
    """Return the number of an ordered pattern; -inf for pattern 0, "no candidate"."""
    number = arith.from_bits(pattern ^ (~(pattern >> 31) | Int32(-0x80000000)))
    return arith.select(arith.equal(pattern, Int32(0)), Float32(float("-inf")), number)


def stored_logit(logit: Float32) -> Int32:
    """Return the bits of a logit as they are stored: one pattern for every NaN."""
    nan = Int32(int(CONSTANTS["NAN_LOGIT_BITS"]))
    return arith.select(arith.unordered(logit, logit), nan, arith.bits(logit))


def _horner(prefix: str, x: Float32) -> Float32:
    degree = sum(name.removeprefix(prefix).isdecimal() for name in CONSTANTS) - 1
    value = constant(f"{prefix}{degree}")
    for power in reversed(range(degree)):
        value = arith.fma_rn(value, x, constant(f"{prefix}{power}"))
    return value
