"""What the operating system refuses is named as such, and the advice fits: no file is missing, no
artifact is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from router_runtime.checkpoint.tensors import gate_tensors
from router_runtime.cli import bundle
from router_runtime.cli.main import main
from router_runtime.device.kernels import kernels_on
from router_runtime.errors import ArtifactError, InputError, RouterRuntimeError, TrustError
from router_runtime.evidence import store
from router_runtime.format import system_errors
from router_runtime.trust import policy as trust
from tests.runtime import releases

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@contextlib.contextmanager
def all_descriptors_used() -> Iterator[None]:
    """No file can be opened in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def folder(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Path:
    fake.entries = [each for each in build.small() if each.kernel == "hash_router"]
    path: Path = build.artifacts(tmp_path / "artifacts", fake.entries)
    releases.add_evidence(path / "evidence", fake.entries)
    return path


FEW = r"too few file descriptors: this process has all \d+ open that it may have"


def refused_without_descriptors(
    what: Callable[[], object], error: type[Exception], mentions: str = ""
) -> None:
    what()  # so that nothing has to be imported later
    with all_descriptors_used(), pytest.raises(error, match=FEW) as raised:
        what()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else hard
    assert f"run: ulimit -n {most}, and start the process again" in str(raised.value)
    assert "make build-cubins" not in str(raised.value)
    assert mentions in str(raised.value)


def test_loading_without_descriptors(folder: Path) -> None:
    refused_without_descriptors(lambda: kernels_on(0, folder), ArtifactError, "artifacts folder")


def test_evidence_without_descriptors(folder: Path) -> None:
    evidence = folder / "evidence"
    refused_without_descriptors(lambda: store.load_evidence(evidence), ArtifactError)
    refused_without_descriptors(lambda: store.require_writable(evidence, folder), ArtifactError)


def test_a_key_without_descriptors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    releases.add_marker(folder)
    release = releases.sign(folder)

    def require() -> None:
        monkeypatch.setattr(trust, "process", trust.Process())
        trust.require_signature(release.public_key, release.envelope)

    refused_without_descriptors(require, TrustError, "public key")


def test_a_checkpoint_without_descriptors(tmp_path: Path) -> None:
    """The package says "no such file" then, and a new download would not help."""
    file = tmp_path / "a.safetensors"
    weight = torch.zeros(8, 16, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.gate"
    tensors = {f"{name}.weight": weight, f"{name}.e_score_correction_bias": torch.zeros(8)}
    safetensors.save_file(tensors, file)
    sizes = {"hidden_size": 16, "num_experts": 8, "top_k": 2, "vocab_size": None}

    def read() -> None:
        gate_tensors("dense", sizes, file, 0)

    refused_without_descriptors(read, InputError, str(file))


def test_a_limit_that_only_root_can_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    said = system_errors.remedy(OSError(errno.EMFILE, "x"), "")
    assert "LimitNOFILE=" in said
    assert "--ulimit nofile=" in said


def test_the_command_line_without_descriptors(folder: Path) -> None:
    runner = CliRunner()
    arguments = ["doctor", "--artifacts", str(folder)]
    runner.invoke(main, arguments)
    with all_descriptors_used():
        done = runner.invoke(main, arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert re.search(FEW, " ".join(done.output.split()))


# --- file systems --------------------------------------------------------------------------------


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, dir: Any = None, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(dir))

    return fail


NAMES = {
    errno.EROFS: "a read-only file system",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left for this user on the device",
    errno.ENFILE: "too few file descriptors: all of this machine are in use",
}


@pytest.mark.parametrize("number", NAMES)
def test_a_folder_for_evidence_that_cannot_be_written(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", failing(number))
    with pytest.raises(ArtifactError, match=f"{NAMES[number]} at {tmp_path}; ") as raised:
        store.require_writable(tmp_path, tmp_path)
    own = "--evidence DIR" in str(raised.value)
    assert own == (number != errno.ENFILE)


@pytest.mark.parametrize("number", NAMES)
def test_a_record_that_cannot_be_written(
    build: SimpleNamespace, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was checked before the suite ran, and has become full since."""
    record = releases.record_of(build.small()[0])
    monkeypatch.setattr(os, "replace", failing(number))
    with pytest.raises(ArtifactError, match=NAMES[number]):
        store.write_record(record, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_bundle_that_cannot_be_written(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", failing(number))
    with pytest.raises(RouterRuntimeError, match=f"{NAMES[number]} at {tmp_path}; name another"):
        bundle.require_writable(tmp_path / "all.zip")


def test_what_no_other_code_explains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the operating system in any command ends in one line."""
    monkeypatch.setattr(sys.modules["router_runtime.cli.doctor"], "diagnose", failing(errno.EROFS))
    done = CliRunner().invoke(main, ["doctor", "--artifacts", str(folder)])
    assert done.exit_code == 1
    assert "Error: operating system: expected a file that can be used, found" in done.output
    assert "a read-only file system" in done.output
