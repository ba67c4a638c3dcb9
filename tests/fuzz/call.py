"""One call of an op between guard bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.guarded import Guarded


@dataclass
class Outcome:
    """The outputs of a call; logical ids and logits only where it stores them."""

    weights: Tensor
    ids: Tensor
    logical: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Call:
    """One call of an op with the caller's outputs, and what must hold of its results.

    ``positional`` and ``keywords`` are the arguments without the outputs; ``rows``, ``k`` and
    ``experts`` their sizes. ``padding`` marks the padding rows, bool ``[rows]``. ``logits`` says
    whether the logits are stored, ``mapped`` is the expert map and its counts if there is one, and
    ``distinct`` whether a row's ids are distinct experts.
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
    mapped: tuple[Tensor, Tensor] | None = None
    ids_dtype: torch.dtype = torch.int32
    distinct: bool = True
    #: The ids, where they are known before the call.
    exact: Tensor | None = None

    def run(self, ops: Any, pattern: int, device: str) -> tuple[Outcome, list[str]]:
        """Call the op once, with guard bands of ``pattern``. Returns its outputs, and a problem for
        each band or input that has changed.
        """
        guarded: dict[str, Guarded] = {}

        def guard(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dtype is torch.bool:  # any byte but zero is true
                value = value.to(torch.uint8).mul(0xFE).view(torch.bool)
            guarded[name] = Guarded(value, pattern)
            return guarded[name].tensor

        positional = [guard(str(place), value) for place, value in enumerate(self.positional)]
        keywords = {name: guard(name, value) for name, value in self.keywords.items()}
        wanted = {"weights_out": (self.k, torch.float32), "ids_out": (self.k, self.ids_dtype)}
        if self.logits:
            wanted["logits_out"] = (self.experts, torch.float32)
        if self.mapped is not None:
            wanted["logical_ids_out"] = (self.k, self.ids_dtype)
        for name, (columns, dtype) in wanted.items():
            guarded[name] = Guarded(
                None, pattern, shape=(self.rows, columns), dtype=dtype, device=device
            )
            keywords[name] = guarded[name].tensor
        getattr(ops, self.op).out(*positional, **keywords)
        problems = [
            f"{self.op}: wrote outside its outputs: {name}"
            for name, tensor in guarded.items()
            if not bool(tensor.unchanged())
        ]
        outcome = Outcome(
            keywords["weights_out"],
            keywords["ids_out"],
            keywords.get("logical_ids_out"),
            keywords.get("logits_out"),
        )
        return outcome, problems
