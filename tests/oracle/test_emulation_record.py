"""Records of emulation: their format, the status that follows, and the folder that they share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_kernels.emulation import interface
from router_runtime.errors import ArtifactError, FormatError
from router_runtime.evidence import cases as suite
from router_runtime.evidence import emulation_record as emulations
from router_runtime.evidence import record as records
from router_runtime.evidence import store
from router_runtime.evidence.emulation_record import MODES, EmulationRecord
from router_runtime.evidence.ladder import STATUSES, serves, status_rank
from router_runtime.evidence.status import status, toolchain_sha256
from router_runtime.format.contract import Contract, GridAxis, Parameter
from router_runtime.format.manifest import Entry, Manifest, Resources, Toolchain, artifact_name
from tests.runtime.releases import emulation_of, record_of

TOOLCHAIN = Toolchain({"nvrtc": "13.5"}, {"cuda": ("--std=c++20",)})
AXIS = GridAxis("constant")


def entry_for(target: str, sha256: str = "ab" * 32, source_sha256: str = "cd" * 32) -> Entry:
    kernel, variant = "topk_select", "row64"
    return Entry(
        kernel=kernel,
        model=None,
        target=target,
        variant=variant,
        constants={},
        file=artifact_name(kernel, None, target, variant, sha256),
        sha256=sha256,
        size=1,
        symbol=kernel,
        contract=Contract(
            (Parameter("scores", "ptr:f32"),),
            (AXIS, AXIS, AXIS),
            (32, 1, 1),
            limits={"row_length": (1, 64), "top_k": (1, 4)},
        ),
        source_sha256=source_sha256,
        numerics=None,
        resources=Resources(32, 0, 0, 0, 0),
    )


ENTRY = entry_for("sm_100a")
RECORD = emulation_of(ENTRY)
#: What proves ENTRY by its sources: a cubin for another target that ran itself.
TWIN = record_of(entry_for("sm_90a", "99" * 32), toolchain_sha256=toolchain_sha256(TOOLCHAIN))
#: What proves ENTRY itself.
OWN = record_of(ENTRY, compute_capability=(10, 0))


def status_of(entry: Entry, *found: records.Record | EmulationRecord) -> str:
    evidence = store.Evidence(
        tuple(each for each in found if isinstance(each, records.Record)),
        tuple(each for each in found if isinstance(each, EmulationRecord)),
    )
    return status(entry, Manifest("ef" * 32, TOOLCHAIN, (entry,)), evidence, (10, 0))


def test_the_best_that_holds_is_the_status() -> None:
    assert STATUSES == ("verified", "source-verified", "emulated", "unproven")
    assert status_of(ENTRY) == "unproven"
    assert status_of(ENTRY, RECORD) == "emulated"
    assert status_of(ENTRY, RECORD, TWIN) == "source-verified"
    assert status_of(ENTRY, RECORD, TWIN, OWN) == "verified"


def test_only_the_digest_of_the_cubin_makes_an_entry_emulated() -> None:
    altered = entry_for("sm_100a", "12" * 32)
    assert status_of(altered, RECORD) == "unproven"
    # Not its sources either: an emulation says nothing of another target's cubin.
    assert status_of(entry_for("sm_103a", "34" * 32), RECORD) == "unproven"
    assert status_of(entry_for("sm_100a", source_sha256="98" * 32), RECORD) == "emulated"
    wider = dataclasses.replace(ENTRY.contract, limits={"row_length": (1, 128), "top_k": (1, 4)})
    assert status_of(dataclasses.replace(ENTRY, contract=wider), RECORD) == "unproven"


@pytest.mark.parametrize(
    "change",
    [
        {"suite_version": suite.SUITE_VERSION + 1},
        {"cases_sha256": "77" * 32},
        {"modes": MODES[:-1]},
        {"modes": (*MODES, "hurried")},
    ],
)
def test_a_record_of_another_suite_or_of_other_modes_is_stale(change: dict[str, Any]) -> None:
    stale = dataclasses.replace(RECORD, **change)
    assert RECORD.current
    assert not stale.current
    assert status_of(ENTRY, stale) == "unproven"
    assert emulations.loads(emulations.dumps(stale)) == stale  # still readable


def test_emulated_serves_only_where_it_is_accepted() -> None:
    assert [serves(each) for each in STATUSES] == [True, True, False, False]
    assert [serves(each, "emulated") for each in STATUSES] == [True, True, True, False]
    assert not serves("unproven", "unproven")
    assert [status_rank(each) for each in STATUSES] == [0, 1, 2, 2]
    # What is accepted counts as much as source-verified: the latency decides between them.
    assert [status_rank(each, "emulated") for each in STATUSES] == [0, 1, 1, 2]


def test_the_modes_are_those_of_the_emulation() -> None:
    assert tuple(interface.MODES) == MODES


# --- a folder with records of both kinds ---


def test_both_kinds_share_a_folder(tmp_path: Path) -> None:
    for each in (OWN, RECORD):
        store.write_record(each, tmp_path / "evidence")
    assert sorted(path.name for path in (tmp_path / "evidence").iterdir()) == [
        "topk_select-any-sm_100a-row64-abababababababab.fake-gpu.emulated.json",
        "topk_select-any-sm_100a-row64-abababababababab.fake-gpu.json",
    ]
    loaded, read = store.load_evidence(tmp_path / "evidence"), store.read_evidence(tmp_path)
    assert loaded == store.Evidence((OWN,), (RECORD,))
    assert (read.records, read.emulations) == ((OWN,), (RECORD,))
    assert list(read.emulations_of(ENTRY.sha256)) == [RECORD]
    assert list(read.emulations_of("12" * 32)) == []


def test_recording_replaces_what_it_supersedes_of_its_kind(tmp_path: Path) -> None:
    old = emulation_of(entry_for("sm_100a", "12" * 32))
    elsewhere = dataclasses.replace(RECORD, device="Another GPU")
    for each in (OWN, old, elsewhere, RECORD):
        store.write_record(each, tmp_path)
    found = store.load_evidence(tmp_path)
    assert found.records == (OWN,)
    assert {(each.sha256, each.device) for each in found.emulations} == {
        (RECORD.sha256, "Fake GPU"),
        (RECORD.sha256, "Another GPU"),
    }


def test_an_emulation_is_read_when_it_decides(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    store.write_record(RECORD, folder)
    (folder / f"topk_select-any-sm_100a-row64-{'12' * 8}.fake-gpu{emulations.SUFFIX}").write_text(
        "rubbish"
    )
    manifest = Manifest("ef" * 32, TOOLCHAIN, ())
    assert status(ENTRY, manifest, store.read_evidence(tmp_path), None) == "emulated"
    with pytest.raises(ArtifactError, match="expected a valid record"):
        assert store.read_evidence(tmp_path).emulations


@pytest.mark.parametrize("kind", [".json", ".emulated.json"])
def test_a_record_under_the_name_of_the_other_kind_is_refused(tmp_path: Path, kind: str) -> None:
    record: Any = RECORD if kind == ".json" else OWN
    dumps: Any = emulations.dumps if kind == ".json" else records.dumps
    (tmp_path / f"{record.stem}{kind}").write_bytes(dumps(record))
    with pytest.raises(ArtifactError, match="expected a valid record"):
        store.load_evidence(tmp_path)


def test_a_renamed_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"other-{RECORD.file_name}").write_bytes(emulations.dumps(RECORD))
    with pytest.raises(ArtifactError, match=r"the name .*make .*record-emulation"):
        store.load_evidence(tmp_path)


# --- what is refused ---


def without_a_mode(document: dict[str, Any]) -> None:
    document["modes"] = []


def one_mode_twice(document: dict[str, Any]) -> None:
    document["modes"] = ["eager", "eager"]


def on_a_device_of_its_target(document: dict[str, Any]) -> None:
    document["compute_capability"] = [10, 0]
    document["ran_target"] = "sm_100a"


def on_a_device_that_cannot_run_it(document: dict[str, Any]) -> None:
    document["compute_capability"] = [8, 0]


def without_its_ptx(document: dict[str, Any]) -> None:
    document["ptx_sha256"] = ""


def with_another_model(document: dict[str, Any]) -> None:
    document["model_sha256"] = document["model_sha256"].upper() + "x"


def without_an_assembler(document: dict[str, Any]) -> None:
    document["ptxas"] = " "


def of_another_kind(document: dict[str, Any]) -> None:
    document["kind"] = "verification"


def without_a_kind(document: dict[str, Any]) -> None:
    del document["kind"]


def of_a_newer_format(document: dict[str, Any]) -> None:
    document["format_version"] += 1


def without_a_case(document: dict[str, Any]) -> None:
    document["cases"].pop()


def with_a_comment(document: dict[str, Any]) -> None:
    document["comment"] = "trust me"


def of_another_file(document: dict[str, Any]) -> None:
    document["file"] = document["file"].replace("abab", "cdcd")


def without_a_driver(document: dict[str, Any]) -> None:
    document["driver"] = 0


@pytest.mark.parametrize(
    "change",
    [
        *(without_a_mode, one_mode_twice, on_a_device_of_its_target, without_its_ptx),
        *(on_a_device_that_cannot_run_it, with_another_model, without_an_assembler),
        *(of_another_kind, without_a_kind, of_a_newer_format, without_a_case, with_a_comment),
        *(of_another_file, without_a_driver),
    ],
)
def test_a_malformed_record_is_refused(change: Any, tmp_path: Path) -> None:
    document = json.loads(emulations.dumps(RECORD))
    change(document)
    data = json.dumps(document).encode()
    with pytest.raises(FormatError, match="expected"):
        emulations.loads(data)
    (tmp_path / RECORD.file_name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"delete it, and .*record-emulation"):
        store.load_evidence(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"\xff"])
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        emulations.loads(data)


# --- any record ---

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
FAMILY = st.sampled_from(["sm_100a", "sm_103a", "sm_100f", "sm_120a"])


@st.composite
def any_record(draw: st.DrawFn) -> EmulationRecord:
    """A record with all cases of this suite, or of another suite."""
    return emulation_of(
        entry_for(draw(FAMILY), draw(DIGESTS), draw(DIGESTS)),
        draw(PRINTABLE),
        suite_version=suite.SUITE_VERSION + draw(st.integers(0, 3)),
        driver=draw(st.integers(1000, 999999)),
        torch=draw(PRINTABLE),
        ptx_sha256=draw(DIGESTS),
        model_sha256=draw(DIGESTS),
        ptxas=draw(PRINTABLE),
        ran_sha256=draw(DIGESTS),
        modes=tuple(draw(st.lists(st.sampled_from(MODES), min_size=1, max_size=4, unique=True))),
    )


@given(any_record())
def test_any_record_round_trips(found: EmulationRecord) -> None:
    data = emulations.dumps(found)
    assert emulations.loads(data) == found
    assert emulations.dumps(emulations.loads(data)) == data
    assert found.file_name.endswith(emulations.SUFFIX)
