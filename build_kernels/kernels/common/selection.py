"""Selection and weights: steps 5 and 6 of the router, for one warp and one token.

Every lane holds ``len(keys)`` ordered keys as unsigned 32-bit patterns (scoring.ordered_key); the
candidates are numbered lane * len(keys) + position, so "lowest lane first, lowest position first" is
"lowest number first", which is the tie rule. A key of 0 is no candidate: no real key maps to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32

from build_kernels.kernels.common import ptx
from build_kernels.kernels.common.scoring import constant


def top_of_warp(
    keys: Sequence[Int32], payloads: Sequence[Sequence[Int32]], count: int, lane: Int32
) -> list[list[Int32]]:
    """The ``count`` largest keys of a warp in rank order.

    ``payloads[i][position]`` travels with ``keys[position]``. Returns, for each rank, the key and its
    payloads; every lane holds the same values.
    """
    left = list(keys)
    rounds: list[tuple[Int32, Int32, list[Int32]]] = []
    for _ in range(count):
        best = ptx.max_of(left)
        # The lane's own first match: ready before the warp agrees on the maximum.
        matches = [ptx.equal(key, best) for key in left]
        place = Int32(len(left) - 1)
        carried = [payload[-1] for payload in payloads]
        for position in reversed(range(len(left) - 1)):
            place = ptx.select(matches[position], Int32(position), place)
            carried = [
                ptx.select(matches[position], payload[position], chosen)
                for payload, chosen in zip(payloads, carried, strict=True)
            ]
        top = ptx.redux_max_u32(best)
        at_top = ptx.equal(best, top)
        lanes = ptx.ballot(at_top)
        # Only the first match of the first lane leaves the race: an equal key is another candidate.
        wins = ptx.both(at_top, ptx.equal(lanes & ptx.lower_lanes(), Int32(0)))
        for position in range(len(left)):
            taken = ptx.both(wins, ptx.equal(place, Int32(position)))
            left[position] = ptx.select(taken, Int32(0), left[position])
        rounds.append((top, lanes, carried))
    # The winners speak only now: a shuffle between the rounds would make each wait for it.
    ranks = []
    for top, lanes, carried in rounds:
        winner = ptx.lowest_lane(lanes)
        ranks.append([top, *(ptx.broadcast(value, winner) for value in carried)])
    return ranks


def own_rank(ranks: Sequence[Int32], lane: Int32) -> Int32:
    """ranks[lane], for lanes below len(ranks)."""
    own = ranks[-1]
    for rank in reversed(range(len(ranks) - 1)):
        own = ptx.select(ptx.equal(lane, Int32(rank)), ranks[rank], own)
    return own


def weight(scores: Sequence[Float32], own: Float32, scale: Float32, renormalize: Int32) -> Float32:
    """The weight of the score ``own`` among the scores of a token in rank order (step 6)."""
    total = scores[0]
    for score in scores[1:]:
        total = ptx.add_rn(total, score)
    share = ptx.div_rn(own, ptx.add_rn(total, constant("RENORM_EPSILON")))
    return ptx.mul_rn(ptx.select(ptx.equal(renormalize, Int32(0)), own, share), scale)
