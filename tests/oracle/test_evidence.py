"""Evidence: the format, what follows from it, and the committed records recomputed on the CPU."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_runtime.errors import ArtifactError, FormatError
from router_runtime.evidence import cases as suite
from router_runtime.evidence import kinds, store
from router_runtime.evidence import record as records
from router_runtime.evidence import status as statuses
from router_runtime.evidence.emulation_record import MODES, EmulationRecord
from router_runtime.evidence.suite import cases_of, cases_sha256
from router_runtime.format.contract import Contract, GridAxis, Parameter
from router_runtime.format.manifest import Entry, Manifest, Resources, Toolchain
from router_runtime.verification import inputs
from router_runtime.verification.examine import examine
from router_runtime.verification.judge import clear_ids_sha256
from router_runtime.verification.reference import Oracle
from router_runtime.verification.trial import Trial

COMMITTED = Path(__file__).parents[2] / "artifacts" / "evidence"
#: Cases recomputed of each committed record.
SAMPLE = 12

LIMITS = {"row_length": (1, 64), "top_k": (1, 4)}
TOOLCHAIN = Toolchain({"nvrtc": "13.5"}, {"cuda": ("--std=c++20",)})


def mismatches(record: records.Examined, cases) -> list[str]:
    """What recomputing these cases on this machine finds wrong with a record."""
    recorded = {case.name: case for case in record.cases}
    wrong = []
    for case in cases:
        given = inputs.make_inputs(case)
        ids, clear = Oracle(case, given).expected_ids
        expected = {
            "seed": case.seed,
            "inputs_sha256": inputs.digest(given),
            "rows": ids.shape[0],
            "clear": int(clear.sum()),
            "ids_sha256": clear_ids_sha256(ids, clear),
        }
        for name, value in expected.items():
            found = getattr(recorded[case.name], name)
            if found != value:
                wrong.append(f"{case.name}: {name}: expected {value}, found {found}")
        if any(
            error > 1
            for name, error in recorded[case.name].worst.items()
            if name in ("weight", "logit")
        ):
            wrong.append(f"{case.name}: its worst error is beyond the bound")
    return wrong


def committed() -> list[Path]:
    return sorted(COMMITTED.glob("*.json"))


def parameters() -> Iterator[Any]:
    """Every fifth record is recomputed with each torch, the others with one."""
    for number, path in enumerate(committed()):
        yield pytest.param(path, marks=pytest.mark.one_torch) if number % 5 else path


@pytest.mark.parametrize(
    "path",
    list(parameters())
    or [pytest.param(None, marks=pytest.mark.skip(reason="no evidence is committed yet"))],
    ids=lambda path: path.stem if path else "none",
)
def test_committed_evidence_recomputes(path):
    record = kinds.loads(path.name, path.read_bytes())
    if not record.current:
        pytest.skip(
            "stale: recorded with another oracle suite, so it proves nothing; run on a GPU: "
            "router-runtime verify --record, for emulations: make record-emulation"
        )
    cases = cases_of(record.kernel, record.constants, record.limits)
    sample = random.Random(record.sha256).sample(cases, min(SAMPLE, len(cases)))
    assert mismatches(record, sample) == []


# --- a record of the oracle itself ---------------------------------------------------------------


@pytest.fixture(scope="module")
def record(outputs):
    found = []
    for case in suite.cases("topk_select", {}, LIMITS):
        given = inputs.make_inputs(case)

        def run(on_device, values, ids, case=case):
            found_values, found_ids = outputs(case, on_device)
            values.copy_(found_values)
            ids.copy_(found_ids)

        verdict = examine(Trial(case, given, "cpu"), run, 64)
        assert not verdict.problems
        found.append(
            records.CaseRecord(
                name=case.name,
                seed=case.seed,
                inputs_sha256=inputs.digest(given),
                rows=verdict.rows,
                clear=verdict.clear,
                reordered=verdict.reordered,
                ids_sha256=verdict.ids_sha256,
                worst=verdict.worst,
            )
        )
    return records.Record(
        entry="topk_select/any/sm_90a/row64",
        kernel="topk_select",
        constants={},
        limits=LIMITS,
        target="sm_90a",
        file="topk_select-any-sm_90a-row64-abababababababab.cubin",
        sha256="ab" * 32,
        source_sha256="cd" * 32,
        toolchain_sha256=statuses.toolchain_sha256(TOOLCHAIN),
        suite_version=suite.SUITE_VERSION,
        cases_sha256=cases_sha256("topk_select"),
        device="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        driver=13000,
        torch="2.13.0",
        cases=tuple(found),
    )


def entry_of(record, **changes):
    contract = Contract(
        parameters=(Parameter("scores", "ptr:f32"),),
        grid=(GridAxis("constant"), GridAxis("constant"), GridAxis("constant")),
        block=(32, 1, 1),
        limits=record.limits,
    )
    entry = Entry(
        kernel=record.kernel,
        model=None,
        target=record.target,
        variant="row64",
        constants=record.constants,
        file=record.file,
        sha256=record.sha256,
        size=1,
        symbol="topk_select",
        contract=contract,
        source_sha256=record.source_sha256,
        numerics=None,
        resources=Resources(32, 0, 0, 0, 0),
    )
    return dataclasses.replace(entry, **changes)


def status(entry, *records, toolchain=TOOLCHAIN, capability=(9, 0)):
    manifest = Manifest("ef" * 32, toolchain, (entry,))
    return statuses.status(entry, manifest, store.Evidence(tuple(records)), capability)


def emulated(record):
    """The record as one of emulation: as if sm_100a's cubin had not run, and its PTX had."""
    shared = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    del shared["format_version"]
    shared |= {"target": "sm_100a", "modes": MODES, "ptxas": "13.5.37", "ran_target": "sm_90a"}
    shared |= dict.fromkeys(("ptx_sha256", "model_sha256", "ran_sha256"), "12" * 32)
    for name in ("entry", "file"):
        shared[name] = shared[name].replace("sm_90a", "sm_100a")
    return EmulationRecord(**shared)


@pytest.mark.parametrize("kind", [lambda record: record, emulated])
def test_a_record_recomputes(record, kind):
    found = kind(record)
    assert kinds.loads(found.file_name, kinds.dumps(found)) == found
    cases = suite.cases("topk_select", {}, LIMITS)
    assert mismatches(found, cases) == []
    wrong = dataclasses.replace(found.cases[0], ids_sha256="0" * 64)
    assert mismatches(dataclasses.replace(found, cases=(wrong, *found.cases[1:])), cases)


def test_round_trip_is_canonical(record, tmp_path):
    data = records.dumps(record)
    assert records.dumps(records.loads(data)) == data
    path = store.write_record(record, tmp_path)
    assert path.name == "topk_select-any-sm_90a-row64-abababababababab.nvidia-h100-80gb-hbm3.json"
    assert path.read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert store.load_evidence(tmp_path).records == (records.loads(data),)


def test_no_evidence(tmp_path):
    assert store.load_evidence(tmp_path / "absent") == store.Evidence()


def test_status(record):
    entry = entry_of(record)
    assert status(entry) == "unproven"
    assert status(entry, record) == "verified"
    altered = dataclasses.replace(entry, sha256="99" * 32)
    assert status(altered, record) == "unproven"  # same target: other bytes prove nothing
    other_target = dataclasses.replace(altered, target="sm_100a")
    assert status(other_target, record) == "source-verified"
    assert status(dataclasses.replace(other_target, source_sha256="98" * 32), record) == "unproven"
    newer = dataclasses.replace(TOOLCHAIN, packages={"nvrtc": "13.6"})
    assert status(other_target, record, toolchain=newer) == "unproven"
    # Bytes are what a device runs: evidence for them holds with any compiler.
    assert status(entry, record, toolchain=newer) == "verified"


def on_device(record, device, capability):
    """The record of a cubin for sm_100f, made on a member of its family."""
    file = record.file.replace("sm_90a", "sm_100f")
    entry = record.entry.replace("sm_90a", "sm_100f")
    return dataclasses.replace(
        record,
        target="sm_100f",
        file=file,
        entry=entry,
        device=device,
        compute_capability=capability,
    )


def test_a_family_is_verified_member_by_member(record, tmp_path):
    """The same bytes: verified where they ran, source-verified on the other members."""
    b200, b300 = on_device(record, "B200", (10, 0)), on_device(record, "B300", (10, 3))
    entry = entry_of(b200, target="sm_100f", file=b200.file)

    def on_each(*found, **settings):
        return [
            status(entry, *found, capability=capability, **settings)
            for capability in ((10, 0), (10, 3), (10, 7), None)
        ]

    assert on_each() == ["unproven"] * 4
    assert on_each(b200) == ["verified", "source-verified", "source-verified", "verified"]
    assert on_each(b300) == ["source-verified", "verified", "source-verified", "verified"]
    assert on_each(b200, b300) == ["verified", "verified", "source-verified", "verified"]
    newer = dataclasses.replace(TOOLCHAIN, packages={"nvrtc": "13.6"})
    assert on_each(b300, toolchain=newer)[0] == "source-verified"
    assert on_each(dataclasses.replace(b200, suite_version=9999)) == ["unproven"] * 4
    # Each device has a file of its own.
    for each in (b200, b300):
        store.write_record(each, tmp_path)
    assert {each.device for each in store.load_evidence(tmp_path).records} == {"B200", "B300"}


def test_a_record_for_one_member_proves_the_source_of_the_family(record):
    """And the reverse: a set for sm_100a and one for sm_100f are made of the same sources."""
    family = entry_of(record, sha256="99" * 32, target="sm_100f")
    exact = dataclasses.replace(
        on_device(record, "B200", (10, 0)),
        target="sm_100a",
        entry=record.entry.replace("sm_90a", "sm_100a"),
        file=record.file.replace("sm_90a", "sm_100a"),
    )
    for capability in ((10, 0), (10, 3)):
        assert status(family, exact, capability=capability) == "source-verified"


def test_evidence_over_other_limits_does_not_verify(record):
    wider = dataclasses.replace(entry_of(record).contract, limits={"row_length": (1, 128)})
    assert status(entry_of(record, contract=wider), record) == "unproven"


def test_stale_evidence_proves_nothing(record):
    stale = dataclasses.replace(record, cases_sha256="77" * 32)
    assert not stale.current
    assert status(entry_of(record), stale) == "unproven"
    other_target = entry_of(record, sha256="99" * 32, target="sm_100a")
    assert status(other_target, stale) == "unproven"
    records.loads(records.dumps(stale))  # still readable


def test_recording_replaces_what_it_supersedes(record, tmp_path):
    old = dataclasses.replace(
        record, sha256="12" * 32, file="topk_select-any-sm_90a-row64-1212121212121212.cubin"
    )
    elsewhere = dataclasses.replace(record, device="NVIDIA H200")
    for each in (old, elsewhere, record):
        store.write_record(each, tmp_path)
    found = {(each.sha256, each.device) for each in store.load_evidence(tmp_path).records}
    assert found == {(record.sha256, record.device), (record.sha256, "NVIDIA H200")}


def flip(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


CASE_TAMPERING = {
    "inputs": {"inputs_sha256": flip},
    "ids": {"ids_sha256": flip},
    "rows": {"rows": lambda n: n + 1},
    "clear": {"clear": lambda n: n - 1},
}


@pytest.mark.parametrize("change", CASE_TAMPERING)
def test_tampering_with_a_case_is_caught(record, change):
    """What the schema cannot see, recomputation does."""
    document = json.loads(records.dumps(record))
    for index in range(0, len(document["cases"]), 10):
        case = document["cases"][index]
        for name, alter in CASE_TAMPERING[change].items():
            case[name] = alter(case[name])
        tampered = records.loads(json.dumps(document).encode())
        cases = suite.cases("topk_select", {}, LIMITS)
        assert any(case["name"] in line for line in mismatches(tampered, cases))
        document = json.loads(records.dumps(record))


def drop_last_case(document):
    document["cases"].pop()


def reseed(document):
    document["cases"][3]["seed"] += 1


def rename_a_case(document):
    document["cases"][3]["name"] += "x"


def exchange_cases(document):
    document["cases"].reverse()


def foreign_device(document):
    document["compute_capability"] = [10, 0]


def unknown_key(document):
    document["comment"] = "trust me"


def missing_key(document):
    del document["torch"]


def newer_format(document):
    document["format_version"] += 1


def upper_case_digest(document):
    document["sha256"] = document["sha256"].upper()


def no_device(document):
    document["device"] = " "


def device_on_two_lines(document):
    document["device"] = "NVIDIA H100\ntrusted"


def no_driver(document):
    document["driver"] = 0


def no_torch(document):
    document["torch"] = ""


def error_below_zero(document):
    document["cases"][0]["worst"]["weight"] = -0.5


def error_that_is_no_number(document):
    document["cases"][0]["worst"]["weight"] = float("nan")


def file_of_another_digest(document):
    document["file"] = document["file"].replace("abab", "cdcd")


def entry_of_another_kernel(document):
    document["entry"] = document["entry"].replace("topk_select", "hash_router")


def entry_without_a_variant(document):
    document["entry"] = document["entry"].rpartition("/")[0]


def kernel_without_cases(document):
    for name in ("entry", "kernel", "file"):
        document[name] = document[name].replace("topk_select", "bottomk_select")


def more_clear_than_rows(document):
    document["cases"][0]["clear"] += 10**6


def widen_the_limits(document):
    document["limits"]["row_length"] = [1, 65536]


@pytest.mark.parametrize(
    "change",
    [
        *(drop_last_case, reseed, rename_a_case, exchange_cases, foreign_device, unknown_key),
        *(missing_key, newer_format, upper_case_digest, more_clear_than_rows, widen_the_limits),
        *(no_device, device_on_two_lines, no_driver, no_torch, error_below_zero),
        *(error_that_is_no_number, file_of_another_digest, entry_of_another_kernel),
        *(entry_without_a_variant, kernel_without_cases),
    ],
)
def test_malformed_evidence_is_refused(record, change, tmp_path):
    document = json.loads(records.dumps(record))
    change(document)
    data = json.dumps(document).encode()
    with pytest.raises(FormatError, match="expected"):
        records.loads(data)
    (tmp_path / record.file_name).write_bytes(data)
    with pytest.raises(ArtifactError, match="verify --record"):
        store.load_evidence(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"\xff"])
def test_rubbish_is_refused(data):
    with pytest.raises(FormatError):
        records.loads(data)


def test_a_renamed_record_is_refused(record, tmp_path):
    renamed = record.file_name.replace("nvidia-h100", "nvidia-h200")
    (tmp_path / renamed).write_bytes(records.dumps(record))
    with pytest.raises(ArtifactError, match="the name"):
        store.load_evidence(tmp_path)


# --- a folder of the user's own ------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(folder))
    return folder


def test_own_evidence_counts_beside_the_shipped(record, tmp_path, own):
    elsewhere = dataclasses.replace(record, device="NVIDIA H200")
    store.write_record(elsewhere, tmp_path / "artifacts" / "evidence")
    store.write_record(record, own)
    found = store.read_evidence(tmp_path / "artifacts")
    assert [each.device for each in found.records] == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]


def test_own_evidence_alone_verifies(record, tmp_path, own):
    store.write_record(record, own)
    assert status(entry_of(record), *store.read_evidence(tmp_path).records) == "verified"


def test_without_the_variable_it_is_not_read(record, tmp_path, own, monkeypatch):
    store.write_record(record, own)
    monkeypatch.delenv(store.ENVIRONMENT_VARIABLE)
    assert store.read_evidence(tmp_path).records == ()


def test_a_folder_that_is_both_is_read_once(record, tmp_path, monkeypatch):
    shipped = tmp_path / "evidence"
    store.write_record(record, shipped)
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(tmp_path / "." / "evidence"))
    assert len(store.read_evidence(tmp_path).records) == 1


def test_a_named_folder_is_used_or_refused(tmp_path, own):
    with pytest.raises(ArtifactError, match=rf"expected the folder {own}.*verify --record"):
        store.read_evidence(tmp_path)


def test_a_record_is_read_when_it_decides(record, tmp_path):
    """One that is about another kernel is left alone; doctor reads them all."""
    folder = tmp_path / "evidence"
    store.write_record(record, folder)
    other = folder / f"hash_router-any-sm_90a-portable-{'0' * 16}.nvidia-h100-80gb-hbm3.json"
    other.write_text("rubbish")
    found = store.read_evidence(tmp_path)
    manifest = Manifest("ef" * 32, TOOLCHAIN, ())
    assert statuses.status(entry_of(record), manifest, found, (9, 0)) == "verified"
    with pytest.raises(ArtifactError, match="expected a valid record"):
        assert found.records
    other.unlink()
    assert store.read_evidence(tmp_path).records == (record,)


def test_the_same_bytes_under_another_name_are_verified(record, tmp_path):
    """A model of the user's own with a known model's sizes compiles to the same cubin."""
    store.write_record(record, tmp_path / "evidence")
    file = record.file.replace("-any-", "-mine-")
    mine = entry_of(record, model="mine", file=file)
    manifest = Manifest("ef" * 32, TOOLCHAIN, (mine,))
    assert statuses.status(mine, manifest, store.read_evidence(tmp_path), (9, 0)) == "verified"


def test_own_evidence_is_as_strict(record, tmp_path, own):
    path = store.write_record(record, own)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="expected a valid record"):
        status(entry_of(record), *store.read_evidence(tmp_path).records)


# --- any record ----------------------------------------------------------------------------------

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, 2**31)
ERRORS = st.floats(0, 1e300, allow_nan=False)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12)
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
CASES = st.builds(
    records.CaseRecord,
    name=PRINTABLE,
    seed=st.integers(0, 2**48),
    inputs_sha256=DIGESTS,
    rows=st.just(2**31),
    clear=COUNTS,
    reordered=COUNTS,
    ids_sha256=DIGESTS,
    worst=st.dictionaries(NAMES, ERRORS, max_size=3),
)


@st.composite
def any_record(draw):
    """A record of another suite: of this one only the records with all of its cases are valid."""
    kernel, model, variant = (draw(NAMES.filter(lambda n: n[0].isalpha())) for _ in range(3))
    target, capability = draw(
        st.sampled_from([("sm_90a", (9, 0)), ("sm_100f", (10, 7)), ("sm_103a", (10, 3))])
    )
    sha256 = draw(DIGESTS)
    return records.Record(
        entry=f"{kernel}/{model}/{target}/{variant}",
        kernel=kernel,
        constants=draw(st.dictionaries(NAMES, COUNTS | ERRORS | NAMES, max_size=4)),
        limits=draw(st.dictionaries(NAMES, st.tuples(COUNTS, COUNTS), max_size=3)),
        target=target,
        file=f"{kernel}-{model}-{target}-{variant}-{sha256[:16]}.cubin",
        sha256=sha256,
        source_sha256=draw(DIGESTS),
        toolchain_sha256=draw(DIGESTS),
        suite_version=suite.SUITE_VERSION + draw(st.integers(1, 1000)),
        cases_sha256=draw(DIGESTS),
        device=draw(PRINTABLE),
        compute_capability=capability,
        driver=draw(st.integers(1000, 999999)),
        torch=draw(PRINTABLE),
        cases=tuple(draw(st.lists(CASES, max_size=3))),
    )


@given(any_record())
def test_any_record_round_trips(found):
    data = records.dumps(found)
    assert records.loads(data) == found
    assert records.dumps(records.loads(data)) == data
    assert not found.current


def test_a_record_of_another_version_or_of_other_cases_is_stale(record):
    assert record.current
    assert not dataclasses.replace(record, suite_version=suite.SUITE_VERSION + 1).current
    assert not dataclasses.replace(record, cases_sha256="0" * 64).current


def test_the_digest_of_a_cubin_alone_makes_it_verified(record):
    """No matter from which sources it was built, and when."""
    entry = entry_of(record, source_sha256="99" * 32)
    assert status(entry, record) == "verified"
    assert record.concerns(entry)
    assert not record.same_sources(entry)
    other = entry_of(record, sha256="98" * 32)
    assert record.concerns(other)
    assert not record.concerns(dataclasses.replace(other, source_sha256="99" * 32))
