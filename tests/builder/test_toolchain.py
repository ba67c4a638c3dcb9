"""The toolchain check, and the lock files that pip installs from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from build_kernels.compile import cutedsl, nvrtc, toolchain
from build_kernels.errors import BuildError
from tests.builder.conftest import ROOT, Project

LOCKS = ("build_kernels/toolchain.lock", "tests/dev.lock", "tests/runtime.lock")


def test_the_installed_toolchain_is_the_locked_one() -> None:
    tools = toolchain.check()
    assert tools.packages["nvidia-cuda-nvrtc"] == "13.5.37"
    assert tools.flags == {"cuda": nvrtc.FLAGS, "cutedsl": cutedsl.FLAGS}


@pytest.mark.parametrize("name", ["nvidia-cuda-nvrtc", "nvidia-cutlass-dsl-libs-cu13"])
@pytest.mark.parametrize("found", ["13.0.1", None])
def test_another_version_is_refused(
    name: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = dict(toolchain._installed())
    expected = installed.pop(name)
    if found is not None:
        installed[name] = found
    monkeypatch.setattr(toolchain, "_installed", lambda: installed)
    message = rf"{name}: expected {expected}, found {found or 'none'}\nnext: make clean-venv"
    with pytest.raises(BuildError, match=message):
        toolchain.check()


def test_a_second_set_of_dsl_libraries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**toolchain._installed(), "nvidia-cutlass-dsl-libs-cu12": "4.8.1"}
    monkeypatch.setattr(toolchain, "_installed", lambda: installed)
    with pytest.raises(BuildError, match=r"libs-cu12: expected none, found 4\.8\.1"):
        toolchain.check()


def test_a_build_with_another_toolchain_publishes_nothing(fresh: Project) -> None:
    lock = fresh.root / "build_kernels" / "toolchain.lock"
    lock.write_text(lock.read_text().replace("cuda-python==13.4.4", "cuda-python==13.4.3"))
    result = fresh.run("build")
    assert result.returncode == 1
    assert "cuda-python: expected 13.4.3, found 13.4.4" in result.stdout
    assert "Traceback" not in result.stdout
    assert not fresh.artifacts.exists()


@pytest.mark.parametrize("line", ["click", "click>=8", "click==8.5.1 ; extra == 'x'"])
def test_a_malformed_lock_is_refused(line: str) -> None:
    with pytest.raises(BuildError, match="expected 'package==version"):
        toolchain.locked(f"# comment\n{line}\n")


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_hashed_and_name_no_place(name: str) -> None:
    text = (ROOT / name).read_text(encoding="ascii")
    packages = re.split(r"\n(?=[a-z])", text)[1:]
    assert packages
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links| @ |\.\./", text)


def test_the_toolchain_is_the_same_on_every_python() -> None:
    packages = toolchain.locked(toolchain.LOCK.read_text())  # refuses environment markers
    assert len(packages) >= 15
    assert "nvidia-cutlass-dsl-libs-cu12" not in packages
    assert "torch" not in packages


@pytest.mark.parametrize("name", LOCKS)
def test_locks_hold_what_their_inputs_ask_for(name: str) -> None:
    asked = (ROOT / name).with_suffix(".in").read_text()
    locked = (ROOT / name).read_text()
    for line in asked.splitlines():
        if line and not line.startswith("#"):
            package, _, version = re.sub(r"\[.*\]", "", line).partition("==")
            assert re.search(rf"^{re.escape(package)}=={re.escape(version)}", locked, re.M), line


@pytest.mark.parametrize("name", LOCKS[1:])
def test_what_is_installed_beside_the_toolchain_agrees_with_it(name: str) -> None:
    packages = toolchain.locked(toolchain.LOCK.read_text())
    for package, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / name).read_text(), re.M):
        assert packages.get(package, version) == version


def test_tools_lie_in_the_environment() -> None:
    folders = [toolchain.nvdisasm().parent, *toolchain.include_directories()]
    assert all(Path(toolchain.__file__).parents[1] != folder for folder in folders)
    assert all("site-packages" in folder.parts for folder in folders)
