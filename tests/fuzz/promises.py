"""The promises of router_runtime/PROMISES.md, checked on the outputs of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.call import Call, Outcome


def violations(call: Call, found: Outcome) -> Iterator[str]:
    """The promises that the outputs of a call break."""
    yield from _of_options(call, found)
    weights, ids = found.weights[:, : call.k], found.ids[:, : call.k]
    if not bool(torch.isfinite(weights).all()):
        yield "a weight is not finite"
    if not bool((weights >= 0).all()):
        yield "a weight is negative, or was not written"
    logical = ids if found.logical is None else found.logical
    in_range = (logical >= 0) & (logical < call.experts)
    if not bool((in_range | (logical == call.sentinel)).all()):
        yield "an id is neither in range nor the sentinel"
    # The sentinel may be an expert's number too: then only padding distinguishes them.
    real = _experts(call, found)
    none = (logical == call.sentinel) & ~real
    if not bool((weights[none] == 0).all()):
        yield "a sentinel has a weight"
    if call.padding is not None:
        rows = call.padding.unsqueeze(1)
        if not bool(((logical == call.sentinel) & (weights == 0) | ~rows).all()):
            yield "a padding row has an expert or a weight"
    if call.distinct:
        selected = torch.ones(call.rows, dtype=torch.bool, device=ids.device)
        for others in (call.padding, call.known):  # what is known was given
            selected = selected if others is None else selected & ~others
        if not bool((real | ~selected.unsqueeze(1)).all()):
            yield "a dense row has no expert somewhere"
        ordered = logical.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
        if bool((twice & selected).any()):
            yield "an expert comes twice in a dense row"
    if call.exact is not None:
        right = (logical == call.exact).all(dim=1)
        if not bool((right if call.known is None else right | ~call.known).all()):
            yield "an id is not the one that was looked up or given"
    if call.mapped is not None:
        table, counts, start, step = call.mapped
        chosen = logical.clamp(0, call.experts - 1).long()
        number = torch.arange(call.rows, device=ids.device).unsqueeze(1)
        replica = (start + step * number) % 2**32 % counts[chosen].clamp(1, table.shape[1])
        physical = table[chosen, replica.long()].to(ids.dtype)
        physical = torch.where(real, physical, call.sentinel)
        if not bool((ids == physical).all()):
            yield "a physical id is not the map's"
    if found.logits is not None:
        bits = found.logits.view(torch.int32)
        if not bool(((bits == 0x7FFFFFFF) | ~found.logits.isnan()).all()):
            yield "a NaN logit is stored under other bits"


def _experts(call: Call, found: Outcome) -> Tensor:
    """Which places of ``[rows, k]`` have an expert."""
    logical = found.ids[:, : call.k] if found.logical is None else found.logical
    real = (logical >= 0) & (logical < call.experts)
    if call.padding is not None:
        real &= ~call.padding.unsqueeze(1)
    return real if call.none is None else real & ~call.none


def _of_options(call: Call, found: Outcome) -> Iterator[str]:
    """The promises of options that the outputs of a call break."""
    options, own = call.options, found.ids[:, : call.k]
    for shared in range(options.shared):
        ids, weights = found.ids[:, call.k + shared], found.weights[:, call.k + shared]
        expected = torch.full_like(ids, options.shared_id + shared)
        shares = torch.full_like(weights, options.shared_weight)
        if call.padding is not None:
            expected[call.padding] = call.sentinel
            shares[call.padding] = 0
        if not (torch.equal(ids, expected) and torch.equal(weights, shares)):
            yield "a shared expert has another id or another weight"
    if options.load is not None and found.load is not None:
        counted = own[_experts(call, found)].long()
        counted = counted[(counted >= 0) & (counted < len(options.load))]
        if options.record is not None and not bool(options.record):
            counted = counted[:0]
        added = torch.bincount(counted, minlength=len(options.load))
        if not torch.equal(found.load, (options.load.long() + added).int()):
            yield "a load is not the number of choices of its expert"
    if found.captured is not None:
        logical = own if found.logical is None else found.logical
        if not torch.equal(found.captured, logical.to(found.captured.dtype)):
            yield "a captured id is not the logical one"
    if found.packed is not None:
        halves = found.weights.bfloat16().view(torch.int16).int() & 0xFFFF
        if not torch.equal(found.packed, (found.ids.int() << 16) | halves):
            yield "a packed word is not the id and the weight"


def same(found: Any, expected: Any) -> bool:
    """Whether two sequences of tensors or None are equal bit for bit."""
    return all(
        (one is None and other is None)
        or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(found, expected, strict=True)
    )
