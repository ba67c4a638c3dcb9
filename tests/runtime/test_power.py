"""What ``tests.bench.power`` reads from nvidia-smi's lines."""

from __future__ import annotations

import pytest

from router_runtime.errors import DriverError
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
