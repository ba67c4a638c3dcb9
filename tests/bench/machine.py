"""Where a chain runs and how it is timed: on a GPU as one CUDA graph, on a CPU by the clock.

The CPU stands in for a GPU in a dry run: the same code runs from the options to the report, and
its figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.errors import DriverError, explain
from tests.bench.link import Link, compile_link

#: A GPU that idled through a compilation needs this long at work to be back at its clocks.
WARM_SECONDS = 0.03

T = TypeVar("T")


class Machine(Protocol):
    """``timed`` runs a chain ``replays`` times and returns the microseconds each took, and what the
    chain's last router gave. ``link`` is the tiny kernel. ``facts`` goes into the report.
    """

    device: torch.device
    l2_bytes: int

    def link(self, previous: Tensor, following: Tensor, dependent: bool) -> None: ...

    def timed(self, chain: Callable[[], T], replays: int) -> tuple[list[float], T]: ...

    def synchronize(self) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class Gpu:
    """torch's current GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DriverError(
                explain(
                    "benchmark",
                    expected=f"a GPU that torch {torch.__version__} can use",
                    found="none",
                    remedy="run it where there is one (make bench PYTHON_GPU=python3), or try "
                    "--dry-run",
                )
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes: int = self._properties.L2_cache_size
        torch.zeros(1, device=self.device)  # makes the context that the link is loaded into
        # One stream for warming up and for capturing: cuBLAS keeps its workspace by stream, and a
        # capture must not be the first to need it.
        self._stream = torch.cuda.Stream(self.device)
        self._link = Link(compile_link(self._properties.major, self._properties.minor))

    def link(self, previous: Tensor, following: Tensor, dependent: bool) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._link.launch(previous, following, stream, dependent)

    def timed(self, chain: Callable[[], T], replays: int) -> tuple[list[float], T]:
        stream = self._stream
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(stream):
            chain()  # compiles, loads and allocates: a capture must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a compiler's helper thread may do as it likes meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            kept = chain()
        start, end = _timing_event(), _timing_event()
        times: list[float] = []
        with torch.cuda.stream(stream):
            warm_until = time.perf_counter() + WARM_SECONDS
            while time.perf_counter() < warm_until:
                graph.replay()
                stream.synchronize()
            for _ in range(replays):
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
        return times, kept

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self._properties.name,
            "compute_capability": [self._properties.major, self._properties.minor],
            "multiprocessors": self._properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": self._properties.total_memory,
            "driver": driver.driver_version(),
        }


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Cpu:
    """The stand-in. Its cache is tiny, so that chains are short."""

    device = torch.device("cpu")
    l2_bytes = 4096

    def link(self, previous: Tensor, following: Tensor, dependent: bool) -> None:
        following[:, 0] = previous[:, 0]

    def timed(self, chain: Callable[[], T], replays: int) -> tuple[list[float], T]:
        kept = chain()
        times: list[float] = []
        for _ in range(replays):
            start = time.perf_counter()
            kept = chain()
            times.append((time.perf_counter() - start) * 1e6)
        return times, kept

    def synchronize(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"name": "dry run on a CPU", "compute_capability": [0, 0], "driver": 0}


class Broken(RuntimeError):
    """The device answers no more: nothing after this can be measured in this process."""


def attempt(action: Callable[[], T], machine: Machine) -> T | str:
    """What ``action`` returns, or why it could not. Raises Broken if the device is gone too.

    One contender's failure is a result like any other, and the others go on.
    """
    try:
        return action()
    except ImportError as error:
        return f"skipped: {error}"
    except Exception as error:
        text = f"failed: {type(error).__name__}: {error}"
        try:
            machine.synchronize()
        except Exception as dead:
            raise Broken(f"{text}; and then the device: {dead}") from error
        return text
