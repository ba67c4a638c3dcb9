"""Workspaces: buffers in device memory for kernels that divide the experts into groups.

The clusters of the groups of one token exchange their best experts (candidates) through it and
count, by a ticket for each token, which of them is the last and merges.

Two launches that can overlap never share a workspace. Launches on one stream use it in order, under
programmatic dependent launch too. There a launch may start before the one before it has ended, but
each of its CTAs executes the dependency wait (``griddepcontrol.wait``), which returns when the
earlier launch has ended and its stores are visible, before it stores to global memory or touches
the workspace. Only what no launch writes, such as the packed weights, is read before the wait.

So all routers of one kernel share one workspace for each stream. It is made when a router is built,
for the stream that is current then, and for another stream by the first launch on it.

A captured graph can be replayed at any time and on any stream. Its launches that were captured on
one stream run in order within a replay, and two replays of one graph do not overlap, so each
capture has one workspace for each stream that it captured. It is never used for anything else,
because the graph holds its address.

A kernel expects tickets and candidates to be zero. The cluster that merges a token sets that
token's back to zero, so a workspace is zeroed only once, when it is made.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.device.launch import LoadedKernel

#: How many workspaces of captured launches are allocated at a time.
_SLOTS = 8

#: The handle that means another stream in every thread (CU_STREAM_PER_THREAD).
_PER_THREAD_STREAM = 2


class Workspaces:
    """The workspaces of one kernel on one device, ``size`` bytes each.

    They live as long as a router that uses the kernel.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = -(-size // 256) * 256  # as aligned as an allocation of its own
        self._device = device
        self._buffers: list[Tensor] = []
        self._addresses: dict[object, int] = {}
        self._by_capture: dict[tuple[int, int], int] = {}
        self._free: list[int] = []
        self._lock = threading.Lock()

    def address(self, stream: int) -> int:
        """The workspace for a launch on ``stream``, the current stream; null if none is needed."""
        if not self._size:
            return 0
        if torch.cuda.is_current_stream_capturing():
            return self._captured(stream)
        return self._addresses.get(stream) or self._on_stream(stream)

    def _on_stream(self, stream: int) -> int:
        key = (stream, threading.get_ident()) if stream == _PER_THREAD_STREAM else stream
        with self._lock:
            if key not in self._addresses:
                self._addresses[key] = self._zeros(1, stream)
            return self._addresses[key]

    def _captured(self, stream: int) -> int:
        key = _capture_id(stream), stream
        with self._lock:
            if key not in self._by_capture:
                if not self._free:
                    self._grow()
                self._by_capture[key] = self._free.pop()
            return self._by_capture[key]

    def _grow(self) -> None:
        """Allocate more workspaces for captured launches.

        They are zeroed now and not by the graph: a captured memset would run at every replay,
        between two kernels that could otherwise overlap.
        """
        first = self._zeros(_SLOTS)
        self._free.extend(range(first, first + _SLOTS * self._size, self._size))

    def _zeros(self, count: int, stream: int | None = None) -> int:
        """The address of ``count`` new workspaces, allocated for ``stream`` or for one that is not
        being captured.

        Done in a thread of its own. While ``torch.compile`` warms a CUDA graph up, what its thread
        allocates goes to the graph's memory pool, where torch tolerates nothing that outlives the
        warm-up.
        """

        def allocate() -> Tensor:
            with driver.relaxed_capture():
                own = (
                    _idle_stream(self._device)
                    if stream is None
                    else torch.cuda.ExternalStream(stream, self._device)  # type: ignore[no-untyped-call]
                )
                with torch.cuda.stream(own):
                    shape = count * self._size
                    buffer = torch.zeros(shape, dtype=torch.uint8, device=self._device)
                own.synchronize()
            return buffer

        with ThreadPoolExecutor(1) as thread:
            buffer = thread.submit(allocate).result()
        self._buffers.append(buffer)
        return buffer.data_ptr()


#: The stream of each device on which workspaces of captured launches are allocated.
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _idle_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is not being captured.

    It is the same one each time where possible: torch's allocator keeps memory apart by stream, so
    that a workspace of a few kilobytes takes 2 MiB on a stream that had none.
    """
    stream = _streams.get(device)
    while True:
        if stream is None:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                _streams[device] = stream
                return stream
        stream = None


def _capture_id(stream: int) -> int:
    """The number of the capture that ``stream`` is part of, which no other capture has."""
    api = driver.bindings()
    # Bindings of CUDA 12 have a query of another name that supports programmatic dependencies.
    query = getattr(api, "cuStreamGetCaptureInfo_v3", None) or api.cuStreamGetCaptureInfo
    _, capture, *_ = driver.check(query(stream), "cuStreamGetCaptureInfo")
    return int(capture)


_lock = threading.Lock()
_shared: weakref.WeakValueDictionary[LoadedKernel, Workspaces] = weakref.WeakValueDictionary()


def workspaces_of(kernel: LoadedKernel, device: torch.device) -> Workspaces:
    """The workspaces that all routers share which use this loaded kernel on ``device``."""
    with _lock:
        found = _shared.get(kernel)
        if found is None:
            found = Workspaces(kernel.entry.contract.workspace_bytes, device)
            _shared[kernel] = found
        return found
