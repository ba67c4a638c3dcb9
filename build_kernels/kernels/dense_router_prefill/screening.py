"""Selection on few experts, for the forms with many tokens: bounds of a key by hardware
approximations, the threshold that follows, and lists of the best ranks so far.

A rank is a 64-bit number, (ordered key, ~expert): the larger one is selected first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from build_kernels.kernels.common import bulk, finish, ptx, scoring
from build_kernels.kernels.common.parameters import Routing

#: A screened score is within this share of the exact one, and this distance. log1p(u) / u is a
#: polynomial, off by 5.7e-5 at most; ex2.approx errs by 2^-22, its argument by 126 * 2^-23; the
#: root halves what is under it. Below -87, ex2.approx gives 0.
SCREEN_RELATIVE = 2.0**-14
SCREEN_ABSOLUTE = 2.0**-60

#: log1p(u) / u for u in [0, 1], of least relative error.
LOG1P_OVER_U = (0.99994328, -0.49697779, 0.30630088, -0.15742713, 0.04134727)


def screened(logit: Float32) -> Float32:
    """sqrt(softplus(logit)) by hardware approximations."""
    exponential = bulk.exp2_approx(
        ptx.mul_rn(ptx.abs_f32(logit), scoring.constant("EXP_NEG_LOG2E"))
    )
    share = Float32(LOG1P_OVER_U[-1])
    for coefficient in reversed(LOG1P_OVER_U[:-1]):
        share = ptx.fma_rn(share, exponential, Float32(coefficient))
    linear = ptx.max_f32(logit, Float32(0.0))
    return bulk.sqrt_approx(ptx.fma_rn(exponential, share, linear))


def bounds(score: Float32, bias: Float32) -> tuple[Float32, Float32]:
    """(low, high) of the key, from a screened score: what ``below`` adds to them aside. The low one
    of an infinite score, which the exact one is not, is NaN: no bound."""
    high = ptx.fma_rn(score, Float32(1.0 + SCREEN_RELATIVE), bias)
    return ptx.fma_rn(score, Float32(-2.0 * SCREEN_RELATIVE), high), high


def below(bound: Float32) -> Float32:
    """So far below a low bound that whoever has a high bound below that has a key below the first:
    by SCREEN_ABSOLUTE, and by what bounds are rounded to."""
    lower = ptx.fma_rn(ptx.abs_f32(bound), Float32(-(2.0**-22)), bound)
    return ptx.add_rn(lower, Float32(-SCREEN_ABSOLUTE))


def near(highs: Sequence[Float32], threshold: Float32) -> list[Int32]:
    """The mask of those that are not below the threshold, a NaN being below nothing: 32 a word, the
    first in the lowest bit. One addition and one shift each: the sign of the difference, which of
    equals is positive, a high bound never being -0."""
    masks = []
    for first in range(0, len(highs), 32):
        far = Int32(-1)
        for high in reversed(highs[first : first + 32]):
            far = bulk.shift_in_sign(far, ptx.add_rn(high, ptx.neg_f32(threshold)))
        masks.append(~far)
    return masks


def threshold(best: Sequence[Float32], lanes: int, top_k: int, groups: int) -> Float32:
    """Whoever has a high bound below it has not one of a token's k largest keys, given the largest
    low bounds of groups of experts, so many for each of the ``lanes`` neighbouring threads that
    hold the token: ``below`` the k-th largest of them, by merging descending lists. Beyond
    ``groups``, those of neighbours are united.
    """
    values = descending(list(best))[:top_k]
    distance = 1
    while distance < lanes:
        others = [ptx.from_bits(bulk.shuffle_xor(ptx.bits(value), distance)) for value in values]
        if len(values) * (lanes // distance) > groups:
            values = [ptx.max_f32(a, b) for a, b in zip(values, others, strict=True)]
        elif 2 * distance < lanes:
            values = joined(values, others)[:top_k]
        else:
            return below(kth(values, others, top_k))
        distance *= 2
    return below(values[top_k - 1])


def descending(values: list[Float32]) -> list[Float32]:
    if len(values) < 2:
        return values
    half = len(values) // 2
    return joined(descending(values[:half]), descending(values[half:]))


def joined(a: Sequence[Float32], b: Sequence[Float32]) -> list[Float32]:
    """All of two descending lists, descending: a bitonic merge, None being below all."""
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
                    values[i] = ptx.max_f32(one, other)
                    values[i + step] = ptx.min_f32(one, other)
        step //= 2
    return values[: len(a) + len(b)]


def kth(a: Sequence[Float32], b: Sequence[Float32], top_k: int) -> Float32:
    """The k-th largest of two descending lists: some first ones of each are the k largest."""
    bound = None
    for i in range(max(0, top_k - len(b)), min(top_k, len(a)) + 1):
        lasts = ([a[i - 1]] if i > 0 else []) + ([b[top_k - i - 1]] if i < top_k else [])
        least = lasts[0] if len(lasts) == 1 else ptx.min_f32(*lasts)
        bound = least if bound is None else ptx.max_f32(bound, least)
    assert bound is not None
    return bound


def insert(ranks: cute.Tensor, value: Int64, top_k: int) -> None:
    """Insert into the descending list, dropping its last."""
    before = [Int64(ranks[i]) for i in range(top_k)]
    over = [bulk.above(value, rank) for rank in before]
    for i in range(top_k):
        shifted = value if i == 0 else ptx.select(over[i - 1], before[i - 1], value)
        ranks[i] = ptx.select(over[i], shifted, before[i])


def merge_lanes(best: Sequence[Int64], lanes: int) -> list[Int64]:
    """The best ranks of so many neighbouring threads, in every one of them."""
    merged_ = list(best)
    distance = 1
    while distance < lanes:
        merged_ = merged(merged_, [shuffled(rank, distance) for rank in merged_])
        distance *= 2
    return merged_


def shuffled(rank: Int64, lanes: int) -> Int64:
    high, low = bulk.halves(rank)
    return bulk.pack(bulk.shuffle_xor(high, lanes), bulk.shuffle_xor(low, lanes))


def merged(a: Sequence[Int64], b: Sequence[Int64]) -> list[Int64]:
    """The largest len(a) of two descending lists, descending: a bitonic merge."""
    size = 1
    while size < len(a):
        size *= 2
    left: list[Any] = [*a, *[None] * (size - len(a))]
    right: list[Any] = [*b, *[None] * (size - len(b))]
    values = [ordered(x, y)[0] for x, y in zip(left, reversed(right), strict=True)]
    step = size // 2
    while step > 0:
        for i in range(size):
            if i & step == 0:
                values[i], values[i + step] = ordered(values[i], values[i + step])
        step //= 2
    return values[: len(a)]


def ordered(a: Any, b: Any) -> tuple[Any, Any]:
    """(larger, smaller); None is below every rank."""
    if a is None or b is None:
        return (b, a) if a is None else (a, b)
    first = bulk.above(a, b)
    return ptx.select(first, a, b), ptx.select(first, b, a)


def logit_at(column: Int32, rows: list[Int32], part_experts: int) -> Float32:
    """The logit of an expert, from the rows of a token in the blocks that hold its parts."""
    row = rows[0]
    for part in range(1, len(rows)):
        row = ptx.select(ptx.less(column, Int32(part * part_experts)), row, rows[part])
    return bulk.load_cluster_f32(row + ptx.remainder(column, part_experts) * 4)


@cute.jit
def finish_token(
    routing: Routing,
    own_experts: list[Int32],
    own_scores: list[Float32],
    top_k: cutlass.Constexpr[int],
    rows: list[Int32],
    part_experts: cutlass.Constexpr[int],
    token: Int32,
    valid: Boolean,
    given: Int32,
    padding: Int32,
    leader: Int32,
    member: Int32,
    members: cutlass.Constexpr[int],
    experts: cutlass.Constexpr[int],
) -> None:
    """``weigh`` for a token of which ``given`` or ``padding`` are not 0 where the caller has chosen
    the experts, or nobody. ``rows`` are its logits in the blocks that hold ``part_experts`` each.
    """
    chosen_experts, chosen_scores = [], []
    for turn in cutlass.range_constexpr(-(-top_k // members)):
        expert, score = own_experts[turn], own_scores[turn]
        if given != 0:
            rank = ptx.min_s32(turn * members + member, Int32(top_k - 1))
            expert = finish.given_id(routing, token, rank, top_k, experts)
            score = scoring.score(logit_at(ptx.max_s32(expert, Int32(0)), rows, part_experts))
        if padding != 0:
            expert = Int32(-1)
        chosen_experts.append(expert)
        chosen_scores.append(ptx.select(ptx.less(expert, Int32(0)), Float32(0.0), score))
    weigh(routing, chosen_experts, chosen_scores, top_k, token, valid, leader, member, members)


@cute.jit
def weigh(
    routing: Routing,
    own_experts: list[Int32],
    own_scores: list[Float32],
    top_k: cutlass.Constexpr[int],
    token: Int32,
    valid: Boolean,
    leader: Int32,
    member: Int32,
    members: cutlass.Constexpr[int],
) -> None:
    """Weigh and store a token's experts by ``members`` lanes from ``leader`` on: member i answers
    for the ranks i, i + members, ... and brings their experts and scores.
    """
    total = Float32(0.0)
    for rank in cutlass.range_constexpr(top_k):
        score = ptx.from_bits(
            ptx.broadcast(ptx.bits(own_scores[rank // members]), leader + rank % members)
        )
        total = score if cutlass.const_expr(rank == 0) else ptx.add_rn(total, score)
    divisor = ptx.add_rn(total, scoring.constant("RENORM_EPSILON"))
    for turn in cutlass.range_constexpr(-(-top_k // members)):
        rank = turn * members + member
        share = ptx.div_rn(own_scores[turn], divisor)
        weight = ptx.mul_rn(
            ptx.select(ptx.equal(routing.renormalize, Int32(0)), own_scores[turn], share),
            routing.scale,
        )
        if ptx.both(valid, ptx.less(rank, Int32(top_k))):
            finish.store(routing, token, rank, top_k, weight, own_experts[turn])


def own_rank(values: Sequence[Int32], member: Int32) -> Int32:
    """values[member]; any of them for a member beyond."""
    own = values[-1]
    for i in reversed(range(len(values) - 1)):
        own = ptx.select(ptx.equal(member, Int32(i)), values[i], own)
    return own
