"""``topk_indices``: what it refuses, which kernel it launches, and with which arguments.

``gpu`` is the fake driver, which reads the launch's argument memory and runs the oracle on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import router_runtime as rt
from router_runtime import spec
from router_runtime.device import kernels
from router_runtime.errors import InputError, ResolutionError
from router_runtime.routing import placement, row_kernels, topk_indices
from router_runtime.routing import row_ops as rows
from router_runtime.routing.placement import Placement

ROWS, COLUMNS, K = 5, 40, 7


@pytest.fixture
def indexer(
    gpu: Any, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Any:
    """The fake device with two variants: a row for a CTA, and a row for a cluster of 8."""
    sizes = {"SCORE_BYTES": 4, "BLOCKS_PER_SM": 1, "HELD": 0, "THREADS": 512, "LOADS": 8}
    gpu.entries += [
        build.entry(
            "topk_indices",
            build.indices(blocks, most),
            variant=variant,
            constants={**sizes, "BLOCKS_PER_ROW": blocks},
        )
        for variant, blocks, most in (("block", 1, 2048), ("cluster8", 8, 4096))
    ]
    half = dataclasses.replace(
        build.indices(),
        parameters=build.parameters("scores=ptr:bf16") + build.indices().parameters[1:],
    )
    gpu.entries.append(
        build.entry(
            "topk_indices",
            half,
            variant="half",
            constants={**sizes, "SCORE_BYTES": 2, "BLOCKS_PER_ROW": 1},
        )
    )
    folder = build.artifacts(tmp_path / "with topk_indices", gpu.entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    return gpu


def inputs(rows: int = ROWS) -> dict[str, Any]:
    """Every argument but the scores and k."""
    generator = torch.Generator().manual_seed(rows)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).int()

    return {
        "row_starts": integers(0, 20, rows),
        "row_ends": integers(10, COLUMNS, rows),
        "page_table": integers(0, 99, 3, 6)[:, :5],
        "page_size": 8,
        "requests": integers(-1, 4, rows),
        "offsets": integers(0, 9, rows),
        "sorted": True,
        "nan_first": True,
    }


def expected(scores: Tensor, k: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``(slots, ids)`` by spec.py."""
    ids = spec.topk_indices(
        scores,
        k,
        given.get("row_starts"),
        given.get("row_ends"),
        in_rank_order=given.get("sorted", False),
        nan_first=given.get("nan_first", False),
    )
    names = ("page_table", "requests", "offsets")
    size = given.get("page_size", 1)
    return spec.slots(ids, page_size=size, **{name: given.get(name) for name in names}), ids


def calls() -> list[tuple[Tensor, int, dict[str, Any]]]:
    scores = torch.randn(ROWS, COLUMNS + 3, generator=torch.Generator().manual_seed(1))
    scores[:, ::5], scores[:, ::7] = torch.nan, 0.5
    every = inputs()
    ragged = {name: every[name] for name in ("row_starts", "row_ends")}
    table = torch.arange(2 * ROWS * 4, dtype=torch.int32).view(ROWS, 2, 4)[:, 0]
    return [
        (scores, K, {}),
        (scores[:, :COLUMNS], 2 * COLUMNS, {"sorted": True}),
        (scores[:, :COLUMNS], K, every),
        (scores.T.contiguous().T, K, {"nan_first": True}),
        (scores[:1].expand(ROWS, -1), K, ragged),
        (scores, K, {"offsets": every["offsets"]}),
        (scores[:, 1:], K, {"page_table": table, "page_size": 16, **ragged}),
        (scores, K, {"page_table": table.T.contiguous().T, "page_size": 3}),
        (scores.bfloat16(), K, every),
        (scores[:0], K, {name: v[:0] for name, v in ragged.items()}),
    ]


def same(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.is_contiguous()


def test_on_the_cpu() -> None:
    for scores, k, given in calls():
        slots, ids = expected(scores, k, given)
        found = rt.topk_indices(scores, k, **given)
        same((found,), (slots,))
        same(torch.ops.dsv4.topk_indices.with_ids(scores, k, **given), (slots, ids))
        outputs = {name: torch.full_like(ids, 9) for name in ("slots_out", "ids_out")}
        torch.ops.dsv4.topk_indices.out(scores, k, **given, **outputs)
        same(outputs.values(), (slots, ids))
        alone = torch.full_like(ids, 9)
        torch.ops.dsv4.topk_indices.out(scores, k, **given, ids_out=alone)
        same((alone,), (ids,))


def test_on_a_device(indexer: Any) -> None:
    for scores, k, given in calls():
        slots, ids = expected(scores, k, given)
        indexer.launches.clear()
        same((topk_indices.indices_cuda(scores, k, **given),), (slots,))
        same(topk_indices.indices_with_ids_cuda(scores, k, **given), (slots, ids))
        out = torch.full_like(ids, 9)
        topk_indices.indices_out_cuda(scores, k, **given, slots_out=out)
        same((out,), (slots,))
        assert len(indexer.launches) == (3 if len(scores) else 0)


def test_scores_and_bounds_are_read_where_they_are(indexer: Any) -> None:
    """The addresses of a launch, so that a captured graph reads what they hold at its replay."""
    scores, given = torch.randn(ROWS, COLUMNS + 5)[:, 2 : COLUMNS + 2], inputs()
    topk_indices.indices_cuda(scores, K, **given)
    (launch,) = indexer.launches
    for name in ("row_starts", "row_ends", "page_table", "requests", "offsets"):
        assert launch.arguments[name] == given[name].data_ptr()
    assert launch.arguments["scores"] == scores.data_ptr()
    assert launch.arguments["row_stride"] == COLUMNS + 5
    assert launch.arguments["page_stride"] == 6
    assert launch.arguments["ids_out"] == launch.arguments["values_out"] == 0
    # Read by the launch, not before it.
    given["row_ends"].zero_()
    assert (topk_indices.indices_cuda(scores, K, **given) == -1).all()


@pytest.mark.parametrize(
    ("columns", "k", "kernel"),
    [
        (9, 3, "topk_select"),
        (65536, 32, "topk_select"),
        (65537, 1, "topk_indices"),
        (33, 33, "topk_indices"),
        (5000, 4096, "topk_indices"),
    ],
)
def test_topk_select_of_any_size(indexer: Any, columns: int, k: int, kernel: str) -> None:
    scores = torch.randn(2, columns + 1)[:, 1:]
    scores[0, ::3] = torch.nan
    found, wanted = rows.topk_select_cuda(scores, k), spec.topk_select(scores, k)
    (launch,) = indexer.launches
    assert launch.symbol == kernel
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].view(torch.int32), wanted[0].view(torch.int32))
    # Both kernels are there from now on, for a capture.
    loads = indexer.calls.count("cuLibraryLoadData")
    rows.topk_select_cuda(torch.randn(2, 70000), 33)
    rows.topk_select_cuda(torch.randn(2, 70), 3)
    assert indexer.calls.count("cuLibraryLoadData") == loads == 5


def test_topk_select_after_another_op_loads_its_own_kernel(indexer: Any) -> None:
    topk_indices.indices_cuda(torch.randn(2, 70), 3)
    assert indexer.calls.count("cuLibraryLoadData") == 3
    rows.topk_select_cuda(torch.randn(2, 70), 33)
    assert indexer.calls.count("cuLibraryLoadData") == 5


def test_what_the_other_kernel_lacks_is_no_error(gpu: Any) -> None:
    """Without topk_indices, a small k of short rows is still served; other calls say why not."""
    rows.topk_select_cuda(torch.randn(2, 70), 3)
    with pytest.raises(ResolutionError, match=r"topk_indices.*no entry of this kernel"):
        rows.topk_select_cuda(torch.randn(2, 70), 33)


def test_longer_rows_alone(
    indexer: Any, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    others = [entry for entry in indexer.entries if entry.kernel != "topk_select"]
    folder = build.artifacts(tmp_path / "without topk_select", others)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    rows.topk_select_cuda(torch.randn(2, 70), 33)
    with pytest.raises(ResolutionError, match=r"topk_select.*no entry of this kernel"):
        rows.topk_select_cuda(torch.randn(2, 70), 3)


def test_the_first_call_is_refused_during_a_capture(
    indexer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = vars(row_kernels)["refuse_capture"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(row_kernels, "refuse_capture", placement.refuse_capture)
    scores = torch.randn(ROWS, COLUMNS)
    with pytest.raises(InputError, match=r"first call of topk_indices .*do it before the capture"):
        topk_indices.indices_cuda(scores, K)
    monkeypatch.setattr(row_kernels, "refuse_capture", refuse)
    topk_indices.indices_cuda(scores, K)
    monkeypatch.setattr(row_kernels, "refuse_capture", placement.refuse_capture)
    # Loaded: a capture may have any shape, and any variant.
    for columns, k in ((COLUMNS, K), (9000, 4096), (2**18, 12)):
        topk_indices.indices_cuda(torch.randn(1, columns), k)


def test_a_call_while_another_device_is_current(
    indexer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Placement] = []

    @contextlib.contextmanager
    def current(self: Placement) -> Iterator[None]:
        entered.append(self)
        monkeypatch.setattr(Placement, "elsewhere", lambda self: False)
        yield
        monkeypatch.setattr(Placement, "elsewhere", lambda self: True)

    several = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Placement, "several", several)
    monkeypatch.setattr(Placement, "elsewhere", lambda self: True)
    monkeypatch.setattr(Placement, "current", current)
    scores = torch.randn(ROWS, COLUMNS)
    same((topk_indices.indices_cuda(scores, K),), (spec.topk_indices(scores, K),))
    assert len(entered) == len(indexer.launches) == 1


def test_the_better_evidence_is_chosen_first(indexer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant that would be faster is left out while it is proven on another target only."""
    scores = torch.randn(1, 2**18)

    def served(status: Any) -> int:
        monkeypatch.setattr(kernels, "status", status)
        monkeypatch.setattr(kernels, "_cache", {})
        monkeypatch.setattr(row_kernels, "_loaded", {})
        indexer.launches.clear()
        topk_indices.indices_cuda(scores, K)
        (launch,) = indexer.launches
        return int(launch.grid[0])

    assert served(lambda *_: "verified") == 8
    assert served(lambda *_: "source-verified") == 8
    assert (
        served(lambda entry, *_: "source-verified" if entry.variant == "cluster8" else "verified")
        == 1
    )


def test_choices_are_remembered_and_bounded(indexer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topk_indices.indices_cuda(torch.randn(1, 9), 3)
    kernel = row_kernels.row_kernel(topk_indices.USE, torch.device("cpu"))
    first = kernel.launcher(4, 1, 9, 3)
    for count in range(1, 5000):
        kernel.launcher(4, count, 9, 3)
    assert len(kernel._chosen) <= 4096
    assert kernel.launcher(4, 1, 9, 3) is first


def vector(**change: Any) -> Tensor:
    return torch.zeros(ROWS, **{"dtype": torch.int32, **change})


TABLE = torch.zeros(ROWS, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 8).half()}, "scores: expected torch.float32 or torch.bfloat16"),
        ({"scores": torch.zeros(8)}, "scores: expected torch.float32 or torch.bfloat16"),
        ({"scores": torch.zeros(2, 0)}, "columns of scores: expected an integer from 1 to 2097152"),
        ({"scores": torch.zeros(1, 1).expand(1, 2**21 + 1)}, "columns of scores"),
        ({"scores": torch.zeros(2, 8).requires_grad_()}, "needs no gradient"),
        ({"k": 0}, "k: expected an integer from 1 to 4096"),
        ({"k": 4097}, "k: expected an integer from 1 to 4096"),
        *(
            ({name: wrong}, rf"{name}: expected torch.int32 \[5\] on cpu")
            for name in ("row_starts", "row_ends", "offsets")
            for wrong in (vector(dtype=torch.int64), vector()[1:], vector()[None])
        ),
        ({"page_table": TABLE, "requests": vector()[1:]}, r"requests: expected torch.int32 \[5\]"),
        ({"page_table": TABLE.long()}, r"page_table: expected torch.int32 \[requests, pages\]"),
        ({"page_table": TABLE[0]}, r"page_table: expected torch.int32 \[requests, pages\]"),
        (
            {"page_table": TABLE[:3]},
            r"page_table: expected torch.int32 \[5, pages\], a row for each",
        ),
        ({"page_table": TABLE, "page_size": 0}, "page_size: expected an integer from 1"),
        ({"page_table": TABLE, "page_size": 2**31}, "page_size: expected an integer from 1"),
        ({"page_size": 64}, "page_size: expected page_size beside a page_table only"),
        ({"requests": vector()}, "requests: expected requests beside a page_table only"),
    ],
)
def test_refused(indexer: Any, change: dict[str, Any], message: str) -> None:
    given = {"scores": torch.zeros(ROWS, COLUMNS), "k": K, **change}
    for call in (rt.topk_indices, topk_indices.indices_cpu, topk_indices.indices_cuda):
        with pytest.raises(InputError, match=message):
            call(**given)
    assert not indexer.launches


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "ids_out: expected ids_out, slots_out or both, found 'neither of them'"),
        (
            {"ids_out": torch.zeros(ROWS, K).long()},
            r"ids_out: expected torch.int32 \[5, 7\] on cpu",
        ),
        ({"slots_out": torch.zeros(ROWS, 8).int()}, r"slots_out: expected torch.int32 \[5, 7\]"),
        ({"slots_out": torch.zeros(K, ROWS).int().T}, r"slots_out: expected .*, contiguous"),
    ],
)
def test_refused_outputs(indexer: Any, outputs: dict[str, Tensor], message: str) -> None:
    scores = torch.zeros(ROWS, COLUMNS)
    for call in (torch.ops.dsv4.topk_indices.out, topk_indices.indices_out_cuda):
        with pytest.raises(InputError, match=message):
            call(scores, K, **outputs)
    assert not indexer.launches


def test_none_for_the_scores() -> None:
    with pytest.raises(InputError, match=r"scores of topk_indices: expected torch\.Tensor"):
        rt.topk_indices(None, 3)  # type: ignore[arg-type]


def entry_of(blocks_per_row: int, blocks_per_sm: int, held: int = 0) -> Any:
    return SimpleNamespace(
        constants={
            "BLOCKS_PER_ROW": blocks_per_row,
            "BLOCKS_PER_SM": blocks_per_sm,
            "HELD": held,
            **({} if held else {"THREADS": 512, "LOADS": 8}),
        }
    )


def test_the_choice_follows_from_sizes_and_constants() -> None:
    """For shapes that were measured on an H200, the variant that was the fastest there."""
    block, pair, quad, cluster = (entry_of(*each) for each in ((1, 2), (2, 1), (4, 1), (8, 1)))
    short, held = entry_of(1, 2, 8), entry_of(1, 2, 16)
    held_cluster, wide = entry_of(8, 1, 16), entry_of(16, 1, 8)
    streamed = [block, pair, quad, cluster]
    for rows_, columns, wanted in (
        (4, 8192, short),
        (1, 16384, held),
        (256, 16384, held),
        (1, 131072, wide),
        (1, 262144, wide),
        (8, 262144, held_cluster),
        (16, 262144, quad),
        (64, 262144, pair),
        (256, 262144, block),
        (1024, 262144, block),
        (256, 65536, block),
        (1, 2**20, cluster),
        (4, 2**20, cluster),
        (16, 2**20, quad),
        (32, 2**20, pair),
        (64, 2**20, pair),
        (1, 2**21, cluster),
    ):
        entries = [*streamed, *([held] if columns <= 16384 else [])]
        entries += [short] if columns <= 8192 else []
        entries += [held_cluster, wide] if columns <= 262144 else []
        for order in (entries, entries[::-1]):
            found = topk_indices.choose(order, (4, rows_, columns, 512), 132)
            assert found is wanted, (rows_, columns)
    # A device with fewer multiprocessors than a cluster has CTAs is no error.
    assert topk_indices.choose([cluster, pair], (4, 1, 2**20, 9), 1) in (cluster, pair)
    # Rows too short for the streamed form to take a bound from.
    assert topk_indices.choose([pair, cluster, held_cluster], (4, 1, 8192, 4096), 132) is (
        held_cluster
    )


def test_estimates_are_near_what_was_measured() -> None:
    for blocks, per_sm, held, rows_, columns, measured in (
        *((1, 2, 0, 1, 262144, 26.9), (1, 2, 0, 256, 262144, 78.5), (1, 2, 0, 1024, 262144, 276)),
        *((1, 2, 0, 256, 65536, 26.4), (1, 2, 0, 1024, 32768, 56.0), (1, 2, 0, 4, 8192, 16.6)),
        *((2, 1, 0, 64, 262144, 27.6), (2, 1, 0, 64, 2**20, 82.5), (2, 1, 0, 1, 262144, 17.8)),
        *((4, 1, 0, 1, 262144, 13.9), (4, 1, 0, 16, 262144, 17.9), (4, 1, 0, 16, 2**20, 37.5)),
        *((8, 1, 0, 1, 262144, 12.7), (8, 1, 0, 1, 2**20, 18.4), (8, 1, 0, 64, 262144, 73.2)),
        *((1, 2, 16, 1, 16384, 4.9), (1, 2, 16, 256, 16384, 10.4), (8, 1, 16, 1, 262144, 10.4)),
        *((8, 1, 16, 16, 262144, 22.4), (16, 1, 8, 1, 262144, 9.6), (16, 1, 8, 8, 262144, 18.8)),
    ):
        constants = entry_of(blocks, per_sm, held).constants
        found = topk_indices.estimated_us(constants, rows_, columns, 4, 132)
        assert 0.75 * measured < found < 1.25 * measured, (blocks, held, rows_, columns, found)
