"""A device as a call needs it: its outputs, its current stream, whether it is current; and what
construction needs: the device itself and its kernels.
"""

from __future__ import annotations

import contextlib
import operator
import os
import typing
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.device.kernels import Kernels, kernels_on
from router_runtime.errors import InputError, explain
from router_runtime.format.advice import runtime
from router_runtime.routing.checks import wrong_value

#: torch stores the number of a GPU in 8 bits and takes a larger one for another.
_MAX_GPU = 127


class Placement:
    """One device, with what every call needs from torch looked up beforehand.

    Attributes:
        device: the device.
        captured: if set, called once, by the next launch that a CUDA graph captures.
        several: whether there are other GPUs, of which one may be current.

    """

    __slots__ = (
        *("__weakref__", "_index", "_new_floats", "_new_integers", "captured", "device"),
        "several",
    )

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured: Callable[[], None] | None = None
        self._index = device.index or 0
        self.several = device.type == "cuda" and torch.cuda.device_count() > 1
        # ``new_empty`` of an existing tensor takes half the time of ``torch.empty`` with keywords.
        self._new_floats = torch.empty(0, dtype=torch.float32, device=device).new_empty
        self._new_integers = torch.empty(0, dtype=torch.int32, device=device).new_empty
        if device.type == "cuda":
            _on_gpus.add(self)

    def outputs(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Uninitialised (fp32, int32) of that shape, from torch's allocator."""
        return self._new_floats(rows, columns), self._new_integers(rows, columns)

    def floats(self, rows: int, columns: int) -> Tensor:
        """Uninitialised fp32 of that shape, from torch's allocator."""
        return self._new_floats(rows, columns)

    def integers(self, rows: int, columns: int) -> Tensor:
        """Uninitialised int32 of that shape, from torch's allocator."""
        return self._new_integers(rows, columns)

    def stored(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A result of ``spec.py``, whose strides depend on its inputs, in contiguous tensors."""
        outputs = self.outputs(*ids.shape)
        return outputs[0].copy_(values), outputs[1].copy_(ids)

    def refuse_calls(self) -> None:
        """Make every later call end in the error of a forked child."""
        self.several = False
        self._new_floats = self._new_integers = _refused_after_fork  # type: ignore[assignment]

    def stream(self) -> int:
        """The raw handle of torch's current stream on the device, for a launch.

        ``torch.cuda.current_stream().cuda_stream`` builds a Stream object on the way, which takes
        ten times as long; the code that torch.compile generates calls this same function.
        """
        if self.captured is not None and _capturing(self.device):
            captured, self.captured = self.captured, None
            captured()
        return torch._C._cuda_getCurrentRawStream(self._index)

    def elsewhere(self) -> bool:
        """Whether another device is current, and a launch on its default stream would go there; to
        be asked where there are ``several``.
        """
        return torch.cuda.current_device() != self._index

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the device current for a block."""
        return torch.cuda.device(self.device)


_on_gpus: weakref.WeakSet[Placement] = weakref.WeakSet()

CPU = Placement(torch.device("cpu"))


def _capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured. DriverError if CUDA no longer answers."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError as error:
        driver.refuse_fork()
        raise driver.lost_error(f"current stream of {device}", error) from error


def _refused_after_fork(*shape: int) -> Any:
    raise driver.fork_error()


def _refuse_after_fork() -> None:
    """Make every call in a forked child end in our error: its copy of CUDA's state is dead. Every
    call allocates outputs first, where torch's own error, if there is one, says less.
    """
    for placement in list(_on_gpus):
        placement.refuse_calls()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_after_fork)


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


@contextlib.contextmanager
def quiet(device: torch.device, what: str) -> Iterator[None]:
    """A block that writes what kernels of any stream may be reading: the host waits for the device
    before it and after it. Raises InputError, starting with ``what``, during a graph capture.
    """
    if device.type != "cuda":
        yield
        return
    refuse_capture(what)
    torch.cuda.synchronize(device)
    yield
    torch.cuda.synchronize(device)


def resolved_device(device: torch.device | str | int) -> torch.device:
    """``device`` with the index that it means now. Raises InputError for one that is neither a CPU
    nor a GPU that torch can use, and DriverError in a forked child of a process that used CUDA.
    """
    if isinstance(device, typing.SupportsIndex):
        _check_number(device)
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise wrong_value("device", "'cpu' or a CUDA device", str(device)) from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise wrong_value("device", "'cpu' or a CUDA device", str(resolved))
    driver.refuse_fork()
    if torch.cuda._is_in_bad_fork():  # torch initialised it, before this package did
        raise driver.fork_error()
    if not torch.cuda.is_available():
        raise InputError(
            explain(
                "device",
                expected=f"a GPU that torch {torch.__version__} can use for {resolved}",
                found="none",
                remedy=f"use device='cpu', or see: {runtime('doctor')}",
            )
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    return torch.device("cuda", index)


def _check_number(number: typing.SupportsIndex) -> None:
    """Raise InputError for what is no number that a GPU can have, such as True."""
    if isinstance(number, bool) or not 0 <= operator.index(number) <= _MAX_GPU:
        expected = f"'cpu' or a CUDA device, by number from 0 to {_MAX_GPU}"
        raise wrong_value("device", expected, number)


def kernels_for(
    device: torch.device, artifacts: str | os.PathLike[str] | None = None
) -> Kernels | None:
    """The kernels that serve Routers on ``device``; None on a CPU, which needs none.

    Raises InputError while the current stream is being captured into a graph.
    """
    if device.type == "cpu":
        return None
    refuse_capture("building a Router")
    return kernels_on(device.index, artifacts)
