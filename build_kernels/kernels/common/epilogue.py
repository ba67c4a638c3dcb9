"""The epilogue of a dense router: selection, merging groups of experts, serving inputs, stores.

``route_all`` does all of it with one warp per token: steps 5 to 7 of the router. A plain call costs
one test of ``routing.serving``; all that serving inputs need is behind that test. Forms that rank
tokens in another way use ``store`` and the functions for serving inputs alone.

If several clusters hold a group of experts each, a cluster writes its ``top_k`` candidates of a
token to the workspace, then takes a ticket for the token: an atomic counter. The cluster that takes
the last ticket merges. The other clusters have stored their candidates before they took their
tickets, but a store may become visible after the ticket, so the merging cluster reads a candidate
again until it is there. It waits only for stores that are under way, never for a CTA that may not
have started. Candidates and tickets are zero before and after every launch.

Expert -1 means no expert: the sentinel is stored for it, with weight 0. A padding token has only
such experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common import scoring, selection
from build_kernels.kernels.common.parameters import WITH_OPTIONS, Routing
from build_kernels.kernels.common.ptx import arith, memory, warp_ops

LANES = 32

#: The smallest key that scoring.ordered_key returns: that of -inf.
_LOWEST_KEY = 0x007FFFFF


@dataclass(frozen=True)
class ExpertGroups:
    """How experts are divided among clusters: ``groups`` of ``group_experts``, the last one padded.

    ``ticket_bytes``: bytes of the workspace before the candidates.
    """

    groups: int
    group_experts: int
    experts: int
    top_k: int
    ticket_bytes: int

    @classmethod
    def of(cls, geometry: Any) -> ExpertGroups:
        """Return the division that a geometry with these attributes has."""
        return cls(**{field.name: getattr(geometry, field.name) for field in fields(cls)})

    @property
    def lane_keys(self) -> int:
        """Keys of one token and group that each lane of a warp holds."""
        return -(-self.group_experts // LANES)


@cute.jit
def route_all(
    routing: Routing,
    workspace: Int64,
    slots: tuple[Int32, Int32, int],
    locate: cutlass.Constexpr[Callable[[Int32], tuple[Int32, Int32, Int32]]],
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
    at_end: cutlass.Constexpr[Callable[[], None] | None] = None,
) -> None:
    """Route the tokens of a warp's slots, then call ``at_end``. Whole warps call this.

    Args:
        routing: The parameters that all dense kernels share.
        workspace: Global address of tickets and candidates; not read with one group.
        slots: Range (first, stop, step) of the warp's slots.
        locate: Returns the (row, scratch, token) of a slot. ``row`` is the shared address of the
            (key, score) pairs of the token's experts in this group: the pair of column c is number
            (c % lane_keys) * 32 + c // lane_keys, so that a lane reads ``lane_keys`` neighbouring
            experts without bank conflicts; a column without an expert has key 0. ``scratch``
            has one 16-byte record per rank, for this warp alone.
        group: The group of experts of this cluster.
        expert_groups: How the experts are divided.
        lane: Lane of this thread.
        at_end: Called by every thread before it ends.

    A plain call ends its threads before the code of serving inputs. To jump over that code would
    cost an instruction fetch from L2, because what follows it is not in the instruction cache.

    """
    first, stop, step = slots
    if routing.serving == 0:
        for slot in range(first, stop, step):
            row, scratch, token = locate(slot)
            _route(routing, workspace, row, scratch, token, group, expert_groups, lane)
        if cutlass.const_expr(at_end is not None):
            at_end()
        warp_ops.exit_thread()
    else:
        for slot in range(first, stop, step):
            row, scratch, token = locate(slot)
            serve(routing, workspace, row, scratch, token, group, expert_groups, lane)
        if cutlass.const_expr(at_end is not None):
            at_end()


@cute.jit
def _route(
    routing: Routing,
    workspace: Int64,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> None:
    """Route one token without serving inputs."""
    select(row, scratch, group, expert_groups, lane)
    last = merge(workspace, scratch, token, group, expert_groups, lane)
    if last != 0:
        weight, expert = selection.weight(
            expert_groups.top_k, scratch, lane, routing.scale, routing.renormalize
        )
        if lane < expert_groups.top_k:
            _store_plain(routing, Int64(token) * expert_groups.top_k + lane, weight, expert)


@cute.jit
def select(
    row: Int32,
    scratch: Int32,
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> None:
    """Store the group's candidates in ``scratch``, in rank order."""
    lane_keys = expert_groups.lane_keys
    pairs = [
        memory.load_shared_v2(row + (position * LANES + lane) * 8) for position in range(lane_keys)
    ]
    first = group * expert_groups.group_experts + lane * lane_keys
    selection.top_of_warp(
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        [first + position for position in range(lane_keys)],
        expert_groups.top_k,
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
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> None:
    """Route one token with serving inputs."""
    last = Int32(0)
    if is_padding(routing, token) != 0:
        # Every group sees that; the first one stores, and none takes a ticket.
        if lane < expert_groups.top_k:
            memory.store_shared_v4(
                scratch + lane * selection.RECORD_BYTES, [Int32(0), Int32(0), Int32(-1), Int32(0)]
            )
        cute.arch.sync_warp()
        last = arith.select(arith.equal(group, Int32(0)), Int32(1), Int32(0))
    else:
        if is_given(routing, token) != 0:
            replay_given(routing, row, scratch, token, group, expert_groups, lane)
        else:
            if is_image(routing, token) != 0:
                use_image_bias(routing, row, group, expert_groups, lane)
            select(row, scratch, group, expert_groups, lane)
        last = merge(workspace, scratch, token, group, expert_groups, lane)
    if last != 0:
        weight, expert = selection.weight(
            expert_groups.top_k, scratch, lane, routing.scale, routing.renormalize
        )
        if lane < expert_groups.top_k:
            _store_served(routing, token, lane, expert_groups.top_k, weight, expert)


# --- serving inputs -------------------------------------------------------------------------------


@cute.jit
def is_padding(routing: Routing, token: Int32) -> Int32:
    """Return a number other than 0 for a padding token, else 0."""
    padding = Int32(0)
    if routing.is_padding.toint() != 0:
        padding = memory.load_global_u8(routing.is_padding.toint() + Int64(token))
    if routing.num_valid_tokens.toint() != 0:
        valid = memory.load_global_b32(routing.num_valid_tokens.toint())
        if routing.first_row + token >= valid:
            padding = Int32(1)
    return padding


@cute.jit
def is_image(routing: Routing, token: Int32) -> Int32:
    """Return a number other than 0 for an image token."""
    image = Int32(0)
    if routing.image_mask.toint() != 0:
        image = memory.load_global_u8(routing.image_mask.toint() + Int64(token))
    return image


@cute.jit
def is_given(routing: Routing, token: Int32) -> Int32:
    """Return a number other than 0 for a token whose experts are not selected: the caller gives
    them, or the table does, which it does for every token that is no image.
    """
    given = is_given_by_caller(routing, token)
    if given == 0 and routing.table.toint() != 0:
        text = arith.equal(is_image(routing, token), Int32(0))
        given = arith.select(text, Int32(1), Int32(0))
    return given


@cute.jit
def is_given_by_caller(routing: Routing, token: Int32) -> Int32:
    """Return a number other than 0 for a token whose experts the caller gives."""
    given = Int32(0)
    if routing.given_ids_i32.toint() != 0:
        given = Int32(1)
    if routing.given_ids_i64.toint() != 0:
        given = Int32(1)
    if given != 0 and routing.given_mask.toint() != 0:
        given = memory.load_global_u8(routing.given_mask.toint() + Int64(token))
    return given


@cute.jit
def given_id(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    experts: cutlass.Constexpr[int],
) -> Int32:
    """Return the given expert of that rank; -1 for one outside [0, experts).

    ``is_given`` is not 0 for the token.
    """
    place = Int64(token) * top_k + rank
    narrow_ids = routing.given_ids_i32.toint()
    by_caller, found = Int32(1), Int32(1)
    if routing.table.toint() != 0:
        by_caller = is_given_by_caller(routing, token)
    if by_caller == 0:
        row = token_id(routing, token)
        place = row * top_k + rank
        narrow_ids = routing.table.toint()
        found = arith.select(arith.less(row, Int64(0)), Int32(0), Int32(1))
    expert = Int32(-1)
    if found != 0:
        if narrow_ids != 0:
            narrow = memory.load_global_b32(narrow_ids + place * 4)
            if narrow >= 0 and narrow < experts:
                expert = narrow
        else:
            wide = memory.load_global_b64(routing.given_ids_i64.toint() + place * 8)
            if wide >= 0 and wide < experts:
                expert = Int32(wide)
    return expert


@cute.jit
def token_id(routing: Routing, token: Int32) -> Int64:
    """Return the row of the table for a token; -1 if its id is outside [0, vocab)."""
    row = Int64(-1)
    if routing.token_ids_i64.toint() != 0:
        row = memory.load_global_b64(routing.token_ids_i64.toint() + Int64(token) * 8)
    else:
        row = Int64(memory.load_global_b32(routing.token_ids_i32.toint() + Int64(token) * 4))
    if row < 0 or row >= Int64(routing.vocab):
        row = Int64(-1)
    return row


@cute.jit
def replay_given(
    routing: Routing,
    row: Int32,
    scratch: Int32,
    token: Int32,
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> None:
    """Store the given experts in ``scratch`` as if they had been selected in that order.

    Keys are ranks here, not scores: a group gives its own experts keys that fall with their rank,
    and the experts of other groups the key 1, which is below all of those. An expert that does
    not exist (-1) belongs to the first group.
    """
    if lane < expert_groups.top_k:
        expert = given_id(routing, token, lane, expert_groups.top_k, expert_groups.experts)
        column = expert - group * expert_groups.group_experts
        key, score = Int32(1), Int32(0)
        rank_key = expert_groups.top_k + 1 - lane
        if expert < 0:
            if group == 0:
                key = rank_key
        elif column >= 0 and column < expert_groups.group_experts:
            key = rank_key
            pair = arith.remainder(column, expert_groups.lane_keys) * LANES
            pair = pair + arith.quotient(column, expert_groups.lane_keys)
            score = memory.load_shared_v2(row + pair * 8)[1]
        memory.store_shared_v4(
            scratch + lane * selection.RECORD_BYTES, [key, score, expert, Int32(0)]
        )
    cute.arch.sync_warp()


@cute.jit
def use_image_bias(
    routing: Routing,
    row: Int32,
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> None:
    """Compute the keys of a row again with the image bias. The key of a NaN logit stays."""
    for position in cutlass.range_constexpr(expert_groups.lane_keys):
        place = row + (position * LANES + lane) * 8
        key, score = memory.load_shared_v2(place)
        if key != 0 and key != _LOWEST_KEY:
            expert = group * expert_groups.group_experts + lane * expert_groups.lane_keys + position
            bias = memory.load_global_f32(routing.image_bias.toint() + Int64(expert) * 4)
            number = arith.from_bits(score)
            memory.store_shared_b32(place, scoring.ordered_key(number, number, bias))
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
    """Store weight and id of one rank of a token, for a form that does not use ``route_all``."""
    if routing.serving == 0:
        _store_plain(routing, Int64(token) * top_k + rank, weight, expert)
    else:
        _store_served(routing, token, rank, top_k, weight, expert)


def _store_plain(routing: Routing, place: Int64, weight: Float32, expert: Int32) -> None:
    memory.store_global_b32(routing.weights_out.toint() + place * 4, arith.bits(weight))
    memory.store_global_b32(routing.ids_out.toint() + place * 4, expert)


@cute.jit
def _store_served(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    weight: Float32,
    expert: Int32,
) -> None:
    """Store with serving inputs: the sentinel for expert -1, physical ids by the map."""
    place = Int64(token) * top_k + rank
    logical = arith.select(arith.less(expert, Int32(0)), routing.sentinel, expert)
    physical = logical
    if routing.expert_map.toint() != 0 and expert >= 0:
        # The count is clamped, so that no content of replica_counts leads outside the map.
        count = memory.load_global_b32(routing.replica_counts.toint() + Int64(expert) * 4)
        count = arith.max_s32(arith.min_s32(count, routing.replicas), Int32(1))
        row = routing.first_row + token
        replica = arith.modulo(routing.replica_start + routing.replica_step * row, count)
        entry = Int64(expert) * Int64(routing.replicas) + Int64(replica)
        physical = memory.load_global_b32(routing.expert_map.toint() + entry * 4)
    _put_id(routing.logical_ids_out.toint(), routing.logical_ids_out_i64.toint(), place, logical)
    if routing.serving != WITH_OPTIONS:
        memory.store_global_b32(routing.weights_out.toint() + place * 4, arith.bits(weight))
        _put_id(routing.ids_out.toint(), routing.ids_out_i64.toint(), place, physical)
    else:
        _store_with_options(routing, token, rank, top_k, weight, expert, logical, physical)


@cute.jit
def _put_id(narrow: Int64, wide: Int64, place: Int64, expert: Int32) -> None:
    if wide != 0:
        memory.store_global_b64(wide + place * 8, Int64(expert))
    elif narrow != 0:
        memory.store_global_b32(narrow + place * 4, expert)


# --- options --------------------------------------------------------------------------------------


@cute.jit
def _store_with_options(
    routing: Routing,
    token: Int32,
    rank: Int32,
    top_k: cutlass.Constexpr[int],
    weight: Float32,
    expert: Int32,
    logical: Int32,
    physical: Int32,
) -> None:
    """Store one rank of a token, and what else its call wants of it.

    All code of the options is here and in what this calls. ``expert`` is -1 for no expert, whose
    ``logical`` and ``physical`` id are the sentinel.
    """
    _put_column(routing, token, rank, weight, physical)
    if routing.expert_load.toint() != 0 and expert >= 0:
        _record(routing, physical)
    place = Int64(token) * Int64(routing.captured_stride) + Int64(rank)
    if routing.captured_ids_i16.toint() != 0:
        memory.store_global_b16(routing.captured_ids_i16.toint() + place * 2, logical)
    if routing.captured_ids_i32.toint() != 0:
        memory.store_global_b32(routing.captured_ids_i32.toint() + place * 4, logical)
    if rank < routing.shared_experts:
        # The lane of rank i stores the shared expert i: there are at most as many as ranks.
        shared, shared_weight = routing.shared_id + rank, routing.shared_weight
        if is_padding(routing, token) != 0:
            shared, shared_weight = routing.sentinel, Float32(0.0)
        _put_column(routing, token, rank + top_k, shared_weight, shared)


@cute.jit
def _put_column(
    routing: Routing, token: Int32, column: Int32, weight: Float32, expert: Int32
) -> None:
    """Store weight and id of one column of a token's row, in the form that the call wants."""
    place = Int64(token) * Int64(routing.ids_stride) + Int64(column)
    if routing.packed_out.toint() != 0:
        word = (expert << 16) | arith.bf16_bits(weight)
        memory.store_global_b32(routing.packed_out.toint() + place * 4, word)
    else:
        row = routing.weights_out.toint() + Int64(token) * Int64(routing.weights_stride) * 4
        memory.store_global_b32(row + Int64(column) * 4, arith.bits(weight))
        _put_id(routing.ids_out.toint(), routing.ids_out_i64.toint(), place, expert)


@cute.jit
def _record(routing: Routing, physical: Int32) -> None:
    """Count one expert of a token under its physical id. An id outside the counts is left out."""
    wanted = Int32(1)
    if routing.record_load.toint() != 0:
        wanted = memory.load_global_u8(routing.record_load.toint())
    if wanted != 0 and physical >= 0 and physical < routing.load_experts:
        memory.add_relaxed(routing.expert_load.toint() + Int64(physical) * 4, Int32(1))


# --- groups of experts ----------------------------------------------------------------------------


@cute.jit
def merge(
    workspace: Int64,
    scratch: Int32,
    token: Int32,
    group: Int32,
    expert_groups: cutlass.Constexpr[ExpertGroups],
    lane: Int32,
) -> Int32:
    """Merge the candidates of all groups. Return 1 in the group that comes last, else 0.

    Before, ``scratch`` holds this group's candidates; afterwards, in the last group, the merged
    ones. With one group nothing is done. A record in the workspace is two 64-bit words, (id, key)
    and (1, score). Neither 64-bit word of a stored record is zero (a key is at least 1), and the
    workspace was zero before, so a reader sees which words have arrived.
    """
    groups, top_k = expert_groups.groups, expert_groups.top_k
    last = Int32(1)
    if cutlass.const_expr(groups > 1):
        count = groups * top_k
        ticket = workspace + Int64(token) * 4
        first = workspace + expert_groups.ticket_bytes + Int64(token) * (count * 16)
        if lane < top_k:
            key, score, expert, _ = memory.load_shared_v4(scratch + lane * selection.RECORD_BYTES)
            memory.store_record(
                first + Int64(group * top_k + lane) * 16, [expert, key, Int32(1), score]
            )
        cute.arch.sync_warp()
        arrived = Int32(0)
        if lane == 0:
            arrived = memory.atomic_add_relaxed(ticket, Int32(1))
        last = arith.select(
            arith.equal(warp_ops.broadcast(arrived, Int32(0)), Int32(groups - 1)),
            Int32(1),
            Int32(0),
        )
        if last != 0:
            # In order of group and rank: for equal keys that is the order of the ids.
            keys, scores, experts = [], [], []
            for position in cutlass.range_constexpr(-(-count // LANES)):
                number = lane * -(-count // LANES) + position
                key, score, expert = Int32(0), Int32(0), Int32(0)
                if number < count:
                    address = first + Int64(number) * 16
                    expert, key, valid, score = memory.load_record(address)
                    while key == 0 or valid == 0:
                        expert, key, valid, score = memory.load_record(address)
                    memory.store_record(address, [Int32(0)] * 4)
                keys.append(key)
                scores.append(score)
                experts.append(expert)
            if lane == 0:
                memory.store_global_b32(ticket, Int32(0))
            if cutlass.const_expr(count <= LANES):
                selection.rank_of_warp(keys[0], scores[0], experts[0], count, top_k, scratch, lane)
            else:
                selection.top_of_warp(keys, scores, experts, top_k, scratch, lane)
    return last
