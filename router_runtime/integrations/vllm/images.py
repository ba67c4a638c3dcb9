"""Which tokens are parts of images: five consecutive token ids stand for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: How many token ids, from the first, stand for parts of images.
IDS = 5


class _Known(NamedTuple):
    forward_pass: weakref.ref[Any]
    capturing: bool
    token_ids: Tensor
    first: int
    mask: Tensor


class ImageMasks:
    """The mask of a forward pass, computed once for all its layers.

    A mask belongs to one forward pass and one tensor of token ids. A graph capture computes its
    own, so that a replay computes it again.
    """

    def __init__(self, forward_pass: Callable[[], Any]) -> None:
        """``forward_pass`` returns the object of the forward pass in progress, or None."""
        self._forward_pass = forward_pass
        self._known: _Known | None = None

    def mask(self, token_ids: Tensor, first: int) -> Tensor:
        """bool ``[tokens]``: the ids from ``first`` on that stand for parts of images."""
        now = self._forward_pass()
        capturing = token_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        known = self._known
        if (
            known is not None
            and now is not None
            and known.forward_pass() is now
            and known.capturing == capturing
            and known.token_ids is token_ids
            and known.first == first
        ):
            return known.mask
        mask = (token_ids >= first) & (token_ids < first + IDS)
        self._known = (
            None if now is None else _Known(weakref.ref(now), capturing, token_ids, first, mask)
        )
        return mask
