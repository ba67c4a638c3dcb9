"""Selection and weights: steps 5 and 6 of the router, for one warp and one token.

Every lane holds ``len(keys)`` ordered keys as unsigned 32-bit patterns (scoring.ordered_key). The
candidates are numbered lane * len(keys) + position, so "lowest lane first, lowest position first"
is "lowest number first", the tie rule. Key 0 means no candidate: no real key maps to it.

Selection takes one round per rank, in a loop that is not unrolled: measured faster than unrolled
rounds at 8 keys per lane, and a fifth of the code.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, memory, warp_ops
from build_kernels.kernels.common.scoring import constant

#: Bytes of one selected candidate in a warp's scratch.
RECORD_BYTES = 16


@cute.jit
def top_of_warp(
    keys: list[Int32],
    scores: list[Int32],
    ids: list[Int32],
    count: cutlass.Constexpr[int],
    scratch: Int32,
    lane: Int32,
) -> None:
    """Store the ``count`` largest keys of the warp in its scratch, in rank order.

    A whole warp calls this. A record is four words, (key, score, id, 0). Every lane may read all of
    them afterwards.
    """
    cute.arch.sync_warp()
    left = cute.make_rmem_tensor(len(keys), Int32)
    for position in cutlass.range_constexpr(len(keys)):
        left[position] = keys[position]
    for rank in cutlass.range(count, unroll=1):
        candidates = [left[position] for position in range(len(keys))]
        best = arith.max_of(candidates)
        # The lane's own first match: ready before the warp agrees on the maximum.
        place = Int32(len(keys) - 1)
        score, expert = scores[-1], ids[-1]
        for position in reversed(range(len(keys) - 1)):
            match = arith.equal(candidates[position], best)
            place = arith.select(match, Int32(position), place)
            score = arith.select(match, scores[position], score)
            expert = arith.select(match, ids[position], expert)
        top = warp_ops.redux_max_u32(best)
        at_top = arith.equal(best, top)
        lanes = warp_ops.ballot(at_top)
        # Only the first match of the first lane is taken: an equal key is another candidate.
        wins = arith.both(at_top, arith.equal(lanes & warp_ops.lower_lanes(), Int32(0)))
        for position in cutlass.range_constexpr(len(keys)):
            taken = arith.both(wins, arith.equal(place, Int32(position)))
            left[position] = arith.select(taken, Int32(0), candidates[position])
        if wins:
            memory.store_shared_v4(scratch + rank * RECORD_BYTES, [top, score, expert, Int32(0)])
    cute.arch.sync_warp()


@cute.jit
def rank_of_warp(
    key: Int32,
    score: Int32,
    expert: Int32,
    candidates: cutlass.Constexpr[int],
    count: cutlass.Constexpr[int],
    scratch: Int32,
    lane: Int32,
) -> None:
    """Do what ``top_of_warp`` does, for at most one candidate per lane.

    Each lane counts the candidates before its own.
    """
    rank = Int32(0)
    for other in cutlass.range_constexpr(candidates):
        theirs = warp_ops.broadcast(key, Int32(other))
        least = arith.select(arith.less(Int32(other), lane), key, key + 1)
        rank = arith.select(arith.at_least_u32(theirs, least), rank + 1, rank)
    if lane < candidates and rank < count:
        memory.store_shared_v4(scratch + rank * RECORD_BYTES, [key, score, expert, Int32(0)])
    cute.arch.sync_warp()


def weight(
    count: int, scratch: Int32, lane: Int32, scale: Float32, renormalize: Int32
) -> tuple[Float32, Int32]:
    """Return (weight, id) of rank ``lane``, for lanes below ``count``: step 6, from the records."""
    total = memory.load_shared_f32(scratch + 4)
    for rank in range(1, count):
        total = arith.add_rn(total, memory.load_shared_f32(scratch + (rank * RECORD_BYTES + 4)))
    _, score, expert, _ = memory.load_shared_v4(
        scratch + arith.min_s32(lane, Int32(count - 1)) * RECORD_BYTES
    )
    own = arith.from_bits(score)
    share = arith.div_rn(own, arith.add_rn(total, constant("RENORM_EPSILON")))
    return arith.mul_rn(arith.select(arith.equal(renormalize, Int32(0)), own, share), scale), expert
