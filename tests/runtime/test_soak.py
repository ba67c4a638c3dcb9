"""What ``make soak`` launches and counts, without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from router_runtime.device.facts import DeviceFacts
from tests.gpu import entries as gpu_entries
from tests.gpu import soak

ROUNDS = 3


class Kernel:
    """Stands in for a kernel: its outputs follow from the rows. One launch in ``wrong_every`` has
    another bit in its last row.
    """

    def __init__(self, wrong_every: int | None = None) -> None:
        self.wrong_every = wrong_every
        self.rows: list[int] = []

    def __call__(self, inputs, *outputs, **by_name):
        rows = next(
            inputs[name]
            for name in ("hidden_states", "logits", "scores", "token_ids")
            if name in inputs
        )
        sums = rows.reshape(len(rows), -1).double().sum(1).float().view(torch.int32)
        self.rows.append(len(rows))
        for output in (*outputs, *by_name.values()):
            output.view(torch.int32)[:] = sums[:, None]
        if self.wrong_every and len(self.rows) % self.wrong_every == 0:
            outputs[0].view(torch.int32)[-1, 0] ^= 1


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    for module in (gpu_entries, soak):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(soak, "COPIED_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    clock = iter(range(1000))
    monkeypatch.setattr(soak.time, "perf_counter", lambda: next(clock))


@pytest.fixture
def entries(build):
    return build.small()


def test_equal_bits_are_counted_as_such(entries):
    for entry in entries:
        kernel = Kernel()
        assert soak.soak(entry, kernel, ROUNDS) == (len(kernel.rows) - 1, 0)


def test_batches_have_several_sizes_within_the_limits(entries):
    for entry in entries:
        kernel = Kernel()
        soak.soak(entry, kernel, ROUNDS)
        limits = entry.contract.limits
        _, most = limits.get("tokens", limits.get("rows", (1, 2**31)))
        assert len(set(kernel.rows)) >= 3
        assert 1 <= min(kernel.rows) < max(kernel.rows) <= most
        of_a_burst = kernel.rows[1 : 1 + (len(kernel.rows) - 1) // (ROUNDS - 1)]
        assert kernel.rows[1:] == of_a_burst * (ROUNDS - 1)


def test_one_bit_of_one_row_is_seen(entries):
    for entry in entries:
        launches, differing = soak.soak(entry, Kernel(wrong_every=7), ROUNDS)
        assert differing == (launches + 1) // 7


def test_a_first_launch_that_is_wrong_shows_too(entries):
    class First(Kernel):
        def __call__(self, inputs, *outputs, **by_name):
            super().__call__(inputs, *outputs, **by_name)
            if len(self.rows) == 1:
                outputs[1].view(torch.int32)[0] ^= 1

    for entry in entries:
        launches, differing = soak.soak(entry, First(), ROUNDS)
        assert differing == launches


@pytest.fixture
def machine(entries, build, tmp_path, monkeypatch):
    """The command on a machine whose kernels are stand-ins."""
    folder = build.artifacts(tmp_path / "artifacts", entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    facts = DeviceFacts(9, 0, 13000, 132, 232448)
    stand_in = SimpleNamespace(initialise=lambda: None, device_facts=lambda _: facts)
    monkeypatch.setattr(gpu_entries, "driver", stand_in)
    monkeypatch.setattr(soak, "load_entry", lambda entry, *_: entry)


def test_the_command_names_every_entry(machine, entries, monkeypatch, capsys):
    monkeypatch.setattr(soak, "KernelRun", lambda entry, device: Kernel())
    assert soak.main(["--seconds", "2"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(entry.key for entry in entries)
    assert all(line.startswith("0 of ") for line in lines)
    assert last == f"0 of {len(entries)} entries had other bits"


def test_the_command_fails_for_other_bits(machine, entries, monkeypatch, capsys):
    wrong = {"hash_router": 5}
    monkeypatch.setattr(soak, "KernelRun", lambda entry, device: Kernel(wrong.get(entry.kernel)))
    assert soak.main(["--seconds", "2"]) == 1
    assert f"1 of {len(entries)} entries had other bits" in capsys.readouterr().out
    assert soak.main(["--seconds", "2", "topk_select"]) == 0


def test_a_name_that_matches_nothing_fails(machine, capsys):
    assert soak.main(["dense_router_prefil1"]) == 1
    assert "expected some of ['activation_topk/any/sm_90a/" in capsys.readouterr().out
