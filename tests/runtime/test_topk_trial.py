"""The trial of ``topk_indices``'s variants without a GPU: what it compares, times and says."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from router_runtime import spec
from tests.bench import topk_trial
from tests.bench.topk import SHAPES, Shape
from tests.bench.topk_rows import RANDOM
from tests.bench.topk_trial import Trial, row


def kernel(
    score_bytes: int = 4, longest: int = 2**21, most: int = 4096, wrong: int | None = None
) -> Any:
    """A kernel with these limits whose ids are the oracle's, but for those of row ``wrong``."""
    limits = {"row_length": (1, longest), "top_k": (1, most)}
    constants = {"SCORE_BYTES": score_bytes, "BLOCKS_PER_ROW": 1}
    entry = SimpleNamespace(constants=constants, contract=SimpleNamespace(limits=limits))
    return SimpleNamespace(entry=entry, wrong=wrong, launches=[])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(kernel: Any, arguments: Mapping[str, Any]) -> None:
        given = dict(arguments)
        kernel.launches.append(given)
        ids = given["ids_out"]
        scores, starts, ends = (given[name] for name in ("scores", "row_starts", "row_ends"))
        in_order = {"in_rank_order": bool(given["sorted"]), "nan_first": bool(given["nan_first"])}
        ids.copy_(spec.topk_indices(scores, given["top_k"], starts, ends, **in_order))
        if kernel.wrong is not None:
            ids[kernel.wrong, 0] += 1

    monkeypatch.setattr(topk_trial, "DEVICE", "cpu")
    monkeypatch.setattr(topk_trial, "CHECKED", ((300, 9), (7, 3), (2100, 2)))
    monkeypatch.setattr(topk_trial, "launch", launch)
    monkeypatch.setattr(topk_trial, "timed", lambda kernel, chain: float(len(chain)))


def test_results_are_compared_with_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = {"right": kernel(), "half": kernel(2, most=2048), "short": kernel(longest=300)}
    assert Trial(kernels, 1e3).wrong() == 0
    assert "0 wrong" in capsys.readouterr().out
    launches = kernels["right"].launches
    for option in ("sorted", "nan_first"):
        assert {given[option] for given in launches} == {0, 1}
    assert {given["top_k"] for given in launches} == {1, 512, 2048, 4096}
    # Rows that are aligned to nothing, whose ends are not those of the scores, with others between.
    assert {given["scores"].data_ptr() % 16 for given in launches} != {0}
    assert all(given["row_stride"] > given["row_length"] for given in launches)
    assert any(bool((given["row_starts"] > 0).any()) for given in launches)
    assert {given["row_length"] for given in kernels["short"].launches} == {300, 7}
    assert all(given["scores"].dtype == torch.bfloat16 for given in kernels["half"].launches)


def test_a_wrong_id_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"right": kernel(longest=7), "bad": kernel(longest=7, wrong=1)}
    assert Trial(found, 1e3).wrong() == len(found["bad"].launches) > 0
    out = capsys.readouterr().out
    assert "WRONG bad random 3 x 7 k 512" in out
    assert "right" not in out


def test_a_comparison_that_is_cut_short_is_no_success(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert Trial({"right": kernel()}, 0.0).wrong() == 1
    assert "INCOMPLETE" in capsys.readouterr().out


def test_variants_are_timed_on_the_shapes_that_suit_them() -> None:
    kernels = {
        "a": kernel(),
        "half": kernel(2),
        "short": kernel(longest=200),
        "few": kernel(most=8),
    }
    trial = Trial(kernels, 1e3)
    assert set(trial.times(Shape(2, 300, 16), RANDOM)) == {"a"}
    assert set(trial.times(Shape(2, 200, 8), "beats_sample", ["a", "short"])) == {"a", "short"}
    assert set(trial.empty(3)) == set(kernels)


def test_a_line_tells_the_fastest_and_whether_the_bar_is_met() -> None:
    assert row("x", 3.0, {"slow": 4.0, "fast": 2.5}).split() == [
        *("x", "bar", "3.0", "met", "fast", "2.50", "slow", "4.00"),
    ]
    assert "MISSED" in row("x", 2.0, {"fast": 2.5})
    assert "bar" not in row("x", None, {"fast": 2.5})
    # Every bar of the benchmark is a line of the trial.
    assert sum(shape.most_us is not None for shape in SHAPES) >= 11
