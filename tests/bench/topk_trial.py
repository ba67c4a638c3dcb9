"""Every variant of ``topk_indices`` in a folder, on a GPU: exact ids on hostile rows, then times.

``python -m tests.bench.topk_trial --artifacts DIR [--only NAME,NAME] [--out FILE]``, less than a
minute. The times are of the shapes that have a bar, and of the fastest variants of a shape on
hostile rows. Kernels are loaded by the manifest, without evidence. Exact: equal to the oracle,
position by position. ``tests.bench.topk_variants`` builds a folder with candidates beside the
variants of the catalog.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.loader import load_entry
from router_runtime.format.target import Target
from router_runtime.verification.score_rows import first_columns_of_parts, sampled_columns
from tests.bench.topk import HOSTILE, LEAST_CALLS, SHAPES, Shape, launch_arguments
from tests.bench.topk_rows import PATTERNS, RANDOM, Rows

#: The device of all tensors.
DEVICE = "cuda"
#: Columns and rows of the calls whose ids are compared: the most that a variant holds and a little
#: less or more, and rows whose addresses are multiples of no vector.
CHECKED = (
    *((8192, 4), (16384, 3), (262144, 2), (131071, 2), (20000, 5), (300, 9), (7, 3), (9001, 4)),
    *((5003, 3), (65536, 2), (524288, 1), (2**20, 1), (2**21, 1)),
)
#: The size of the sample that the held form takes.
_SAMPLE = 512
#: Patterns that only the trial has.
BEATING = ("beats_sample", "beats_groups")
#: A variant is timed for a call of at most so many CTAs and, where that has one row, at most so
#: many columns a CTA.
_MOST_CTAS, _MOST_COLUMNS = 2048, 300_000
#: Bytes of the scores of a chain, so that they come from memory; calls of a chain, at most.
_CHAIN_BYTES, _MOST_CALLS = 200 << 20, 96
_WRONG_SHOWN = 20


class Trial:
    """The kernels of a folder on the current device, and seconds that remain."""

    def __init__(self, kernels: Mapping[str, LoadedKernel], seconds: float) -> None:
        self._kernels = kernels
        self._end = time.monotonic() + seconds
        self._random = torch.Generator(DEVICE).manual_seed(1)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def wrong(self) -> int:
        """Compare ids on every pattern. Returns how many results were not the oracle's."""
        tried = wrong = 0
        for turn, (columns, rows) in enumerate(CHECKED):
            for pattern in (*PATTERNS, *BEATING):
                if self.over():
                    print(f"INCOMPLETE: out of time at {columns} {pattern}")
                    return wrong + 1
                for found in self._compared(turn, columns, rows, pattern):
                    tried += 1
                    wrong += found is not None
                    if found is not None and wrong < _WRONG_SHOWN:
                        print("WRONG", found, flush=True)
        print(f"compared {tried} results, {wrong} wrong", flush=True)
        return wrong

    def _compared(self, turn: int, columns: int, rows: int, pattern: str) -> Iterator[str | None]:
        """For each kernel and k what is wrong, or None."""
        whole = torch.full((rows, columns + 13), torch.inf, device=DEVICE)
        scores = whole[:, turn % 3 : turn % 3 + columns]
        scores.copy_(drawn(rows, columns, pattern))
        starts, ends = self._integers(0, max(columns // 3, 1), rows), None
        ends = self._integers(columns // 2 + 5, columns + 5, rows)
        starts[0], ends[0] = -3, columns + 5
        if turn % 2:
            ends[-1] = starts[-1] - 1
        expected: dict[Any, Tensor] = {}
        for name, kernel in self._kernels.items():
            given = scores.bfloat16() if half(kernel) else scores
            longest, most = (
                kernel.entry.contract.limits[each][1] for each in ("row_length", "top_k")
            )
            if columns > longest:
                continue
            for k in (512, (1, 2048, most)[turn % 3]):
                options = {
                    "sorted": int(turn % 2 if k == 512 else k == most),
                    "nan_first": int(pattern == "any_bits" and k == 512),
                }
                key = half(kernel), k, *options.values()
                if key not in expected:
                    expected[key] = spec.topk_indices(
                        *(given, k, starts, ends),
                        in_rank_order=bool(options["sorted"]),
                        nan_first=bool(options["nan_first"]),
                    )
                ids = torch.full((rows, k), 77, dtype=torch.int32, device=DEVICE)
                bounds = {"row_starts": starts, "row_ends": ends}
                launch(kernel, {**launch_arguments(given, ids), **bounds, **options})
                different = (ids != expected[key]).any(dim=1)
                if not bool(different.any()):
                    yield None
                    continue
                row = int(different.nonzero()[0, 0])
                bounded = f"{int(starts[row])} to {int(ends[row])}"
                yield f"{name} {pattern} {rows} x {columns} k {k} {options} row {row}: {bounded}"

    def _integers(self, low: int, high: int, count: int) -> Tensor:
        drawn_ = torch.randint(low, high, (count,), generator=self._random, device=DEVICE)
        return drawn_.int()

    def times(self, shape: Shape, pattern: str, only: Collection[str] = ()) -> dict[str, float]:
        """Microseconds of a call by variant; those that the shape does not suit are left out."""
        size = 4 * shape.rows * shape.columns
        calls = min(max(-(-_CHAIN_BYTES // size), 2), _MOST_CALLS)
        pool = drawn(shape.rows * calls, shape.columns, pattern)
        pool = pool.view(calls, shape.rows, shape.columns)
        ids = torch.empty(shape.rows, shape.top_k, dtype=torch.int32, device=DEVICE)
        found = {}
        for name, kernel in self._kernels.items():
            ctas = int(kernel.entry.constants["BLOCKS_PER_ROW"])
            limits = kernel.entry.contract.limits
            if (
                half(kernel)
                or (only and name not in only)
                or shape.top_k > limits["top_k"][1]
                or shape.columns > limits["row_length"][1]
                or shape.rows * ctas > _MOST_CTAS
                or (shape.rows == 1 and shape.columns > _MOST_COLUMNS * ctas)
            ):
                continue
            chain = [launch_arguments(pool[i % calls], ids) for i in range(max(calls, LEAST_CALLS))]
            found[name] = timed(kernel, chain)
        return found

    def empty(self, rows: int) -> dict[str, float]:
        """Microseconds of a call whose rows have no scores: what a launch costs."""
        scores = torch.randn(rows, 64, device=DEVICE)
        ids = torch.empty(rows, 512, dtype=torch.int32, device=DEVICE)
        ends = {"row_ends": torch.zeros(rows, dtype=torch.int32, device=DEVICE)}
        return {
            name: timed(
                kernel,
                [{**launch_arguments(scores.bfloat16() if half(kernel) else scores, ids), **ends}]
                * 64,
            )
            for name, kernel in self._kernels.items()
        }


def half(kernel: LoadedKernel) -> bool:
    """Whether the kernel takes bf16 scores."""
    return kernel.entry.constants["SCORE_BYTES"] == 2


def drawn(rows: int, columns: int, pattern: str) -> Tensor:
    """Rows of one of the benchmark's patterns, or with large scores where a kernel looks first."""
    if pattern not in BEATING:
        return Rows(rows, columns, torch.device(DEVICE)).draw(pattern)
    scores = Rows(rows, columns, torch.device(DEVICE)).draw(RANDOM)
    large = (
        sampled_columns(columns, _SAMPLE)
        if pattern == "beats_sample"
        else first_columns_of_parts(columns)
    )
    scores[:, large.to(DEVICE)] += 100
    return scores


def launch(kernel: LoadedKernel, arguments: Mapping[str, Any]) -> None:
    """Launch on the current stream."""
    kernel.launch(torch.cuda.current_stream().cuda_stream, **arguments)


def timed(kernel: LoadedKernel, chain: list[dict[str, Any]], replays: int = 7) -> float:
    """Median microseconds of a call: a graph of the calls, replayed."""
    # What the default stream still does with memory that was freed and is used here again.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(kernel, chain[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in chain:
            launch(kernel, arguments)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(chain))
    return float(statistics.median(times))


def row(name: str, bar: float | None, found: Mapping[str, float]) -> str:
    """A line of a table: whether the fastest meets the bar, and all times, the fastest first."""
    ordered = sorted(found.items(), key=lambda each: each[1])
    best = ordered[0][1] if ordered else float("inf")
    told = "" if bar is None else f"bar {bar:6.1f} {'met' if best <= bar else 'MISSED'}"
    return f"{name:28} {told:18}" + "  ".join(f"{key} {us:.2f}" for key, us in ordered)


def load(folder: Path, only: Callable[[str], bool]) -> dict[str, LoadedKernel]:
    """The kernels of a folder that run on the current device, by variant."""
    capability = torch.cuda.get_device_capability()
    manifest = read_manifest(folder)
    return {
        entry.variant: load_entry(entry, manifest, folder, torch.cuda.current_device())
        for entry in manifest.entries
        if entry.kernel == "topk_indices"
        and Target.parse(entry.target).runs_on(*capability)
        and only(entry.variant)
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--seconds", type=float, default=55.0, help="at most")
    parser.add_argument("--out", type=Path, help="a file for the times, as JSON")
    options = parser.parse_args()
    torch.zeros(1, device=DEVICE)
    names = set(filter(None, options.only.split(",")))
    kernels = load(options.artifacts, lambda name: not names or name in names)
    print(torch.cuda.get_device_name(), *kernels, flush=True)
    trial = Trial(kernels, options.seconds)
    wrong = trial.wrong()
    found: dict[str, dict[str, float]] = {}

    def tell(name: str, bar: float | None, times: dict[str, float]) -> None:
        found[name] = times
        print(row(name, bar, times), flush=True)

    for rows in (1, 256):
        tell(f"no scores x {rows}", None, trial.empty(rows))
    fastest: dict[tuple[int, int], list[str]] = {}
    for shape in SHAPES:
        if not trial.over():
            times = trial.times(shape, RANDOM)
            tell(f"{shape.columns} x {shape.rows} k {shape.top_k}", shape.most_us, times)
            fastest.setdefault(
                (shape.rows, shape.columns), sorted(times, key=times.__getitem__)[:3]
            )
    for shape in HOSTILE:
        for pattern in (*PATTERNS, *BEATING):
            if not trial.over():
                times = trial.times(shape, pattern, fastest[shape.rows, shape.columns])
                tell(f"{shape.columns} x {shape.rows} {pattern}", None, times)
    if trial.over():
        print("INCOMPLETE: out of time")
    if options.out:
        options.out.write_text(json.dumps({"wrong": wrong, "times": found}, indent=1))
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
