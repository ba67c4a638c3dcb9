"""Ranking candidates, and weights of the ranks, for the forms that screen.

A rank is a 64-bit number, (ordered key, ~expert): the larger one is selected first, so equal keys
go to the lower id. Several neighbouring lanes, the members, rank one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from build_kernels.kernels.common import epilogue
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, memory, warp_ops
from build_kernels.kernels.common.scoring import Scoring, constant


def insert(ranks: cute.Tensor, value: Int64, top_k: int) -> None:
    """Insert into the descending list, and drop its last."""
    before = [Int64(ranks[i]) for i in range(top_k)]
    over = [arith.above(value, rank) for rank in before]
    for i in range(top_k):
        shifted = value if i == 0 else arith.select(over[i - 1], before[i - 1], value)
        ranks[i] = arith.select(over[i], shifted, before[i])


def merge_lanes(best: Sequence[Int64], lanes: int) -> list[Int64]:
    """Return the best ranks of ``lanes`` neighbouring threads, in each of them."""
    merged_ = list(best)
    distance = 1
    while distance < lanes:
        merged_ = merged(merged_, [shuffled(rank, distance) for rank in merged_])
        distance *= 2
    return merged_


def shuffled(rank: Int64, lanes: int) -> Int64:
    """Return the rank of the lane whose number differs by ``lanes``, an exclusive or."""
    high, low = arith.halves(rank)
    return arith.pack(warp_ops.shuffle_xor(high, lanes), warp_ops.shuffle_xor(low, lanes))


def merged(a: Sequence[Int64], b: Sequence[Int64]) -> list[Int64]:
    """Return the largest len(a) of two descending lists, descending: a bitonic merge."""
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
    """Return (larger, smaller); None is below every rank."""
    if a is None or b is None:
        return (b, a) if a is None else (a, b)
    first = arith.above(a, b)
    return arith.select(first, a, b), arith.select(first, b, a)


def logit_at(column: Int32, rows: list[Int32], cta_experts: int) -> Float32:
    """Return the logit of an expert. ``rows`` are a token's rows in the CTAs that hold its logits,
    ``cta_experts`` each."""
    row = rows[0]
    for e_rank in range(1, len(rows)):
        row = arith.select(arith.less(column, Int32(e_rank * cta_experts)), row, rows[e_rank])
    return memory.load_cluster_f32(row + arith.remainder(column, cta_experts) * 4)


@cute.jit
def weigh_or_replay(
    routing: Routing,
    own_experts: list[Int32],
    own_scores: list[Float32],
    top_k: cutlass.Constexpr[int],
    rows: list[Int32],
    cta_experts: cutlass.Constexpr[int],
    token: Int32,
    valid: Boolean,
    given: Int32,
    padding: Int32,
    leader: Int32,
    member: Int32,
    members: cutlass.Constexpr[int],
    experts: cutlass.Constexpr[int],
    rule: cutlass.Constexpr[Scoring],
) -> None:
    """Do what ``weigh`` does, for a token that may be replayed or padding.

    ``given`` is not 0 if the caller has given the experts, ``padding`` if the token has none.
    ``rows`` and ``cta_experts`` are those of ``logit_at``; ``rule`` is how the entry scores.
    """
    chosen_experts, chosen_scores = [], []
    for turn in cutlass.range_constexpr(-(-top_k // members)):
        expert, score = own_experts[turn], own_scores[turn]
        if given != 0:
            rank = arith.min_s32(turn * members + member, Int32(top_k - 1))
            expert = epilogue.given_id(routing, token, rank, top_k, experts)
            score = rule.score(logit_at(arith.max_s32(expert, Int32(0)), rows, cta_experts))
        if padding != 0:
            expert = Int32(-1)
        chosen_experts.append(expert)
        chosen_scores.append(arith.select(arith.less(expert, Int32(0)), Float32(0.0), score))
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
    """Compute and store weights and ids of a token: step 6.

    ``members`` lanes from lane ``leader`` on call this. Member i has the experts and scores of the
    ranks i, i + members, ...; nothing is stored unless ``valid``.
    """
    total = Float32(0.0)
    for rank in cutlass.range_constexpr(top_k):
        score = arith.from_bits(
            warp_ops.broadcast(arith.bits(own_scores[rank // members]), leader + rank % members)
        )
        total = score if cutlass.const_expr(rank == 0) else arith.add_rn(total, score)
    divisor = arith.add_rn(total, constant("RENORM_EPSILON"))
    for turn in cutlass.range_constexpr(-(-top_k // members)):
        rank = turn * members + member
        share = arith.div_rn(own_scores[turn], divisor)
        weight = arith.mul_rn(
            arith.select(arith.equal(routing.renormalize, Int32(0)), own_scores[turn], share),
            routing.scale,
        )
        if arith.both(valid, arith.less(rank, Int32(top_k))):
            epilogue.store(routing, token, rank, top_k, weight, own_experts[turn])


def own_rank(values: Sequence[Int32], member: Int32) -> Int32:
    """Return values[member], or any of them for a member beyond their end."""
    own = values[-1]
    for i in reversed(range(len(values) - 1)):
        own = arith.select(arith.equal(member, Int32(i)), values[i], own)
    return own
