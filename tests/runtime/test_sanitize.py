"""What ``make sanitize`` launches, without a GPU and without a sanitizer."""

from __future__ import annotations

import pytest

from build_kernels.catalog.kernels import KERNELS
from build_kernels.catalog.models import MODELS
from router_runtime.verification.inputs import ROW_INPUT, make_inputs
from tests.gpu import entries as gpu_entries
from tests.gpu import sanitize


def serving(cases):
    return [set(case.serving) for case in cases if case.serving]


def test_each_entry_is_launched_on_few_cases_that_reach_everything(every_kernel):
    for entry in every_kernel:
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
            "topk_indices": [],
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


def test_entries_are_named_by_the_start_of_their_keys(every_kernel):
    def keys(*prefixes):
        return [entry.key for entry in gpu_entries.named(every_kernel, prefixes)]

    assert keys() == [entry.key for entry in every_kernel]
    assert keys("dense_router_decode/small") == ["dense_router_decode/small/sm_90a/portable"]
    assert keys("dense_router_decode/other/few") == ["dense_router_decode/other/sm_90a/few"]
    assert keys("dense_router_decode/other/sm_90a/few") == ["dense_router_decode/other/sm_90a/few"]
    assert len(keys("topk_select", "hash_router")) == 3
    assert keys("no_such") == []


@pytest.fixture
def launched(in_name_only, monkeypatch):
    """The keys of the entries that were launched."""
    found = []

    class Run:
        def __init__(self, entry, device):
            self._key = entry.key

        def __call__(self, inputs, *outputs, **by_name):
            found.append(self._key)

    monkeypatch.setattr(gpu_entries, "KernelRun", Run)
    return found


def test_a_run_names_every_entry_and_its_time(launched, every_kernel, capsys):
    assert sanitize.main([]) == 0
    assert set(launched) == {entry.key for entry in every_kernel}
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted({entry.key for entry in every_kernel})
    assert all(line.endswith(" s") for line in lines)
    assert last.startswith(f"{len(every_kernel)} entries, {len(launched)} launches, ")


def test_names_that_match_nothing_fail(launched, capsys):
    assert sanitize.main(["dense_router_prefil1"]) == 1
    assert not launched
    assert "expected some of ['activation_topk/any/sm_90a/e16'" in capsys.readouterr().out
    assert sanitize.main(["hash_router"]) == 0
    assert set(launched) == {"hash_router/any/sm_90a/portable"}
