"""What ``make soak`` launches and counts, without a GPU."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from router_runtime.verification.inputs import ROW_INPUT, make_inputs
from tests.gpu import entries as gpu_entries
from tests.gpu import soak

SECONDS = 3


class Kernel:
    """Stands in for a kernel: its outputs follow from the rows. One launch in ``wrong_every`` has
    another bit in its last row.
    """

    def __init__(self, wrong_every: int | None = None) -> None:
        self.wrong_every = wrong_every
        self.rows: list[int] = []

    def __call__(self, inputs, *outputs, **by_name):
        rows = inputs[next(name for name in ROW_INPUT.values() if name in inputs)]
        sums = rows.reshape(len(rows), -1).double().sum(1).float().view(torch.int32)
        self.rows.append(len(rows))
        for output in (*outputs, *by_name.values()):
            output.view(torch.int32)[:] = sums[:, None]
        if self.wrong_every and len(self.rows) % self.wrong_every == 0:
            outputs[0].view(torch.int32)[-1, 0] ^= 1


@pytest.fixture(autouse=True)
def no_gpu(in_name_only, monkeypatch):
    """A graph that calls, and a clock on which each look takes a second."""
    monkeypatch.setattr(soak, "DEVICE", "cpu")
    monkeypatch.setattr(soak, "COPIED_BYTES", 16)
    monkeypatch.setattr(soak, "SHARES", (2, 1, 0.3, 3, 0.1))
    monkeypatch.setattr(soak, "captured", lambda call: (SimpleNamespace(replay=call), None))
    event = SimpleNamespace(record=lambda: None, query=itertools.cycle([False, True]).__next__)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(soak.time, "perf_counter", itertools.count().__next__)


def soaked(entry, kernel, seconds=SECONDS):
    """What the entry's first case gives."""
    return soak.soak(entry, soak.cases_to_launch(entry)[0], kernel, seconds)


def test_equal_bits_are_counted_as_such(every_kernel):
    for entry in every_kernel:
        kernel = Kernel()
        launches, differing = soaked(entry, kernel)
        assert (launches, differing) == (len(kernel.rows) - 1, [])


def test_a_burst_has_batches_of_several_sizes_within_the_limits(every_kernel):
    for entry in every_kernel:
        kernel = Kernel()
        soaked(entry, kernel)
        limits = entry.contract.limits
        _, most = limits.get("tokens", limits.get("rows", (1, 2**31)))
        assert len(set(kernel.rows)) >= 3
        assert 1 <= min(kernel.rows) < max(kernel.rows) <= most
        burst = kernel.rows[1 : 1 + (len(kernel.rows) - 1) // SECONDS]
        assert kernel.rows[1:] == burst * SECONDS


def test_one_bit_of_one_row_is_seen(every_kernel):
    for entry in every_kernel:
        kernel = Kernel(wrong_every=7)
        launches, differing = soaked(entry, kernel)
        assert len(differing) == (launches + 1) // 7
        assert differing == kernel.rows[6::7]


def test_a_first_launch_that_is_wrong_shows_too(every_kernel):
    class First(Kernel):
        def __call__(self, inputs, *outputs, **by_name):
            super().__call__(inputs, *outputs, **by_name)
            if len(self.rows) == 1:
                outputs[1].view(torch.int32)[0] ^= 1

    for entry in every_kernel:
        launches, differing = soaked(entry, First())
        assert len(differing) == launches


def test_no_seconds_are_one_burst(every_kernel):
    launches, _ = soaked(every_kernel[0], Kernel(), seconds=0)
    assert launches > 0


def test_the_cases_reach_long_rows_large_k_and_image_tokens(every_kernel):
    cases = {entry.kernel: soak.cases_to_launch(entry) for entry in every_kernel}
    lengths = [case.sizes["row_length"] for case in cases["topk_indices"]]
    assert max(lengths) > 100_000
    assert max(case.sizes["top_k"] for case in cases["topk_indices"]) >= 512
    assert any(case.sizes["images"] for case in cases["hash_gate"])
    for entry in every_kernel:
        rows = [len(make_inputs(case)[ROW_INPUT[entry.kernel]]) for case in cases[entry.kernel]]
        assert rows[0] == max(rows)


def test_the_command_names_every_entry(every_kernel, monkeypatch, capsys):
    monkeypatch.setattr(gpu_entries, "KernelRun", lambda entry, device: Kernel())
    assert soak.main(["--seconds", "1"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(entry.key for entry in every_kernel)
    assert all(" 0 of " in line for line in lines)
    assert last == f"0 of {len(every_kernel)} entries had other bits"


def test_the_command_takes_as_long_as_it_is_told(monkeypatch):
    kernels = []

    def run(entry, device):
        kernels.append(Kernel())
        return kernels[-1]

    monkeypatch.setattr(gpu_entries, "KernelRun", run)
    assert soak.main(["dense_router_decode/small", "--seconds", "2"]) == 0
    assert soak.main(["dense_router_decode/small"]) == 0
    short, default = (len(kernel.rows) - 1 for kernel in kernels)
    assert default * 2 == short * 5


def test_the_command_fails_for_other_bits(every_kernel, monkeypatch, capsys):
    wrong = {"hash_router": 5}
    monkeypatch.setattr(
        gpu_entries, "KernelRun", lambda entry, device: Kernel(wrong.get(entry.kernel))
    )
    assert soak.main(["--seconds", "1"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"1 of {len(every_kernel)} entries had other bits"
    (line,) = (line for line in lines if line.startswith("hash_router"))
    assert " launches differ, of [" in line
    assert line.endswith("] rows")
    assert soak.main(["--seconds", "1", "topk_select"]) == 0


def test_a_name_that_matches_nothing_fails(capsys):
    assert soak.main(["dense_router_prefil1"]) == 1
    assert "expected some of ['activation_topk/any/sm_90a/" in capsys.readouterr().out
