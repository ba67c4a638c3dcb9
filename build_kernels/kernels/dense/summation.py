"""The order in which all dense kernels add a logit's partial sums: a tree of fixed shape.

The hidden dimension is cut into chunks of ``k_chunk`` elements, and the chunks into ``SLICES``
contiguous slices. A slice's sum takes its chunks in ascending order, and the logit takes the slices
in ascending order. So a CTA that has whole slices passes one number on for each of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from build_kernels.kernels.common.numerics import SLICES

Term = TypeVar("Term")


def slice_chunks(chunks: int) -> list[range]:
    """Return the chunks of each slice. Fewer chunks than slices are one slice each."""
    bounds = [slice_end(number - 1, chunks) for number in range(min(SLICES, chunks) + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def slice_end(number: Any, chunks: int) -> Any:
    """Return the chunk behind slice ``number``."""
    if chunks < SLICES:
        return number + 1
    return (number + 1) * chunks // SLICES


def add_chunks(terms: Sequence[Term], add: Callable[[Term, Term], Term]) -> Term:
    """Return the sum of a logit's chunk sums ``terms``, in that order."""
    parts = [[terms[chunk] for chunk in chunks] for chunks in slice_chunks(len(terms))]
    return functools.reduce(add, [functools.reduce(add, part) for part in parts])
