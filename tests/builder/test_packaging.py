"""The wheel, the console scripts, and the Makefile's own checks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.builder.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _wheel(source: Path, folder: Path, umask: int) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=source,
        umask=umask,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in ("build_kernels", "router_runtime"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_wheel_holds_both_packages_and_every_source(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(_wheel(source, tmp_path / "one", 0o022)) as wheel:
        packed = set(wheel.namelist())
    for name in ("build_kernels", "router_runtime"):
        files = {
            p.relative_to(source).as_posix() for p in (source / name).rglob("*") if p.is_file()
        }
        assert files
        assert files <= packed
    assert not any(name.startswith("tests/") for name in packed)


def test_the_wheel_is_the_same_bytes_again(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "elsewhere")
    os.utime(copy / "LICENSE", (0, 2_000_000_000))
    first = _wheel(source, tmp_path / "one", 0o022)
    second = _wheel(Path(copy), tmp_path / "two", 0o022)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("script", sorted(PROJECT["scripts"]))
def test_console_scripts_name_modules_that_exist(script: str) -> None:
    module, _, name = PROJECT["scripts"][script].partition(":")
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert f"def {name}(" in text


def test_the_build_backend_is_locked() -> None:
    version = importlib.metadata.version("hatchling")
    assert f"hatchling=={version} \\" in (ROOT / "build_kernels" / "release.lock").read_text()


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", ["build-cubins", "release", "test"])
def test_an_old_python_is_refused_before_anything_is_made(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "build_kernels").mkdir()
    (tmp_path / "tests").mkdir()
    for name in (
        *("build_kernels/toolchain.lock", "build_kernels/release.lock"),
        *("tests/dev.lock", "tests/runtime.lock"),
    ):
        (tmp_path / name).touch()
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.9\nexit 1\n')
    old.chmod(0o755)
    result = _make(tmp_path, target, "PYTHON=./python3.10")
    assert result.returncode
    assert "expected Python 3.11 or newer, found: Python 3.10.9; next: make" in result.stderr
    assert not (tmp_path / ".venv").exists()
    assert not (tmp_path / ".venv-test").exists()


def test_make_explains_itself() -> None:
    said = _make(ROOT).stdout
    for target in (
        *("build-cubins", "check-cubins", "release", "verify-release", "test", "kill-trials"),
        *("verify-gpu", "lint", "lock", "clean-venv"),
    ):
        assert f"\n{target} " in "\n" + said


@pytest.mark.parametrize("name", ["ci", "gpu"])
def test_the_workflows_call_what_exists(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make (?:-C \w+ )?([a-z-]+)", text))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"-m build_kernels ([a-z-]+)", text):
        assert f'@main.command("{command}")' in (ROOT / "build_kernels" / "cli.py").read_text()
