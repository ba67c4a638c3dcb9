"""Batches that hold the same rows in other places, for the check of batch invariance."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from router_runtime.verification.inputs import ROW_INPUT, Inputs

#: The batch sizes tried, up to the limit of the kernel.
BATCHES = (
    *(1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 130, 255, 256),
    257,
)

#: Inputs with one element or row per token that move together with those of ``ROW_INPUT``.
_MOVED_TOO = (
    *("is_padding", "image_mask", "given_ids", "token_ids"),
    *("row_starts", "row_ends", "requests", "offsets"),
)


class Arrangement(NamedTuple):
    """A batch made of the rows of another batch.

    ``order[i]`` is the source row at position i. ``strangers`` are positions whose rows are
    overwritten with NaN and infinities; ``kept`` are the other positions and ``sources`` their
    source rows. ``name`` describes the batch in problems.
    """

    name: str
    order: Tensor
    strangers: Tensor
    kept: Tensor
    sources: Tensor

    def apply(self, kernel: str, inputs: Inputs) -> Inputs:
        """The inputs of this batch."""
        moved = in_order(kernel, inputs, self.order)
        if len(self.strangers):
            batch = moved[ROW_INPUT[kernel]]
            assert isinstance(batch, Tensor)
            batch[self.strangers] = math.nan
            batch[self.strangers[::2]] = math.inf
        return moved


def in_order(kernel: str, inputs: Inputs, order: Tensor) -> Inputs:
    """The inputs of the batch whose row ``i`` is row ``order[i]``; its rows are copies."""
    return {
        name: value[order]
        if isinstance(value, Tensor) and name in (ROW_INPUT[kernel], *_MOVED_TOO)
        else value
        for name, value in inputs.items()
    }


@functools.lru_cache(maxsize=16)
def arrangements(rows: int, largest: int, device: str) -> list[Arrangement]:
    """The arrangements of ``rows`` rows in batches of at most ``largest``, with their indices on a
    device. Cached: many cases have the same number of rows.
    """
    found = []
    for name, order, strangers in _described(rows, largest):
        others = torch.ones(len(order), dtype=torch.bool)
        others[strangers] = False
        kept = others.nonzero().flatten()
        parts = (each.to(device) for each in (order, strangers, kept, order[kept]))
        found.append(Arrangement(name, *parts))
    return found


def _described(rows: int, largest: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name, the order and the strangers of every arrangement."""
    no_strangers = torch.arange(0)
    for row in sorted({0, rows // 2, rows - 1}):
        yield f"row {row} alone", torch.tensor([row]), no_strangers
    yield f"{rows} rows reversed", torch.arange(rows).flip(0), no_strangers
    for size in BATCHES:
        if size <= largest:
            # A step of five mixes the rows. Where it divides their number, only each fifth row
            # comes up; the reversed batch above has all of them.
            order = (torch.arange(size) * 5 + 3) % rows
            yield f"batch of {size}", order, no_strangers
            yield f"batch of {size} among NaN and inf", order, torch.arange(1, size, 2)
