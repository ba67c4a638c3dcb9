"""The end of a dense router: selection, merging groups of experts, serving inputs, the stores.

``route_all`` and ``route`` do all of it for a warp. A plain call passes one test more than it would
without serving inputs; what they need stands behind that test.

Where several clusters hold a group of experts each, a cluster leaves its ``top_k`` candidates in
the workspace, then takes a ticket for the token; the last one merges. It may see its ticket before
the others' candidates, which are under way by then: it reads until none is missing. Candidates and
tickets are zero before and after every launch. No block waits for one that may not have started.

An expert of -1 is none: the sentinel is stored for it, with weight 0. A padding token is a token
that has only such experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_ptr

from build_kernels.kernels.common import ptx, scoring, selection
from build_kernels.kernels.common.parameters import ROUTING, Routing

LANES = 32

#: Lowest key that scoring.ordered_key gives: that of -inf.
_LOWEST_KEY = 0x007FFFFF

_ELEMENTS = {"bf16": BFloat16, "f32": Float32, "i32": Int32, "i64": Int64, "u8": Uint8}
_ELEMENTS["u32"] = Int32
_ALIGNMENTS = {"bf16": 16, "u8": 1, "i64": 8, "u32": 16}


@dataclass(frozen=True)
class Division:
    """How a router's experts are divided: ``groups`` of ``group_experts``, the last one padded."""

    groups: int
    group_experts: int
    experts: int
    top_k: int
    ticket_bytes: int

    @property
    def lane_keys(self) -> int:
        return -(-self.group_experts // LANES)


def placeholder(kind: str) -> object:
    """An argument of that contract type to compile with."""
    _, pointer, element = kind.partition("ptr:")
    if not pointer:
        return _ELEMENTS[kind](1)
    alignment = _ALIGNMENTS.get(element, 4)
    return make_ptr(_ELEMENTS[element], 0, cute.AddressSpace.gmem, assumed_align=alignment)


def arguments(*kinds: str) -> tuple[object, ...]:
    """What to compile a dense kernel with: arguments of those types, then the routing's."""
    routing = Routing(*(placeholder(parameter.type) for parameter in ROUTING))
    return (*(placeholder(kind) for kind in kinds), routing)


@cute.jit
def route_all(
    routing: Routing,
    workspace: Int64,
    slots: tuple[Int32, Int32, int],
    locate: cutlass.Constexpr[Callable[[Int32], tuple[Int32, Int32, Int32]]],
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
    leave: cutlass.Constexpr[Callable[[], None] | None] = None,
) -> None:
    """Route one token a slot by a warp, in the range that ``slots`` is; then ``leave``, and end.

    ``locate`` gives a slot's (row, scratch, token), as ``route`` takes them. A plain call ends
    before the code of serving: a jump over that would wait for instructions from L2.
    """
    first, stop, step = slots
    if routing.serving == 0:
        for slot in range(first, stop, step):
            row, scratch, token = locate(slot)
            _route(routing, workspace, row, scratch, token, group, division, lane)
        if cutlass.const_expr(leave is not None):
            leave()
        ptx.exit_thread()
    else:
        for slot in range(first, stop, step):
            row, scratch, token = locate(slot)
            serve(routing, workspace, row, scratch, token, group, division, lane)
        if cutlass.const_expr(leave is not None):
            leave()


@cute.jit
def route(
    routing: Routing,
    workspace: Int64,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """Route one token by a warp, from the (key, score) pairs of a group of experts.

    ``row`` is the shared address of the pairs: that of column c is number c % lane_keys * 32 +
    c / lane_keys; a column that is no expert has key 0. ``scratch`` has a record a rank.
    """
    if routing.serving == 0:
        _route(routing, workspace, row, scratch, token, group, division, lane)
    else:
        serve(routing, workspace, row, scratch, token, group, division, lane)


@cute.jit
def _route(
    routing: Routing,
    workspace: Int64,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """``route`` without serving inputs."""
    select(row, scratch, group, division, lane)
    last = merge(workspace, scratch, token, group, division, lane)
    if last != 0:
        weight, expert = selection.weight(
            division.top_k, scratch, lane, routing.scale, routing.renormalize
        )
        if lane < division.top_k:
            _store_plain(routing, Int64(token) * division.top_k + lane, weight, expert)


@cute.jit
def select(
    row: Int32,
    scratch: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """Leave the group's candidates in ``scratch``, in rank order."""
    lane_keys = division.lane_keys
    pairs = [
        ptx.load_shared_v2(row + (position * LANES + lane) * 8) for position in range(lane_keys)
    ]
    first = group * division.group_experts + lane * lane_keys
    selection.top_of_warp(
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        [first + position for position in range(lane_keys)],
        division.top_k,
        scratch,
        lane,
    )


@cute.jit
def serve(
    routing: Routing,
    workspace: Int64,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """``route`` with serving inputs."""
    last = Int32(0)
    if is_padding(routing, token) != 0:
        # Every group knows; one stores, and nobody takes a ticket.
        if lane < division.top_k:
            ptx.store_shared_v4(
                scratch + lane * selection.RECORD_BYTES, [Int32(0), Int32(0), Int32(-1), Int32(0)]
            )
        cute.arch.sync_warp()
        last = ptx.select(ptx.equal(group, Int32(0)), Int32(1), Int32(0))
    else:
        if replays(routing) != 0:
            take_given(routing, row, scratch, token, group, division, lane)
        else:
            if is_image(routing, token) != 0:
                use_image_bias(routing, row, group, division, lane)
            select(row, scratch, group, division, lane)
        last = merge(workspace, scratch, token, group, division, lane)
    if last != 0:
        weight, expert = selection.weight(
            division.top_k, scratch, lane, routing.scale, routing.renormalize
        )
        if lane < division.top_k:
            _store_served(routing, token, lane, division.top_k, weight, expert)


# --- serving inputs -------------------------------------------------------------------------------


@cute.jit
def is_padding(routing: Routing, token: Int32) -> Int32:
    """Not 0 for a padding token."""
    padding = Int32(0)
    if routing.is_padding.toint() != 0:
        padding = ptx.load_global_u8(routing.is_padding.toint() + Int64(token))
    if routing.num_valid_tokens.toint() != 0:
        valid = ptx.load_global_b32(routing.num_valid_tokens.toint())
        if routing.first_row + token >= valid:
            padding = Int32(1)
    return padding


@cute.jit
def is_image(routing: Routing, token: Int32) -> Int32:
    """Not 0 for an image token."""
    image = Int32(0)
    if routing.image_mask.toint() != 0:
        image = ptx.load_global_u8(routing.image_mask.toint() + Int64(token))
    return image


@cute.jit
def replays(routing: Routing) -> Int32:
    """Not 0 if the experts are given."""
    replay = Int32(0)
    if routing.given_ids_i32.toint() != 0:
        replay = Int32(1)
    if routing.given_ids_i64.toint() != 0:
        replay = Int32(1)
    return replay


@cute.jit
def given_id(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    experts: cutlass.Constexpr[int],
) -> Int32:
    """The given expert of that rank; -1 for one outside [0, experts)."""
    place = Int64(token) * top_k + rank
    expert = Int32(-1)
    if routing.given_ids_i64.toint() != 0:
        wide = ptx.load_global_b64(routing.given_ids_i64.toint() + place * 8)
        if wide >= 0 and wide < experts:
            expert = Int32(wide)
    else:
        narrow = ptx.load_global_b32(routing.given_ids_i32.toint() + place * 4)
        if narrow >= 0 and narrow < experts:
            expert = narrow
    return expert


@cute.jit
def take_given(
    routing: Routing,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """Leave the given experts in ``scratch`` as if they had been selected in that order.

    A group answers for its own experts, by keys that rank them; the others get the lowest key. The
    first group answers for those that do not exist.
    """
    if lane < division.top_k:
        expert = given_id(routing, token, lane, division.top_k, division.experts)
        column = expert - group * division.group_experts
        key, score = Int32(1), Int32(0)
        rank_key = division.top_k + 1 - lane
        if expert < 0:
            if group == 0:
                key = rank_key
        elif column >= 0 and column < division.group_experts:
            key = rank_key
            pair = ptx.remainder(column, division.lane_keys) * LANES
            pair = pair + ptx.quotient(column, division.lane_keys)
            score = ptx.load_shared_v2(row + pair * 8)[1]
        ptx.store_shared_v4(scratch + lane * selection.RECORD_BYTES, [key, score, expert, Int32(0)])
    cute.arch.sync_warp()


@cute.jit
def use_image_bias(
    routing: Routing,
    row: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> None:
    """Form the keys of a row anew, with the other bias. The key of -inf stays: a NaN logit's."""
    for position in cutlass.range_constexpr(division.lane_keys):
        place = row + (position * LANES + lane) * 8
        key, score = ptx.load_shared_v2(place)
        if key != 0 and key != _LOWEST_KEY:
            expert = group * division.group_experts + lane * division.lane_keys + position
            bias = ptx.load_global_f32(routing.image_bias.toint() + Int64(expert) * 4)
            number = ptx.from_bits(score)
            ptx.store_shared_b32(place, scoring.ordered_key(number, number, bias))
    cute.arch.sync_warp()


@cute.jit
def store(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    weight: Float32,
    expert: Int32,
) -> None:
    """Store weight and id of one rank, for a kernel that does not end with ``route``."""
    if routing.serving == 0:
        _store_plain(routing, Int64(token) * top_k + rank, weight, expert)
    else:
        _store_served(routing, token, rank, top_k, weight, expert)


def _store_plain(routing: Routing, place: Int64, weight: Float32, expert: Int32) -> None:
    ptx.store_global_b32(routing.weights_out.toint() + place * 4, ptx.bits(weight))
    ptx.store_global_b32(routing.ids_out.toint() + place * 4, expert)


@cute.jit
def _store_served(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    weight: Float32,
    expert: Int32,
) -> None:
    """Expert -1 becomes the sentinel, others go by the map."""
    place = Int64(token) * top_k + rank
    logical = ptx.select(ptx.less(expert, Int32(0)), routing.sentinel, expert)
    physical = logical
    if routing.expert_map.toint() != 0 and expert >= 0:
        # Clamped, so that no content of the map can lead outside it.
        count = ptx.load_global_b32(routing.replica_counts.toint() + Int64(expert) * 4)
        count = ptx.max_s32(ptx.min_s32(count, routing.replicas), Int32(1))
        replica = ptx.modulo(routing.first_row + token, count)
        entry = Int64(expert) * Int64(routing.replicas) + Int64(replica)
        physical = ptx.load_global_b32(routing.expert_map.toint() + entry * 4)
    ptx.store_global_b32(routing.weights_out.toint() + place * 4, ptx.bits(weight))
    _put_id(routing.ids_out.toint(), routing.ids_out_i64.toint(), place, physical)
    _put_id(routing.logical_ids_out.toint(), routing.logical_ids_out_i64.toint(), place, logical)


@cute.jit
def _put_id(narrow: Int64, wide: Int64, place: Int64, expert: Int32) -> None:
    if wide != 0:
        ptx.store_global_b64(wide + place * 8, Int64(expert))
    elif narrow != 0:
        ptx.store_global_b32(narrow + place * 4, expert)


# --- groups of experts ----------------------------------------------------------------------------


@cute.jit
def merge(
    workspace: Int64,
    scratch: Int32,
    token: Int32,
    group: Int32,
    division: cutlass.Constexpr[Division],
    lane: Int32,
) -> Int32:
    """Leave this group's candidates. Not 0 in the group that comes last, with the merged ones in
    ``scratch``; at once where there is one group.

    A record is two 64-bit words, (id, key) and (1, score): neither is ever zero, so a record that
    has arrived shows it.
    """
    groups, top_k = division.groups, division.top_k
    last = Int32(1)
    if cutlass.const_expr(groups > 1):
        count = groups * top_k
        ticket = workspace + Int64(token) * 4
        first = workspace + division.ticket_bytes + Int64(token) * (count * 16)
        if lane < top_k:
            key, score, expert, _ = ptx.load_shared_v4(scratch + lane * selection.RECORD_BYTES)
            ptx.store_record(
                first + Int64(group * top_k + lane) * 16, [expert, key, Int32(1), score]
            )
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
            if cutlass.const_expr(count <= LANES):
                selection.rank_of_warp(keys[0], scores[0], experts[0], count, top_k, scratch, lane)
            else:
                selection.top_of_warp(keys, scores, experts, top_k, scratch, lane)
    return last
