"""The runner of the emulation (tests/emulation) with the oracle in place of the kernels."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build_kernels.emulation.interface import COUNTS, ERRORS, FOUND_BY_HOST, MODES
from router_runtime import spec
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.facts import DeviceFacts
from router_runtime.errors import ArtifactError
from router_runtime.evidence.status import status
from router_runtime.evidence.store import load_evidence
from router_runtime.format.contract import Contract, GridAxis, Parameter
from router_runtime.format.manifest import (
    Entry,
    Manifest,
    Resources,
    Toolchain,
    artifact_name,
    dumps,
)
from tests.emulation import __main__ as command
from tests.emulation import defects, launches, recording, suite
from tests.emulation.launches import differences
from tests.emulation.library import Report
from tests.emulation.recording import Recorder
from tests.oracle.writing import write

AXIS = GridAxis("constant")


def entry(variant: str) -> Entry:
    return Entry(
        kernel="dense_router_decode",
        model="small",
        target="sm_90a",
        variant=variant,
        constants={"HIDDEN": 128, "EXPERTS": 16, "TOP_K": 4},
        file=artifact_name("dense_router_decode", "small", "sm_90a", variant, "a" * 64),
        sha256="a" * 64,
        size=1,
        symbol="kernel",
        contract=Contract(
            (Parameter("logits_out", "ptr:f32"),),
            (AXIS, AXIS, AXIS),
            (32, 1, 1),
            limits={"tokens": (1, 16)},
        ),
        source_sha256="5" * 64,
        numerics="tag",
        resources=Resources(32, 0, 0, 0, 0),
    )


EMULATED, SIBLING = entry("tcgen05.sm_100f"), entry("portable")


class FakeLibrary:
    def __init__(self, errors: Mapping[str, str]) -> None:
        self.errors = errors
        self.started: list[str] = []

    def start(self, mode: str, limit_ms: int) -> None:
        self.started.append(mode)

    def report(self) -> Report:
        return Report(dict.fromkeys(COUNTS, 3), self.errors)


@pytest.fixture
def machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: Callable[..., Any]
) -> SimpleNamespace:
    """A machine whose kernels are the oracle; the emulated one can be broken."""
    state = SimpleNamespace(folder=tmp_path, library=FakeLibrary({}), broken=None, lines=[])
    manifest = Manifest("0" * 64, Toolchain({}, {}), (EMULATED, SIBLING))
    (tmp_path / "manifest.json").write_bytes(dumps(manifest))

    class Run:
        def __init__(self, loaded: Entry) -> None:
            self.entry, self.launches = loaded, 0

        def __call__(
            self,
            given: Mapping[str, Any],
            values: torch.Tensor,
            ids: torch.Tensor,
            *logits: torch.Tensor,
            **more: Any,
        ) -> None:
            self.launches += 1
            case = SimpleNamespace(
                kernel="dense_router_decode",
                serving="sentinel" in given,
                sizes={"top_k": self.entry.constants["TOP_K"]},
                scoring="sqrtsoftplus",
                gate_temperature=1.0,
            )
            write(given, outputs(case, given), values, ids, **more)
            for stored in logits:
                stored.copy_(spec.dense_logits(given["hidden_states"], given["weight"], 128))
            if self.entry is not SIBLING and self.entry.variant == EMULATED.variant:
                if state.broken == "one bit" and values.numel():
                    values.view(torch.int32)[-1, 0] += 1
                if state.broken == "launch":
                    raise RuntimeError("an illegal instruction was encountered")

        def seconds(self) -> float:
            return 0.5

    monkeypatch.setattr(suite, "load", lambda each, *_: (each, state.library))
    monkeypatch.setattr(suite, "load_entry", lambda each, *_: each)
    monkeypatch.setattr(suite, "TimedRun", Run)
    for module in (suite, launches):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    return state


def run(state: SimpleNamespace, *modes: str) -> int:
    emulated: suite.Record = {EMULATED.key: {"of": []}}
    work = suite.Suite(state.folder, emulated, state.lines.append)
    state.totals = work.totals
    return work.run(lambda each: True, suite.modes(modes))


def test_every_mode_of_a_correct_kernel_passes(machine: SimpleNamespace) -> None:
    assert run(machine, "eager", "deep") == 0
    assert machine.library.started == ["eager", "deep"]
    passed = [line for line in machine.lines if line.startswith("pass")]
    assert len(passed) == len(machine.lines) == 2
    assert all(EMULATED.key in line and "mmas 3" in line for line in passed)
    launched = [int(line.split("launches ")[1].split()[0]) for line in passed]
    assert launched[1] > 2 * launched[0]  # the batches that are rearranged
    assert machine.totals["mmas"] == 6
    assert machine.totals["GPU seconds"] == 1.0


def test_other_bits_than_the_siblings_fail_and_say_where(machine: SimpleNamespace) -> None:
    machine.broken = "one bit"
    assert run(machine, "eager") == 1
    text = "\n".join(machine.lines)
    assert text.startswith("FAIL")
    assert f"other bits than {SIBLING.key}" in text


def test_an_error_of_the_model_fails_a_run(machine: SimpleNamespace) -> None:
    machine.library.errors = {"lane": "2 (a load of another warp's lanes)"}
    assert run(machine, "late") == 1
    assert any("error lane: 2" in line for line in machine.lines)


def test_a_lost_context_ends_the_run_with_the_next_step(machine: SimpleNamespace) -> None:
    machine.broken = "launch"
    with pytest.raises(SystemExit, match=r"illegal instruction.*--only"):
        run(machine, "eager")


def test_without_a_sibling_the_suite_alone_decides(machine: SimpleNamespace) -> None:
    manifest = Manifest("0" * 64, Toolchain({}, {}), (EMULATED,))
    (machine.folder / "manifest.json").write_bytes(dumps(manifest))
    assert run(machine, "eager") == 0
    assert "token counts 0" in machine.lines[0]
    machine.broken = "one bit"
    assert run(machine, "eager") == 1


# --- records ---

MODEL = "7" * 64
TARGETS = ("sm_100a", "sm_103a")


def original(target: str, sha256: str) -> Entry:
    """What EMULATED is the PTX of, for one of two targets that share it."""
    file = artifact_name("dense_router_decode", "small", target, "tcgen05", sha256)
    return dataclasses.replace(EMULATED, target=target, variant="tcgen05", sha256=sha256, file=file)


ORIGINALS = tuple(original(target, digit * 64) for target, digit in zip(TARGETS, "bc", strict=True))


@pytest.fixture
def recorded(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """The machine as an H200, with the cubins that are emulated in an artifacts folder."""
    machine.artifacts = tmp_path / "artifacts"
    machine.artifacts.mkdir()
    manifest = Manifest("0" * 64, Toolchain({"nvrtc": "13.5"}, {}), ORIGINALS)
    (machine.artifacts / "manifest.json").write_bytes(dumps(manifest))
    machine.document = {
        "model_sha256": MODEL,
        "ptxas": "13.5.37",
        "entries": {
            EMULATED.key: {
                "of": [{"entry": each.key, "sha256": each.sha256} for each in ORIGINALS],
                "ptx_sha256": "9" * 64,
            }
        },
    }
    gpu = SimpleNamespace(
        device_name=lambda index: "NVIDIA H200",
        device_facts=lambda index: DeviceFacts(9, 0, 13000, 132, 227 * 1024),
        initialise=lambda: None,
    )
    monkeypatch.setattr(recording, "driver", gpu)
    monkeypatch.setattr(command, "driver", gpu)
    monkeypatch.setattr(recording, "model_sha256", lambda: MODEL)
    return machine


def record(state: SimpleNamespace, *modes: str) -> int:
    """Run the suite with a recorder, as ``--record`` does."""
    work = suite.Suite(state.folder, state.document["entries"], state.lines.append)
    folder = state.artifacts / "evidence"
    recorder = Recorder(state.document, state.artifacts, folder, state.lines.append)
    recorder.check(entry.key for entry in work.entries(lambda each: True))
    return work.run(lambda each: True, suite.modes(modes), recorder.finished)


def statuses(state: SimpleNamespace) -> list[str]:
    manifest = read_manifest(state.artifacts)
    evidence = load_evidence(state.artifacts / "evidence")
    return [status(entry, manifest, evidence, None) for entry in manifest.entries]


def test_one_run_gives_a_record_for_every_cubin_of_its_ptx(recorded: SimpleNamespace) -> None:
    assert record(recorded) == 0
    found = load_evidence(recorded.artifacts / "evidence")
    assert found.records == ()
    assert [each.entry for each in found.emulations] == [each.key for each in ORIGINALS]
    for each, entry in zip(found.emulations, ORIGINALS, strict=True):
        assert each.current
        assert (each.sha256, each.target) == (entry.sha256, entry.target)
        assert (each.ran_target, each.ran_sha256) == ("sm_90a", EMULATED.sha256)
        assert (each.ptx_sha256, each.model_sha256, each.ptxas) == ("9" * 64, MODEL, "13.5.37")
        assert each.modes == tuple(MODES)
        assert (each.device, each.compute_capability) == ("NVIDIA H200", (9, 0))
        assert all(case.rows for case in each.cases)
    assert statuses(recorded) == ["emulated", "emulated"]
    assert sum("recorded dense_router_decode" in line for line in recorded.lines) == 2


def test_by_the_command(recorded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded.folder
    (folder / "emulation.json").write_text(json.dumps(recorded.document))
    own = folder / "own"
    arguments = ["--artifacts", str(recorded.artifacts), "--evidence", str(own), "--record"]
    monkeypatch.setattr(sys, "argv", ["tests.emulation", str(folder), *arguments])
    assert command.main() == 0
    assert len(load_evidence(own).emulations) == 2
    for more in (["--mode", "eager"], ["--defects"]):
        monkeypatch.setattr(sys, "argv", ["tests.emulation", str(folder), *arguments, *more])
        with pytest.raises(SystemExit, match="2"):
            command.main()
    monkeypatch.setattr(sys, "argv", ["tests.emulation", str(folder), *arguments[:2]])
    with pytest.raises(SystemExit, match="2"):
        command.main()


def test_what_fails_gets_no_record_and_loses_the_one_it_had(recorded: SimpleNamespace) -> None:
    assert record(recorded) == 0
    recorded.lines.clear()
    recorded.library.errors = {"lane": "2 (a load of another warp's lanes)"}
    assert record(recorded) == len(MODES)
    assert statuses(recorded) == ["unproven", "unproven"]
    text = "\n".join(recorded.lines)
    assert "not recorded: failed in eager, late, deep, slowed" in text
    assert text.count("it no longer holds") == 2


def test_other_bits_than_the_sibling_give_no_record(recorded: SimpleNamespace) -> None:
    recorded.broken = "one bit"
    assert record(recorded) == len(MODES)
    assert statuses(recorded) == ["unproven", "unproven"]


def test_a_run_in_some_modes_records_nothing_and_removes_nothing(
    recorded: SimpleNamespace,
) -> None:
    assert record(recorded, "eager", "deep") == 0
    assert "      not recorded: did not run in late, slowed" in recorded.lines
    assert statuses(recorded) == ["unproven", "unproven"]
    assert record(recorded) == 0
    assert record(recorded, "eager") == 0
    assert statuses(recorded) == ["emulated", "emulated"]


def test_an_entry_that_ends_the_run_loses_its_record(recorded: SimpleNamespace) -> None:
    assert record(recorded) == 0
    recorded.broken = "launch"
    with pytest.raises(SystemExit, match="CUDA context is lost"):
        record(recorded)
    assert statuses(recorded) == ["unproven", "unproven"]
    assert "      not recorded: failed in eager; did not run in late, deep, slowed" in (
        recorded.lines
    )


@pytest.mark.parametrize("found", ["another cubin", "no entry"])
def test_a_cubin_that_the_artifacts_do_not_have_is_refused(
    recorded: SimpleNamespace, found: str
) -> None:
    """Before anything runs, with the commands that make both from the same sources."""
    other = original("sm_103a", "d" * 64)
    entries = (ORIGINALS[0], other) if found == "another cubin" else ORIGINALS[:1]
    manifest = Manifest("0" * 64, Toolchain({"nvrtc": "13.5"}, {}), entries)
    (recorded.artifacts / "manifest.json").write_bytes(dumps(manifest))
    message = r"sm_103a/tcgen05 in .*the cubin cccc.*build-cubins, then run: make emulation"
    with pytest.raises(ArtifactError, match=message):
        record(recorded)
    assert recorded.library.started == []


@pytest.mark.parametrize(
    "change", [{"model_sha256": "8" * 64}, {"model_sha256": None}, {"ptxas": None}]
)
def test_an_emulation_by_other_sources_is_refused(
    recorded: SimpleNamespace, change: dict[str, str | None]
) -> None:
    document = recorded.document | change
    recorded.document = {name: value for name, value in document.items() if value is not None}
    with pytest.raises(ArtifactError, match=f"of model {MODEL[:16]}.*run: make emulation"):
        record(recorded)
    assert recorded.library.started == []


def test_a_folder_that_cannot_be_written_is_refused_first(recorded: SimpleNamespace) -> None:
    (recorded.artifacts / "evidence").write_text("no folder")
    with pytest.raises(ArtifactError, match="a folder that can be written"):
        record(recorded)
    assert recorded.library.started == []


# --- modes, differences ---


def test_an_unknown_mode_is_refused() -> None:
    assert suite.modes([]) == list(MODES)
    with pytest.raises(SystemExit, match="expected a mode of eager"):
        suite.modes(["never"])


def test_differences_name_outputs_rows_and_values() -> None:
    expected = {"weights": torch.ones(4, 3), "ids": torch.zeros(4, 3, dtype=torch.int32)}
    assert differences(expected, expected) == {}
    found = {name: tensor.clone() for name, tensor in expected.items()}
    found["weights"][2, 1] = -0.5
    assert differences(found, expected) == {
        "weights": "1 of 12 differ, 1 rows, first [2], of row 2 columns [1]: [2, 1] -0.5 for 1"
    }
    nan = {"weights": torch.full((4, 3), float("nan"))}
    assert differences(nan, nan) == {}


@pytest.mark.parametrize(
    ("layer", "seen", "verdict"),
    [
        ("bits", {"eager": ["bits"], "late": ["bits"]}, "seen"),
        ("bits:late", {"eager": [], "late": ["bits", "shared"]}, "seen"),
        ("error:lane", {"eager": ["lane"]}, "seen"),
        ("error:lane", {"eager": ["bits"]}, "other"),
        ("error:timeout", {"eager": ["fault"]}, "other"),
        ("error:lane", {"eager": [], "late": []}, "MISSED"),
        ("none", {"eager": []}, "gap"),
        ("none", {"eager": ["bits"]}, "other"),
    ],
)
def test_the_verdict_on_a_defect(layer: str, seen: dict[str, list[str]], verdict: str) -> None:
    facts = {"defect": "some.once", "layer": layer, "unwaited": []}
    assert defects.table_row(facts, seen)[0] == verdict


def test_a_sound_kernel_must_be_seen_by_nothing_and_translation_needs_no_launch() -> None:
    sound = {"defect": "sound.once", "layer": "none", "unwaited": []}
    assert defects.table_row(sound, {"eager": []})[0] == "sound"
    assert defects.table_row(sound, {"eager": ["lane"]})[0] == "FALSE"
    loads = {"defect": "no_wait_for_loads.once", "layer": "translation", "unwaited": [7]}
    assert defects.table_row(loads, {"eager": []})[0] == "seen"


def test_what_the_host_finds_is_an_error_too() -> None:
    assert set(FOUND_BY_HOST) < set(ERRORS)


def test_a_defect_that_ends_its_process_is_a_fault_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first process answers for ``a`` and ends in ``b``; the second runs ``c``."""
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            keys = command[command.index("--defect-worker") + 1 :]
            started.append(keys)
            key = keys[0]
            answers = [
                {"entry": key, "done": False, "mode": "eager", "seen": ["bits"]},
                {"entry": key, "done": True},
            ]
            self.stdout = io.StringIO("".join(json.dumps(answer) + "\n" for answer in answers))

        def wait(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    record = {key: {"defect": key, "layer": "bits", "unwaited": []} for key in "abc"}
    lines: list[str] = []
    missed = defects.run(tmp_path, record, lambda key: True, lines.append)
    assert started == [["a", "b", "c"], ["c"]]
    assert [line.split()[:2] for line in lines[:3]] == [
        ["seen", "a"],
        ["other", "b"],
        ["seen", "c"],
    ]
    assert "fault" in lines[1]
    assert missed == 0
