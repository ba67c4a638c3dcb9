"""Random calls of the ops that select from rows of scores, and the promises that they break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_runtime import spec
from tests.fuzz.draw import Draw
from tests.fuzz.guarded import PATTERNS, Guarded
from tests.fuzz.promises import same


def select_violations(ops: Any, draw: Draw, rows: int, device: str) -> list[str]:
    """The promises that one call of ``topk_select`` breaks.

    It has no form with the caller's outputs, so only its input lies between guard bands.
    """
    columns = draw.columns(rows)
    # Half the time what the kernel topk_select takes, else also what is left to topk_indices.
    k = draw.choose.randint(1, min(draw.choose.choice((32, 4096)), columns))
    scores = draw.scores(rows, columns)
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


def indices_violations(ops: Any, draw: Draw, rows: int, device: str) -> list[str]:
    """The promises that one call of ``topk_indices`` breaks: ids and slots are those of
    ``spec.py``, whatever is around its inputs and was in its outputs.
    """
    columns = draw.columns(rows)
    k = draw.choose.randint(1, draw.choose.choice((32, 600, 4096)))
    scores = draw.scores(rows, columns)
    if draw.choose.random() < 0.3:
        scores = draw.upper_halves(scores)
    inputs: dict[str, Any] = {
        name: draw.maybe(lambda: draw.int32(columns, rows)) for name in ("row_starts", "row_ends")
    }
    inputs |= {name: draw.choose.random() < 0.5 for name in ("sorted", "nan_first")}
    inputs["offsets"] = draw.maybe(lambda: draw.int32(2**20, rows))
    if draw.choose.random() < 0.6:
        requests = draw.choose.choice((1, rows, rows + 5))
        size = inputs["page_size"] = draw.choose.choice((1, 7, 64, 2**31 - 1))
        pages = max(-(-columns // size) - draw.choose.choice((0, 1)), 1)
        inputs["page_table"] = draw.int32(2**20, requests, pages)
        if requests != rows or draw.choose.random() < 0.5:
            inputs["requests"] = draw.int32(requests, rows)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    bounds = [inputs.get(name) for name in ("row_starts", "row_ends")]
    ids = spec.topk_indices(
        scores, k, *bounds, in_rank_order=inputs["sorted"], nan_first=inputs["nan_first"]
    )
    names = ("page_table", "requests", "offsets")
    slots = spec.slots(
        ids,
        page_size=inputs.get("page_size", 1),
        **{name: inputs.get(name) for name in names},
    )
    # Rows within wider ones, so that no address of a row is a multiple of much.
    before, behind = draw.choose.randint(0, 9), draw.choose.randint(0, 9)
    problems = []
    for pattern in PATTERNS:
        guarded = {
            "scores": Guarded(_widened(scores, before, behind, pattern), pattern),
            **{
                name: Guarded(value, pattern)
                for name, value in inputs.items()
                if isinstance(value, Tensor)
            },
        }
        for name in ("slots_out", "ids_out"):
            guarded[name] = Guarded(
                None, pattern, shape=(rows, k), dtype=torch.int32, device=device
            )
        given = {**inputs, **{name: each.tensor for name, each in guarded.items()}}
        within = given.pop("scores")[:, before : before + columns]
        ops.topk_indices.out(within, k, **given)
        problems += [
            f"topk_indices: wrote outside its outputs: {name}"
            for name, each in guarded.items()
            if not bool(each.unchanged())
        ]
        for name, found, wanted in (("id", "ids_out", ids), ("slot", "slots_out", slots)):
            if not torch.equal(given[found], wanted):
                problems.append(f"topk_indices: {name}s are not the oracle's")
    return problems


def _widened(scores: Tensor, before: int, behind: int, pattern: int) -> Tensor:
    """``scores`` between columns that are filled with the bytes of ``pattern``."""
    rows, columns = scores.shape
    shape = (rows, (before + columns + behind) * scores.element_size())
    wide = torch.full(shape, pattern, dtype=torch.uint8, device=scores.device).view(scores.dtype)
    wide[:, before : before + columns] = scores
    return wide
