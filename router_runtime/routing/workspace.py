"""The zeroed buffers in which a kernel's blocks count each other; no two launches that can overlap
share one.

Launches on one stream follow each other, so they share one buffer: for the stream on which a router
is built it is made then, for others by their first launch. A captured launch can be replayed at any
time on any stream, so each has its own, for the life of the router: a captured graph holds the
address. Kernels leave a buffer zeroed where it matters, so it is zeroed once, when it is made.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.routing.placement import Placement

#: Captured launches that one allocation serves.
_SLOTS = 8

#: The handle that means another stream in every thread (CU_STREAM_PER_THREAD).
_PER_THREAD_STREAM = 2


class Workspaces:
    """The buffers of one router's launches of one kernel, ``size`` bytes each."""

    def __init__(self, size: int, placement: Placement) -> None:
        self._size = -(-size // 256) * 256  # a slot starts where an allocation could
        self._placement = placement
        self._by_stream: dict[object, Tensor] = {}
        self._addresses: dict[object, int] = {}
        self._captured: list[Tensor] = []
        self._free: list[int] = []
        self._lock = threading.Lock()

    def address(self, stream: int) -> int:
        """The buffer for one launch on ``stream``, the current stream; null if none is needed."""
        if not self._size:
            return 0
        if torch.cuda.is_current_stream_capturing():
            return self._captured_slot()
        return self._addresses.get(stream) or self._stream_buffer(stream)

    def _stream_buffer(self, stream: int) -> int:
        key = (stream, threading.get_ident()) if stream == _PER_THREAD_STREAM else stream
        with self._lock:
            if key not in self._addresses:
                buffer = self._by_stream[key] = self._zeros(1)
                self._addresses[key] = buffer.data_ptr()
            return self._addresses[key]

    def _captured_slot(self) -> int:
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.pop()

    def _grow(self) -> None:
        """More slots, zeroed now and not by the graph: a captured memset would run at every replay,
        and would stand between two kernels that overlap.
        """
        with driver.relaxed_capture():
            stream = self._idle_stream()
            with torch.cuda.stream(stream):
                buffer = self._zeros(_SLOTS)
            stream.synchronize()
        self._captured.append(buffer)
        first = buffer.data_ptr()
        self._free.extend(range(first, first + buffer.numel(), self._size))

    def _idle_stream(self) -> torch.cuda.Stream:
        """A stream that is not being captured: torch hands out the same few in turn."""
        while True:
            stream = torch.cuda.Stream(self._placement.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    return stream

    def _zeros(self, count: int) -> Tensor:
        device = self._placement.device
        return torch.zeros(count * self._size, dtype=torch.uint8, device=device)
