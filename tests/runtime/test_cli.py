"""``router-runtime doctor`` with a GPU, without one, and with things wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from router_runtime.cli import doctor
from router_runtime.cli.main import main


@pytest.fixture
def folder(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    fake.entries = build.small() + build.small("sm_100a")
    path: Path = build.artifacts(tmp_path / "artifacts", fake.entries)
    return path


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--artifacts", str(folder)])


def test_doctor_with_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "status", lambda *_: "verified")
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    for line in (
        "14 entries",
        "14 match their digest, 0 do not",
        "14 verified, 0 source-verified, 0 unproven",
        "cuda:0 Fake GPU: compute capability 9.0, driver for CUDA 13.0, 132 multiprocessors",
        "dense_router_decode/small/sm_90a/portable [verified]: chosen",
        "dense router, HIDDEN=128, EXPERTS=24, TOP_K=4: "
        "1 to 8 tokens by dense_router_decode/small/sm_90a/portable; "
        "9 to 32 tokens by dense_router_prefill/small/sm_90a/portable",
        "built for sm_100a, the device has compute capability 9.0",
        "topk_select(row_length=65536, top_k=32): topk_select/any/sm_90a/row65536",
        "topk_select(row_length=1024, top_k=32): topk_select/any/sm_90a/row1024",
        "serves row_length from 1 to 1024, not 65536",
    ):
        assert line in done.output


def test_doctor_without_a_gpu(folder: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.init = RuntimeError("no libcuda")
    monkeypatch.setattr(doctor, "status", lambda *_: "source-verified")
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    for line in (
        "driver      NVIDIA driver: expected libcuda on this machine, found no libcuda",
        "a device for sm_100a: compute capability 10.0",
        "a device for sm_90a: compute capability 9.0",
        "dense_router_decode/small/sm_100a/portable [source-verified]: chosen",
    ):
        assert line in done.output


def test_doctor_without_a_prefill_kernel(
    build: SimpleNamespace, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode kernel serves every batch: nothing is amiss."""
    fake.entries = [entry for entry in build.small() if "prefill" not in entry.kernel]
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    monkeypatch.setattr(doctor, "status", lambda *_: "verified")
    done = run(folder, "doctor")
    assert done.exit_code == 0, done.output
    assert "TOP_K=4: 1 to 8 tokens by dense_router_decode/small/sm_90a/portable" in done.output
    assert "no entry of dense_router_prefill" in done.output


def test_doctor_with_nothing_proven(folder: Path) -> None:
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "0 verified, 0 source-verified, 14 unproven" in done.output
    assert "nothing serves it" in done.output
    assert "no evidence that this digest" in done.output


def test_doctor_with_an_old_driver(
    folder: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.version = 12080
    monkeypatch.setattr(doctor, "status", lambda *_: "verified")
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "driver      for CUDA 12.8, too old: CUDA 13.0 is needed" in done.output


def test_doctor_with_an_altered_cubin(
    folder: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "status", lambda *_: "verified")
    path = folder / fake.entries[0].file
    path.write_bytes(b"\0" * path.stat().st_size)
    done = run(folder, "doctor")
    assert done.exit_code == 1
    assert "13 match their digest, 1 do not" in done.output
    assert "(altered)" in done.output


def test_doctor_without_artifacts(tmp_path: Path, fake: Any) -> None:
    done = run(tmp_path, "doctor")
    assert done.exit_code == 1
    assert "run: make build-cubins" in done.output


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify(folder: Path, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int) -> None:
    from router_runtime.verification import verify

    seen: list[Any] = []

    def stand_in(artifacts: Path, record: bool, echo: Any, own: Path | None) -> bool:
        seen.append((artifacts, record, own))
        echo("ran")
        return passed

    monkeypatch.setattr(verify, "run", stand_in)
    done = run(folder, "verify", "--record")
    assert (done.exit_code, done.output) == (code, "ran\n")
    run(folder, "verify")
    run(folder, "verify", "--record", "--evidence", str(folder / "mine"))
    assert seen == [(folder, True, None), (folder, False, None), (folder, True, folder / "mine")]


def test_evidence_folder_without_record(folder: Path) -> None:
    done = run(folder, "verify", "--evidence", str(folder))
    assert done.exit_code == 2
    assert "add --record" in done.output


def test_verify_without_a_driver(folder: Path, fake: Any) -> None:
    fake.init = RuntimeError("no libcuda")
    done = run(folder, "verify")
    assert done.exit_code == 1
    assert done.output.startswith("Error: NVIDIA driver: expected libcuda")
