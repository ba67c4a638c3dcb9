"""What ``tests.bench.power`` reads from nvidia-smi's lines, and its table, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from build_kernels.catalog.models import Model
from router_runtime.errors import DriverError
from tests.bench import power
from tests.bench.machine import Cpu
from tests.bench.power import Reading, reading, samples


def test_samples_are_the_lines_of_two_numbers() -> None:
    lines = ["1500, 692.45", "", "[N/A], 10.0", "1470, 690.00", "terminated"]
    assert samples(lines) == [(1500.0, 692.45), (1470.0, 690.0)]


def test_the_second_half_under_load_counts() -> None:
    found = reading([10.0, 10.0, 20.0, 22.0, 24.0, 26.0], ["345, 100", "1500, 600", "1450, 700"])
    assert found == Reading(24.0, 1475.0, 650.0)
    assert found.energy == pytest.approx(15.6)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(DriverError, match="nvidia-smi --query-gpu=clocks"):
        reading([1.0], ["no devices were found"])


def test_a_row_for_each_contender_and_kind_of_hidden_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def steady(device: torch.device) -> Iterator[list[str]]:
        yield ["1500, 690"]

    monkeypatch.setattr(power, "sampled", steady)
    model = Model("tiny", 64, 8, 2, 1.0, 0, 16)
    table = [row.split() for row in power.rows(Cpu(), model, 3, 0.0)]
    assert [row[:4] for row in table] == [
        ["tiny", "3", name, kind]
        for kind in ("random", "zeros")
        for name in ("dense_router", "torch.mm")
    ]
    assert {tuple(row[5:7]) for row in table} == {("1500", "690")}
