"""The order of a logit's sums, for tests: written without the code that it is compared with."""

from __future__ import annotations

import itertools

import numpy as np

from tests.kernels.tensor_core import Sums

#: Slices of the hidden dimension.
SLICES = 4


def chunk_sums(weight: Sums, hidden: Sums, k_chunk: int) -> list[Sums]:
    """Return the logits over each chunk, [tokens, experts]: exact, then rounded to FP32."""
    found = []
    for start in range(0, hidden.shape[1], k_chunk):
        part = slice(start, start + k_chunk)
        exactly = hidden[:, part].astype(np.float64) @ weight[:, part].astype(np.float64).T
        found.append(exactly.astype(np.float32))
    return found


def tree_slices(hidden: int, k_chunk: int) -> list[range]:
    """Return the hidden elements of each slice; slices without elements are left out."""
    chunks = -(-hidden // k_chunk)
    ends = [min(number * chunks // SLICES * k_chunk, hidden) for number in range(SLICES + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends) if start < end]


def tree(weight: Sums, hidden: Sums, k_chunk: int) -> Sums:
    """Return the logits: chunks in the order of each slice, then the slices in their order."""
    terms = chunk_sums(weight, hidden, k_chunk)
    total = np.full(terms[0].shape, -0.0, np.float32)
    for number in range(SLICES):
        own = np.full(terms[0].shape, -0.0, np.float32)
        for term in terms[number * len(terms) // SLICES : (number + 1) * len(terms) // SLICES]:
            own = own + term
        total = total + own
    return total


def uneven(hidden: Sums, k_chunk: int, generator: np.random.Generator) -> Sums:
    """Return hidden states whose chunks have other sizes, so that a sum depends on its order."""
    chunks = -(-hidden.shape[1] // k_chunk)
    sizes = np.exp2(generator.permutation(np.linspace(0, 24, chunks).round()))
    scaled: Sums = hidden * sizes.astype(np.float32).repeat(k_chunk)[: hidden.shape[1]]
    return scaled
