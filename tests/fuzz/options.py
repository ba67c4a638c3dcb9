"""The options of a random call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import Draw


@dataclass
class Options:
    """What a call is given beside its serving inputs.

    ``shared`` experts follow the others, from ``shared_id`` on, with ``shared_weight`` each.
    ``load`` holds the counts before the call, ``record`` is the flag beside it. ``captured`` is the
    dtype of the captured ids, whose tensor has ``more_rows`` than the call. ``gaps`` are the
    elements between the rows of the weights, and of the ids. ``packed``: whether that form is
    called too.
    """

    shared: int = 0
    shared_id: int = 0
    shared_weight: float = 0.0
    load: Tensor | None = None
    record: Tensor | None = None
    captured: torch.dtype | None = None
    more_rows: int = 0
    gaps: tuple[int, int] = (0, 0)
    packed: bool = False

    @classmethod
    def draw(cls, draw: Draw, k: int, experts: int, sentinel: int) -> Options:
        """Options for a call: none at all for half of the calls."""
        choose, made = draw.choose, cls()
        if choose.random() < 0.5:
            return made
        if choose.random() < 0.5:
            made.shared = choose.randint(0, min(2, k))
            made.shared_id = choose.choice((0, experts, 40000, 2**31 - 2))
            made.shared_weight = choose.choice((0.0, 0.4, 1.0, 1e18))
        if choose.random() < 0.5:
            counts = choose.choice((1, experts // 2 + 1, experts, 3 * experts))
            made.load = draw.integers(-(2**31), 2**31, counts).int()
            made.record = draw.maybe(lambda: draw.mask(1))
        if choose.random() < 0.5:
            narrow = -(2**15) <= sentinel < 2**15 and choose.random() < 0.7
            made.captured = torch.int16 if narrow else torch.int32
            made.more_rows = choose.choice((0, 3))
        made.gaps = choose.choice(((0, 0), (1, 0), (3, 2), (0, 5)))
        made.packed = choose.random() < 0.5
        return made

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that every form takes."""
        found: dict[str, Any] = {}
        if self.shared:
            found |= {"shared_experts": self.shared, "shared_id": self.shared_id}
            found["shared_weight"] = self.shared_weight
        return found
