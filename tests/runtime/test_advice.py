"""The next command that an error names, in a checkout and in an installed wheel."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from build_kernels.catalog.targets import TARGETS
from build_kernels.cli import main as build_kernels
from router_runtime.format import advice
from router_runtime.format.target import BUILDABLE

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "checkout", lambda: None)


def test_the_builder_builds_what_the_advice_names() -> None:
    assert BUILDABLE == TARGETS


def test_this_is_a_checkout() -> None:
    assert advice.checkout() == ROOT


def test_a_copy_of_the_package_alone_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "__file__", str(tmp_path / "router_runtime/format/advice.py"))
    assert advice.checkout() is None
    (tmp_path / "build_kernels").mkdir()
    assert advice.checkout() is None
    (tmp_path / "Makefile").touch()
    assert advice.checkout() == tmp_path


def test_building_names_a_target_of_the_makefile_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert advice.build_artifacts() == "run: make build-cubins"
    assert "\nbuild-cubins:" in (ROOT / "Makefile").read_text()
    monkeypatch.chdir(tmp_path)
    assert advice.build_artifacts() == f"run: make -C {ROOT} build-cubins"


def test_a_folder_that_was_named_is_made_whole_where_it_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert advice.restore(ROOT / "artifacts") == "run: make build-cubins"
    command = f"run: .venv/bin/python -m build_kernels build --out {tmp_path}, with the options"
    assert advice.restore(tmp_path).startswith(command)
    monkeypatch.setattr(advice, "checkout", lambda: None)
    assert advice.restore(tmp_path) == f"copy {tmp_path} again from where it was built"


def test_a_package_in_a_zip_file_is_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.whl"
    file.touch()
    monkeypatch.setattr(advice, "__file__", str(file / "router_runtime/format/advice.py"))
    assert advice.archive() == file
    assert f"cubins need a folder: run: pip install {file}" in advice.build_artifacts()


@pytest.mark.parametrize(
    ("capability", "target"), [((9, 0), "sm_90a"), ((10, 0), "sm_100f"), ((10, 7), "sm_100f")]
)
def test_a_device_that_can_be_built_for(
    capability: tuple[int, int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = advice.build_for_device(*capability)
    assert f"-m build_kernels build --target {target} --out build/{target}" in text
    assert f"export ROUTER_RUNTIME_ARTIFACTS={ROOT}/build/{target}" in text
    assert "device='cpu'" in text


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_a_device_that_cannot_be_built_for(capability: tuple[int, int]) -> None:
    text = advice.build_for_device(*capability)
    assert "no kernels can be built" in text
    assert "device='cpu'" in text
    assert "--target" not in text


def test_the_options_that_are_named_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = {option for each in build_kernels.commands["build"].params for option in each.opts}
    for text in (advice.build_for_device(9, 0), advice.build_model()):
        assert set(re.findall(r"--[a-z-]+", text)) <= known


def test_a_checkout_without_an_environment_makes_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    monkeypatch.setattr(advice, "checkout", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "run: make .venv/.toolchain && .venv/bin/python" in advice.build_model()
    assert "\n.venv/.toolchain:" in (tmp_path / "Makefile").read_text()
    os.chdir("/")
    assert f"run: cd {tmp_path} && make .venv/.toolchain && " in advice.build_model()


@pytest.mark.usefixtures("installed")
def test_a_wheel_has_the_command() -> None:
    assert advice.runtime("doctor") == "router-runtime doctor"


def test_a_checkout_has_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised runs, from the checkout's folder and from any other."""
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        done = subprocess.run(
            advice.runtime("--version"), shell=True, capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith("router-runtime "), done.stderr
    monkeypatch.setattr(advice, "checkout", lambda: tmp_path)
    assert advice.runtime("doctor") == f"{sys.executable} -m router_runtime doctor"


def test_what_may_not_be_looked_at_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advice is given although the checkout, or its virtual environment, may not be looked into."""
    genuine = os.stat

    def refusing(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return genuine(path, *rest, **options)

    monkeypatch.chdir("/")
    monkeypatch.setattr(os, "stat", refusing)
    with monkeypatch.context() as patch:
        patch.setattr(advice, "checkout", lambda: tmp_path)
        assert f"{sys.executable} -m router_runtime doctor" in advice.runtime("doctor")
        assert "make .venv/.toolchain" in advice.build_model()
    monkeypatch.setattr(advice, "__file__", str(tmp_path / "router_runtime/format/advice.py"))
    assert advice.checkout() is None
    assert advice.archive() is None


def test_a_current_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert advice.build_artifacts() == f"run: make -C {ROOT} build-cubins"
    assert advice.runtime("doctor").startswith(f"PYTHONPATH={ROOT} ")


@pytest.mark.usefixtures("installed")
def test_recording_names_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(advice.ARTIFACTS_VARIABLE, raising=False)
    default = ROOT / "artifacts"
    assert advice.record_evidence() == "router-runtime verify --record"
    assert advice.record_evidence(default) == "router-runtime verify --record"
    named = f"router-runtime verify --record --evidence DIR --artifacts {tmp_path}"
    assert advice.record_evidence(tmp_path, "--evidence DIR") == named
    monkeypatch.setenv(advice.ARTIFACTS_VARIABLE, str(tmp_path))
    assert advice.record_evidence(default).endswith(f" --artifacts {default}")


@pytest.mark.usefixtures("installed")
def test_an_installed_wheel_is_not_told_to_build() -> None:
    for text in (advice.build_artifacts(), advice.build_for_device(10, 3)):
        assert "make " not in text
        assert "build_kernels" not in text
        assert "wheel" in text
    assert "in a checkout" in advice.build_model()
