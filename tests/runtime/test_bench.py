"""The benchmark without a GPU: its arithmetic, its report, its options, and a dry run of all of it.

Nothing here looks at a clock: figures come from a machine with scripted times.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import dataclasses
import json
import subprocess
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from cuda.bindings import driver as real

from build_kernels.catalog.models import MODELS, Model
from router_runtime import InputError, get_router, register_router
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request
from router_runtime.routing.router import ROUTERS
from tests.bench import cli, contenders, engines, host, peers, report, startup
from tests.bench import options as options_
from tests.bench import run as run_
from tests.bench.artifacts import edition, entries_here, variants_of
from tests.bench.chain import CACHES, INPUT_BYTES, Output, make_chain, make_layers, plan
from tests.bench.contenders import (
    CONTENDERS,
    GATE,
    MM,
    MM_TRITON,
    MODES,
    OURS,
    Contender,
    Settings,
    alone,
    field,
    mathematics,
)
from tests.bench.host import HostCell
from tests.bench.latency import Cell, Latencies
from tests.bench.link import Link
from tests.bench.machine import Broken, Cpu, Gpu, attempt
from tests.runtime import releases

FLASH, PRO, FLASH41, DSPARK = MODELS
H100_L2 = 50 << 20
PEERS = peers.load()
#: The model of ``build.small``, whose shape the dry run's has.
SMALL: dict[str, Any] = {"model": "small", "constants": cli.TINY.constants()}


# --- the peers' figures ---


def test_peers_are_the_documents():
    assert PEERS.gpu == "NVIDIA H200"
    assert PEERS.tokens == (1, 4, 16, 32, 64, 128, 256, 1024, 4096, 16384)
    assert set(PEERS.tokens) <= set(cli.TOKENS)
    # No peer of the draft layers has been measured yet.
    assert set(PEERS.models) == {model.name for model in MODELS} - {DSPARK.name}
    assert {name: figures.routers for name, figures in PEERS.models.items()} == {
        "dsv4-flash": 80,
        "dsv4-pro": 32,
        "dsv41-flash": 40,
    }
    corners = [
        (PEERS.models[model].best_peer[tokens], PEERS.models[model].torch_mm[tokens])
        for model in ("dsv4-flash", "dsv4-pro", "dsv41-flash")
        for tokens in (1, 32, 16384)
    ]
    assert corners == [
        *((4.04, 6.16), (5.59, 6.29), (77.39, 57.24)),
        *((5.24, 7.03), (8.12, 7.47), (177.5, 143.0)),
        *((5.08, 7.31), (7.48, 7.62), (136.1, 105.7)),
    ]


def test_peers_with_a_missing_figure_are_refused():
    document = json.loads(peers.PATH.read_text())
    document["models"]["dsv4-pro"]["best_peer"].pop()
    with pytest.raises(ValueError, match="shorter"):
        peers.parse(document)


def test_bars():
    assert [PEERS.bar(OURS, tokens) for tokens in (1, 64, 65, 128, 16384, 16385)] == [
        *(0.5, 0.5, None, 0.75, 0.75, None)
    ]
    assert [PEERS.bar(GATE, tokens) for tokens in (1, 4, 5, 8, 64, 128, 16384, 16385)] == [
        *(0.65, 0.65, None, 0.5, 0.5, 1.0, 1.0, None)
    ]
    assert PEERS.bar(MM, 1) is None
    assert PEERS.host_bar == 0.6


@pytest.mark.parametrize(
    ("model", "tokens", "microseconds"),
    [
        (FLASH, 1, 1.0),  # an empty node: the weights take 0.70
        (FLASH41, 1, 1.31),
        (PRO, 1, 1.84),
        (FLASH, 16384, 45),  # memory
        (FLASH41, 16384, 82),  # tensor cores
        (PRO, 16384, 114),
    ],
)
def test_floors_are_the_documents(model: Model, tokens: int, microseconds: float):
    assert PEERS.floor.of(model, tokens) == pytest.approx(microseconds, rel=0.012)


def test_peers_scale_with_the_devices_torch_mm():
    assert PEERS.scaled("dsv4-flash", 64, 6.49) == pytest.approx(8.93)
    assert PEERS.scaled("dsv4-flash", 64, 2 * 6.49) == pytest.approx(2 * 8.93)
    assert PEERS.scaled("dsv4-flash", 64, None) is None
    assert PEERS.scaled("dsv4-flash", 65, 7.1) is None
    assert PEERS.scaled("another", 64, 7.1) is None


# --- the chain ---


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("l2_bytes", [H100_L2, 126 << 20])
def test_a_chain_outgrows_the_cache_and_fits_the_device(model: Model, l2_bytes: int):
    figures = PEERS.models.get(model.name)
    least = figures.routers if figures else run_.LEAST_ROUTERS
    for tokens in PEERS.tokens:
        routers, inputs = plan(model, tokens, l2_bytes, least)
        weight_bytes = 2 * model.hidden * model.experts * routers
        input_bytes = 2 * model.hidden * tokens * inputs
        assert routers >= least
        assert weight_bytes >= CACHES * l2_bytes
        assert inputs == routers or input_bytes >= CACHES * l2_bytes
        assert input_bytes <= max(INPUT_BYTES, 2 * CACHES * l2_bytes)
        if l2_bytes == H100_L2 and figures:
            assert routers == least


@pytest.fixture
def chain():
    model = cli.TINY
    layers = make_layers(model, 3, torch.device("cpu"))
    return make_chain(Cpu(), layers, 5, 2)


def right(chain: Any) -> Callable[[int, torch.Tensor], Output]:
    layers, model = chain.layers, chain.layers.model

    def route(layer: int, x: torch.Tensor) -> Output:
        weight, bias = layers.weights[layer], layers.biases[layer]
        weights, ids = mathematics(x, weight, bias, model.top_k, model.scale)
        return Output(weights, ids)

    return route


def test_every_router_of_a_chain_depends_on_the_one_before(chain):
    previous, seen = chain.first, []

    def route(layer: int, x: torch.Tensor) -> Output:
        nonlocal previous
        assert x is chain.inputs[layer % 2]
        torch.testing.assert_close(x[:, 0], previous[:, 0].bfloat16(), rtol=0, atol=0)
        seen.append(layer)
        output = right(chain)(layer, x)
        previous = output.values
        return output

    chain.routed(route, True)
    assert seen == [0, 1, 2]


def test_a_chain_tells_right_results_from_wrong_ones(chain):
    output = chain.routed(right(chain), True)
    assert chain.wrong_rows(output) == 0
    assert output.ids is not None
    swapped = output._replace(ids=output.ids.flip(1))
    assert chain.wrong_rows(swapped) == 5
    values = output.values.clone()
    values[1] *= 1.01
    assert chain.wrong_rows(output._replace(values=values)) == 1
    values[2] = torch.nan
    assert chain.wrong_rows(output._replace(values=values)) == 2


def test_a_chain_checks_bare_logits(chain):
    route = CONTENDERS[MM].make(chain.layers, "pdl", Settings({}, {}))
    output = chain.routed(route, True)
    assert output.ids is None
    assert chain.wrong_rows(output) == 0
    assert chain.wrong_rows(output._replace(values=output.values + 0.01)) == 5


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "mm+triton"])
def test_contenders_agree_with_the_oracle(name: str, chain):
    route = CONTENDERS[name].make(chain.layers, "pdl", Settings({}, {}))
    assert chain.wrong_rows(chain.routed(route, True)) == 0


# --- the figures ---


class Scripted(Cpu):
    """Reports scripted times, in microseconds, one per chain."""

    def __init__(self, *times: list[float]) -> None:
        self.times = list(times)
        self.dead = False

    def timed(self, chain: Callable[[], Any], replays: int) -> tuple[list[float], Any]:
        times = self.times.pop(0)
        assert len(times) == replays
        return times, chain()

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("illegal memory access")


def latencies(machine: Scripted, *contenders: Contender, modes: Any = ("pdl",)) -> Latencies:
    replays = len(machine.times[0])
    return Latencies(machine, cli.TINY, contenders, modes, replays, 4)


def test_a_figure_is_the_replays_over_the_routers_without_the_links():
    machine = Scripted([8.0, 4.0, 100.0], [48.0, 44.0, 400.0])
    (cell,) = latencies(machine, CONTENDERS[MM]).cells(3)
    assert (cell.model, cell.tokens, cell.contender, cell.mode) == ("tiny", 3, MM, "pdl")
    assert cell.routers == 4
    assert cell.link_us == 2.0
    assert (cell.low_us, cell.median_us, cell.high_us) == (9.0, 10.0, 98.0)
    assert cell.wrong_rows == 0
    assert cell.error is None


def test_the_routers_of_a_model_are_let_go_before_the_next():
    """Captured, they would stay registered, and in memory, to the end of the run."""
    machine = Scripted([8.0, 4.0, 100.0], [48.0, 44.0, 400.0])
    measured = latencies(machine, CONTENDERS[OURS])
    list(measured.cells(3))
    (route,) = measured._routes.values()
    ids = []
    for router in route._routers:
        ids.append(register_router(router))
        ROUTERS.mark_captured(router)
    assert len(ids) == measured.routers
    measured.close()
    for router_id in ids:
        with pytest.raises(InputError):
            get_router(router_id)


def test_each_mode_has_links_of_its_own():
    machine = Scripted([4.0], [44.0], [8.0], [44.0])
    cells = latencies(machine, CONTENDERS[MM], modes=MODES).cells(3)
    assert [(c.mode, c.link_us, c.median_us) for c in cells] == [
        ("pdl", 1.0, 10.0),
        ("plain", 2.0, 9.0),
    ]


def test_a_wrong_contender_is_an_error_with_a_figure():
    def make(layers: Any, mode: Any, settings: Any) -> Any:
        return lambda layer, x: Output(torch.zeros(x.shape[0], 24), None)

    (cell,) = latencies(Scripted([4.0], [44.0]), Contender("broken", make)).cells(5)
    assert cell.median_us == 10.0
    assert cell.wrong_rows == 5
    assert cell.error == "wrong: 5 of the rows checked differ from the oracle"


def test_a_failing_contender_does_not_stop_the_others():
    def make(layers: Any, mode: Any, settings: Any) -> Any:
        raise ValueError("no such kernel")

    machine = Scripted([4.0], [44.0])
    broken, fine = latencies(machine, Contender("broken", make), CONTENDERS[MM]).cells(5)
    assert broken.error == "failed: ValueError: no such kernel"
    assert broken.median_us is None
    assert fine.median_us == 10.0


def test_a_dead_device_stops_the_run():
    machine = Scripted()

    def die() -> None:
        machine.dead = True
        raise RuntimeError("launch failed")

    with pytest.raises(Broken, match=r"launch failed.*illegal memory access"):
        attempt(die, machine)


def test_the_product_says_what_serves_it_and_a_kernel_alone_declines_more(monkeypatch):
    @dataclasses.dataclass
    class Entry:
        key: str

    @dataclasses.dataclass
    class TokenRange:
        high: int
        entry: Entry

    token_ranges = (TokenRange(8, Entry("decode")), TokenRange(64, Entry("prefill")))
    layers = make_layers(cli.TINY, 1, torch.device("cpu"))
    monkeypatch.setattr("router_runtime.Router.token_ranges", token_ranges)
    product = CONTENDERS[OURS].make(layers, "pdl", Settings({}, {}))
    assert [product.served_by(tokens) for tokens in (8, 9, 65)] == [
        *("decode", "prefill", "prefill, by parts")
    ]
    assert not product.declines(65)
    by_itself = CONTENDERS[OURS].make(layers, "pdl", Settings({}, {}, alone=True))
    assert [by_itself.declines(tokens) for tokens in (64, 65)] == [False, True]
    machine = Scripted([4.0])
    assert list(latencies(machine, alone({}, "k", "v")).cells(65)) == []


def test_host_times_are_medians_over_batches_that_take_turns():
    turns: list[str] = []
    calls = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    times = host.submit_times(calls, lambda: turns.append("|"), 2, 3)
    assert "".join(turns) == "|aaa|bbb" * 2 + "|"
    assert {name: len(figures) for name, figures in times.items()} == {"a": 2, "b": 2}


def test_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [host.percentile(values, fraction) for fraction in (0, 0.1, 0.5, 0.9, 1)] == [
        *(1, 1, 3, 5, 5)
    ]


# --- the comparison and the tables ---


def cell(contender: str, median: float | None, tokens: int = 64, **changes: Any) -> Cell:
    blank = Cell("dsv4-flash", tokens, contender, "pdl", 80, 80, 1.0, median, median, median, 0)
    return dataclasses.replace(blank, **changes)


def test_comparison_scales_the_peer():
    # This device runs torch.mm half as fast as the document's, so the peer gets twice 8.93.
    cells = [cell(OURS, 8.0), cell(MM, 12.98), cell("eager", 60.0)]
    (found,) = report.compare(cells, PEERS)
    assert found.best_peer_us == 8.93
    assert found.scaled_peer_us == pytest.approx(17.86)
    assert found.ratio == pytest.approx(8.0 / 17.86)
    assert (found.bar, found.met) == (0.5, True)
    (found,) = report.compare([cell(OURS, 9.0), cell(MM, 12.98)], PEERS)
    assert not found.met


def test_comparison_needs_our_right_figure_and_a_torch_mm_of_the_same_cell():
    mm = cell(MM, 7.1)
    for cells in (
        [cell(OURS, 5.0)],
        [cell(OURS, 5.0), cell(MM, 7.1, tokens=32)],
        [cell(OURS, 5.0), cell(MM, 7.1, mode="plain")],
        [cell(OURS, 5.0, mode="plain"), mm],
        [cell(OURS, 5.0, error="wrong: 9 rows"), mm],
        [cell(OURS, None, error="failed: x"), mm],
        [cell(OURS, 5.0, tokens=65), cell(MM, 7.1, tokens=65)],
    ):
        assert report.compare(cells, PEERS) == []


def test_comparison_takes_every_variant():
    cells = [cell(f"{OURS}[a]", 5.0), cell("dense_router_decode/b", 6.0), cell(MM, 7.1)]
    found = [each.contender for each in report.compare(cells, PEERS)]
    assert found == [f"{OURS}[a]", "dense_router_decode/b"]


def host_cell(contender: str, median: float | None, **changes: Any) -> HostCell:
    blank = HostCell("dsv4-flash", 1, contender, median, median, median, 90.0, 30.0, 80.0, 35.0)
    return dataclasses.replace(blank, **changes)


def test_host_comparison():
    cells = [
        host_cell(host.ROUTER, 10.0),
        host_cell(host.OP, 13.0),
        host_cell(host.PEER, 20.0),
        host_cell(host.ROUTER, 10.0, tokens=64),
    ]
    found = report.compare_host(cells, 0.6)
    assert [(each.contender, each.ratio, each.met) for each in found] == [
        (host.ROUTER, 0.5, True),
        (host.OP, 0.65, False),
    ]
    table = report.host_table(cells, 0.6)
    assert table[4].split() == [
        *(host.ROUTER, "1", "dsv4-flash", "10.00", "10.00", "10.00"),
        *("90.00", "35.00", "80.00", "30.00", "0.500", "yes"),
    ]
    assert table[5].split()[-1] == "NO"
    assert report.host_table([], 0.6) == []


def test_tables():
    cells = [
        cell(OURS, 4.2),
        cell(MM, 6.49),
        cell(OURS, 6.0, mode="plain", link_us=1.5),
        cell(MM, 7.2, mode="plain", link_us=1.5),
        cell(OURS, 4.0, tokens=1),
        cell(MM, None, tokens=1, error="failed: x"),
        cell(OURS, 9.0, model="dsv4-pro"),
    ]
    head, columns, *rows = report.latency_table(cells, FLASH, PEERS)
    assert head.startswith("dsv4-flash")
    assert columns.split() == ["tokens", "link", OURS, MM, "floor"]
    assert [row.split() for row in rows] == [
        ["1", "1.00/-", "4.00/-", "-/-!", "1.00"],
        ["64", "1.00/1.50", "4.20/6.00", "6.49/7.20", "1.00"],
    ]
    compared = report.compare(cells, PEERS)
    lines = report.comparison_table(compared, FLASH)
    assert lines[-1].split() == ["64", OURS, "4.20", "8.93", "8.93", "0.470", "0.50", "yes"]
    assert report.comparison_table(compared, PRO) == []
    (line,) = report.summary(compared, [])
    assert line == (
        f"{OURS}: 1 of 1 bars met; farthest: dsv4-flash at 64 tokens, ratio 0.470, bar 0.5"
    )


def test_the_compact_table_is_ours_torch_mm_and_the_best_peer():
    own = Model("own", 4096, 288, 8, 1.0, 0, 100)
    cells = [
        cell(OURS, 4.2),
        cell(MM, 2 * 6.49),  # a device of half the speed: the measured peer takes 17.86
        cell(MM_TRITON, 16.0),
        cell(OURS, 1.0, mode="plain"),
        cell(OURS, 2.4, tokens=1),
        cell(MM, 6.16, tokens=1),
        cell(MM_TRITON, 9.0, tokens=1),
        cell(OURS, 5.0, model="own"),
        cell(MM, 6.0, model="own"),
        cell(MM_TRITON, None, model="own", error="failed: x"),
    ]
    head, columns, *rows = report.compact_table(cells, [FLASH, own], PEERS)
    assert PEERS.gpu in head
    assert columns.split() == ["tokens", "dsv4-flash", "own"]
    assert [" ".join(row.split()) for row in rows] == [
        "1 2.40 / 6.16 / 4.04 - / - / -",
        "64 4.20 / 12.98 / 16.00 5.00 / 6.00 / -",
    ]
    assert report.compact_table([], [FLASH], PEERS) == []


def test_cells_are_compared_with_what_the_manifest_states(build):
    """At the next stated number of tokens; a batch in several launches has no figure."""
    decode, other = build.small()[:2]
    decode = dataclasses.replace(decode, latency=((1, 2.0), (64, 4.0)))
    cells = [
        cell(OURS, 3.0, tokens=8, served_by=decode.key),
        cell(OURS, 3.5, tokens=8, served_by=decode.key, mode="plain"),
        cell(OURS, None, tokens=64, served_by=decode.key, error="failed: x"),
        cell(OURS, 9.0, tokens=128, served_by=f"{decode.key}, by parts"),
        cell(OURS, 5.0, tokens=8, served_by=other.key),
        cell(MM, 7.0, tokens=8),
    ]
    (found,) = report.against_stated(cells, [decode, dataclasses.replace(other, latency=())])
    assert (found.tokens, found.entry, found.stated_us, found.ratio) == (8, decode.key, 4.0, 0.75)
    assert report.stated_table([found])[-1].split() == [decode.key, "8", "3.00", "4.00", "0.750"]
    assert report.stated_table([]) == []


def test_problems_are_told_once():
    cells = [
        cell(MM, None, error="failed: x"),
        cell(MM, None, tokens=1, error="failed: x"),
        cell(OURS, 5.0),
    ]
    others = [host_cell(host.PEER, None, error="skipped: no triton")]
    assert report.problems(cells, others) == [
        f"{MM}: failed: x (dsv4-flash 64 pdl and 1 more)",
        "mm+triton: skipped: no triton (dsv4-flash 1 host)",
    ]


def test_latency_rows_end_where_a_kernel_does():
    decode, prefill = "dense_router_decode/portable", "dense_router_prefill/wgmma"
    cells = [
        cell(decode, 3.004, tokens=1),
        cell(decode, 9.0, tokens=64),
        cell(prefill, 8.0, tokens=1),
        cell(prefill, 8.5, tokens=64),
        cell(prefill, 12.0, tokens=1024),
        cell(prefill, 13.0, tokens=1024, mode="plain"),
        cell(MM, 7.0, tokens=1024),
        cell(prefill, 9.0, tokens=1, model="dsv4-pro"),
    ]
    text = "\n".join(report.latency_rows(cells, "sm_90a", [1, 64, 1024]))
    assert tomllib.loads(text) == {
        "tokens": [1, 64, 1024],
        "sm_90a": {
            "dsv4-flash": {decode: [3.0, 9.0], prefill: [8.0, 8.5, 12.0]},
            "dsv4-pro": {prefill: [9.0]},
        },
    }


# --- start-up ---


@pytest.fixture
def proven(build, tmp_path):
    """A folder whose every entry has evidence."""
    folder = build.artifacts(tmp_path / "artifacts", build.small())
    releases.add_evidence(folder / "evidence", build.small())
    return folder


def test_startup_takes_every_step_in_a_process_of_its_own(proven, monkeypatch):
    monkeypatch.setattr(startup, "PROCESSES", 1)
    cells = startup.measure("small", proven, (9, 0))
    assert [(cell.signed, cell.step) for cell in cells] == [
        *((False, step) for step in (*startup.STEPS[1:], "total")),
        *((True, step) for step in (*startup.STEPS, "total")),
    ]
    assert all(0 < cell.low_ms <= cell.median_ms <= cell.high_ms for cell in cells)


def test_startup_reads_what_routers_of_the_model_load(build, proven, monkeypatch):
    read = []
    monkeypatch.setattr(startup.artifacts, "read_cubin", lambda entry, _: read.append(entry.key))
    startup.steps("small", proven, (9, 0))
    routed = {"dense_router_decode", "dense_router_prefill", "hash_router"}
    assert sorted(read) == sorted(e.key for e in build.small() if e.kernel in routed)


def test_startup_of_what_nothing_serves_says_why(proven, monkeypatch, capfd):
    for path in (proven / "evidence").iterdir():
        path.unlink()
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure("small", proven, (9, 0))
    assert "verify --record" in capfd.readouterr().err


def test_startup_is_held_to_its_bar():
    def cells(total):
        for step in ("manifest", "total"):
            yield startup.StartupCell("small", False, step, total, total, total)

    head, *rows = startup.table([*cells(startup.BAR_MS)])
    assert head[-2:] == ["bar", "met"]
    assert rows == [["small", "no", "-", "50.0", "-", "-", "-", "50.0", "50", "yes"]]
    assert startup.table([*cells(startup.BAR_MS + 1)])[1][-1] == "NO"
    assert startup.table([]) == []


# --- editions of the artifacts ---


class Pretended(Cpu):
    """A machine that reports itself as a GPU and runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "compute_capability": [9, 0]}


def test_an_edition_launches_the_same_cubins_without_dependent_launch(gpu, build, tmp_path):
    folder = tmp_path / "artifacts"
    plain = edition(folder, tmp_path / "plain", dependent=False)
    before, after = read_manifest(folder), read_manifest(plain)
    assert any(entry.contract.programmatic_dependent_launch for entry in before.entries)
    assert not any(entry.contract.programmatic_dependent_launch for entry in after.entries)
    assert [(entry.key, entry.sha256) for entry in after.entries] == [
        (entry.key, entry.sha256) for entry in before.entries
    ]
    serial = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    gpu.execute = False
    for which, present in ((folder, True), (plain, False), (folder, True)):
        kernel = kernels_on(0, which).load(Request("activation_topk", quantities={"experts": 16}))
        kernel.launch(
            7, **dict.fromkeys(kernel.arguments, 0) | {"tokens": 1, "scale": 1.0, "top_k": 4}
        )
        assert (serial in gpu.launches[-1].attributes) is present


def test_an_edition_keeps_the_evidence_and_only_one_dense_kernel(build, tmp_path):
    entries = [
        *build.small(),
        build.entry("dense_router_decode", build.dense(128, 24), **SMALL, variant="other"),
    ]
    folder = build.artifacts(tmp_path / "artifacts", entries)
    (folder / "evidence").mkdir()
    (folder / "evidence" / "a.json").write_text("{}")
    only = ("dense_router_decode", "other")
    copy = edition(folder, tmp_path / "copy", only=only)
    assert (copy / "evidence" / "a.json").is_file()
    kept = read_manifest(copy).entries
    assert variants_of(OURS, cli.TINY, kept) == [only]
    assert {entry.kernel for entry in kept} == {entry.kernel for entry in entries} - {
        "dense_router_prefill"
    }
    assert all((copy / entry.file).is_file() for entry in kept)
    assert len(list(copy.glob("*.cubin"))) == len(kept)


def test_a_variant_is_timed_alone_for_the_models_that_have_it(build, tmp_path):
    wide = {"HIDDEN": 256, "EXPERTS": 24, "TOP_K": 4}
    entries = [
        *build.small(),
        build.entry(
            "dense_router_decode", build.dense(256, 24), model="wide", constants=wide, variant="few"
        ),
        build.entry("hash_gate", build.gate(256, 24), model="wide", constants=wide | {"IMAGES": 0}),
        build.entry(
            "hash_gate",
            build.gate(256, 24),
            model="wide",
            constants=wide | {"IMAGES": 1},
            variant="images",
        ),
    ]
    here = entries_here(build.artifacts(tmp_path / "artifacts", entries), (9, 0))
    assert set(variants_of(OURS, cli.TINY, here)) == {
        ("dense_router_decode", "portable"),
        ("dense_router_prefill", "portable"),
    }
    assert variants_of("hash_gate", cli.TINY, here) == []
    model = dataclasses.replace(cli.TINY, hidden=256)
    assert variants_of(OURS, model, here) == [("dense_router_decode", "few")]
    assert variants_of("hash_gate", model, here) == [("hash_gate", "portable")]


def alone_options(folder: Path, out: Path, **changes: Any) -> run_.Options:
    """Each kernel by itself, one token, latency only."""
    options = run_.Options(
        models=[cli.TINY],
        tokens=(1,),
        contenders=(OURS, MM),
        modes=MODES,
        replays=1,
        parts=("latency",),
        artifacts=folder,
        variants={},
        alone=True,
        out=out,
    )
    return dataclasses.replace(options, **changes)


def test_both_models_of_a_run_are_timed_without_what_they_lack(tmp_path, build, monkeypatch):
    """One run: the editions are made once, and no cell is timed for a variant that is not there."""
    wide = {"HIDDEN": 256, "EXPERTS": 24, "TOP_K": 4}
    entries = [
        *build.small(),
        build.entry(
            "dense_router_decode", build.dense(256, 24), model="wide", constants=wide, variant="few"
        ),
    ]
    timed: dict[str, list[str]] = {}

    class Scripted:
        routers = 1

        def __init__(self, machine, model, contenders, *rest):
            timed[model.name] = [contender.name for contender in contenders]

        def cells(self, tokens):
            return iter(())

        def close(self):
            pass

    monkeypatch.setattr(run_, "Latencies", Scripted)
    folder = build.artifacts(tmp_path / "artifacts", entries)
    models = [cli.TINY, dataclasses.replace(cli.TINY, name="wide", hidden=256)]
    options = alone_options(folder, tmp_path / "out", models=models)
    run = run_.Run(options, Pretended(), tmp_path / "scratch", print)
    assert run.run() is True
    assert timed == {
        "tiny": ["dense_router_decode/portable", "dense_router_prefill/portable", MM],
        "wide": ["dense_router_decode/few", MM],
    }


def test_entries_of_another_target_are_not_timed(build, tmp_path):
    folder = build.artifacts(tmp_path / "artifacts", [*build.small(), *build.small("sm_100a")])
    here = entries_here(folder, (9, 0))
    assert {entry.target for entry in here} == {"sm_90a"}
    assert "topk_select" not in {entry.kernel for entry in here}


# --- options ---


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.main, arguments)

    return run


@pytest.fixture
def options(bench, monkeypatch):
    """The options that the command line sets, without a run."""
    seen: list[run_.Options] = []
    monkeypatch.setattr(cli, "Gpu", Cpu)
    monkeypatch.setattr(cli, "run", lambda found, machine, echo: seen.append(found) or True)

    def parse(*arguments: str) -> run_.Options:
        result = bench(*arguments)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return parse


def test_defaults_are_the_whole_comparison(options):
    found = options()
    assert list(found.models) == list(MODELS)
    assert found.tokens == cli.TOKENS
    assert found.contenders == tuple(CONTENDERS)
    assert found.modes == MODES
    assert found.parts == ("startup", "host", "latency", "topk")
    assert found.replays == 60
    assert found.artifacts is None
    assert found.variants == {}
    assert found.alone is False
    assert found.out == Path("build/bench")


def test_every_option_reaches_the_run(options):
    found = options(
        *("--models", "dsv4-pro", "--tokens", "64,1,64", "--contenders", f"{MM},{OURS}"),
        *("--modes", "plain", "--parts", "latency", "--replays", "7", "--artifacts", "there"),
        *("--variant", "a=1", "--variant", "a=2", "--variant", "b=3", "--alone", "--out", "here"),
    )
    assert [model.name for model in found.models] == ["dsv4-pro"]
    assert found.tokens == (1, 64)
    assert found.contenders == (MM, OURS)
    assert found.modes == ("plain",)
    assert found.parts == ("latency",)
    assert found.replays == 7
    assert found.artifacts == Path("there")
    assert found.variants == {"a": ["1", "2"], "b": ["3"]}
    assert found.alone is True
    assert found.out == Path("here")


MINE = """
name = "mine"
hidden = 4096
experts = 288
top_k = 8
scale = 1.5
hash_layers = 0
vocab = 129280
"""


def test_a_model_of_ones_own(options, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    found = options("--model-file", str(file), "--artifacts", "there")
    assert list(found.models) == [Model("mine", 4096, 288, 8, 1.5, 0, 129280)]
    found = options("--model-file", str(file), "--models", "dsv4-pro")
    assert [model.name for model in found.models] == ["dsv4-pro", "mine"]


def test_a_wrong_model_file_is_refused(bench, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace("4096", "4000"))
    result = bench("--model-file", str(file))
    assert result.exit_code == 1
    assert "mine.toml: hidden: expected a positive multiple of 64, found 4000" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--models", "dsv5"],
            f"expected some of {', '.join(model.name for model in MODELS)}, found dsv5",
        ),
        (["--contenders", "mm"], "found mm"),
        (["--tokens", "0,1"], "expected numbers of tokens such as 1,64,1024, found 0,1"),
        (["--tokens", "a"], "found a"),
        (["--variant", "decode"], "expected kernel=variant"),
        (["--replays", "0"], "0 is not in the range"),
        (["--dry-run", "--alone"], "expected --dry-run without"),
        (["--dry-run", "--models", "dsv4-pro"], "expected --dry-run without"),
        (["--dry-run", "--model-file", "mine.toml"], "expected --dry-run without"),
        (["--dry-run", "--variant", "a=b"], "expected --dry-run without"),
        (["--dry-run", "--artifacts", "x"], "expected --dry-run without"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(bench, arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_no_gpu_is_an_error_with_a_way_on(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench()
    assert result.exit_code == 1
    assert "expected a GPU" in result.output
    assert "--dry-run" in result.output


def test_variants_make_a_contender_each():
    names = [contender.name for contender in field([OURS, MM], {}, {})]
    assert names == [OURS, MM]
    one = {"dense_router_decode": ["a"], "activation_topk": ["e"]}
    ours, other = field([OURS, "mm+activation_topk"], {}, one)
    assert (ours.name, ours.settings.variants) == (OURS, {"dense_router_decode": "a"})
    assert other.settings.variants == {"dense_router_decode": "a", "activation_topk": "e"}
    two = {"dense_router_decode": ["a", "b"], "dense_router_prefill": ["c"]}
    assert [contender.name for contender in field([OURS, MM], {}, two)] == [
        f"{OURS}[a,c]",
        f"{OURS}[b,c]",
        MM,
    ]


def test_a_dense_kernel_that_is_named_serves_hash_layers(monkeypatch):
    given = []
    monkeypatch.setattr(contenders, "Router", lambda *_, **more: given.append(more["variants"]))
    layers = types.SimpleNamespace(
        model=cli.TINY, token_ids=None, weights=[torch.empty(0)], tables=[None]
    )
    named = {"dense_router_prefill": "b", "dense_router_decode": "c", "topk_select": "d"}
    contenders.GateRouters(layers, "pdl", contenders.Settings({}, named))
    assert given == [{"dense_router_prefill": "b"}]


def test_alone_puts_each_dense_kernel_in_place_of_the_product(tmp_path, build, monkeypatch):
    entries = [
        *build.small(),
        build.entry("dense_router_decode", build.dense(128, 24), **SMALL, variant="other"),
    ]
    folder = build.artifacts(tmp_path / "artifacts", entries)
    variants = {"dense_router_decode": ["other"]}
    options = alone_options(folder, tmp_path / "out", variants=variants)

    def names(options: run_.Options, scratch: str, model: Model = cli.TINY) -> dict[str, Contender]:
        run = run_.Run(options, Pretended(), tmp_path / scratch, print)
        return {contender.name: contender for contender in run._contenders(model)}

    found = names(options, "one")
    decode = "dense_router_decode/other"
    assert [name for name in found if "decode" in name or name in (OURS, MM)] == [decode, MM]
    settings = found[decode].settings
    assert settings.alone
    assert settings.variants == {"dense_router_decode": "other"}
    for mode in MODES:
        kept = read_manifest(settings.folders[mode]).entries
        assert variants_of(OURS, cli.TINY, kept) == [("dense_router_decode", "other")]
        dependent = any(entry.contract.programmatic_dependent_launch for entry in kept)
        assert dependent is (mode == "pdl")
    everything = names(dataclasses.replace(options, variants={}), "all")
    assert {"dense_router_decode/portable", decode, MM} <= set(everything)
    other = dataclasses.replace(cli.TINY, name="another", hidden=256)
    assert list(names(dataclasses.replace(options, variants={}), "another", other)) == [MM]
    product = names(dataclasses.replace(options, alone=False, variants={}), "product")
    assert list(product) == [OURS, MM]
    assert product[OURS].settings.folders["pdl"] == folder


def test_what_plug_ins_add_is_held_against_the_bar():
    cells = [engines.PluginCell("vLLM", 4.5, 1.5), engines.PluginCell("SGLang", 4.6, 1.5)]
    assert [line.split() for line in report.plugin_table(cells, 3.0)[3:]] == [
        ["vLLM", "4.50", "1.50", "3.00", "yes"],
        ["SGLang", "4.60", "1.50", "3.10", "NO"],
    ]


def test_the_plug_ins_serve_while_they_are_measured_and_are_gone_afterwards():
    for name, served in engines.ENGINES.items():
        with served() as (layer, call):
            assert layer.is_serving, name
            weights, ids = call()
            assert (weights.shape, ids.dtype) == ((engines.TOKENS, 4), torch.int32)
        assert not layer.is_serving


# --- a dry run ---


def dry(bench: Callable[..., Result], *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = bench("--dry-run", "--out", "out", *arguments)
    assert result.exit_code == 0, result.output
    return result, json.loads(Path("out/bench.json").read_text())


def test_dry_run_writes_the_document(bench):
    result, document = dry(bench, "--tokens", "2", "--replays", "3")
    assert set(document) == {
        *("format_version", "device", "software", "artifacts", "method", "peers", "startup"),
        *("cells", "comparisons", "stated", "host", "host_comparisons", "plugins", "topk"),
    }
    assert document["format_version"] == report.FORMAT_VERSION
    assert document["device"]["name"] == "dry run on a CPU"
    assert document["software"]["torch"] == torch.__version__
    assert document["method"]["replays"] == 3
    assert document["method"]["routers"] == {"tiny": 2}
    assert {(c["tokens"], c["contender"], c["mode"]) for c in document["cells"]} == {
        (2, name, mode) for name in CONTENDERS for mode in MODES
    }
    for each in document["cells"]:
        assert set(each) == {each.name for each in dataclasses.fields(Cell)}
        if each["contender"] != "mm+triton":
            assert each["error"] is None
            assert each["wrong_rows"] == 0
            assert each["low_us"] <= each["median_us"] <= each["high_us"]
    assert {(c["tokens"], c["contender"]) for c in document["host"]} == {
        (tokens, name)
        for tokens in run_.HOST_TOKENS
        for name in (host.OUTPUTS, host.ROUTER, host.OP, host.PEER)
    }
    assert "tiny: microseconds a router" in result.output
    assert "out/bench.json" in result.output


def test_parts_can_be_left_out(bench):
    _, document = dry(bench, "--parts", "latency", "--contenders", MM, "--modes", "pdl")
    assert document["host"] == document["plugins"] == []
    assert [(c["contender"], c["mode"], c["tokens"]) for c in document["cells"]] == [
        (MM, "pdl", 1),
        (MM, "pdl", 3),
    ]
    result, document = dry(bench, "--parts", "host")
    assert document["cells"] == []
    for each in document["host"]:
        ours = each["contender"] in host.OURS
        assert (each["warmed_us"] is not None) is ours
        assert (each["rested_us"] is None) is (each["error"] is not None)
        assert (each["error"] is None) is (each["contender"] != host.PEER)
    assert [cell["engine"] for cell in document["plugins"]] == ["vLLM", "SGLang"]
    for cell in document["plugins"]:
        assert cell["call_us"] > 0
        assert cell["added_us"] == cell["call_us"] - cell["router_us"]
    assert "that a plug-in adds to the eager op" in result.output
    assert "tiny: microseconds a router" not in result.output


def test_without_matplotlib_the_plot_is_skipped_and_says_so(bench, monkeypatch):
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result, _ = dry(bench, "--parts", "latency", "--contenders", MM, "--tokens", "1")
    assert "no plot: No module named 'matplotlib'; next: pip install matplotlib" in result.output


def test_an_error_makes_the_run_fail_and_leaves_the_document(bench, monkeypatch):
    def make(layers: Any, mode: Any, settings: Any) -> Any:
        raise ValueError("no such kernel")

    broken = {**CONTENDERS, MM: Contender(MM, make)}
    monkeypatch.setattr("tests.bench.contenders.CONTENDERS", broken)
    arguments = ("--parts", "latency", "--contenders", f"{MM},eager", "--tokens", "1")
    result = bench("--dry-run", "--out", "out", *arguments)
    assert result.exit_code == 1
    assert f"{MM}: failed: ValueError: no such kernel" in result.output
    cells = json.loads(Path("out/bench.json").read_text())["cells"]
    assert [c["contender"] for c in cells if c["error"] is None] == ["eager", "eager"]


def test_a_dead_device_leaves_what_was_measured(bench, monkeypatch):
    def die(self: Cpu) -> None:
        raise RuntimeError("illegal memory access")

    def make(layers: Any, mode: Any, settings: Any) -> Any:
        monkeypatch.setattr(Cpu, "synchronize", die)
        raise ValueError("launch failed")

    broken = {**CONTENDERS, "eager": Contender("eager", make)}
    monkeypatch.setattr("tests.bench.contenders.CONTENDERS", broken)
    arguments = ("--parts", "latency", "--contenders", f"{MM},eager", "--tokens", "1,3")
    result = bench("--dry-run", "--out", "out", *arguments)
    assert result.exit_code == 1
    assert "stopped:" in result.output
    cells = json.loads(Path("out/bench.json").read_text())["cells"]
    assert [(c["contender"], c["tokens"]) for c in cells] == [(MM, 1)]


# --- the GPU's side, as far as it goes without one ---


class LinkDriver:
    """The bindings with a launch that reads the argument memory and does what the link does."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, str]:
        return real.CUresult.CUDA_SUCCESS, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, str]:
        assert (module, name) == ("module", b"chain_link")
        return real.CUresult.CUDA_SUCCESS, "function"

    def cuLaunchKernelEx(self, config: Any, function: str, table: int, extra: int) -> tuple[Any]:
        kinds = (ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32)
        addresses = (ctypes.c_void_p * len(kinds)).from_address(table)
        values = [
            kind.from_address(address).value for kind, address in zip(kinds, addresses, strict=True)
        ]
        previous, previous_stride, following, next_stride, tokens = values
        assert config.gridDimX * config.blockDimX >= tokens > (config.gridDimX - 1) * 256
        for token in range(tokens):
            source = previous + 4 * token * previous_stride
            bits = ctypes.c_uint32.from_address(source).value
            target = following + 2 * token * next_stride
            ctypes.c_uint16.from_address(target).value = bits >> 16
        dependent = sum(
            attribute.value.programmaticStreamSerializationAllowed
            for attribute in config.attrs[: config.numAttrs]
        )
        self.launches.append((config.gridDimX, int(config.hStream), tokens, dependent))
        return (real.CUresult.CUDA_SUCCESS,)


@pytest.mark.parametrize("tokens", [1, 256, 257])
@pytest.mark.parametrize("dependent", [True, False])
def test_link_copies_the_first_column(monkeypatch, tokens, dependent):
    api = LinkDriver()
    monkeypatch.setattr("cuda.bindings.driver", api)
    link = Link(b"code")
    previous = torch.rand(tokens, 6)
    following = torch.zeros(tokens, 128, dtype=torch.bfloat16)
    link.launch(previous, following, 7, dependent)
    assert api.launches == [(-(-tokens // 256), 7, tokens, int(dependent))]
    truncated = (previous.view(torch.int32) >> 16 << 16).view(torch.float32)
    torch.testing.assert_close(following[:, 0].float(), truncated[:, 0], rtol=0, atol=0)
    assert not following[:, 1:].any()


def test_gpu_warms_up_captures_and_times_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Event:
        def record(self, stream: Any) -> None:
            log.append(f"record {stream}")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 0.25

    class Stream:
        def __str__(self) -> str:
            return "side"

        def synchronize(self) -> None:
            pass

    @contextlib.contextmanager
    def inside(what: str) -> Iterator[None]:
        log.append(what)
        yield
        log.append("end")

    def graph(captured: Graph, *, stream: Stream, capture_error_mode: str) -> Any:
        return inside(f"capture {stream} {capture_error_mode}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside(f"on {stream}"))
    monkeypatch.setattr("tests.bench.machine.WARM_SECONDS", 0)
    gpu: Any = object.__new__(Gpu)
    gpu.device, gpu._stream = torch.device("cuda", 0), Stream()
    chain = iter(["warm", "captured"])

    def run() -> str:
        log.append("chain")
        return next(chain)

    assert gpu.timed(run, 2) == ([250.0, 250.0], "captured")
    assert log == [
        *("on side", "chain", "end"),
        *("capture side thread_local", "chain", "end"),
        *("on side", *(["record side", "replay", "record side"] * 2), "end"),
    ]


def test_options_are_timed_and_checked(monkeypatch):
    """Every option's router in a chain on a CPU; one that is wrong fails."""
    small = Model("small", 128, 24, 4, 1.5, 0, 100)
    monkeypatch.setattr(options_, "MODELS", (small,))
    arguments = ["--model", "small", "--tokens", "3", "--replays", "2", "--dry-run"]
    done = CliRunner().invoke(options_.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    header, row = done.output.splitlines()
    assert all(name in header for name in ("plain", "load", "capture", "all of these"))
    assert len(row.split()) == 8
    right = options_.RoutersWithOptions.__call__

    def wrong(self, layer, x):
        return options_.Output(right(self, layer, x).values + 1, right(self, layer, x).ids)

    monkeypatch.setattr(options_.RoutersWithOptions, "__call__", wrong)
    done = CliRunner().invoke(options_.main, arguments)
    assert done.exit_code == 1
    assert "differ from the oracle" in done.output
