"""Rows of scores on any device for the part ``topk``: random ones, and those on which selections
become slow or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: The pattern that all others are compared with.
RANDOM = "random"


class Rows:
    """Draws fp32 ``[rows, columns]`` by pattern; the same every time on one device and torch."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._shape, self._device = (rows, columns), device
        self._random = torch.Generator(device).manual_seed(3)

    def draw(self, pattern: str) -> Tensor:
        """The rows of one of ``PATTERNS``."""
        return PATTERNS[pattern](self)

    def random(self) -> Tensor:
        """Normal scores."""
        return torch.randn(self._shape, generator=self._random, device=self._device)

    def equal(self) -> Tensor:
        """One value."""
        return torch.full(self._shape, 0.75, device=self._device)

    def two_values(self) -> Tensor:
        """0 and 1, each half the time."""
        return (self.random() > 0).float()

    def descending(self) -> Tensor:
        """The largest first."""
        return -self.ascending()

    def ascending(self) -> Tensor:
        """Each larger than all before it."""
        column = torch.arange(self._shape[1], device=self._device).float()
        return column.expand(self._shape).contiguous()

    def relu(self) -> Tensor:
        """Zeros, but for one in a thousand."""
        return (self.random() - 3.2).relu()

    def nan_runs(self) -> Tensor:
        """NaN from the seventh part of a row on."""
        scores = self.random()
        scores[:, self._shape[1] // 7 :] = torch.nan
        return scores

    def subnormals(self) -> Tensor:
        """4096 different subnormal numbers."""
        bits = torch.randint(0, 4096, self._shape, generator=self._random, device=self._device)
        return bits.int().view(torch.float32)

    def outlier(self) -> Tensor:
        """One score that is larger than all others by far."""
        scores = self.random()
        scores[:, self._shape[1] // 3] = 1e38
        return scores

    def any_bits(self) -> Tensor:
        """Any bits: NaN, infinities, all exponents."""
        low, high = -(2**31), 2**31
        bits = torch.randint(low, high, self._shape, generator=self._random, device=self._device)
        return bits.int().view(torch.float32)

    def clustered(self) -> Tensor:
        """The largest 6000 are neighbours, in the part of one CTA."""
        scores, middle = self.random(), self._shape[1] // 2
        scores[:, middle : middle + 6000] += 10
        return scores


PATTERNS: Mapping[str, Callable[[Rows], Tensor]] = {
    RANDOM: Rows.random,
    "equal": Rows.equal,
    "two_values": Rows.two_values,
    "descending": Rows.descending,
    "ascending": Rows.ascending,
    "relu": Rows.relu,
    "nan_runs": Rows.nan_runs,
    "subnormals": Rows.subnormals,
    "outlier": Rows.outlier,
    "any_bits": Rows.any_bits,
    "clustered": Rows.clustered,
}
