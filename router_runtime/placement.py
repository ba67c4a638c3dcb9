"""A device as a call needs it: its outputs, its current stream, whether it is current."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from router_runtime.errors import InputError, explain


class Placement:
    """One device, with what the hot path asks of torch worked out beforehand."""

    __slots__ = ("_index", "_new_floats", "_new_integers", "_several", "device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index or 0
        self._several = device.type == "cuda" and torch.cuda.device_count() > 1
        # ``new_empty`` of a tensor at hand takes half the time of ``torch.empty`` with keywords.
        self._new_floats = torch.empty(0, dtype=torch.float32, device=device).new_empty
        self._new_integers = torch.empty(0, dtype=torch.int32, device=device).new_empty

    def outputs(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Uninitialised (fp32, int32) of that shape, from torch's allocator."""
        return self._new_floats(rows, columns), self._new_integers(rows, columns)

    def floats(self, rows: int, columns: int) -> Tensor:
        """Uninitialised fp32 of that shape, from torch's allocator."""
        return self._new_floats(rows, columns)

    def stored(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A result of ``spec.py``, whose strides depend on its inputs', in outputs of ours."""
        outputs = self.outputs(*ids.shape)
        return outputs[0].copy_(values), outputs[1].copy_(ids)

    def stream(self) -> int:
        """The raw handle of torch's current stream on the device.

        ``torch.cuda.current_stream().cuda_stream`` builds a Stream object on the way, some ten
        times the cost; the code that torch.compile generates calls this same function.
        """
        return torch._C._cuda_getCurrentRawStream(self._index)

    def elsewhere(self) -> bool:
        """True if another device is current, and a launch on its default stream would go there."""
        return self._several and torch.cuda.current_device() != self._index

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the device current for a block."""
        return torch.cuda.device(self.device)


CPU = Placement(torch.device("cpu"))


def refuse_capture(what: str) -> None:
    """Refuse to load or synchronise while the current stream is being captured into a graph."""
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            explain(
                what,
                expected="no CUDA graph capture in progress",
                found="the current stream is being captured",
                remedy="do it before the capture",
            )
        )
