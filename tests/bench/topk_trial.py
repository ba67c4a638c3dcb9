"""Every variant of topk_indices on a GPU: exact ids on hostile rows, then times.

``python -m tests.bench.topk_trial --artifacts DIR``. Kernels are loaded by the manifest, without
evidence. Right means: equal, position by position, to a stable sort.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.loader import load_entry
from router_runtime.format.target import Target

#: name -> rows of fp32 ``[rows, columns]``
HOSTILE: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {}


def hostile(function: Callable[[int, int, torch.Generator], Tensor]) -> None:
    HOSTILE[function.__name__] = function


def normal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=g, device="cuda")


def uniform(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, generator=g, device="cuda")


hostile(normal)


@hostile
def equal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.full((rows, columns), 0.75, device="cuda")


@hostile
def two_values(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return (uniform(rows, columns, g) < 0.5).float()


@hostile
def descending(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.arange(columns, 0, -1, device="cuda").float().expand(rows, columns).contiguous()


@hostile
def ascending(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.arange(columns, device="cuda").float().expand(rows, columns).contiguous()


@hostile
def relu(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return (normal(rows, columns, g) - 3.2).relu() * torch.where(uniform(rows, columns, g) < 0.5, -1.0, 1.0).relu()


@hostile
def signed_zeros(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.where(uniform(rows, columns, g) < 0.5, -0.0, 0.0)


@hostile
def nan_runs(rows: int, columns: int, g: torch.Generator) -> Tensor:
    scores = normal(rows, columns, g)
    scores[:, columns // 7 :] = float("nan")
    return scores


@hostile
def specials(rows: int, columns: int, g: torch.Generator) -> Tensor:
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-40],
        device="cuda",
    )
    return values[torch.randint(0, 10, (rows, columns), generator=g, device="cuda")]


@hostile
def subnormals(rows: int, columns: int, g: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2**12, (rows, columns), generator=g, device="cuda", dtype=torch.int32)
    return bits.view(torch.float32)


@hostile
def outlier(rows: int, columns: int, g: torch.Generator) -> Tensor:
    scores = normal(rows, columns, g)
    scores[:, columns // 3] = 1e38
    return scores


@hostile
def any_bits(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.randint(
        -(2**31), 2**31, (rows, columns), generator=g, device="cuda", dtype=torch.int64
    ).int().view(torch.float32)


@hostile
def clustered(rows: int, columns: int, g: torch.Generator) -> Tensor:
    scores = normal(rows, columns, g)
    scores[:, columns // 2 : columns // 2 + 6000] += 10
    return scores


def beats_sample(size: int) -> Callable[[int, int, torch.Generator], Tensor]:
    """Large scores at just the places that the kernels sample: the first bound is too high."""

    def make(rows: int, columns: int, g: torch.Generator) -> Tensor:
        bits = min(max((columns // 32).bit_length(), 8), size.bit_length()) - 1
        i = torch.arange(1 << bits, device="cuda")
        places = ((i << 16 | (i * 2654435761 & 0xFFFFFFFF) >> 16) * columns) >> 16 + bits
        places = places.clamp(max=columns - 1)
        scores = normal(rows, columns, g)
        scores[:, places] += 100
        return scores

    return make


HOSTILE |= {f"beats{size}": beats_sample(size) for size in (512, 1024, 2048)}


def ranks(scores: Tensor, nan_first: bool) -> Tensor:
    scores = scores.float()
    scores = torch.where(scores == 0, torch.zeros_like(scores), scores)
    if not nan_first:
        return torch.where(scores.isnan(), torch.full_like(scores, -torch.inf), scores)
    bits = scores.view(torch.int32).long()
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return torch.where(scores.isnan(), torch.full_like(keys, 2**40), keys)


def expected(scores: Tensor, k: int, starts: Tensor, ends: Tensor, ordered: bool, nan_first: bool) -> Tensor:
    rows, columns = scores.shape
    found = torch.full((rows, k), -1, dtype=torch.int32, device="cuda")
    for row in range(rows):
        start = max(int(starts[row]), 0)
        end = min(int(ends[row]), columns)
        if end <= start:
            continue
        part = ranks(scores[row, start:end], nan_first)
        order = torch.sort(part, descending=True, stable=True).indices[:k]
        if not ordered:
            order = order.sort().values
        found[row, : len(order)] = order.int()
    return found


def arguments(scores: Tensor, k: int, **given: Any) -> dict[str, Any]:
    rows, columns = scores.shape
    empty = dict.fromkeys(
        (
            "row_starts", "row_ends", "page_table", "requests", "offsets", "values_out", "ids_out",
            "slots_out",
        )
    )
    numbers = dict.fromkeys(("page_rows", "page_columns", "page_stride", "sorted", "nan_first"), 0)
    own = {
        "scores": scores, "rows": rows, "row_length": columns, "row_stride": scores.stride(0),
        "top_k": k, "page_size": 1,
    }
    return {**empty, **numbers, **own, **given}


def launch(kernel: LoadedKernel, **given: Any) -> None:
    kernel.launch(torch.cuda.current_stream().cuda_stream, **given)


def check(kernels: dict[str, LoadedKernel], seconds: float) -> int:
    g = torch.Generator("cuda").manual_seed(1)
    begun, wrong, tried = time.time(), 0, 0
    for turn, (columns, rows) in enumerate(
        ((262144, 3), (20000, 5), (300, 9), (65536, 3), (131071, 2), (7, 3), (2**21, 1), (9001, 4), (1 << 20, 1))
    ):
        for pattern, make in HOSTILE.items():
            if time.time() - begun > seconds:
                print(f"checked {tried}, wrong {wrong}: out of time at {columns} {pattern}")
                return wrong
            whole = torch.full((rows, columns + 13), float("inf"), device="cuda")
            scores = whole[:, turn % 3 : turn % 3 + columns]
            scores.copy_(make(rows, columns, g))
            starts = torch.randint(0, max(columns // 3, 1), (rows,), generator=g, device="cuda").int()
            ends = (torch.randint(0, columns // 2, (rows,), generator=g, device="cuda") + columns // 2 + 5).int()
            starts[0], ends[0] = -3, columns + 5
            if turn % 2:
                ends[-1] = starts[-1] - 1
            cache: dict[Any, Tensor] = {}
            for name, kernel in kernels.items():
                half = kernel.entry.constants["SCORE_BYTES"] == 2
                given = scores.bfloat16() if half else scores
                most = int(kernel.entry.constants["MAX_TOP_K"])
                for k in (512, (1, 2048, most)[turn % 3]):
                    ordered = bool(turn % 2) if k == 512 else k == most
                    nan_first = pattern in ("specials", "any_bits") and k == 512
                    key = half, k, ordered, nan_first
                    if key not in cache:
                        cache[key] = expected(given, k, starts, ends, ordered, nan_first)
                    wanted = cache[key]
                    ids = torch.full((rows, k), 77, dtype=torch.int32, device="cuda")
                    launch(kernel, **arguments(given, k, row_starts=starts, row_ends=ends, ids_out=ids,
                                               sorted=int(ordered), nan_first=int(nan_first)))
                    torch.cuda.synchronize()
                    tried += 1
                    if not torch.equal(ids, wanted):
                        wrong += 1
                        if wrong < 20:
                            row = int((ids != wanted).any(1).nonzero()[0, 0])
                            at = int((ids[row] != wanted[row]).nonzero()[0, 0])
                            print("WRONG", name, pattern, scores.shape, "k", k, "sorted", ordered,
                                  "row", row, int(starts[row]), int(ends[row]), "at", at,
                                  ids[row, at : at + 4].tolist(), wanted[row, at : at + 4].tolist(),
                                  "differ", int((ids != wanted).sum()))
    print(f"checked {tried}, wrong {wrong}, {time.time() - begun:.1f} s")
    return wrong


def timed(run: Callable[[int], None], count: int, replays: int = 7) -> float:
    """Median microseconds of a call: a graph of calls on different inputs, replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            run(index)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
    return sorted(times)[len(times) // 2]


SHAPES = (
    (1, 262144, (512, 1024)), (64, 262144, (512, 1024)), (256, 262144, (512, 1024)),
    (1024, 262144, (512,)), (64, 1048576, (512, 2048)), (256, 16384, (512,)), (4, 8192, (512,)),
    (1, 131072, (512,)), (64, 131072, (512,)), (1, 1048576, (512,)), (16, 262144, (512,)), (1, 16384, (512,)),
)
#: bytes a microsecond
HBM = 4.2e6


def measure(kernels: dict[str, LoadedKernel], seconds: float, peers: bool) -> dict[str, Any]:
    begun, found = time.time(), {}
    g = torch.Generator("cuda").manual_seed(2)
    for rows in (1, 256):  # rows of no scores: what a launch costs
        scores, ends = normal(rows, 64, g), torch.zeros(rows, dtype=torch.int32, device="cuda")
        ids, cells = torch.empty(rows, 512, dtype=torch.int32, device="cuda"), {}
        for name, kernel in kernels.items():
            given = scores.bfloat16() if kernel.entry.constants["SCORE_BYTES"] == 2 else scores
            row = arguments(given, 512, ids_out=ids, row_ends=ends)
            cells[name] = timed(lambda _, kernel=kernel, row=row: launch(kernel, **row), 64)
        found[f"empty x{rows}"] = cells
        print(f"   empty x {rows:<5} | " + "  ".join(
            f"{name} {value:.2f}" for name, value in cells.items()), flush=True)
    for rows, columns, ks in SHAPES:
        size = rows * columns * 4
        count = min(max(-(-(200 << 20) // size), 2), 96)
        pool = normal(rows * count, columns, g).view(count, rows, columns)
        for k in ks:
            cells: dict[str, float] = {}
            for name, kernel in kernels.items():
                constants = kernel.entry.constants
                cluster = int(constants["BLOCKS_PER_ROW"])
                if constants["SCORE_BYTES"] == 2 or k > int(constants["MAX_TOP_K"]):
                    continue
                if rows * cluster > 2048 or (rows == 1 and columns // cluster > 300000):
                    continue
                ids = torch.empty(rows, k, dtype=torch.int32, device="cuda")

                def call(index: int, kernel: Any = kernel, ids: Tensor = ids, k: int = k) -> None:
                    launch(kernel, **arguments(pool[index], k, ids_out=ids))

                cells[name] = timed(call, count)
            if peers:
                cells["torch.topk"] = timed(
                    lambda index, k=k: torch.topk(pool[index], k, sorted=False), min(count, 16), 3
                )
            found[f"{columns}x{rows} k{k}"] = cells
            print(f"{columns:>8} x {rows:<5} k {k:<5} floor {size / HBM:8.2f} us | " + "  ".join(
                f"{name} {value:.2f}" for name, value in cells.items()), flush=True)
        del pool
        if time.time() - begun > seconds:
            print("out of time for the other shapes")
            break
    return found


def hostile_times(kernels: dict[str, LoadedKernel], seconds: float) -> dict[str, Any]:
    begun, found = time.time(), {}
    g = torch.Generator("cuda").manual_seed(3)
    for rows, columns, names in (
        (1, 262144, ("cluster16", "t_c16_1024")), (64, 262144, ("pair",)), (256, 262144, ("block",)),
        (256, 16384, ("block", "t_short")), (4, 8192, ("block", "t_short")),
    ):
        size = rows * columns * 4
        count = min(max(-(-(120 << 20) // size), 2), 64)
        for pattern, make in HOSTILE.items():
            pool = make(rows * count, columns, g).view(count, rows, columns)
            cells = {}
            for name in names:
                if name not in kernels:
                    continue
                ids = torch.empty(rows, 512, dtype=torch.int32, device="cuda")
                cells[name] = timed(
                    lambda index, name=name, ids=ids, pool=pool: launch(
                        kernels[name], **arguments(pool[index], 512, ids_out=ids)
                    ), count, 5)
            found[f"{columns}x{rows} {pattern}"] = cells
            print(f"{columns:>8} x {rows:<5} {pattern:<13}" + "  ".join(
                f"{name} {value:.2f}" for name, value in cells.items()), flush=True)
            if time.time() - begun > seconds:
                print("out of time for the other patterns")
                return found
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--check", type=float, default=15)
    parser.add_argument("--time", type=float, default=22)
    parser.add_argument("--hostile", type=float, default=8)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    capability = torch.cuda.get_device_capability()
    manifest = read_manifest(options.artifacts)
    kernels = {
        entry.variant: load_entry(entry, manifest, options.artifacts, 0)
        for entry in manifest.entries
        if entry.kernel == "topk_indices" and Target.parse(entry.target).runs_on(*capability)
        and (not options.only or entry.variant in options.only.split(","))
    }
    print(torch.cuda.get_device_name(), sorted(kernels), flush=True)
    wrong = check(kernels, options.check)
    found = {"times": measure(kernels, options.time, not options.no_peers),
             "hostile": hostile_times(kernels, options.hostile), "wrong": wrong}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
