"""Random tensors of any bits."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

#: fp32 patterns at which something changes: zeros, subnormals, infinities, NaNs, edges of exp.
EDGES = (
    *(0x0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x00800000),
    *(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xC2A00000, 0x42A00000, 0xC2FE0000),
)

#: Scores of one call, at most.
MOST_SCORES = 2**22


class Draw:
    """A generator of random tensors on one device, from a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.choose = random.Random(seed)
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Integers of [low, high)."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=dtype
        )

    def normal(self, *shape: int) -> Tensor:
        """fp32 of the standard normal distribution."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def floats(self, rows: int, columns: int) -> Tensor:
        """fp32 ``[rows, columns]`` of any bits; the kind of bits changes from row to row."""
        words = self.integers(-(2**31), 2**31, rows, columns).int()
        edges = torch.tensor(EDGES, device=self.device)[self.integers(0, len(EDGES), rows, columns)]
        edges = (edges - (edges >= 2**31) * 2**32).int()
        normal = self.normal(rows, columns) * 4
        kinds = (
            words,
            edges,
            normal.view(torch.int32),
            (normal * 30 - 100).view(torch.int32),  # scores that underflow
            words & -0x7F800001,  # subnormals and zeros of both signs
            edges[:, :1].expand(rows, columns),  # all keys equal
            words[:, :1].expand(rows, columns),
            torch.where(self.integers(0, 8, rows, columns) == 0, edges, normal.view(torch.int32)),
        )
        kind = self.integers(0, len(kinds), rows)
        mixed = words
        for number, bits in enumerate(kinds):
            mixed = torch.where((kind == number).unsqueeze(1), bits, mixed)
        return mixed.contiguous().view(torch.float32)

    def columns(self, rows: int) -> int:
        """The length of that many rows of scores, a few million scores together at most."""
        lengths = (1, 9, 256, 1024, 1500, 8192, 33000, 70001, 300000, 2**21)
        return self.choose.choice([n for n in lengths if n * rows <= MOST_SCORES] or [9])

    def scores(self, rows: int, columns: int) -> Tensor:
        """fp32 ``[rows, columns]``: any bits, or rows that are hard to select from, row by row."""
        column = torch.arange(columns, device=self.device).expand(rows, columns)
        normal = self.normal(rows, columns)
        one_in_50 = self.integers(0, 50, rows, columns) == 0
        kinds = (
            self.floats(rows, columns),
            normal,
            (normal > 0).float(),  # two values
            -column.float(),
            column.float(),
            (normal - 2).clamp(min=0),  # zeros, as after a ReLU
            torch.where(column % 4096 < columns % 4096, torch.nan, normal),  # runs of NaN
            torch.where(column == columns // 3, 1e38, normal),  # one outlier
            1.0 + one_in_50,  # most tie at the bound, in every part of the row
            (normal * 2).round(),
            normal + (column > columns - columns // 8) * 10,  # the largest are neighbours
        )
        kind = self.integers(0, len(kinds), rows).unsqueeze(1)
        mixed = kinds[0]
        for number, each in enumerate(kinds):
            bits = torch.where(kind == number, each.view(torch.int32), mixed.view(torch.int32))
            mixed = bits.view(torch.float32)
        return mixed

    def bf16(self, rows: int, columns: int) -> Tensor:
        """bf16 ``[rows, columns]``: the upper halves of ``floats``."""
        return self.upper_halves(self.floats(rows, columns))

    def upper_halves(self, numbers: Tensor) -> Tensor:
        """The bf16 that the upper halves of fp32 are."""
        upper = numbers.contiguous().view(torch.int32) >> 16
        return upper.to(torch.int16).view(torch.bfloat16)

    def int32(self, limit: int, *shape: int) -> Tensor:
        """int32 of any bits, or near [0, limit): each half the time."""
        wide = self.integers(-(2**31), 2**31, *shape)
        near = self.integers(-2, limit + 2, *shape)
        return torch.where(self.integers(0, 8, *shape) == 0, wide, near).int()

    def ids(self, limit: int, *shape: int) -> Tensor:
        """int32 or int64 of any bits, half of them in [0, limit)."""
        if self.choose.random() < 0.5:
            wide = self.integers(-(2**31), 2**31, *shape).int()
        else:
            wide = self.integers(-(2**63), 2**63 - 1, *shape)
        near = self.integers(-2, limit + 2, *shape).to(wide.dtype)
        return torch.where(self.integers(0, 4, *shape) == 0, wide, near)

    def mask(self, rows: int) -> Tensor:
        """bool ``[rows]``, one in four true."""
        return self.integers(0, 4, rows) == 0

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        """What ``make`` returns, or None: each half the time."""
        return make() if self.choose.random() < 0.5 else None

    def ids_dtype(self) -> torch.dtype:
        """The dtype of the ids of a call: int32 or int64."""
        return self.choose.choice((torch.int32, torch.int64))
