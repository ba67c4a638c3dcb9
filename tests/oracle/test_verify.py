"""``router-runtime verify`` with the oracle in place of the kernels: its table, its exit, what it
records and what it removes; and that it has a value for every argument of every contract.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch

from router_runtime import spec
from router_runtime.device.facts import DeviceFacts
from router_runtime.errors import ArtifactError, DriverError
from router_runtime.evidence import cases as suite
from router_runtime.evidence import store
from router_runtime.evidence.status import status
from router_runtime.evidence.suite import cases_of
from router_runtime.format.contract import Contract, GridAxis, Parameter
from router_runtime.format.manifest import Entry, Manifest, Resources, Toolchain, artifact_name
from router_runtime.format.manifest import dumps as dump_manifest
from router_runtime.format.scoring import scoring_constants
from router_runtime.verification import shared_trials, verify
from router_runtime.verification.examine import examine
from router_runtime.verification.inputs import ROW_INPUT, make_inputs
from router_runtime.verification.kernel_run import KernelRun
from router_runtime.verification.shared_trials import SharedTrials
from router_runtime.verification.trial import Trial
from tests.oracle.writing import write

AXIS = GridAxis("constant")
#: What every routing kernel can be given beside its rows, and what only those that score can.
SERVING = (
    " serving sentinel first_row replicas is_padding num_valid_tokens expert_map replica_counts "
    "ids_out_i64 logical_ids_out logical_ids_out_i64 replica_start replica_step weights_stride "
    "ids_stride packed_out expert_load load_experts record_load captured_ids_i16 captured_ids_i32 "
    "captured_stride shared_experts shared_id shared_weight"
)
SCORED = f"{SERVING} image_mask image_bias given_ids_i32 given_ids_i64 given_mask"
LOOKS_UP = f"{SCORED} token_ids_i32 token_ids_i64 table vocab"
#: The launch arguments of each kernel; repacked weights have the name of their matrix.
PARAMETERS = {
    "hash_router": "token_ids_i32 token_ids_i64 table weights_out ids_out tokens vocab top_k"
    + SERVING,
    "topk_select": "scores values_out ids_out rows row_length row_stride top_k",
    "topk_indices": "scores row_starts row_ends page_table requests offsets values_out ids_out "
    "slots_out rows row_length row_stride top_k page_rows page_columns page_stride page_size "
    "sorted nan_first",
    "activation_topk": "logits bias weights_out ids_out tokens experts row_stride top_k scale "
    "renormalize" + SCORED,
    "hash_gate": "hidden_states token_ids_i32 token_ids_i64 weight table row_stride vocab "
    "weights_out ids_out tokens scale renormalize" + SCORED,
    "dense_router_decode": "hidden_states weight bias weights_out ids_out logits_out workspace "
    "tokens row_stride scale renormalize" + LOOKS_UP,
    "dense_router_prefill": "hidden_states weight bias weights_out ids_out logits_out workspace "
    "tokens scale renormalize" + LOOKS_UP,
}


def entry(
    kernel, target="sm_90a", constants=None, limits=None, digest="a", numerics=None, parameters=()
):
    return Entry(
        kernel=kernel,
        model=None,
        target=target,
        variant="portable",
        constants=constants or {},
        file=artifact_name(kernel, None, target, "portable", digest * 64),
        sha256=digest * 64,
        size=1,
        symbol=kernel,
        contract=Contract(parameters, (AXIS, AXIS, AXIS), (32, 1, 1), limits=limits or {}),
        source_sha256="5" * 64,
        numerics=numerics,
        resources=Resources(32, 0, 0, 0, 0),
    )


DENSE = {
    "constants": {"HIDDEN": 128, "EXPERTS": 16, "TOP_K": 4},
    "limits": {"tokens": (1, 16)},
    "numerics": "bf16-k16-f32/chunk128/epilogue1",
}
LOGITS = (Parameter("logits_out", "ptr:f32"),)
ENTRIES = (
    entry("hash_router", limits={"top_k": (1, 8)}, digest="1"),
    entry("topk_select", limits={"row_length": (1, 64), "top_k": (1, 4)}, digest="2"),
    entry("dense_router_decode", parameters=LOGITS, digest="3", **DENSE),
    entry("hash_router", target="sm_100a", limits={"top_k": (1, 8)}, digest="4"),
)


@pytest.fixture
def folder(tmp_path):
    manifest = Manifest("0" * 64, Toolchain({}, {}), ENTRIES)
    (tmp_path / "manifest.json").write_bytes(dump_manifest(manifest))
    return tmp_path


@pytest.fixture
def machine(monkeypatch, outputs):
    """A machine of compute capability 9.0 whose kernels are the oracle; ``broken`` breaks some."""
    broken = set()

    class Kernel:
        def __init__(self, loaded, device):
            self.entry = loaded

        def __call__(self, given, values, ids, *logits, **more):
            case = self.case
            if f"{self.entry.kernel} by sqrtsoftplus" in broken:
                case = dataclasses.replace(case, scoring="sqrtsoftplus", gate_temperature=1.0)
            found = outputs(case, given)
            if f"{self.entry.kernel} in one bit" in broken:
                found[0].view(torch.int32)[:, 0] += (found[0][:, 0] > 0).int()
            write(given, found, values, ids, **more)
            for stored in logits:
                stored.copy_(spec.dense_logits(given["hidden_states"], given["weight"], 128))
            if self.entry.kernel in broken:
                values.zero_()

    def on_cpu(trial, run, largest, logits):
        assert trial.device == "cuda:0"
        case = trial.case
        assert logits == (run.entry.kernel == "dense_router_decode")
        run.case = case
        return examine(Trial(case, trial.inputs, "cpu"), run, largest, logits)

    monkeypatch.setattr(verify, "load_entry", lambda entry, *_: entry)
    monkeypatch.setattr(verify, "KernelRun", Kernel)
    monkeypatch.setattr(verify, "examine", on_cpu)
    monkeypatch.setattr(
        verify,
        "driver",
        SimpleNamespace(
            initialise=lambda **_: None,
            device_facts=lambda _: DeviceFacts(9, 0, 13000, 132, 232448),
            device_name=lambda _: "NVIDIA H100 80GB HBM3",
        ),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return broken


def test_all_pass_and_nothing_is_written(folder, machine):
    lines = []
    assert verify.run(folder, False, lines.append).passed
    text = "\n".join(lines)
    assert "NVIDIA H100" in text
    assert text.count("  pass") == 3
    assert "sm_100a" not in text
    assert not (folder / "evidence").exists()


def test_entries_are_judged_by_their_own_scoring(folder, machine):
    """Of two models of one shape, one scores by a sigmoid at a temperature."""
    kernel = "dense_router_decode"
    constants = {**DENSE["constants"], **scoring_constants("sigmoid", 1.7)}
    own = DENSE | {"constants": constants, "numerics": f"{DENSE['numerics']}/sigmoid"}
    entries = [
        dataclasses.replace(
            each, model=model, file=artifact_name(kernel, model, "sm_90a", "portable", each.sha256)
        )
        for model, each in (
            ("plain", entry(kernel, parameters=LOGITS, digest="3", **DENSE)),
            ("sigmoid", entry(kernel, parameters=LOGITS, digest="6", **own)),
        )
    ]
    manifest = Manifest("0" * 64, Toolchain({}, {}), tuple(entries))
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))
    assert verify.run(folder, False, lambda _: None).passed
    machine.add(f"{kernel} by sqrtsoftplus")
    found = verify.run(folder, False, lambda _: None)
    assert [not each.problems for each in found.entries] == [True, False]


def test_recorded_evidence_verifies(folder, machine):
    assert verify.run(folder, True, lambda _: None).passed
    found = store.load_evidence(folder / "evidence")
    assert len(found.records) == 3
    manifest = Manifest("0" * 64, Toolchain({}, {}), ENTRIES)
    assert [status(each, manifest, found, (9, 0)) for each in ENTRIES] == [
        *("verified", "verified", "verified"),
        "source-verified",  # the same source as the one for sm_90a
    ]
    first = {path.name: path.read_bytes() for path in (folder / "evidence").iterdir()}
    assert verify.run(folder, True, lambda _: None).passed
    assert {path.name: path.read_bytes() for path in (folder / "evidence").iterdir()} == first


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_evidence_goes_to_a_folder_of_ones_own(folder, machine, tmp_path, monkeypatch, how):
    """An installed package is read-only; here even the folder's place is taken."""
    (folder / "evidence").write_text("not a folder")
    mine, lines = tmp_path / "mine" / "evidence", []
    only_one(folder)
    if how == "variable":
        monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(mine))
        assert verify.run(folder, True, lines.append).passed
    else:
        assert verify.run(folder, True, lines.append, mine).passed
        assert lines[-1] == (
            f"for the runtime to read it: export {store.ENVIRONMENT_VARIABLE}={mine}"
        )
    assert len(store.load_evidence(mine).records) == 1
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(mine))
    (folder / "evidence").unlink()
    assert len(store.read_evidence(folder).records) == 1


def test_a_folder_that_cannot_be_written_is_refused_at_once(folder, machine, monkeypatch):
    (folder / "evidence").write_text("not a folder")
    monkeypatch.setattr(verify, "examine", None)
    with pytest.raises(
        ArtifactError, match=r"verify --record --evidence DIR --artifacts \S+, or ROUTER_"
    ):
        verify.run(folder, True, lambda _: None)


def test_without_a_driver_nothing_is_left_behind(folder, machine, monkeypatch):
    def initialise(*, needs_gpu):
        assert needs_gpu
        raise DriverError("no driver")

    monkeypatch.setattr(verify.driver, "initialise", initialise, raising=False)
    with pytest.raises(DriverError, match="no driver"):
        verify.run(folder, True, lambda _: None)
    assert not (folder / "evidence").exists()


def only_one(folder):
    """Keep the entry that is the fastest to examine."""
    kept = [entry for entry in ENTRIES if entry.kernel == "hash_router"]
    (folder / "manifest.json").write_bytes(
        dump_manifest(Manifest("0" * 64, Toolchain({}, {}), tuple(kept)))
    )


def test_a_failure_is_reported_and_removes_its_evidence(folder, machine):
    assert verify.run(folder, True, lambda _: None).passed
    machine.add("dense_router_decode")
    lines = []
    assert not verify.run(folder, True, lines.append).passed
    text = "\n".join(lines)
    assert "FAIL" in text
    assert "weights out of bounds" in text
    kept = {record.kernel for record in store.load_evidence(folder / "evidence").records}
    assert kept == {"hash_router", "topk_select"}


def test_kernels_of_one_numerics_tag_must_agree_bit_for_bit(folder, machine):
    """One bit of the weights is far within every bound, and still a broken promise."""
    prefill = entry("dense_router_prefill", digest="6", **DENSE)
    other = entry("dense_router_prefill", digest="7", **(DENSE | {"numerics": "something/else"}))
    for added, message in (
        (prefill, "other bits than dense_router_decode/any/sm_90a"),
        (other, ""),
    ):
        manifest = Manifest("0" * 64, Toolchain({}, {}), (*ENTRIES, added))
        (folder / "manifest.json").write_bytes(dump_manifest(manifest))
        machine.clear()
        assert verify.run(folder, False, lambda _: None).passed
        machine.add("dense_router_prefill in one bit")
        lines = []
        assert verify.run(folder, False, lines.append).passed == (not message)
        assert message in "\n".join(lines)


def three_alike(folder):
    """A decode and two prefill entries of one model, and one of another model that draws its own
    inputs.
    """
    alike = [
        entry(kernel, digest=digest, **DENSE)
        for kernel, digest in (
            ("dense_router_decode", "a"),
            ("dense_router_prefill", "b"),
            ("dense_router_prefill", "c"),
        )
    ]
    alike[0] = dataclasses.replace(
        alike[0], contract=dataclasses.replace(alike[0].contract, parameters=LOGITS)
    )
    alike[2] = dataclasses.replace(
        alike[2], variant="wide", file=alike[2].file.replace("portable", "wide")
    )
    other = DENSE | {"constants": {"HIDDEN": 64, "EXPERTS": 16, "TOP_K": 4}}
    small = entry("dense_router_prefill", digest="d", **other)
    small = dataclasses.replace(
        small,
        model="small",
        file=artifact_name(small.kernel, "small", "sm_90a", "portable", "d" * 64),
    )
    manifest = Manifest("0" * 64, Toolchain({}, {}), (small, *alike))
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))
    return len(suite.cases("dense_router_decode", DENSE["constants"], DENSE["limits"]))


def test_inputs_are_drawn_once_for_the_entries_that_share_them(folder, machine, monkeypatch):
    """And what is recorded is what every entry by itself would have been given."""
    cases = three_alike(folder)
    drawn = []
    monkeypatch.setattr(
        shared_trials, "make_inputs", lambda case: drawn.append(case) or make_inputs(case)
    )
    assert verify.run(folder, True, lambda _: None).passed
    assert len(drawn) == 2 * cases  # of two models
    shared = {path.name: path.read_bytes() for path in (folder / "evidence").iterdir()}
    assert len(shared) == 4
    monkeypatch.setattr(shared_trials, "SHARED_BYTES", 0)
    drawn.clear()
    assert verify.run(folder, True, lambda _: None).passed
    assert len(drawn) == 4 * cases
    assert {path.name: path.read_bytes() for path in (folder / "evidence").iterdir()} == shared


def test_what_is_kept_is_bounded_and_forgotten(monkeypatch):
    constants = {"HIDDEN": 64, "EXPERTS": 8, "TOP_K": 2}
    first, second, *_ = suite.cases("dense_router_decode", constants, {"tokens": (1, 2)})
    trials = SharedTrials("cpu")
    trials.turn_to(entry("dense_router_decode"))
    one = trials.trial(first)
    assert trials.trial(first) is not one  # not before it has passed
    trials.keep(one)
    monkeypatch.setattr(shared_trials, "SHARED_BYTES", one.nbytes())
    trials.keep(trials.trial(second))
    assert trials.trial(first) is one
    assert trials.trial(dataclasses.replace(first, kernel="dense_router_prefill")) is one
    assert trials.trial(dataclasses.replace(first, sizes={**first.sizes, "padding": 8})) is not one
    assert trials.trial(second) is not trials.trial(second)
    trials.turn_to(entry("dense_router_prefill"))
    assert trials.trial(first) is one
    trials.turn_to(dataclasses.replace(entry("dense_router_prefill"), model="another"))
    assert trials.trial(first) is not one


def test_a_trial_counts_every_storage_once():
    """The trial and its oracle hold the same inputs, and two parts of the oracle the same ids."""
    constants = {"HIDDEN": 64, "EXPERTS": 8, "TOP_K": 2}
    case = suite.cases("dense_router_decode", constants, {"tokens": (1, 2)})[0]
    trial = Trial(case, make_inputs(case), "cpu")
    given = [value for value in trial.inputs.values() if isinstance(value, torch.Tensor)]
    inputs = sum(value.untyped_storage().nbytes() for value in given)
    assert trial.nbytes() == inputs
    assert trial.on_device is not trial.inputs
    assert trial.nbytes() == 2 * inputs
    assert trial.oracle.reference
    kept = trial.nbytes()
    assert kept > 2 * inputs
    assert trial.oracle.expected_ids[0] is trial.oracle.reference.ids
    assert trial.nbytes() == kept


def test_a_trial_that_found_something_is_not_kept(folder, machine, monkeypatch):
    """Its copy of the inputs on the device may be what the kernel wrote into."""
    cases = three_alike(folder)
    drawn = []
    monkeypatch.setattr(
        shared_trials, "make_inputs", lambda case: drawn.append(case) or make_inputs(case)
    )
    machine.add("dense_router_decode")
    assert not verify.run(folder, False, lambda _: None).passed
    assert len(drawn) > 2 * cases


def test_no_entry_for_the_device_is_a_failure(folder, machine, monkeypatch):
    monkeypatch.setattr(
        verify.driver, "device_facts", lambda _: DeviceFacts(12, 0, 13000, 100, 100)
    )
    lines = []
    assert not verify.run(folder, False, lines.append).passed
    assert "no kernels can be built for compute capability 12.0" in "\n".join(lines)


def test_an_entry_without_cases_is_a_failure(folder, machine):
    unknown = Manifest("0" * 64, Toolchain({}, {}), (*ENTRIES, entry("no_kernel", digest="9")))
    (folder / "manifest.json").write_bytes(dump_manifest(unknown))
    lines = []
    assert not verify.run(folder, False, lines.append).passed
    assert "add its cases to router_runtime/evidence/cases.py" in "\n".join(lines)


class Recorder:
    """A loaded kernel that remembers what it was launched with."""

    def __init__(self, listed, arguments):
        self.entry, self.arguments, self.given = listed, arguments, {}

    def launch(self, stream, /, **arguments):
        self.given = arguments


def on_cpu(monkeypatch):
    """Give the CPU, which has no streams, stream 0."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("kernel", PARAMETERS)
def test_every_argument_has_a_value(kernel, monkeypatch):
    constants = {"HIDDEN": 128, "EXPERTS": 16, "TOP_K": 4, "SCORE_BYTES": 4, "SAMPLES": 512}
    case = cases_of(kernel, constants, {"top_k": (1, 4), "row_length": (1, 64)})[0]
    given = make_inputs(case)
    recorder = Recorder(entry(kernel), tuple(PARAMETERS[kernel].split()))
    run = KernelRun(recorder, "cpu")
    on_cpu(monkeypatch)
    rows = given[ROW_INPUT[kernel]].shape[0]
    k = case.sizes["top_k"]
    outputs = [torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)]
    run(given, *outputs)
    assert tuple(recorder.given) == recorder.arguments
    if "logits_out" in recorder.arguments:
        assert recorder.given["logits_out"] is None
        run(given, *outputs, torch.empty(rows, 16))
        assert recorder.given["logits_out"].shape == (rows, 16)
    if kernel == "hash_router":
        assert (recorder.given["token_ids_i32"] is None) != (
            recorder.given["token_ids_i64"] is None
        )


def test_options_have_values(monkeypatch):
    """Under the names of a contract, each as wide as its tensor is."""
    kernel = "hash_router"
    case = next(each for each in suite.cases(kernel, {}, {"top_k": (1, 4)}) if each.serving)
    given = make_inputs(case)
    recorder = Recorder(entry(kernel), tuple(PARAMETERS[kernel].split()))
    run = KernelRun(recorder, "cpu")
    on_cpu(monkeypatch)
    k, shared = case.sizes["top_k"], {"shared_experts": 2, "shared_id": 9, "shared_weight": 0.5}
    rows, load = case.sizes["tokens"], torch.zeros(5, dtype=torch.int32)
    weights, ids = torch.empty(rows, k + 7), torch.empty(rows, k + 3, dtype=torch.int32)
    for dtype in (torch.int16, torch.int32):
        captured = torch.empty(rows, k + 1, dtype=dtype)[:, :k]
        more = {"expert_load": load, "captured_ids": captured}
        run(given, weights[:, : k + 2], ids[:, : k + 2], **shared, **more)
        found = recorder.given
        assert tuple(found) == recorder.arguments
        assert (found["serving"], found["tokens"], found["top_k"]) == (2, rows, k)
        assert (found["weights_stride"], found["ids_stride"]) == (k + 7, k + 3)
        assert (found["load_experts"], found["captured_stride"]) == (5, k + 1)
        narrow, wide = found["captured_ids_i16"], found["captured_ids_i32"]
        expected = (captured, None) if dtype is torch.int16 else (None, captured)
        assert all(one is other for one, other in zip((narrow, wide), expected, strict=True))
        assert {name: found[name] for name in shared} == shared
    words, none = torch.empty(rows, k + 2, dtype=torch.int32), torch.empty(0)
    flag = {"record_load": torch.zeros(1, dtype=torch.bool), "expert_load": load}
    run(given, none, none.int(), packed_out=words, **shared, **flag)
    found = recorder.given
    assert found["weights_out"] is found["ids_out"] is None
    assert found["packed_out"] is words
    assert (found["tokens"], found["top_k"], found["ids_stride"]) == (rows, k, k + 2)
    assert found["record_load"].dtype is torch.uint8


@pytest.mark.parametrize("kernel", PARAMETERS)
def test_contracts_ask_for_nothing_else(kernel):
    """The names above are those of the kernels' own contracts."""
    try:
        module = importlib.import_module(f"build_kernels.kernels.{kernel}.contract")
        catalog = importlib.import_module("build_kernels.catalog.kernels")
        models = importlib.import_module("build_kernels.catalog.models")
        numerics = importlib.import_module("build_kernels.kernels.common.numerics")
    except ImportError as error:
        pytest.skip(f"the builder is not here: {error}")
    row = next((row for row in catalog.KERNELS if row.name == kernel), None)
    if row is None:
        pytest.skip(f"{kernel} is not in the catalog")
    for model in models.MODELS if row.per_model else (None,):
        for variant in row.variants:
            if not variant.has(model):
                continue
            constants = numerics.CONSTANTS | variant.constants_of(model)
            if hasattr(module, "derive"):
                constants = {**module.derive(constants), **constants}
            contract = module.contract(constants)
            names = {parameter.name for parameter in contract.parameters}
            names -= {recipe.parameter for recipe in contract.repacks}
            allowed = {*PARAMETERS[kernel].split(), "workspace"}
            assert names <= allowed
            assert all(axis.argument in {None, *allowed} for axis in contract.grid)
            cases_of(kernel, constants, contract.limits)


def test_the_workspace_starts_zeroed(monkeypatch):
    listed = entry("dense_router_decode")
    contract = dataclasses.replace(
        listed.contract, workspace_bytes=64, parameters=(Parameter("workspace", "ptr:u32"),)
    )
    recorder = Recorder(dataclasses.replace(listed, contract=contract), ("workspace",))
    on_cpu(monkeypatch)
    run = KernelRun(recorder, "cpu")
    run({}, torch.empty(1, 4), torch.empty(1, 4, dtype=torch.int32))
    assert ctypes.string_at(recorder.given["workspace"], 64) == bytes(64)


def test_records_that_cannot_be_read_are_reported_before_the_gpu_is_used(folder, machine):
    """As after a change of the format: the user must delete the old records first."""
    evidence = folder / "evidence"
    evidence.mkdir()
    old = evidence / f"topk_select-any-sm_90a-old-{'0' * 16}.gpu.json"
    old.write_text('{"format_version": 1}')
    lines = []
    with pytest.raises(ArtifactError, match="format version 2, found 1; delete it and run"):
        verify.run(folder, True, lines.append)
    assert len(lines) == 1  # the announcement that CUDA is initialised
