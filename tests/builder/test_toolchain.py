"""The toolchain check, and the lock files that pip installs from."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from build_kernels.compile import cutedsl, installed, nvrtc, toolchain
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
    versions = dict(toolchain._installed())
    expected = versions.pop(name)
    if found is not None:
        versions[name] = found
    monkeypatch.setattr(toolchain, "_installed", lambda: versions)
    message = rf"{name}: expected {expected}, found {found or 'none'}\nnext: make clean-venv"
    with pytest.raises(BuildError, match=message):
        toolchain.check()


def test_a_second_set_of_dsl_libraries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**toolchain._installed(), "nvidia-cutlass-dsl-libs-cu12": "4.8.1"}
    monkeypatch.setattr(toolchain, "_installed", lambda: versions)
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


@pytest.mark.parametrize("name", [*LOCKS, "tests/conformance.lock"])
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


@pytest.mark.parametrize("name", [*LOCKS, "tests/conformance.lock"])
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


# --- installed files -----------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package with a RECORD, as pip leaves it."""
    site = tmp_path / "site"
    facts = site / "demo-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    (site / "demo").mkdir()
    lines = []
    for name, text in {"demo/__init__.py": "", "demo/a, b.py": "x = 1\n"}.items():
        (site / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        lines.append(f'"{name}",sha256={digest.decode()},{len(text)}\n')
    lines += ["demo/__pycache__/a.cpython-311.pyc,,\n", "demo-1.0.dist-info/RECORD,,\n"]
    (facts / "RECORD").write_text("".join(lines))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_installed_files_are_compared_with_their_record(package: Path) -> None:
    assert installed.altered(["demo"]) == []
    path = package / "demo" / "a, b.py"
    path.write_text("x = 2\n")
    assert installed.altered(["demo"]) == [
        f"demo: expected {path} as it was installed, found it altered"
    ]
    path.unlink()
    assert installed.altered(["demo"]) == [f"demo: expected {path}, found none"]
    (package / "demo-1.0.dist-info" / "RECORD").unlink()
    assert installed.altered(["demo"]) == ["demo: expected a RECORD of its files, found none"]


def test_every_file_of_the_toolchain_is_compared() -> None:
    """The compilers, what they load and the headers; and all of them are as pip installed them."""
    packages = toolchain.locked(toolchain.LOCK.read_text())
    compared = {
        file.path for package in packages for file in installed._files(package) if file.digest
    }
    headers = [folder / "cuda_runtime.h" for folder in toolchain.include_directories()[:1]]
    assert {toolchain.nvdisasm(), *headers} <= compared
    for library in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.5", "_cutlass_ir.cu13.cpython"):
        assert any(path.name.startswith(library) for path in compared), library
    toolchain.check_files()


ALTERED = """
from build_kernels.compile import installed
from build_kernels.cli import main

installed.altered = lambda packages: [f"{{name}}: altered" for name in packages]
main({arguments!r})
"""


def test_a_build_with_altered_files_publishes_nothing(fresh: Project) -> None:
    result = fresh.python(ALTERED.format(arguments=["build"]))
    assert result.returncode == 1
    assert "the installed toolchain are not those that pip installed:\n  click: altered\n" in (
        result.stderr
    )
    assert re.search(
        r"\n  and \d+ others\nnext: make clean-venv && make build-cubins$", result.stderr.strip()
    )
    assert not fresh.artifacts.exists()


def test_a_build_that_compiles_nothing_compares_no_file(project: Project) -> None:
    """It takes a second, and nothing of them is used."""
    assert project.python(ALTERED.format(arguments=["build"])).returncode == 0


@pytest.mark.parametrize("check", [toolchain.check_release, toolchain.check_emulation])
def test_other_tools_with_altered_files_are_refused(
    check: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    monkeypatch.setattr(installed, "altered", lambda packages: sorted(packages)[:1])
    with pytest.raises(BuildError, match=r"make clean-venv && make (release|emulation)$"):
        check()


@pytest.mark.parametrize("name", ["cuda.py", "cutlass/__init__.py", "numpy.py"])
def test_a_file_that_hides_a_package_of_the_toolchain_is_named(fresh: Project, name: str) -> None:
    """The workers look into the checkout first, where the builder is."""
    (fresh.root / name).parent.mkdir(exist_ok=True)
    (fresh.root / name).write_text("")
    result = fresh.run("build")
    assert result.returncode == 1
    assert f"found in their place:\n  {fresh.root / name}\nnext: rename it" in result.stdout
    assert "Traceback" not in result.stdout


def test_a_folder_that_hides_nothing_is_fine(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    assert installed.hiding(["cuda-bindings"], tmp_path) == []
