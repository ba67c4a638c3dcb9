"""The promises of router_runtime/PROMISES.md, checked on the outputs of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.fuzz.call import Call, Outcome
from tests.fuzz.draw import Draw
from tests.fuzz.guarded import PATTERNS, Guarded


def violations(call: Call, found: Outcome) -> Iterator[str]:
    """The promises that the outputs of a call break."""
    weights, ids = found.weights, found.ids
    if not bool(torch.isfinite(weights).all()):
        yield "a weight is not finite"
    if not bool((weights >= 0).all()):
        yield "a weight is negative, or was not written"
    logical = ids if found.logical is None else found.logical
    in_range = (logical >= 0) & (logical < call.experts)
    if not bool((in_range | (logical == call.sentinel)).all()):
        yield "an id is neither in range nor the sentinel"
    # The sentinel may be an expert's number too: then only padding distinguishes them.
    real = in_range if call.padding is None else in_range & ~call.padding.unsqueeze(1)
    none = (logical == call.sentinel) & ~real
    if not bool((weights[none] == 0).all()):
        yield "a sentinel has a weight"
    if call.padding is not None:
        rows = call.padding.unsqueeze(1)
        if not bool(((logical == call.sentinel) & (weights == 0) | ~rows).all()):
            yield "a padding row has an expert or a weight"
    if call.distinct:
        routed = real if call.padding is None else real | call.padding.unsqueeze(1)
        if not bool(routed.all()):
            yield "a dense row has no expert somewhere"
        ordered = logical.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
        if call.padding is not None:
            twice &= ~call.padding
        if bool(twice.any()):
            yield "an expert comes twice in a dense row"
    if call.exact is not None and not bool((logical == call.exact).all()):
        yield "an id is not the one that was looked up or given"
    if call.mapped is not None:
        table, counts = call.mapped
        chosen = logical.clamp(0, call.experts - 1).long()
        number = torch.arange(call.rows, device=ids.device).unsqueeze(1)
        replica = number % counts[chosen].clamp(1, table.shape[1])
        physical = table[chosen, replica.long()].to(ids.dtype)
        physical = torch.where(real, physical, call.sentinel)
        if not bool((ids == physical).all()):
            yield "a physical id is not the map's"
    if found.logits is not None:
        bits = found.logits.view(torch.int32)
        if not bool(((bits == 0x7FFFFFFF) | ~found.logits.isnan()).all()):
            yield "a NaN logit is stored under other bits"


def select_violations(ops: Any, draw: Draw, rows: int, device: str) -> list[str]:
    """The promises that one call of ``topk_select`` breaks.

    It has no form with the caller's outputs, so only its input lies between guard bands.
    """
    columns = draw.choose.choice((1, 9, 256, 1024, 1500, 8192) if rows < 2000 else (9, 256, 1024))
    k = draw.choose.randint(1, min(32, columns))
    scores = draw.floats(rows, columns)
    results, problems = [], []
    for pattern in PATTERNS:
        given = Guarded(scores, pattern)
        values, ids = ops.topk_select(given.tensor, k)
        if not bool(given.unchanged()):
            problems.append("topk_select: changed its input")
        results.append((values, ids))
    (values, ids), other = results
    if not same(results[0], other):
        problems.append("topk_select: depends on memory outside its input")
    if not bool(((ids >= 0) & (ids < columns)).all()):
        return [*problems, "topk_select: an id is out of range"]
    ordered = ids.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        problems.append("topk_select: an id comes twice")
    picked = scores.view(torch.int32).gather(1, ids.long())
    if not torch.equal(picked, values.view(torch.int32)):
        problems.append("topk_select: a value is not the one at its id")
    ranks = torch.where(values.isnan(), -torch.inf, values)
    if not bool((ranks[:, 1:] <= ranks[:, :-1]).all()):
        problems.append("topk_select: values out of order")
    return problems


def same(found: Any, expected: Any) -> bool:
    """Whether two sequences of tensors or None are equal bit for bit."""
    return all(
        (one is None and other is None)
        or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(found, expected, strict=True)
    )
