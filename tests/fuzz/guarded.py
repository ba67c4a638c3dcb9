"""Tensors between guard bands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Bytes of each band.
GUARD = 1024
#: The byte that fills the bands, and outputs before the call: as fp32 negative, as ids far out of
#: range. Each call is made once with either.
PATTERNS = (0xA5, 0xFF)


class Guarded:
    """A tensor between two bands of ``pattern``: a copy of ``content``, or poisoned."""

    def __init__(
        self,
        content: Tensor | None,
        pattern: int,
        *,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> None:
        if content is not None:
            shape, dtype, device = tuple(content.shape), content.dtype, content.device
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        self._content = None if content is None else content.contiguous().view(-1)
        self._pattern, self._end = pattern, GUARD + count
        padded = GUARD + count + GUARD
        self._buffer = torch.full((padded,), pattern, dtype=torch.uint8, device=device)
        inner = self._buffer[GUARD : self._end]
        self.tensor = (
            inner.view(dtype).view(shape)
            if count
            else torch.empty(shape, dtype=dtype, device=device)
        )
        if self._content is not None and count:
            inner.copy_(self._content.view(torch.uint8))

    def bands_intact(self) -> Tensor:
        """Whether no byte of the bands has changed: one bool on the device."""
        bands = torch.cat((self._buffer[:GUARD], self._buffer[self._end :]))
        return (bands == self._pattern).all()

    def unchanged(self) -> Tensor:
        """Whether the bands and the content, if there was any, are as they were."""
        if self._content is None or not self._content.numel():
            return self.bands_intact()
        inner = self._buffer[GUARD : self._end]
        return self.bands_intact() & (inner == self._content.view(torch.uint8)).all()
