"""The part ``topk`` of the benchmark without a GPU: what is timed, and how it is judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from router_runtime import spec
from router_runtime.device.kernels import kernels_on
from tests.bench import cli, topk, topk_report
from tests.bench.machine import Broken, Cpu
from tests.bench.topk import KERNEL, LEAST_CALLS, PEER, Shape, Topk, TopkCell
from tests.bench.topk_rows import PATTERNS, RANDOM, Rows


class Scripted(Cpu):
    """A machine on which each replay of a chain takes as long as was scripted."""

    def __init__(self, *times: float) -> None:
        self.times = times
        self.chains = 0

    def timed(self, chain: Any, replays: int) -> Any:
        self.chains += 1
        return list(self.times), chain()


def measured(machine: Any = None, kernels: Any = None, entries: Any = (), **options: Any) -> Any:
    named = {"alone": False, "replays": 3, **options}
    return list(Topk(machine or Scripted(6.0, 2.0, 4.0), kernels, entries, **named).cells())


def test_a_figure_is_the_median_of_the_replays_over_the_calls() -> None:
    cells = measured()
    assert {cell.pattern for cell in cells} == set(PATTERNS)
    for cell in cells:
        assert cell.error is None
        # At least three caches of scores, and so many calls that a replay's start does not count.
        assert cell.calls * 4 * cell.rows * cell.columns >= 3 * Cpu.l2_bytes
        assert cell.median_us == 4.0 / max(cell.calls, LEAST_CALLS)
        assert cell.low_us is not None
        assert cell.high_us is not None
        assert cell.low_us <= cell.median_us <= cell.high_us
        assert cell.wrong_rows == (None if cell.contender == PEER else 0)
    shapes = {(cell.rows, cell.columns, cell.top_k) for cell in cells}
    for shape in shapes:
        own = [
            (cell.contender, cell.pattern)
            for cell in cells
            if (cell.rows, cell.columns, cell.top_k) == shape
        ]
        assert len(own) == len(set(own))
        assert {(KERNEL, RANDOM), (PEER, RANDOM)} <= set(own)


def test_wrong_ids_are_an_error_with_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scores: torch.Tensor, k: int) -> torch.Tensor:
        ids = spec.topk_indices(scores, k)
        ids[-1, -1] += 1
        return ids

    monkeypatch.setattr(topk, "topk_indices", wrong)
    cells = [cell for cell in measured() if cell.contender == KERNEL]
    assert {cell.error for cell in cells} == {"wrong: 1 of the rows checked differ from the oracle"}
    assert all(cell.median_us for cell in cells)
    assert topk_report.problems(cells)[0].startswith(f"{KERNEL}: wrong: 1 of the rows checked")


def test_a_failing_contender_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(topk, "topk_indices", fail)
    cells = measured()
    errors = {cell.contender: cell.error for cell in cells if cell.pattern == RANDOM}
    assert errors == {KERNEL: "failed: ValueError: no such kernel", PEER: None}


def test_a_dead_device_stops_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Scripted):
        def synchronize(self) -> None:
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr(topk, "topk_indices", lambda *_: 1 / 0)
    with pytest.raises(Broken, match="illegal memory access"):
        measured(Dead(1.0))


@pytest.fixture
def entries(
    gpu: Any, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Any:
    """Entries of the kernel on the fake device, which executes them by the oracle."""
    sizes = {"SCORE_BYTES": 4, "BLOCKS_PER_SM": 1, "HELD": 0, "THREADS": 512, "LOADS": 8}
    made = [
        build.entry(
            KERNEL,
            build.indices(blocks, most),
            variant=variant,
            constants={**sizes, "BLOCKS_PER_ROW": blocks},
        )
        for variant, blocks, most in (("block", 1, 2048), ("cluster8", 8, 4096), ("few", 1, 8))
    ]
    half = build.entry(
        KERNEL, build.indices(), variant="half", constants={**sizes, "SCORE_BYTES": 2}
    )
    gpu.entries = [*made, half]
    folder = build.artifacts(tmp_path / "indexer", gpu.entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return gpu.entries


def test_the_variant_that_the_op_would_choose_and_each_alone(entries: Any) -> None:
    """Without evidence: the entries need none, because results are checked."""
    cells = measured(kernels=kernels_on(0), entries=entries)
    assert {cell.served_by for cell in cells if cell.contender == KERNEL} == {
        "topk_indices/any/sm_90a/block"
    }
    assert not [cell for cell in cells if cell.error]
    cells = measured(kernels=kernels_on(0), entries=entries, alone=True)
    assert {(cell.contender, cell.top_k) for cell in cells if "/" in cell.contender} == {
        *((f"{KERNEL}/{name}", k) for name in ("block", "cluster8") for k in (16, 8)),
        (f"{KERNEL}/few", 8),
    }
    assert not [cell for cell in cells if cell.error]
    # Nothing of ours to time: the peer is left.
    cells = measured(kernels=kernels_on(0), entries=[])
    assert {cell.contender for cell in cells} == {PEER}


def test_the_shapes_and_their_bars() -> None:
    """Those of the indexers of released models, at the sizes that were to be reached."""
    bars = {
        (each.columns, each.rows, each.top_k): each.most_us
        for each in topk.SHAPES
        if each.most_us is not None
    }
    assert bars == {
        **{(262144, 1, k): 8.0 for k in (512, 1024)},
        **{(262144, 64, k): pytest.approx(1.6 * 16, rel=0.01) for k in (512, 1024)},
        **{(262144, 256, k): pytest.approx(1.4 * 64, rel=0.01) for k in (512, 1024)},
        **{(262144, 1024, k): pytest.approx(1.4 * 256, rel=0.01) for k in (512, 1024)},
        (1048576, 64, 512): pytest.approx(1.4 * 64, rel=0.01),
        (16384, 256, 512): pytest.approx(2 * 4, rel=0.01),
        (8192, 4, 512): 5.0,
    }
    timed = {(each.rows, each.columns, each.top_k) for each in topk.SHAPES}
    assert {(each.rows, each.columns, each.top_k) for each in topk.HOSTILE} <= timed


def cell(us: float | None, contender: str = KERNEL, **change: Any) -> TopkCell:
    blank = TopkCell(64, 262144, 512, RANDOM, contender, 16.0, 25.6, 2, median_us=us)
    return dataclasses.replace(blank, **change)


def test_the_tables_judge_by_the_bars() -> None:
    served = "topk_indices/any/sm_90a/pair"
    cells = [
        cell(25.0, served_by=served),
        cell(90.0, PEER),
        cell(40.0, columns=8192, rows=4, bar_us=5.0, error="wrong: 1"),
        cell(60.0, PEER, columns=8192, rows=4, bar_us=5.0),
        cell(49.0, pattern="equal"),
        cell(51.0, pattern="relu"),
        cell(None, pattern="any_bits", error="failed: no"),
    ]
    head, names, *rows = topk_report.table(cells)
    assert "microseconds a call" in head
    assert names.split()[-4:] == ["torch.topk", "served", "by"][-4:] or names.endswith("served by")
    assert rows[0].split() == [
        *("262144", "x", "64,", "512", "25.00", "90.00", "16.00", "25.60", "yes", "0.278", "pair")
    ]
    assert rows[1].split()[4:] == ["40.00!", "60.00", "16.00", "5.00", "NO", "0.667", "-"]
    hostile = topk_report.hostile_table(cells)
    assert [row.split() for row in hostile[2:]] == [
        ["random", "25.00", "(1.000)"],
        ["equal", "49.00", "(1.960)"],
        ["relu", "51.00", "(2.040)"],
        ["any_bits", "-!", "(-)"],
    ]
    assert topk_report.summary(cells) == [
        f"{KERNEL}: met 1 of 2 bars in microseconds, 1 of 2 relative to torch.topk, "
        "1 of 2 for rows that are hard to select from"
    ]
    assert topk_report.table([]) == topk_report.hostile_table([]) == topk_report.summary([]) == []


def test_patterns_are_what_they_say() -> None:
    rows = {name: Rows(3, 20000, torch.device("cpu")).draw(name) for name in PATTERNS}
    for name, scores in rows.items():
        assert scores.shape == (3, 20000)
        assert scores.dtype == torch.float32
        assert scores.is_contiguous()
        again = Rows(3, 20000, torch.device("cpu")).draw(name)
        assert torch.equal(again.view(torch.int32), scores.view(torch.int32))
    assert set(rows["two_values"].unique().tolist()) == {0.0, 1.0}
    assert (rows["ascending"].diff() > 0).all()
    assert (rows["descending"].diff() < 0).all()
    assert 0 < (rows["relu"] > 0).sum() < 200
    assert 0.8 < rows["nan_runs"].isnan().float().mean() < 0.9
    assert rows["subnormals"].abs().max() < 2.0**-126
    assert (rows["outlier"] == 1e38).sum() == 3
    assert (rows["clustered"] > 5).sum() > 17000


def test_dry_run_writes_the_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry-run", "--parts", "topk", "--out", "out"]
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "topk: microseconds a call" in result.output
    document = json.loads(Path("out/bench.json").read_text())
    assert document["cells"] == []
    assert {each["contender"] for each in document["topk"]} == {KERNEL, PEER}
    assert {each["pattern"] for each in document["topk"]} == set(PATTERNS)
    monkeypatch.setattr(topk, "topk_indices", lambda scores, k: torch.zeros(len(scores), k).int())
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "differ from the oracle" in result.output


def test_the_plot_has_every_contender_and_the_floor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []

    class Panel:
        def plot(self, *data: Any, label: str, **options: Any) -> None:
            drawn.append((label, data[0], data[1]))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    class Figure:
        def tight_layout(self) -> None: ...

        def savefig(self, path: Path, dpi: int) -> None:
            path.write_text("drawn")

    pyplot = SimpleNamespace(subplots=lambda **_: (Figure(), Panel()), close=lambda figure: None)
    matplotlib = SimpleNamespace(use=lambda backend: None, pyplot=pyplot)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", matplotlib)
    cells = [
        cell(25.0),
        cell(90.0, PEER),
        cell(7.0, rows=1, floor_us=0.25),
        cell(9.0, pattern="relu"),
    ]
    document = {"topk": [dataclasses.asdict(each) for each in cells], "device": {"name": "GPU"}}
    paths = topk_report.draw(document, tmp_path)
    assert [path.read_text() for path in paths] == ["drawn"] * 2
    assert drawn == [
        (KERNEL, (1048576, 64 * 1048576), (7.0, 25.0)),
        (PEER, (64 * 1048576,), (90.0,)),
        ("floor of an H200", (1048576, 64 * 1048576), (0.25, 16.0)),
    ]


def test_a_bar_in_floors_is_of_what_reading_takes() -> None:
    assert Shape(64, 262144, 512, bar_floors=2.0).most_us == pytest.approx(2 * 15.98, rel=1e-3)
    assert Shape(1, 8, 8, bar_us=3.0).most_us == 3.0
    assert Shape(1, 8, 8).most_us is None
