"""What ``tests.bench.tune`` compares, times and writes, without a GPU: a dry run of all of it."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from build_kernels.catalog.models import Model
from build_kernels.tuning.record import TUNING_NAME, Figures, Trial, Tuning, read_tuning
from router_runtime.device.artifact_store import read_manifest
from router_runtime.format.codec import canonical_json, decode
from tests.bench import tune
from tests.bench.contenders import DenseRouters
from tests.bench.machine import Cpu
from tests.fake_driver.calls import FakeDriver
from tests.fake_driver.install import serve_cpu_memory
from tests.runtime.routers import build_on_the_fake_gpu

SMALL = Model("small", 128, 24, 4, 1.5, 0, 100)
DIVISION = {
    **{"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4},
    **{"FORM": "tile", "CLUSTER_E": 1, "CLUSTER_T": 1, "PASSES": 1},
}
PREFIX = "dense_router_prefill/small/sm_90a"

Bench = Callable[..., Result]


@pytest.fixture
def folder(build: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of ``build-kernels tune`` with two classes of three entries each."""
    names = [f"{name}{number}" for name in ("few", "many") for number in ("", ".1", ".2")]
    small: dict[str, Any] = {"model": "small", "constants": DIVISION, "numerics": build.numerics}
    entries = [
        build.entry("dense_router_decode", build.dense(128, 24), **small),
        *(
            build.entry(
                "dense_router_prefill",
                dataclasses.replace(build.prefill(128, 24), block=(64 * number, 1, 1)),
                variant=name,
                **small,
            )
            for number, name in enumerate(names, 1)
        ),
    ]
    found = build.artifacts(tmp_path / "artifacts", entries)
    kernel = "dense_router_prefill"
    tuning = Tuning(
        "sm_90a",
        (128, 256, 4096),
        (SMALL,),
        (
            Trial("small", kernel, "few", (128, 256), "few", tuple(names[:3])),
            Trial("small", kernel, "many", (4096,), "many", tuple(names[3:])),
        ),
        {},
    )
    (found / TUNING_NAME).write_bytes(canonical_json(tuning))
    return Path(found)


@pytest.fixture
def bench(folder: Path, tmp_path: Path) -> Bench:
    def run(*arguments: str) -> Result:
        out = ("--artifacts", str(folder), "--out", str(tmp_path / "figures.json"))
        return CliRunner().invoke(tune.main, [*out, "--dry-run", "--replays", "2", *arguments])

    return run


def figures(tmp_path: Path) -> Figures:
    found: Figures = decode(Figures, json.loads((tmp_path / "figures.json").read_text()), "file")
    return found


def test_a_dry_run_does_every_step(bench: Bench, folder: Path, tmp_path: Path) -> None:
    result = bench()
    assert result.exit_code == 0, result.output
    found = figures(tmp_path)
    assert (found.device, found.target) == ("dry run on a CPU", "sm_90a")
    assert found.complete
    assert found.wrong == {}
    assert found.sha256 == {entry.key: entry.sha256 for entry in read_manifest(folder).entries}
    assert set(found.torch_mm["small"]) == {"128", "256", "4096"}
    # Each entry is timed for the batches of its own class. The fastest entry of a class, and the
    # one that serves that class today, are timed for the batches of all classes.
    rows = {key.rpartition("/")[2]: set(row) for key, row in found.microseconds.items()}
    assert set(rows) == {"few", "few.1", "few.2", "many", "many.1", "many.2"}
    assert all(rows[name] >= {"128", "256"} for name in ("few", "few.1", "few.2"))
    assert all(rows[name] >= {"4096"} for name in ("many", "many.1", "many.2"))
    assert rows["few"] == rows["many"] == {"128", "256", "4096"}
    for names in (("few", "few.1", "few.2"), ("many", "many.1", "many.2")):
        assert 1 <= sum(len(rows[name]) == 3 for name in names) <= 2
    assert result.output.count("right") == 6
    assert "(today's)" in result.output


class Perturbed(DenseRouters):
    """Routers of which one entry is wrong in the last bit of one number."""

    #: The variant, and which of weights, ids, and logits.
    variant, number = "few.1", 0

    def __init__(self, layers: Any, mode: Any, settings: Any) -> None:
        super().__init__(layers, mode, settings)
        self._wrong = self.variant in settings.variants.values()

    def __call__(self, layer: int, x: torch.Tensor) -> Any:
        output = super().__call__(layer, x)
        return output if self.number == 2 else type(output)(*self._changed(output[:2]))

    def with_logits(self, layer: int, x: torch.Tensor) -> Any:
        return self._changed(super().with_logits(layer, x))

    def _changed(self, found: Any) -> Any:
        if self._wrong and self.number < len(found) and found[0].shape[0] > 1:
            found[self.number][-1, -1:].view(torch.int32).bitwise_xor_(1)
        return found


@pytest.mark.parametrize(("number", "what"), [(0, "weights"), (1, "ids"), (2, "logits")])
def test_a_candidate_with_other_bits_is_named_and_not_timed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    monkeypatch.setattr(Perturbed, "number", number)
    monkeypatch.setattr(tune, "DenseRouters", Perturbed)
    monkeypatch.setattr(tune.Measurement, "has_logits", lambda *_: True)
    result = bench()
    assert result.exit_code == 1
    found = figures(tmp_path)
    (key,) = found.wrong
    assert key == f"{PREFIX}/few.1"
    assert f"other {what} than the kernel for few tokens" in found.wrong[key]
    assert f"{key} WRONG: failed: ValueError" in result.output
    assert key not in found.microseconds
    assert found.complete


def test_a_result_unlike_the_oracles_is_wrong(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "ALLOWED_ROWS", -1)
    result = bench()
    assert isinstance(result.exception, ValueError)
    monkeypatch.setattr(tune, "ALLOWED_ROWS", 2)
    routed = DenseRouters.__call__

    def off(self: DenseRouters, layer: int, x: torch.Tensor) -> Any:
        output = routed(self, layer, x)
        return output._replace(values=output.values + 1) if layer else output

    monkeypatch.setattr(DenseRouters, "__call__", off)
    result = bench()
    assert result.exit_code == 1
    assert set(figures(tmp_path).wrong) == {f"{PREFIX}/{name}" for name in _names()}
    assert "of the rows checked differ from the oracle" in result.output


def _names() -> list[str]:
    return [f"{name}{number}" for name in ("few", "many") for number in ("", ".1", ".2")]


def test_an_entry_can_be_left_out(bench: Bench, tmp_path: Path) -> None:
    result = bench("--skip", f"{PREFIX}/few.2")
    assert result.exit_code == 0, result.output
    assert f"{PREFIX}/few.2" not in figures(tmp_path).microseconds
    assert "few.2" not in result.output


def test_a_run_that_is_cut_short_says_so_and_is_no_success(bench: Bench, tmp_path: Path) -> None:
    result = bench("--seconds", "-1")
    assert result.exit_code == 1
    assert "INCOMPLETE: out of time, 4 of 4 steps are left" in result.output
    assert not figures(tmp_path).complete


def test_a_dead_device_leaves_what_was_measured(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Cpu) -> None:
        raise RuntimeError("illegal memory access")

    routed = DenseRouters.__init__

    def make(self: DenseRouters, layers: Any, mode: Any, settings: Any) -> None:
        routed(self, layers, mode, settings)
        if "many.1" in settings.variants.values():
            monkeypatch.setattr(Cpu, "synchronize", die)
            raise ValueError("launch failed")

    monkeypatch.setattr(DenseRouters, "__init__", make)
    result = bench()
    assert result.exit_code == 1
    assert f"{PREFIX}/many.1 INCOMPLETE" in result.output
    assert "next: run again with --skip and the entry named last" in result.output
    found = figures(tmp_path)
    assert not found.complete
    assert f"{PREFIX}/few" in found.microseconds


def test_a_kernel_that_hangs_ends_the_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[Any] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda *given, **named: armed.append((given, named))
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append("off"))
    assert bench("--seconds", "100").exit_code == 0
    (((seconds,), named), off) = armed
    assert 100 < seconds < 160
    assert named["exit"]
    assert off == "off"


def test_each_entry_is_launched_and_nothing_else(
    fake: FakeDriver, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fake GPU, whose kernels compute what the oracle does."""
    fake.execute = True
    fake.entries = list(read_manifest(folder).entries)
    serve_cpu_memory(monkeypatch)
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(tune, "CHECKED", (1, 9))
    tuning = dataclasses.replace(read_tuning(folder), tokens=(3, 5, 40))
    few, many = tuning.trials
    trials = (
        dataclasses.replace(few, tokens=(3,)),
        dataclasses.replace(many, tokens=(5,)),
        Trial("small", "dense_router_decode", "portable", (3,), "portable", ("portable",)),
    )
    (folder / TUNING_NAME).write_bytes(canonical_json(dataclasses.replace(tuning, trials=trials)))
    measurement = tune.Measurement(folder, Cpu(), False, 1, (), tmp_path / "scratch")
    with torch.no_grad():
        assert tune.measure(measurement, 100, tmp_path / "figures.json")
    assert figures(tmp_path).wrong == {}
    # A launch of this one takes 8 tokens.
    few_only = "dense_router_decode/small/sm_90a/portable"
    assert set(figures(tmp_path).microseconds[few_only]) == {"3", "5"}
    # The reference, and each of the six: their blocks differ.
    launched = {(launch.symbol, launch.block[0]) for launch in fake.launches}
    assert launched == {(entry.kernel, entry.contract.block[0]) for entry in fake.entries}
    assert len(launched) == 7


def test_another_folder_and_another_gpu_are_refused(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Cpu):
        def facts(self) -> dict[str, Any]:
            return {**super().facts(), "compute_capability": (8, 0)}

    monkeypatch.setattr(tune, "Gpu", Other)
    result = CliRunner().invoke(tune.main, ["--artifacts", str(folder)])
    assert result.exit_code == 1
    assert "expected a GPU of sm_90a, found compute capability (8, 0); next:" in result.output
    (folder / TUNING_NAME).unlink()
    result = bench()
    assert result.exit_code == 1
    assert f"next: .venv/bin/python -m build_kernels tune MODEL --out {folder}" in result.output


def test_the_models_take_turns() -> None:
    trials = tuple(
        Trial(model, "dense_router_prefill", variant, (128,), None, ())
        for model in ("a", "b")
        for variant in ("few", "many")
    )
    found = tune.in_turn(trials)
    assert [(trial.model, trial.variant) for trial in found] == [
        *(("a", "few"), ("b", "few"), ("a", "many"), ("b", "many")),
    ]


def test_the_readmes_command() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = (line for line in text.splitlines() if "tests.bench.tune" in line)
    python, *words = shlex.split(line)
    assert (python, words[:2]) == (".venv-test/bin/python", ["-m", "tests.bench.tune"])
    context = tune.main.make_context("tune", words[2:])
    assert context.params["artifacts"] == Path("build/tune")
    assert context.params["seconds"] == 150
