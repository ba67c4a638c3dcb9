"""The part ``topk``: ``topk_indices`` on the shapes of a sparse-attention indexer.

A chain is one call after the other, on scores that are three times the L2 cache together, so that
they come from memory; where these are few calls, all of them several times, so that the start of a
replay does not count. The figure is the median of the replays divided by the number of calls. The
ids of the last call are compared with the oracle.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from router_runtime import spec, topk_indices
from router_runtime.device.kernels import Kernels
from router_runtime.device.launch import LoadedKernel
from router_runtime.format.manifest import Entry
from router_runtime.routing.topk_indices import choose
from tests.bench.chain import CACHES
from tests.bench.machine import Machine, attempt
from tests.bench.topk_rows import PATTERNS, RANDOM, Rows

KERNEL = "topk_indices"
PEER = "torch.topk"

#: Bytes a microsecond that an H200 reads, measured: 4.2 TB/s of 4.8 nominal.
_MEMORY_RATE = 4.2e6
#: Calls with scores of their own, at most; calls of a chain, at least.
_MOST_CALLS, LEAST_CALLS = 96, 24
#: Rows of a result that are compared with the oracle, at most.
_CHECKED_ROWS = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of fp32 scores, and the microseconds that a call may take on an H200: ``bar_us``, or
    ``bar_floors`` times what reading the scores takes; neither: there is no bar.
    """

    rows: int
    columns: int
    top_k: int
    bar_us: float | None = None
    bar_floors: float | None = None

    @property
    def floor_us(self) -> float:
        """What reading the scores takes on an H200."""
        return 4 * self.rows * self.columns / _MEMORY_RATE

    @property
    def most_us(self) -> float | None:
        """The bar in microseconds."""
        return self.bar_us if self.bar_floors is None else self.bar_floors * self.floor_us


SHAPES = (
    *(Shape(1, 262144, k, bar_us=8.0) for k in (512, 1024)),
    *(Shape(64, 262144, k, bar_floors=1.6) for k in (512, 1024)),
    *(Shape(256, 262144, k, bar_floors=1.4) for k in (512, 1024)),
    *(Shape(1024, 262144, k, bar_floors=1.4) for k in (512, 1024)),
    Shape(64, 1048576, 512, bar_floors=1.4),
    Shape(64, 1048576, 2048),
    Shape(256, 16384, 512, bar_floors=2.0),
    Shape(4, 8192, 512, bar_us=5.0),
    Shape(1, 16384, 512),
    Shape(1, 131072, 512),
    Shape(64, 131072, 512),
    Shape(1, 1048576, 512),
)
#: The shapes on which every pattern is timed.
HOSTILE = tuple(
    Shape(rows, columns, 512)
    for rows, columns in ((1, 262144), (64, 262144), (256, 262144), (256, 16384), (4, 8192))
)
#: Those of a dry run.
_TINY = (Shape(2, 300, 16), Shape(1, 64, 8))


@dataclass(frozen=True, slots=True)
class TopkCell:
    """Microseconds of a call. ``low_us`` and ``high_us`` are the 10th and the 90th percentile of
    the replays; ``served_by`` is the entry of ours that served; ``wrong_rows`` of those checked.
    """

    rows: int
    columns: int
    top_k: int
    pattern: str
    contender: str
    floor_us: float
    bar_us: float | None
    calls: int
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    served_by: str | None = None
    wrong_rows: int | None = None
    error: str | None = None


#: Writes the ids of one call.
_Call = Callable[[Tensor, Tensor], object]


class Topk:
    """Measures the cells of the part.

    Args:
        machine: Where.
        kernels: The artifacts on the device; None on a CPU.
        entries: Those of the kernel that run there. They need no evidence: results are checked.
        alone: Whether each variant is timed by itself too.
        replays: Of each chain.

    """

    def __init__(
        self,
        machine: Machine,
        kernels: Kernels | None,
        entries: Sequence[Entry],
        alone: bool,
        replays: int,
    ) -> None:
        self._machine, self._kernels, self._replays = machine, kernels, replays
        self._entries = [entry for entry in entries if entry.constants["SCORE_BYTES"] == 4]
        self._alone = alone
        self._loaded: dict[str, LoadedKernel] = {}

    def cells(self) -> Iterator[TopkCell]:
        """Every cell, shape by shape. Raises Broken after the cell that broke the device."""
        cuda = self._machine.device.type == "cuda"
        for shape in SHAPES if cuda else _TINY:
            yield from self._cells(shape, RANDOM, peer=True)
        for shape in HOSTILE if cuda else _TINY[:1]:
            for pattern in PATTERNS:
                if pattern != RANDOM:  # which has been timed
                    yield from self._cells(shape, pattern, peer=False)

    def _cells(self, shape: Shape, pattern: str, *, peer: bool) -> Iterator[TopkCell]:
        machine = self._machine
        nbytes = 4 * shape.rows * shape.columns
        calls = min(max(math.ceil(CACHES * machine.l2_bytes / nbytes), 2), _MOST_CALLS)
        drawn = Rows(shape.rows * calls, shape.columns, machine.device).draw(pattern)
        pool = drawn.view(calls, shape.rows, shape.columns)
        blank = TopkCell(
            *(shape.rows, shape.columns, shape.top_k, pattern, KERNEL),
            *(shape.floor_us, shape.most_us, calls),
        )
        for entry in self._contenders(shape):
            key = None if entry is None else entry.key
            yield self._measure(pool, dataclasses.replace(blank, served_by=key), self._ours(entry))
        for entry in self._serving(shape) if self._alone else []:
            named = dataclasses.replace(
                blank, contender=f"{KERNEL}/{entry.variant}", served_by=entry.key
            )
            yield self._measure(pool, named, self._ours(entry))
        if peer:
            named = dataclasses.replace(blank, contender=PEER)
            yield self._measure(
                pool, named, lambda scores, _: torch.topk(scores, shape.top_k, sorted=False)
            )

    def _serving(self, shape: Shape) -> list[Entry]:
        """The entries whose limits the shape is within."""
        sizes = {"rows": shape.rows, "row_length": shape.columns, "top_k": shape.top_k}
        limits = [(entry, entry.contract.limits) for entry in self._entries]
        return [
            entry
            for entry, own in limits
            if all(own[name][0] <= size <= own[name][1] for name, size in sizes.items())
        ]

    def _contenders(self, shape: Shape) -> list[Entry | None]:
        """The entry that the op would choose; None for a CPU, which has no entries."""
        if self._kernels is None:
            return [None]
        entries = self._serving(shape)
        sizes = (4, shape.rows, shape.columns, shape.top_k)
        return [choose(entries, sizes, self._kernels.facts.sms)] if entries else []

    def _ours(self, entry: Entry | None) -> _Call:
        if entry is None:
            return lambda scores, ids: ids.copy_(topk_indices(scores, ids.shape[1]))

        def call(scores: Tensor, ids: Tensor) -> None:
            if entry.key not in self._loaded:
                assert self._kernels is not None
                self._loaded[entry.key] = self._kernels.load_entry(entry)
            stream = torch.cuda.current_stream(scores.device).cuda_stream
            self._loaded[entry.key].launch(stream, **launch_arguments(scores, ids))

        return call

    def _measure(self, pool: Tensor, blank: TopkCell, call: _Call) -> TopkCell:
        shape = (blank.calls, blank.rows, blank.top_k)
        ids = torch.empty(shape, dtype=torch.int32, device=pool.device)

        length = max(blank.calls, LEAST_CALLS)

        def chain() -> None:
            for index in range(length):
                call(pool[index % blank.calls], ids[index % blank.calls])

        def timed() -> TopkCell:
            times, _ = self._machine.timed(chain, self._replays)
            each = [time / length for time in times]
            wrong = None if blank.contender == PEER else _wrong_rows(pool[-1], ids[-1])
            deciles = statistics.quantiles(each, n=10) if len(each) > 1 else each * 9
            return dataclasses.replace(
                blank,
                median_us=statistics.median(each),
                low_us=deciles[0],
                high_us=deciles[-1],
                wrong_rows=wrong,
                error=f"wrong: {wrong} of the rows checked differ from the oracle"
                if wrong
                else None,
            )

        found = attempt(timed, self._machine)
        return dataclasses.replace(blank, error=found) if isinstance(found, str) else found


def launch_arguments(scores: Tensor, ids: Tensor) -> dict[str, Any]:
    """The arguments of a launch on whole rows, by the names of the contract."""
    rows, columns = scores.shape
    return {
        **dict.fromkeys(("row_starts", "row_ends", "page_table", "requests", "offsets")),
        **dict.fromkeys(("values_out", "slots_out")),
        **dict.fromkeys(("page_rows", "page_columns", "page_stride", "sorted", "nan_first"), 0),
        **{"scores": scores, "ids_out": ids, "rows": rows, "row_length": columns},
        **{"row_stride": scores.stride(0), "top_k": ids.shape[1], "page_size": 1},
    }


def _wrong_rows(scores: Tensor, ids: Tensor) -> int:
    """Rows, among those checked, whose ids are not the oracle's."""
    count = min(len(scores), _CHECKED_ROWS)
    rows = torch.linspace(0, len(scores) - 1, count, device=scores.device).round().long()
    return int((spec.topk_indices(scores[rows], ids.shape[1]) != ids[rows]).any(dim=1).sum())
