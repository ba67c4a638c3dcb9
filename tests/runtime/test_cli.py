"""``router-runtime`` with a GPU, without one, and with things wrong."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from router_runtime import version
from router_runtime.cli import decisions, diagnosis, variables, why
from router_runtime.cli.main import main
from router_runtime.cli.report import SCHEMA
from router_runtime.device import artifact_store, driver
from router_runtime.evidence.store import Evidence, write_record
from router_runtime.format import advice
from router_runtime.format.manifest import MANIFEST_NAME
from router_runtime.routing.config import RouterConfig
from router_runtime.verification.outcome import CaseBits, EntryOutcome, Outcome
from router_runtime.verification.timing import Timing
from tests.runtime import releases

BUILT = Path(__file__).resolve().parents[2] / "artifacts"


@pytest.fixture
def folder(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    fake.entries = build.small() + build.small("sm_100a")
    path: Path = build.artifacts(tmp_path / "artifacts", fake.entries)
    return path


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "status", lambda *_: "verified")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package looks installed from a wheel: advice names the command ``router-runtime``."""
    monkeypatch.setattr(advice, "checkout", lambda: None)


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--artifacts", str(folder)])


def words(done: Result) -> str:
    """The output with every run of white space as one space: lines are aligned and wrapped."""
    return " ".join(done.output.split())


def test_the_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"router-runtime {version.__version__}\n"


@pytest.mark.usefixtures("verified")
def test_doctor_with_a_gpu(folder: Path) -> None:
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    for text in (
        "14 entries, 14 cubins match their digest, signature not required",
        "14 verified, 0 source-verified, 0 emulated, 0 unproven; 0 stale records",
        "driver serves CUDA 13.0",
        "cuda:0 Fake GPU (compute capability 9.0, 132 multiprocessors)",
        "dense_router/small 1 to 8 tokens dense_router_decode portable verified "
        "9 tokens and more dense_router_prefill portable verified",
        "topk_select (row_length to 65536, ",
        "no problems",
    ):
        assert text in words(done)
    assert len(done.output.splitlines()) < 25


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ROUTER_RUNTIME_ARTIFATCS", "did you mean ROUTER_RUNTIME_ARTIFACTS?"),
        ("DSV4_ROUTER_ACEPT", "did you mean DSV4_ROUTER_ACCEPT?"),
        ("ROUTER_RUNTIME_SOMETHING_ELSE", "those that are read: ROUTER_RUNTIME_ARTIFACTS, "),
    ],
)
def test_a_variable_that_nothing_reads_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "x")
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    assert f"note: the environment variable {name} is set, and nothing reads it" in words(done)
    assert f"next: run: unset {name} ({meant}" in words(done)


def test_every_variable_that_is_read_is_known() -> None:
    """Also those that a later change adds."""
    package = Path(variables.__file__).parents[1]
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    read = set(re.findall(r'"((?:ROUTER_RUNTIME|DSV4_ROUTER)_[A-Z_]*[A-Z])"', sources))
    assert read == set(variables.KNOWN)
    assert not list(variables.misspelled(["_ROUTER_RUNTIME_COMPLETE", "PATH", *variables.KNOWN]))


@pytest.mark.usefixtures("verified")
def test_gpus_that_do_not_differ_are_shown_once(folder: Path, fake: Any) -> None:
    fake.devices = 8
    done = run(folder, "doctor")
    assert words(done).count("Fake GPU") == 1
    assert "cuda:0, cuda:1, cuda:2" in done.output


def test_doctor_without_a_gpu(folder: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.init = RuntimeError("no libcuda")
    monkeypatch.setattr(diagnosis, "status", lambda *_: "source-verified")
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    for text in (
        "driver none",
        "note: NVIDIA driver: expected libcuda on this machine, found none: no libcuda",
        "next: install an NVIDIA driver of release 580",
        "a device for sm_100a (compute capability 10.0)",
        "a device for sm_90a (compute capability 9.0)",
        "dense_router/small 2 kernels, source-verified",
    ):
        assert text in words(done)
    done = run(folder, "doctor", "--target", "sm_100a")
    assert "sm_90a" not in done.output
    assert "1 to 8 tokens dense_router_decode portable source-verified" in words(done)


@pytest.fixture
def family(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    """Artifacts for sm_100f."""
    fake.entries = build.small("sm_100f")
    path: Path = build.artifacts(tmp_path / "family", fake.entries)
    return path


def recorded_on_b200(_entry: Any, _manifest: Any, _evidence: Any, capability: Any) -> str:
    """The status of every entry when 10.0 has recorded it, and no other member of the family."""
    return "verified" if capability in (None, (10, 0)) else "source-verified"


def head(*minors: int) -> str:
    """The line above what serves on these members of the family of sm_100f."""
    numbers = " or ".join(f"10.{minor}" for minor in minors)
    return f"a device for sm_100f (compute capability {numbers})"


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("arguments", [(), ("--target", "sm_100f")])
def test_members_of_a_family_that_do_not_differ_are_shown_together(
    family: Path, fake: Any, arguments: tuple[str, ...]
) -> None:
    fake.init = RuntimeError("no libcuda")
    done = run(family, "doctor", *arguments)
    assert f"\n{head(0, 3, 7)}\n" in done.output
    assert done.output.count("a device for sm_100f") == 1
    assert words(done).count("1 to 8 tokens dense_router_decode portable verified") == 1
    found = json.loads(run(family, "doctor", "--json", *arguments).stdout)
    assert [each["compute_capability"] for each in found["devices"]] == [[10, 0], [10, 3], [10, 7]]


def test_a_target_without_kernels_of_its_own_names_those_that_run_there(
    family: Path, folder: Path, fake: Any
) -> None:
    fake.init = RuntimeError("no libcuda")
    told = run(family, "doctor", "--target", "sm_103a").output
    name = "a device for sm_103a, on which the kernels for sm_100f run"
    assert f"\n{name} (compute capability 10.3)\n" in told
    assert (
        "\na device for sm_103a (compute capability 10.3)\n"
        in run(folder, "doctor", "--target", "sm_103a").output
    )
    assert (
        f" on {name} (10.3)\n"
        in run(family, "doctor", "--target", "sm_103a", "--why", "dense_router/small/1").output
    )


def test_members_of_a_family_have_the_status_of_their_own_records(
    family: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "status", recorded_on_b200)
    text = run(family, "doctor", "--target", "sm_100f").output
    assert "7 verified, 0 source-verified, 0 emulated, 0 unproven" in text
    first, _, others = text.partition(head(3, 7))
    assert head(0) in first
    assert re.search("1 to 8 tokens +dense_router_decode +portable +verified", first)
    assert re.search("1 to 8 tokens +dense_router_decode +portable +source-verified", others)
    why_text = run(family, "doctor", "--target", "sm_100f", "--why", "dense_router/small/1").output
    parts = re.split(r"^dense_router/small/1 on a device for sm_100f ", why_text, flags=re.M)
    assert [part.splitlines()[0] for part in parts[1:]] == ["(10.0)", "(10.3)", "(10.7)"]
    assert "[verified]: chosen" in parts[1]
    assert parts[2] == "(10.3)\n"
    assert "[source-verified]: chosen" in parts[3]


@pytest.mark.parametrize("minor", [0, 3])
def test_doctor_says_what_only_another_member_of_the_family_has_verified(
    family: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, minor: int
) -> None:
    monkeypatch.setattr(diagnosis, "status", recorded_on_b200)
    fake.capability = (10, minor)
    done = run(family, "doctor")
    assert done.exit_code == 0, done.output
    note = (
        "note: 7 kernels are verified on another compute capability of their target's family, and "
        f"source-verified on cuda:0, which has 10.{minor} "
        f"next: run: {advice.record_evidence(family)}"
    )
    assert (note in words(done)) == (minor == 3)


@pytest.mark.usefixtures("verified")
def test_devices_that_two_targets_name_are_shown_once(
    build: SimpleNamespace, fake: Any, tmp_path: Path
) -> None:
    fake.entries = [*build.small("sm_100f"), *build.small("sm_100a")]
    fake.init = RuntimeError("no libcuda")
    done = run(build.artifacts(tmp_path / "both", fake.entries), "doctor", "--json")
    devices = json.loads(done.stdout)["devices"]
    assert [(each["target"], each["compute_capability"]) for each in devices] == [
        ("sm_100a", [10, 0]),
        ("sm_100f", [10, 3]),
        ("sm_100f", [10, 7]),
    ]
    chosen = [each["routers"][0]["ranges"][0]["entry"].split("/")[2] for each in devices]
    assert chosen == ["sm_100a", "sm_100f", "sm_100f"]


@pytest.mark.usefixtures("verified")
def test_a_target_can_be_shown_in_place_of_the_gpu(folder: Path) -> None:
    done = run(folder, "doctor", "--target", "sm_100a")
    assert done.exit_code == 0
    assert "a device for sm_100a" in done.output
    assert "Fake GPU" not in done.output


@pytest.mark.usefixtures("verified")
def test_doctor_without_a_prefill_kernel(build: SimpleNamespace, fake: Any, tmp_path: Path) -> None:
    """The decode kernel serves every batch: no problem is reported."""
    fake.entries = [entry for entry in build.small() if "prefill" not in entry.kernel]
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    assert "dense_router/small any number of tokens dense_router_decode portable" in words(done)


@pytest.mark.usefixtures("installed")
def test_doctor_with_nothing_proven(folder: Path) -> None:
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "0 verified, 0 source-verified, 0 emulated, 14 unproven" in words(done)
    assert "nothing serves it" in done.output
    assert "error: nothing serves dense_router/small, " in words(done)
    assert "note: 7 kernels are unproven: no evidence says that they are right" in words(done)
    assert f"next: run: router-runtime verify --record --artifacts {folder}" in done.output


@pytest.mark.usefixtures("installed")
def test_doctor_where_evidence_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    done = run(folder, "doctor")
    assert (
        f"next: run: router-runtime verify --record --evidence DIR --artifacts {folder} && "
        f"export ROUTER_RUNTIME_EVIDENCE=DIR ({folder}/evidence is read-only)" in words(done)
    )


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_100a the prefill kernel is emulated, the others are source-verified."""

    def status(entry: Any, *_: Any) -> str:
        if entry.target == "sm_90a":
            return "verified"
        return "emulated" if entry.kernel == "dense_router_prefill" else "source-verified"

    monkeypatch.setattr(diagnosis, "status", status)


@pytest.mark.usefixtures("emulated", "installed")
def test_doctor_with_emulated_kernels(folder: Path) -> None:
    done = run(folder, "doctor", "--target", "sm_100a")
    assert "7 verified, 6 source-verified, 1 emulated, 0 unproven" in words(done)
    assert "9 tokens and more dense_router_prefill" not in words(done)
    note = "note: 1 kernels are emulated: their PTX passed the oracle suite with some instructions"
    assert note in words(done)
    assert "so they serve only a Router that accepts that" in words(done)
    assert "verify --record" in words(done)
    assert "or write Router(..., accept='emulated')" in words(done)
    accepted = run(folder, "doctor", "--target", "sm_100a", "--accept", "emulated")
    assert accepted.exit_code == 0, accepted.output
    assert "decisions for Router(..., accept='emulated')" in words(accepted)
    assert "9 tokens and more dense_router_prefill portable emulated" in words(accepted)
    assert note in words(accepted)
    assert "serve only a Router that accepts" not in words(accepted)
    found = json.loads(
        run(folder, "doctor", "--target", "sm_100a", "--accept", "emulated", "--json").stdout
    )
    assert found["accept"] == "emulated"
    assert found["evidence"]["statuses"]["emulated"] == 1
    (device,) = found["devices"]
    assert "emulated" in {each["status"] for each in device["routers"][0]["ranges"]}
    refused = run(folder, "doctor", "--accept", "unproven")
    assert refused.exit_code == 2
    assert "emulated" in refused.output


@pytest.mark.usefixtures("emulated", "installed")
def test_why_with_emulated_kernels(folder: Path) -> None:
    question = ("doctor", "--why", "dense_router_prefill/small/9", "--target", "sm_100a")
    done = run(folder, *question)
    assert done.exit_code == 1
    assert "dense_router_prefill/small/sm_100a/portable [emulated]: refused" in words(done)
    assert "no evidence says that this digest or its source is right on a device" in words(done)
    assert "or accept what is emulated: Router(..., accept='emulated')" in words(done)
    accepted = run(folder, *question, "--accept", "emulated")
    assert accepted.exit_code == 0, accepted.output
    assert "dense_router_prefill/small/9, accept='emulated', on a device" in words(accepted)
    assert "dense_router_prefill/small/sm_100a/portable [emulated]: chosen" in words(accepted)
    found = json.loads(run(folder, *question, "--accept", "emulated", "--json").stdout)
    assert found["accept"] == "emulated"


def test_doctor_counts_stale_records_of_emulation(folder: Path, fake: Any) -> None:
    entry = next(each for each in fake.entries if each.target == "sm_100a")
    write_record(releases.emulation_of(entry, modes=("eager",)), folder / "evidence")
    done = run(folder, "doctor")
    assert "0 emulated, 14 unproven; 1 stale records" in words(done)
    assert "note: 1 records of emulation are stale" in words(done)
    assert "record-emulation" in done.output
    write_record(releases.emulation_of(entry), folder / "evidence")
    assert "1 emulated, 13 unproven; 0 stale records" in words(run(folder, "doctor"))


class PassedAs:
    """A current record about one cubin, made from sources of this digest."""

    current = True

    def __init__(self, entry: Any, source_sha256: str) -> None:
        self.entry, self.source_sha256 = entry, source_sha256

    def matches(self, entry: Any) -> bool:
        return bool((self.entry.sha256, self.entry.kernel) == (entry.sha256, entry.kernel))

    def same_sources(self, entry: Any) -> bool:
        return bool((self.entry.kernel, self.source_sha256) == (entry.kernel, entry.source_sha256))


@pytest.mark.parametrize("elsewhere", ["unproven", "source-verified"])
@pytest.mark.parametrize("sources", ["other", "same"])
def test_doctor_with_records_of_other_sources(
    folder: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, sources: str, elsewhere: str
) -> None:
    """The cubins have the same bytes, but other targets lose what their sources proved."""
    records = [
        PassedAs(entry, entry.source_sha256 if sources == "same" else "a1" * 32)
        for entry in fake.entries
        if entry.target == "sm_90a"
    ]
    found = SimpleNamespace(records=records, emulations=())
    monkeypatch.setattr(diagnosis, "Evidence", lambda *_: found)
    monkeypatch.setattr(
        diagnosis,
        "status",
        lambda entry, *_: "verified" if entry.target == "sm_90a" else elsewhere,
    )
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    told = "have records of other sources than the manifest's" in words(done)
    assert told == (sources == "other" and elsewhere == "unproven")
    if told:
        assert "note: 7 verified kernels, such as " in words(done)
        assert f"next: on a GPU of sm_90a, run: {advice.record_evidence(folder)}" in words(done)


def test_doctor_with_stale_evidence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = (SimpleNamespace(current=False), SimpleNamespace(current=True))
    found = SimpleNamespace(records=records, emulations=())
    monkeypatch.setattr(diagnosis, "Evidence", lambda *_: found)
    monkeypatch.setattr(diagnosis, "status", lambda *_: "verified")
    done = run(folder, "doctor")
    assert done.exit_code == 0
    assert "; 1 stale records" in done.output
    assert "note: 1 records of evidence are stale" in words(done)


@pytest.mark.usefixtures("verified")
def test_doctor_with_an_old_driver(folder: Path, fake: Any) -> None:
    fake.version = 12080
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "the driver is too old: it serves CUDA 12.8, CUDA 13.0 is needed" in words(done)


@pytest.mark.usefixtures("verified")
def test_doctor_with_an_altered_cubin(folder: Path, fake: Any) -> None:
    for entry in fake.entries[:2]:
        path = folder / entry.file
        path.write_bytes(b"\0" * path.stat().st_size)
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "12 cubins match their digest" in words(done)
    assert "(altered) (and 1 more)" in words(done)
    assert f"build_kernels build --out {folder}" in words(done)


def test_doctor_without_artifacts(tmp_path: Path, fake: Any) -> None:
    done = run(tmp_path, "doctor")
    assert done.exit_code == 1
    assert f"build there: .venv/bin/python -m build_kernels build --out {tmp_path}" in done.output


def test_doctor_without_artifacts_in_an_installed_wheel(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "checkout", lambda: None)
    for module in (advice, artifact_store):
        monkeypatch.setattr(module, "artifacts_places", lambda: ())
    done = run(tmp_path, "doctor")
    assert "make " not in done.output
    assert "pip install --force-reinstall" in done.output


@pytest.mark.usefixtures("verified")
def test_doctor_with_two_wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"router_runtime": ["dsv4-router-runtime", "dsv4-router-runtime-sm90a"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "pip uninstall -y dsv4-router-runtime dsv4-router-runtime-sm90a &&" in words(done)


@pytest.mark.usefixtures("verified")
def test_doctor_on_a_mig_slice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device_name", lambda _: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    done = run(folder, "doctor")
    assert done.exit_code == 0
    assert "note: cuda:0 is a MIG slice with 132 multiprocessors" in words(done)


@pytest.mark.usefixtures("verified")
def test_doctor_in_a_forked_child(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forked() -> None:
        raise driver.fork_error()

    monkeypatch.setattr(driver, "refuse_fork", forked)
    done = run(folder, "doctor")
    assert "note: CUDA after fork: expected the process" in words(done)
    assert "next: start workers with the 'spawn' method" in done.output


@pytest.mark.usefixtures("verified")
def test_doctor_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def lacking(package: str) -> str:
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "error: torch is not installed" in done.output


@pytest.mark.usefixtures("verified")
@pytest.mark.skipif(not (BUILT / MANIFEST_NAME).exists(), reason="run: make build-cubins")
@pytest.mark.parametrize("gpu", [False, True])
def test_the_report_on_what_was_built_fits_a_screen(fake: Any, gpu: bool) -> None:
    """It has a line for each range of tokens, and not one for each of its entries."""
    if not gpu:
        fake.init = RuntimeError("no libcuda")
    done = run(BUILT, "doctor")
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) <= 70
    assert max(map(len, done.output.splitlines())) <= 140


@pytest.mark.usefixtures("verified")
def test_json_has_everything_of_the_screen(folder: Path) -> None:
    """These keys are part of the interface: other programs read them."""
    done = run(folder, "doctor", "--json")
    found = json.loads(done.stdout)
    assert found["schema"] == SCHEMA == 2
    assert list(found) == [
        *("schema", "usable", "software", "artifacts", "evidence", "accept", "devices"),
        "problems",
    ]
    assert list(found["software"]) == [
        *("router_runtime", "python", "torch", "cuda_bindings", "driver")
    ]
    assert list(found["artifacts"]) == [
        *("folder", "entries", "intact", "signature", "source_sha256", "toolchain")
    ]
    assert list(found["evidence"]) == ["folders", "statuses", "stale_records"]
    (device,) = found["devices"]
    assert list(device) == [
        *("name", "indices", "target", "compute_capability", "multiprocessors"),
        *("shared_memory_per_block", "routers", "row_ops"),
    ]
    router = device["routers"][0]
    assert list(router) == ["kernel", "models", "constants", "ranges", "next"]
    assert (router["kernel"], router["models"]) == ("dense_router", ["small"])
    assert list(router["ranges"][0]) == ["low", "high", "entry", "kernel", "variant", "status"]
    assert list(device["row_ops"][0]) == ["kernel", "limits", "entries", "statuses", "next"]
    assert found["usable"] is True
    assert found["problems"] == []


def test_json_problems(tmp_path: Path, fake: Any) -> None:
    found = json.loads(run(tmp_path, "doctor", "--json").stdout)
    assert found["usable"] is False
    assert found["artifacts"] is None
    (problem,) = found["problems"]
    assert list(problem) == ["severity", "text", "next"]
    assert problem["severity"] == "error"
    assert "build_kernels build --out" in problem["next"]


@pytest.mark.usefixtures("verified")
def test_why_a_dense_batch(folder: Path) -> None:
    done = run(folder, "doctor", "--why", "dense_router/small/9")
    assert done.exit_code == 0, done.output
    for text in (
        "dense_router/small/9 on cuda:0 Fake GPU",
        "9 to 32 tokens: dense_router_prefill/small/sm_90a/portable",
        "dense_router_prefill/small/sm_90a/portable [verified]: chosen",
        "dense_router_decode/small/sm_90a/portable [verified]: could serve",
        "(2 entries for other targets or shapes are left out)",
    ):
        assert text in words(done)
    done = run(folder, "doctor", "--why", "dense_router/HIDDEN=128/EXPERTS=24/TOP_K=4")
    assert "1 to 8 tokens: dense_router_decode" in words(done)
    assert "9 to 32 tokens: dense_router_prefill" in words(done)
    # A batch beyond the last range is split into launches of that range.
    done = run(folder, "doctor", "--why", "dense_router/small/100000")
    assert "100000 tokens, in pieces of 32: dense_router_prefill" in words(done)
    assert "9 to 32 tokens" not in words(done)


@pytest.mark.usefixtures("verified")
def test_why_one_kernel_and_a_row_op(folder: Path) -> None:
    done = run(folder, "doctor", "--why", "dense_router_decode/small/9")
    assert done.exit_code == 1
    assert "serves tokens from 1 to 8, not 9" in done.output
    done = run(folder, "doctor", "--why", "topk_select/row_length=65536/top_k=32")
    assert done.exit_code == 0, done.output
    assert "topk_select/any/sm_90a/row65536 [verified]: chosen" in words(done)
    assert "serves row_length from 1 to 1024, not 65536" in words(done)
    done = run(folder, "doctor", "--why", "topk_select/row_length=1024/top_k=32")
    assert "topk_select/any/sm_90a/row1024 [verified]: chosen" in words(done)


@pytest.mark.usefixtures("installed")
def test_why_nothing_serves(folder: Path) -> None:
    done = run(folder, "doctor", "--why", "dense_router/small/1")
    assert done.exit_code == 1
    assert "nothing serves it" in done.output
    assert "no evidence that this digest" in done.output
    advice = f"next: run on this GPU: router-runtime verify --record --artifacts {folder}, or name"
    assert f"{advice} one of the variants ['portable']: " in done.output
    assert "Router(..., variants={'dense_router_decode': 'portable'})" in done.output
    absent = run(folder, "doctor", "--target", "sm_100a", "--why", "dense_router/small/1")
    assert "next: run on a GPU of compute capability 10.0: " in absent.output
    assert "this GPU" not in absent.output
    row_op = run(folder, "doctor", "--why", "topk_select/row_length=8/top_k=2")
    assert f"next: run on this GPU: router-runtime verify --record --artifacts {folder}\n" in (
        row_op.output
    )
    named = run(folder, "doctor", "--why", "dense_router/small/1/variant=portable")
    assert named.exit_code == 0
    assert "1 to 8 tokens: dense_router_decode/small/sm_90a/portable" in words(named)


@pytest.mark.usefixtures("verified")
def test_why_as_json_and_for_a_target(folder: Path) -> None:
    done = run(folder, "doctor", "--why", "dense_router/small", "--json", "--target", "sm_100a")
    found = json.loads(done.stdout)
    assert list(found) == ["schema", "request", "accept", "answers"]
    (answer,) = found["answers"]
    assert list(answer) == [
        *("device", "indices", "chosen", "ranges", "verdicts", "elsewhere", "next")
    ]
    assert list(answer["verdicts"][0]) == [
        *("entry", "status", "verdict", "reasons", "microseconds")
    ]
    assert answer["ranges"] == [[1, 8], [9, 32]]
    assert all("sm_100a" in key for key in answer["chosen"])


@pytest.mark.usefixtures("verified")
def test_why_without_a_gpu_answers_for_every_target(folder: Path, fake: Any) -> None:
    fake.init = RuntimeError("no libcuda")
    done = run(folder, "doctor", "--why", "dense_router/small/1")
    assert "on a device for sm_100a" in done.output
    assert "on a device for sm_90a" in done.output


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("dense_routr/small", "expected a kernel of .*; did you mean dense_router?"),
        ("dense_router/smal", "expected a model of small, found 'smal'; did you mean small?"),
        ("dense_router/small/variant=portabel", "did you mean portable?"),
        ("topk_select/row_lenth=5", "did you mean row_length?"),
        ("topk_select/small", "expected a kernel that depends on a model"),
        ("topk_select/row_length=-1", "expected a whole number from 1 for row_length, found '-1'"),
        (
            "topk_select/row_length=9/row_length=8",
            "expected one value of row_length, found another",
        ),
        ("topk_select/9", "expected a name of .*, found 'tokens'"),
        (
            "dense_router/small/9/tokens=8",
            "expected one value of tokens, found another, 'tokens=8'",
        ),
        ("dense_router/small/small", "expected one value of model, found another, 'small'"),
        ("dense_router/small/tokens=" + "9" * 5000, "expected a whole number from 1 for tokens"),
        ("dense_router/small/0", "expected a whole number from 1 for tokens, found '0'"),
        ("dense_router/\N{ARABIC-INDIC DIGIT THREE}", "expected a model of small"),
        ("nothing/like/it", "found 'nothing'; write KERNEL"),
    ],
)
def test_a_request_that_cannot_be_read(folder: Path, request_: str, message: str) -> None:
    done = run(folder, "doctor", "--why", request_)
    assert done.exit_code == 1
    start, _, end = message.partition(".*")
    assert start in words(done)
    assert end in words(done)


def test_why_names_the_expected_latency(build: SimpleNamespace, tmp_path: Path) -> None:
    (entry,) = (each for each in build.small() if each.kernel == "dense_router_decode")
    entry = dataclasses.replace(entry, latency=((1, 2.5), (8, 4.0)))
    manifest = build.manifest([entry])
    contents = diagnosis.Contents(tmp_path, manifest, Evidence())
    question = why.parse("dense_router/small/5/variant=portable", manifest)
    places = diagnosis.places(manifest, (), "sm_90a")
    (answer,) = why.explain_request(question, contents, places).answers
    assert [verdict.microseconds for verdict in answer.verdicts] == [4.0]
    told = "\n".join(why.lines(why.explain_request(question, contents, places), question.tokens))
    assert "4.00 us expected\n" in told
    assert "measured on another device or are predicted; nothing was timed here" in told
    bare = dataclasses.replace(entry, latency=())
    contents = diagnosis.Contents(tmp_path, build.manifest([bare]), Evidence())
    told = "\n".join(why.lines(why.explain_request(question, contents, places), question.tokens))
    assert "expected" not in told


def test_shapes_are_those_of_a_router(build: SimpleNamespace) -> None:
    """The doctor requests the constants that a Router requests, where the kernel has them."""
    shapes = {entry.kernel: decisions.shape_of(entry) for entry in build.small()}
    assert shapes["dense_router_decode"] == RouterConfig(128, 24, 4, 1.0).constants()


TIMINGS = (Timing("small", 16, ("dense_router_prefill/small/sm_90a/x",), 1, 6.0, 8.0, 3.0),)


def stand_in(monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> list[Any]:
    """Put ``outcome`` in the place of a run of the suite, and ``TIMINGS`` in that of a measurement;
    returns the arguments of each run.
    """
    command = sys.modules["router_runtime.cli.verify"]
    seen: list[Any] = []

    def found(artifacts: Path, record: bool, echo: Any, own: Path | None) -> Outcome:
        seen.append((artifacts, record, own))
        echo("ran")
        return outcome

    monkeypatch.setattr(command, "run", found)
    monkeypatch.setattr(command, "Gpu", lambda: None)
    monkeypatch.setattr(command, "time_models", lambda artifacts, machine: iter(TIMINGS))
    return seen


def outcome_of(folder: Path, *problems: str) -> Outcome:
    """The outcome of two entries: one that passed, and one with these problems."""
    record = folder.parent / "record.json"
    record.write_text("{}")
    case = CaseBits("random", 7, "1" * 64, "2" * 64)
    return Outcome(
        (
            EntryOutcome("hash_router/any/sm_90a/portable", "a" * 64, (), (case,), record),
            EntryOutcome("dense_router_decode/small/sm_90a/portable", "b" * 64, problems, (), None),
        )
    )


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize(("problems", "code"), [((), 0), (("random: wrong",), 1)])
def test_verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problems: tuple[str, ...], code: int
) -> None:
    seen = stand_in(monkeypatch, outcome_of(folder, *problems))
    done = run(folder, "verify")
    assert (done.exit_code, done.output) == (code, "ran\n")
    recorded = run(folder, "verify", "--record")
    assert recorded.exit_code == code
    text = recorded.output.partition("what serves by default now:")[2]
    assert re.search(r"dense_router/small .*dense_router_decode +portable", text)
    run(folder, "verify", "--record", "--evidence", str(folder / "mine"))
    assert seen == [(folder, False, None), (folder, True, None), (folder, True, folder / "mine")]


def test_a_bundle_has_everything_that_was_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = outcome_of(folder, "random: wrong")
    stand_in(monkeypatch, outcome)
    path, again = tmp_path / "first.zip", tmp_path / "again.zip"
    done = run(folder, "verify", "--record", "--bundle", str(path))
    assert done.exit_code == 1
    assert done.output.endswith(f"everything that was found is in {path}\n")
    record = outcome.entries[0].record
    assert record is not None
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files.pop(f"evidence/{record.name}") == record.read_bytes()
    assert set(files) == {
        *("report.txt", "doctor.txt", "doctor.json", "bits.json", "bench.txt", "bench.json"),
    }
    report = files["report.txt"].decode()
    assert report.startswith("ran\n")
    assert "what serves by default now:" in report
    assert json.loads(files["doctor.json"])["schema"] == SCHEMA
    assert files["doctor.txt"].decode().startswith("versions")
    assert json.loads(files["bench.json"]) == [
        {
            "model": "small",
            "tokens": 16,
            "entries": ["dense_router_prefill/small/sm_90a/x"],
            "launches": 1,
            "router_us": 6.0,
            "torch_mm_us": 8.0,
            "stated_us": 3.0,
            "error": None,
        }
    ]
    table = files["bench.txt"].decode()
    assert re.search(r"dense_router_prefill/small/sm_90a/x +16 +1 +6\.00 +8\.00 +0\.75", table)
    assert table in done.output
    passed, failed = sorted(json.loads(files["bits.json"]).items(), reverse=True)
    assert passed[1]["cases"]["random"]["bits_sha256"] == "2" * 64
    assert failed[1]["problems"] == ["random: wrong"]
    run(folder, "verify", "--record", "--bundle", str(again))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["found.tar", "absent/found.zip"])
def test_a_bundle_that_cannot_be_written_is_refused_before_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    seen = stand_in(monkeypatch, outcome_of(folder))
    done = run(folder, "verify", "--record", "--bundle", str(tmp_path / name))
    assert done.exit_code == 1
    assert "--bundle FILE.zip" in done.output
    assert not seen
    assert not list(tmp_path.glob("found*"))


@pytest.mark.parametrize("option", ["--evidence", "--bundle"])
def test_options_that_need_record(folder: Path, option: str) -> None:
    done = run(folder, "verify", option, str(folder / "x.zip"))
    assert done.exit_code == 2
    assert "add --record" in done.output


def test_verify_without_a_driver(folder: Path, fake: Any) -> None:
    fake.init = RuntimeError("no libcuda")
    done = run(folder, "verify")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: NVIDIA driver: expected libcuda")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("doctor",), "asking the NVIDIA driver for its version and GPUs: cuInit, no context"),
        (("doctor", "--json"), "asking the NVIDIA driver"),
        (("doctor", "--why", "dense_router/small"), "asking the NVIDIA driver"),
        (("verify",), "initialising CUDA: a context, memory and kernel launches"),
    ],
)
def test_the_driver_is_announced_before_it_is_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    """A driver in disorder may never answer."""
    events: list[str] = []
    genuine = driver.bindings

    def bindings() -> Any:
        events.append("the driver")
        return genuine()

    def echo(text: str, **_: Any) -> None:
        events.append(text)

    monkeypatch.setattr(driver, "bindings", bindings)
    monkeypatch.setattr(click, "echo", echo)
    run(folder, *arguments)
    before = events[: events.index("the driver")]
    assert any(text.startswith(said) for text in before)


def test_the_announcement_does_not_mix_with_the_report(folder: Path) -> None:
    done = run(folder, "doctor", "--json")
    assert done.stderr.startswith("asking the NVIDIA driver")
    assert done.stdout.startswith("{")


@pytest.mark.parametrize("arguments", [("--help",), ("doctor", "--help"), ("--version",)])
def test_help_does_not_touch_the_driver(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(driver, "bindings", lambda: pytest.fail("the driver"))
    assert CliRunner().invoke(main, arguments).exit_code == 0
