"""Screening: which experts can be among a token's best, without their exact scores.

Every thread bounds the keys of its experts from below and above by hardware approximations with a
proven margin. A threshold follows from the lower bounds; an expert whose upper bound reaches it is
a candidate. Only candidates get their exact score. NOTES.md of dense_router_prefill has the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Int32

from build_kernels.kernels.common import scoring
from build_kernels.kernels.common.ptx import arith, warp_ops
from build_kernels.kernels.common.scoring import Scoring

#: Largest relative and absolute error of a screened score. log1p(u) / u is a polynomial, off by
#: 5.7e-5 at most; ex2.approx errs by 2^-22, its argument by 126 * 2^-23; the root halves a relative
#: error. A sigmoid has no polynomial and no root: its relative error is at most that of u, 1.1e-5,
#: and those of an addition, a product and rcp.approx (2^-23). Below -87, ex2.approx gives 0.
SCREEN_RELATIVE = 2.0**-14
SCREEN_ABSOLUTE = 2.0**-60

#: Coefficients of log1p(u) / u for u in [0, 1], of least relative error, lowest power first.
LOG1P_OVER_U = (0.99994328, -0.49697779, 0.30630088, -0.15742713, 0.04134727)


def screened(logit: Float32, rule: Scoring) -> Float32:
    """Return the score of a logit by hardware approximations."""
    z = rule.tempered(logit)
    exponential = arith.exp2_approx(
        arith.mul_rn(arith.abs_f32(z), scoring.constant("EXP_NEG_LOG2E"))
    )
    if rule.function == "sigmoid":
        inverse = arith.rcp_approx(arith.add_rn(exponential, Float32(1.0)))
        negative = arith.mul_rn(exponential, inverse)
        return arith.select(arith.not_negative(z), inverse, negative)
    share = Float32(LOG1P_OVER_U[-1])
    for coefficient in reversed(LOG1P_OVER_U[:-1]):
        share = arith.fma_rn(share, exponential, Float32(coefficient))
    linear = arith.max_f32(z, Float32(0.0))
    return arith.sqrt_approx(arith.fma_rn(exponential, share, linear))


def bounds(score: Float32, bias: Float32) -> tuple[Float32, Float32]:
    """Return (low, high) bounds of the key of a screened score, up to what ``below`` takes off.

    The low bound of an infinite score is NaN, which bounds nothing: the exact score is finite.
    """
    high = arith.fma_rn(score, Float32(1.0 + SCREEN_RELATIVE), bias)
    return arith.fma_rn(score, Float32(-2.0 * SCREEN_RELATIVE), high), high


def below(bound: Float32) -> Float32:
    """Return a threshold so far below a low bound that a smaller high bound means a smaller key.

    It is lower by SCREEN_ABSOLUTE and by the rounding of the bound and of a key of its size. The
    rounding of a larger high bound is less than the half of SCREEN_RELATIVE that scores do not use.
    """
    lower = arith.fma_rn(arith.abs_f32(bound), Float32(-(2.0**-22)), bound)
    return arith.add_rn(lower, Float32(-SCREEN_ABSOLUTE))


def near(highs: Sequence[Float32], threshold: Float32) -> list[Int32]:
    """Return the mask of the high bounds that are not below the threshold, 32 bits per word.

    The first one is the lowest bit. A NaN is not below anything. A bound takes one addition and one
    shift: its bit is 0 if the difference of bound and threshold has a negative sign. The difference
    of equal numbers is +0, because a high bound is never -0.
    """
    masks = []
    for first in range(0, len(highs), 32):
        far = Int32(-1)
        for high in reversed(highs[first : first + 32]):
            far = arith.shift_in_sign(far, arith.add_rn(high, arith.neg_f32(threshold)))
        masks.append(~far)
    return masks


def threshold(best: Sequence[Float32], lanes: int, top_k: int, groups: int) -> Float32:
    """Return a number such that an expert whose high bound is below it is not among the best.

    ``lanes`` neighbouring threads hold a token; all call this. ``best`` are this thread's largest
    low bounds, one for each of its groups of experts. The result is ``below`` the ``top_k``-th
    largest of all lanes' bounds, found by merging descending lists. While the lanes have more than
    ``groups`` bounds, the groups of neighbouring lanes are united.
    """
    values = descending(list(best))[:top_k]
    distance = 1
    while distance < lanes:
        others = [
            arith.from_bits(warp_ops.shuffle_xor(arith.bits(value), distance)) for value in values
        ]
        if len(values) * (lanes // distance) > groups:
            values = [arith.max_f32(a, b) for a, b in zip(values, others, strict=True)]
        elif 2 * distance < lanes:
            values = joined(values, others)[:top_k]
        else:
            return below(kth(values, others, top_k))
        distance *= 2
    return below(values[top_k - 1])


def least_kept(patterns: Sequence[Int32], lanes: int, top_k: int, groups: int) -> Int32:
    """Return a pattern: no key whose pattern is smaller is among a token's ``top_k`` best.

    ``lanes`` neighbouring threads hold a token's exact keys; all call this. ``patterns`` are those
    of this thread's keys (``scoring.ordered_key``), 0 for none. If there are at least ``top_k``
    keys, as many are not below the result. ``groups`` is that of ``threshold``.
    """
    count = max(1, min(len(patterns), groups // lanes))
    best = [Float32(float("-inf"))] * count
    for i, pattern in enumerate(patterns):
        best[i % count] = arith.max_f32(best[i % count], scoring.from_ordered_key(pattern))
    return scoring.ordered(arith.bits(threshold(best, lanes, top_k, groups)))


def descending(values: list[Float32]) -> list[Float32]:
    """Return the values, the largest first."""
    if len(values) < 2:
        return values
    half = len(values) // 2
    return joined(descending(values[:half]), descending(values[half:]))


def joined(a: Sequence[Float32], b: Sequence[Float32]) -> list[Float32]:
    """Return all values of two descending lists, descending: a bitonic merge, None below all."""
    size = 1
    while size < max(len(a), len(b)):
        size *= 2
    values: list[Any] = [*a, *[None] * (2 * size - len(a) - len(b)), *reversed(b)]
    step = size
    while step > 0:
        for i in range(2 * size):
            if i & step == 0:
                one, other = values[i], values[i + step]
                if one is None or other is None:
                    values[i], values[i + step] = (other, one) if one is None else (one, other)
                else:
                    values[i] = arith.max_f32(one, other)
                    values[i + step] = arith.min_f32(one, other)
        step //= 2
    return values[: len(a) + len(b)]


def kth(a: Sequence[Float32], b: Sequence[Float32], top_k: int) -> Float32:
    """Return the k-th largest of two descending lists: the k largest are first ones of each."""
    bound = None
    for i in range(max(0, top_k - len(b)), min(top_k, len(a)) + 1):
        lasts = ([a[i - 1]] if i > 0 else []) + ([b[top_k - i - 1]] if i < top_k else [])
        least = lasts[0] if len(lasts) == 1 else arith.min_f32(*lasts)
        bound = least if bound is None else arith.max_f32(bound, least)
    assert bound is not None
    return bound
