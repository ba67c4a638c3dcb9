"""The end of a dense router for one warp and one token: merging groups of experts, and the stores.

Where several clusters hold a group of experts each, a cluster leaves its ``count`` candidates in
the workspace, then takes a ticket for the token; the last one merges. It may see its ticket before
the others' candidates, which are under way by then: it reads until none is missing. Candidates and
tickets are zero before and after every launch. No block waits for one that may not have started.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common import ptx, selection

LANES = 32


@cute.jit
def merge(
    tickets: Int64,
    records: Int64,
    scratch: Int32,
    token: Int32,
    group: Int32,
    groups: cutlass.Constexpr[int],
    top_k: cutlass.Constexpr[int],
    lane: Int32,
) -> Int32:
    """Leave this group's candidates, which selection.top_of_warp left in ``scratch``. Not 0 in the
    group that comes last, with the merged ones in ``scratch``.

    A record is two 64-bit words, (id, key) and (1, score): neither is ever zero, so a record that
    has arrived shows it.
    """
    count = groups * top_k
    ticket = tickets + Int64(token) * 4
    first = records + Int64(token) * (count * 16)
    if lane < top_k:
        key, score, expert, _ = ptx.load_shared_v4(scratch + lane * selection.RECORD_BYTES)
        ptx.store_record(first + Int64(group * top_k + lane) * 16, [expert, key, Int32(1), score])
    cute.arch.sync_warp()
    arrived = Int32(0)
    if lane == 0:
        arrived = ptx.atomic_add_relaxed(ticket, Int32(1))
    last = ptx.select(
        ptx.equal(ptx.broadcast(arrived, Int32(0)), Int32(groups - 1)), Int32(1), Int32(0)
    )
    if last != 0:
        # In order of group and rank: for equal keys that is the order of the ids.
        keys, scores, experts = [], [], []
        for position in cutlass.range_constexpr(-(-count // LANES)):
            number = lane * -(-count // LANES) + position
            key, score, expert = Int32(0), Int32(0), Int32(0)
            if number < count:
                address = first + Int64(number) * 16
                expert, key, valid, score = ptx.load_record(address)
                while key == 0 or valid == 0:
                    expert, key, valid, score = ptx.load_record(address)
                ptx.store_record(address, [Int32(0)] * 4)
            keys.append(key)
            scores.append(score)
            experts.append(expert)
        if lane == 0:
            ptx.store_global_b32(ticket, Int32(0))
        selection.top_of_warp(keys, scores, experts, top_k, scratch, lane)
    return last


@cute.jit
def store(
    weights_out: Int64,
    ids_out: Int64,
    scratch: Int32,
    token: Int32,
    top_k: cutlass.Constexpr[int],
    scale: Float32,
    renormalize: Int32,
    lane: Int32,
) -> None:
    """Store weights and ids of what selection.top_of_warp left in ``scratch``."""
    weight, expert = selection.weight(top_k, scratch, lane, scale, renormalize)
    if lane < top_k:
        place = (Int64(token) * top_k + lane) * 4
        ptx.store_global_b32(weights_out + place, ptx.bits(weight))
        ptx.store_global_b32(ids_out + place, expert)
