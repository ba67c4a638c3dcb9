"""One call of an op between guard bands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.guarded import Guarded
from tests.fuzz.options import Options


@dataclass
class Outcome:
    """The outputs of a call; logical ids and logits only where it stores them, loads and captured
    ids only where it records them. ``packed`` is what the form of that name returns.
    """

    weights: Tensor
    ids: Tensor
    logical: Tensor | None = None
    logits: Tensor | None = None
    load: Tensor | None = None
    captured: Tensor | None = None
    packed: Tensor | None = None


@dataclass
class Call:
    """One call of an op with the caller's outputs, and what must hold of its results.

    ``positional`` and ``keywords`` are the arguments without the outputs; ``rows``, ``k`` and
    ``experts`` their sizes. ``padding`` marks the padding rows, bool ``[rows]``. ``logits`` says
    whether the logits are stored, ``mapped`` is the expert map, its counts and its order (start,
    step) if there is one, and ``distinct`` whether a row's ids are distinct experts.
    """

    op: str
    positional: list[Any]
    keywords: dict[str, Any]
    rows: int
    k: int
    experts: int
    sentinel: int = -1
    padding: Tensor | None = None
    logits: bool = False
    mapped: tuple[Tensor, Tensor, int, int] | None = None
    ids_dtype: torch.dtype = torch.int32
    distinct: bool = True
    #: The ids, where they are known before the call: of all rows, or of those in ``known``.
    exact: Tensor | None = None
    known: Tensor | None = None
    #: Places of ``exact`` that have no expert, bool ``[rows, k]``: the sentinel may be one too.
    none: Tensor | None = None
    options: Options = field(default_factory=Options)

    def run(self, ops: Any, pattern: int, device: str) -> tuple[Outcome, list[str]]:
        """Call the op once, with guard bands of ``pattern``. Returns its outputs, and a problem for
        each band, input or gap between rows that has changed.
        """
        guarded: dict[str, Guarded] = {}

        def guard(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dtype is torch.bool:  # any byte but zero is true
                value = value.to(torch.uint8).mul(0xFE).view(torch.bool)
            guarded[name] = Guarded(value, pattern)
            return guarded[name].tensor

        options = self.options
        positional = [guard(str(place), value) for place, value in enumerate(self.positional)]
        keywords = self.keywords | options.arguments()
        keywords = {name: guard(name, value) for name, value in keywords.items()}
        given = dict(keywords)
        if options.record is not None:
            keywords["record_load"] = guard("record_load", options.record)
        columns, gaps = self.k + options.shared, options.gaps
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
            "weights_out": ((self.rows, columns), torch.float32, gaps[0]),
            "ids_out": ((self.rows, columns), self.ids_dtype, gaps[1]),
        }
        if self.logits:
            wanted["logits_out"] = ((self.rows, self.experts), torch.float32, 0)
        if self.mapped is not None:
            wanted["logical_ids_out"] = ((self.rows, self.k), self.ids_dtype, 0)
        if options.load is not None:
            wanted["expert_load"] = (tuple(options.load.shape), torch.int32, 0)
        if options.captured is not None:
            rows = self.rows + options.more_rows
            wanted["captured_ids"] = ((rows, self.k), options.captured, gaps[0])
        for name, (shape, dtype, gap) in wanted.items():
            apart = (*shape[:-1], shape[-1] + gap)
            guarded[name] = Guarded(None, pattern, shape=apart, dtype=dtype, device=device)
            keywords[name] = guarded[name].tensor[..., : shape[-1]]
        if options.load is not None:
            keywords["expert_load"].copy_(options.load)
        getattr(ops, self.op).out(*positional, **keywords)
        problems = [
            f"{self.op}: wrote outside its outputs: {name}"
            for name, tensor in guarded.items()
            if not bool(tensor.unchanged())
        ]
        problems += [
            f"{self.op}: wrote between the rows of {name}, or behind them"
            for name, (shape, _, _) in wanted.items()
            if not _untouched(guarded[name].tensor, shape[-1], self.rows, pattern)
        ]
        captured = keywords.get("captured_ids")
        outcome = Outcome(
            keywords["weights_out"],
            keywords["ids_out"],
            keywords.get("logical_ids_out"),
            keywords.get("logits_out"),
            keywords.get("expert_load"),
            None if captured is None else captured[: self.rows],
        )
        if options.packed:
            if self.mapped is not None and "expert_map" not in given:
                given["mapped"] = True
            outcome.packed = getattr(ops, self.op).packed(*positional, **given)
        return outcome, problems


def _untouched(tensor: Tensor, columns: int, rows: int, pattern: int) -> bool:
    """Whether what lies beside the first ``columns`` of the first ``rows`` is still ``pattern``."""
    if tensor.dim() == 1:
        return True
    beside = [tensor[:, columns:], tensor[rows:]]
    return all(bool((each.contiguous().view(torch.uint8) == pattern).all()) for each in beside)
