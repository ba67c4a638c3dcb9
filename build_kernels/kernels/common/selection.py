"""Selection and weights: steps 5 and 6 of the router, for one warp and one token.

Every lane holds ``len(keys)`` ordered keys as unsigned 32-bit patterns (scoring.ordered_key); the
candidates are numbered lane * len(keys) + position, so "lowest lane first, lowest position first"
is "lowest number first", the tie rule. A key of 0 is no candidate: no real key maps to it.

One round a rank, in a loop that stays a loop: measured faster than the unrolled rounds at 8 keys a
lane, and a fifth of the code.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common import ptx
from build_kernels.kernels.common.scoring import constant

#: One selected candidate in a warp's scratch.
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
    """Leave the ``count`` largest keys of the warp in its scratch, in rank order.

    A record is four words, (key, score, id, 0). Every lane may read them all afterwards.
    """
    cute.arch.sync_warp()
    left = cute.make_rmem_tensor(len(keys), Int32)
    for position in cutlass.range_constexpr(len(keys)):
        left[position] = keys[position]
    for rank in cutlass.range(count, unroll=1):
        candidates = [left[position] for position in range(len(keys))]
        best = ptx.max_of(candidates)
        # The lane's own first match: ready before the warp agrees on the maximum.
        place = Int32(len(keys) - 1)
        score, expert = scores[-1], ids[-1]
        for position in reversed(range(len(keys) - 1)):
            match = ptx.equal(candidates[position], best)
            place = ptx.select(match, Int32(position), place)
            score = ptx.select(match, scores[position], score)
            expert = ptx.select(match, ids[position], expert)
        top = ptx.redux_max_u32(best)
        at_top = ptx.equal(best, top)
        lanes = ptx.ballot(at_top)
        # Only the first match of the first lane leaves the race: an equal key is another candidate.
        wins = ptx.both(at_top, ptx.equal(lanes & ptx.lower_lanes(), Int32(0)))
        for position in cutlass.range_constexpr(len(keys)):
            taken = ptx.both(wins, ptx.equal(place, Int32(position)))
            left[position] = ptx.select(taken, Int32(0), candidates[position])
        if wins:
            ptx.store_shared_v4(scratch + rank * RECORD_BYTES, [top, score, expert, Int32(0)])
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
    """``top_of_warp`` for at most one candidate a lane: each counts those before it."""
    rank = Int32(0)
    for other in cutlass.range_constexpr(candidates):
        theirs = ptx.broadcast(key, Int32(other))
        least = ptx.select(ptx.less(Int32(other), lane), key, key + 1)
        rank = ptx.select(ptx.at_least_u32(theirs, least), rank + 1, rank)
    if lane < candidates and rank < count:
        ptx.store_shared_v4(scratch + rank * RECORD_BYTES, [key, score, expert, Int32(0)])
    cute.arch.sync_warp()


def weight(
    count: int, scratch: Int32, lane: Int32, scale: Float32, renormalize: Int32
) -> tuple[Float32, Int32]:
    """Step 6 on what ``top_of_warp`` left: (weight, id) of rank ``lane``, for ``count`` lanes."""
    total = ptx.load_shared_f32(scratch + 4)
    for rank in range(1, count):
        total = ptx.add_rn(total, ptx.load_shared_f32(scratch + (rank * RECORD_BYTES + 4)))
    _, score, expert, _ = ptx.load_shared_v4(
        scratch + ptx.min_s32(lane, Int32(count - 1)) * RECORD_BYTES
    )
    own = ptx.from_bits(score)
    share = ptx.div_rn(own, ptx.add_rn(total, constant("RENORM_EPSILON")))
    return ptx.mul_rn(ptx.select(ptx.equal(renormalize, Int32(0)), own, share), scale), expert
