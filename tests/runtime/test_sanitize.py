"""What ``make sanitize`` launches, without a GPU and without a sanitizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from build_kernels.catalog.kernels import KERNELS
from build_kernels.catalog.models import MODELS
from router_runtime.device.facts import DeviceFacts
from router_runtime.verification.inputs import ROW_INPUT, make_inputs
from tests.gpu import entries as gpu_entries
from tests.gpu import sanitize

DENSE = {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}


@pytest.fixture
def entries(build):
    """One of each kernel, and a decode kernel for few tokens."""
    few = build.dense(128, 24, tokens=(1, 32))
    gate = {"model": "small", "constants": DENSE | {"IMAGES": 1}}
    return [
        *build.small(),
        build.entry("dense_router_decode", few, model="other", constants=DENSE, variant="few"),
        build.entry("hash_gate", build.gate(), **gate),
    ]


def serving(cases):
    return [set(case.serving) for case in cases if case.serving]


def test_each_entry_is_launched_on_few_cases_that_reach_everything(entries):
    for entry in entries:
        cases = list(sanitize.cases_to_launch(entry))
        assert len(cases) <= 4
        assert any(case.pattern in ("ties", "repeated", "out_of_range") for case in cases)
        most = entry.contract.limits.get("tokens", (1, 2**31))[1]
        for case in cases:
            given = make_inputs(case)
            rows = len(given[ROW_INPUT[case.kernel]])
            assert rows <= min(sanitize.ROWS_AT_MOST, most)
        everything = {"padding", "count", "map", "wide"}
        expected = {
            "topk_select": [],
            "hash_router": [everything],
        }
        scored = [everything | {"images"}, everything | {"replay"}]
        if entry.kernel.startswith("dense"):
            scored[0] |= {"table"}
        assert serving(cases) == expected.get(entry.kernel, scored)


def test_the_last_tile_is_ragged():
    """For every tile that a constant of the catalog names, and a batch cut to its limit."""
    names = ("TOKENS_TILE", "TILE_TOKENS", "TOKENS_PER_BLOCK")
    constants = [
        variant.constants_of(model)
        for row in KERNELS
        for variant in row.variants
        for model in MODELS
    ]
    tiles = {each[name] for each in constants for name in names if name in each}
    assert tiles
    for each in constants:
        limit = each.get("MAX_TOKENS", 2**31 - 1)
        rows = min(sanitize.ROWS_AT_MOST, limit - sanitize.BELOW_LIMIT)
        assert all(rows % each[name] for name in names if name in each)


def test_entries_are_named_by_the_start_of_their_keys(entries):
    def keys(*prefixes):
        return [entry.key for entry in gpu_entries.named(entries, prefixes)]

    assert keys() == [entry.key for entry in entries]
    assert keys("dense_router_decode/small") == ["dense_router_decode/small/sm_90a/portable"]
    assert keys("dense_router_decode/other/few") == ["dense_router_decode/other/sm_90a/few"]
    assert keys("dense_router_decode/other/sm_90a/few") == ["dense_router_decode/other/sm_90a/few"]
    assert len(keys("topk_select", "hash_router")) == 3
    assert keys("no_such") == []


@pytest.fixture
def launched(entries, build, tmp_path, monkeypatch):
    """Entries that were launched, on a machine with no GPU."""
    folder = build.artifacts(tmp_path / "artifacts", entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    found = []

    class Run:
        def __init__(self, entry, device):
            self._key = entry.key

        def __call__(self, inputs, *outputs, **logical_ids):
            found.append(self._key)

    facts = DeviceFacts(9, 0, 13000, 132, 232448)
    stand_in = SimpleNamespace(initialise=lambda: None, device_facts=lambda _: facts)
    monkeypatch.setattr(gpu_entries, "driver", stand_in)
    for module in (gpu_entries, sanitize):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(sanitize, "KernelRun", Run)
    monkeypatch.setattr(sanitize, "load_entry", lambda entry, *_: entry)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def test_a_run_names_every_entry_and_its_time(launched, entries, capsys):
    assert sanitize.main([]) == 0
    assert set(launched) == {entry.key for entry in entries}
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == sorted({entry.key for entry in entries})
    assert all(line.split()[1] == "s" for line in lines)
    assert f"{len(launched)} launches, {len(entries)} entries" in last


def test_names_that_match_nothing_fail(launched, capsys):
    assert sanitize.main(["dense_router_prefil1"]) == 1
    assert not launched
    assert "expected some of ['activation_topk/any/sm_90a/e16'" in capsys.readouterr().out
    assert sanitize.main(["hash_router"]) == 0
    assert set(launched) == {"hash_router/any/sm_90a/portable"}
