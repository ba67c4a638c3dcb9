"""Rows of scores for the kernels that select from them, by patterns that are hard to select from,
and what else a case of ``topk_indices`` has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from router_runtime.evidence.cases import Case
from router_runtime.verification.prng import Random

_INF, _MAX = math.inf, torch.finfo(torch.float32).max
_TINY = 2.0**-149


def floats(*values: float) -> Tensor:
    """fp32 of these values."""
    return torch.tensor(values, dtype=torch.float32)


#: Quiet and signalling NaNs of both signs: each is returned with its own bits.
NANS = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1], dtype=torch.int32).view(
    torch.float32
)
_SPECIALS = torch.cat((floats(0.0, -0.0, _INF, -_INF, 1.0, -1.0, _TINY, -_TINY, _MAX, -_MAX), NANS))


def strided(rows: Tensor, padding: int, between: float = math.nan) -> Tensor:
    """The same rows with ``padding`` elements between them, so that reading one shows."""
    if not padding:
        return rows
    buffer = torch.full((rows.shape[0], rows.shape[1] + padding), between, dtype=rows.dtype)
    buffer[:, : rows.shape[1]] = rows
    return buffer[:, : rows.shape[1]]


def score_rows(case: Case, random: Random) -> Tensor:
    """fp32 ``[rows, row_length]`` of the pattern of a case."""
    rows, length = case.sizes["rows"], case.sizes["row_length"]
    ramp = torch.arange(length, dtype=torch.float32).expand(rows, length).clone()

    def raised(columns: Tensor | slice, by: float) -> Tensor:
        scores = random.normal(rows, length)
        scores[:, columns] += by
        return scores

    patterns: Mapping[str, Callable[[], Tensor]] = {
        "random": lambda: random.normal(rows, length),
        "ties": lambda: random.integers(-2, 3, rows, length).float(),
        "equal": lambda: torch.full((rows, length), 0.75),
        "ascending": lambda: ramp,
        "descending": lambda: -ramp,
        "specials": lambda: random.choice(_SPECIALS, rows, length),
        # Nothing is above zero, so both zeros are selected.
        "signed_zeros": lambda: random.choice(floats(0.0, -0.0, -1.0, -_TINY), rows, length),
        "mostly_nan": lambda: torch.where(
            random.integers(0, length, rows, length) < 3,
            random.normal(rows, length),
            random.choice(torch.cat((NANS, floats(-_INF))), rows, length),
        ),
        "all_nan": lambda: random.choice(NANS, rows, length),
        "any_bits": lambda: random.bits(rows, length),
        "two_values": lambda: random.integers(0, 2, rows, length).float(),
        # A few in a hundred are above zero.
        "relu": lambda: (random.normal(rows, length) - 2.25).clamp(min=0.0),
        "subnormals": lambda: random.integers(0, 2**12, rows, length).int().view(torch.float32),
        "outlier": lambda: raised(slice(length // 3, length // 3 + 1), 1e38),
        # The largest are neighbours: in the part of one CTA.
        "clustered": lambda: raised(slice(length // 2, length // 2 + 6000), 10.0),
        "beats_sample": lambda: raised(sampled_columns(length, case.sizes["sample"]), 100.0),
        "beats_groups": lambda: raised(first_columns_of_parts(length), 100.0),
    }
    return patterns[case.pattern]()


def sampled_columns(length: int, most: int) -> Tensor:
    """The columns that ``topk_indices`` reads of a row first, of which it takes at most ``most``,
    to estimate how large the scores are that it looks for. Where these are larger than all others,
    the estimate is wrong, and the kernel has to find that out.
    """
    bits = min(max((length // 32).bit_length(), 8), most.bit_length()) - 1
    number = torch.arange(1 << bits)
    places = (number << 16 | (number * 2654435761 & 0xFFFFFFFF) >> 16) * length >> 16 + bits
    return places.clamp(max=length - 1)


def first_columns_of_parts(length: int) -> Tensor:
    """51 columns at the beginning of each of 32 parts of a row, no two of them in one group of the
    maxima by which ``topk_indices`` estimates how large the scores are that it looks for.
    """
    parts = torch.arange(32) * length // 32
    columns = parts.unsqueeze(1) + torch.arange(0, 1020, 20)
    return columns.flatten().clamp(max=length - 1)


def indexer_inputs(case: Case, random: Random) -> dict[str, Tensor | int | float]:
    """The inputs of a case of ``topk_indices``, under the names of its contract."""
    sizes = case.sizes
    rows, length, page_size = (sizes[name] for name in ("rows", "row_length", "page_size"))
    scores = score_rows(case, random)
    inputs: dict[str, Tensor | int | float] = {
        "top_k": sizes["top_k"],
        "sorted": sizes["sorted"],
        "nan_first": sizes["nan_first"],
    }
    if sizes["bounded"]:
        starts = random.integers(-2, length // 3 + 1, rows)
        ends = random.integers(length // 2, length + 6, rows)
        # One whole row, one with fewer scores than top_k, one with none.
        starts[0], ends[0] = -1, length + 5
        ends[1:2] = starts[1:2] + sizes["top_k"] // 2
        ends[2:3] = starts[2:3] - 1
        column = torch.arange(length)
        outside = (column < starts.unsqueeze(1)) | (column >= ends.unsqueeze(1))
        # Larger than all others, so that reading one shows.
        scores = torch.where(outside, floats(_INF), scores)
        inputs |= {"row_starts": starts.int(), "row_ends": ends.int()}
    if sizes["score_bytes"] == 2:
        scores = (scores.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    inputs["scores"] = strided(scores, sizes["padding"], _INF)
    if page_size:
        pages = max(-(-length // page_size) - 1, 1)  # the last page is not there
        requests = rows + 3 if sizes["requests"] else rows
        inputs["page_table"] = random.integers(-5, 2**20, requests, pages + 1).int()[:, :pages]
        inputs["page_size"] = page_size
        if sizes["requests"]:
            inputs["requests"] = random.integers(-1, requests + 1, rows).int()
    if sizes["offsets"]:
        inputs["offsets"] = random.integers(-(2**20), 2**20, rows).int()
    return inputs
