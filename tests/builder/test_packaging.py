"""The wheel, the console scripts, and the Makefile's own checks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from router_runtime.format.manifest import loads
from router_runtime.format.wheel import ARTIFACTS
from tests.builder.conftest import ROOT, Project, Released, pip_install

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def built(released: Released, tmp_path: Path) -> Project:
    """A built checkout with evidence for sm_90a."""
    return Project(Path(shutil.copytree(released.project.root, tmp_path / "checkout")))


def _made(source: Path, folder: Path, kind: str = "wheel", umask: int = 0o022) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder],
        cwd=source,
        umask=umask,
        check=True,
        capture_output=True,
    )
    (made,) = folder.iterdir()
    return made


def test_the_wheel_holds_both_packages_every_source_and_the_artifacts(
    built: Project, tmp_path: Path
) -> None:
    with zipfile.ZipFile(_made(built.root, tmp_path / "one")) as wheel:
        packed = {name: wheel.read(name) for name in wheel.namelist()}
    for name in ("build_kernels", "router_runtime"):
        files = {
            path.relative_to(built.root).as_posix()
            for path in (built.root / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files
        assert files <= packed.keys()
    assert not any(name.startswith("tests/") for name in packed)
    found = {n.removeprefix(ARTIFACTS): d for n, d in packed.items() if n.startswith(ARTIFACTS)}
    entries = loads((built.artifacts / "manifest.json").read_bytes()).entries
    evidence = [f"evidence/{path.name}" for path in (built.artifacts / "evidence").iterdir()]
    assert evidence
    assert found == {
        name: (built.artifacts / name).read_bytes()
        for name in ("manifest.json", *(entry.file for entry in entries), *evidence)
    }


def test_the_wheel_is_the_same_bytes_again(built: Project, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.root, tmp_path / "elsewhere"))
    os.utime(copy / "LICENSE", (0, 2_000_000_000))
    first = _made(built.root, tmp_path / "one")
    second = _made(copy, tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()


def test_a_source_archive_can_be_installed(built: Project, tmp_path: Path) -> None:
    """It has the cubins, as what is made of a checkout has them."""
    archive = _made(built.root, tmp_path / "archive", "sdist")
    said = pip_install(archive, tmp_path / "site")
    assert said.returncode == 0, said.stdout
    assert _artifacts(tmp_path / "site", sys.executable) == tmp_path / "site" / ARTIFACTS


def _artifacts(cwd: Path, python: str) -> Path:
    """The artifacts that an installed runtime uses. Every cubin is read."""
    script = (
        "from router_runtime.device import artifact_store as a; folder = a.find_artifacts();"
        "m = a.read_manifest(folder); [a.read_cubin(entry, folder) for entry in m.entries];"
        "print(folder)"
    )
    found = subprocess.run(
        [python, "-P", "-c", script],
        cwd=cwd,
        env={"PYTHONPATH": str(cwd)},
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(found.stdout.strip())


def test_installing_a_checkout_takes_its_cubins(built: Project, tmp_path: Path) -> None:
    site = tmp_path / "site"
    said = pip_install(built.root, site)
    assert said.returncode == 0, said.stdout
    assert _artifacts(site, sys.executable) == site / ARTIFACTS


@pytest.mark.parametrize("case", ["unbuilt", "version", "altered", "missing", "evidence"])
def test_a_checkout_without_whole_artifacts_is_not_installed(
    built: Project, tmp_path: Path, case: str
) -> None:
    manifest, cubin = built.artifacts / "manifest.json", next(built.artifacts.glob("*.cubin"))
    message = f"next: make -C {built.root} build-cubins, and run the command again"
    if case == "unbuilt":
        shutil.rmtree(built.artifacts)
    elif case == "version":
        manifest.write_text('{"format_version": 99}')
    elif case == "altered":
        cubin.write_bytes(cubin.read_bytes()[:-1])
    elif case == "missing":
        cubin.unlink()
    else:
        record = next((built.artifacts / "evidence").iterdir())
        record.write_bytes(record.read_bytes()[:-10])
        message = f"evidence {record}: expected a valid record"
    said = pip_install(built.root, tmp_path / "site")
    assert said.returncode == 1
    assert message in said.stdout
    assert "Traceback" not in said.stdout
    assert not (tmp_path / "site" / "router_runtime").exists()


def test_an_editable_installation_uses_the_checkouts_artifacts(
    built: Project, tmp_path: Path
) -> None:
    """Those that are there when they are used: it can be made before the first build."""
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # The environment gets the build backend without being able to install it.
    (site / "backend.pth").write_text(sysconfig.get_path("purelib") + "\n")
    artifacts = built.artifacts.rename(tmp_path / "away")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"),
            *("--no-index", "--no-build-isolation", "--disable-pip-version-check"),
            *("--editable", str(built.root)),
        ],
        check=True,
        capture_output=True,
    )
    artifacts.rename(built.artifacts)
    assert _artifacts(tmp_path, python) == built.artifacts


@pytest.mark.parametrize(
    "target",
    [
        *PROJECT["scripts"].values(),
        *(target for group in PROJECT["entry-points"].values() for target in group.values()),
    ],
)
def test_scripts_and_plug_ins_name_functions_that_exist(target: str) -> None:
    module, _, name = target.partition(":")
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
        *("verify-gpu", "test-engines", "lint", "lock", "clean-venv"),
    ):
        assert f"\n{target} " in "\n" + said


@pytest.mark.parametrize("name", ["ci", "engines", "gpu"])
def test_the_workflows_call_what_exists(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make (?:-C \w+ )?([a-z-]+)", text))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"-m build_kernels ([a-z-]+)", text):
        assert f'@main.command("{command}")' in (ROOT / "build_kernels" / "cli.py").read_text()


def test_each_step_that_installs_says_before_what_and_how_long() -> None:
    rules = re.split(r"\n(?=\S)", (ROOT / "Makefile").read_text())
    installing = [rule for rule in rules if re.search(r"\$\((LOCKED|INSTALL)\) -r", rule)]
    assert len(installing) >= 8
    for rule in installing:
        announced, _, rest = rule.partition("$(call announce,")
        assert rest, rule
        assert "-r $<" not in announced


def test_an_announcement(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "build_kernels").mkdir()
    (tmp_path / "build_kernels" / "toolchain.lock").touch()
    said = _make(tmp_path, "--dry-run", ".venv/.toolchain").stdout
    assert 'echo "installing the compilers into .venv (0.8 GB on disk; ' in said
    assert said.index("installing the compilers") < said.index("-m pip install")


def test_a_checkout_can_have_the_command_and_its_completion(fresh: Project, tmp_path: Path) -> None:
    root = fresh.root.rename(tmp_path / "A path with spaces")
    shutil.copy(ROOT / "Makefile", root)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / ".toolchain").touch()
    # A link to the interpreter would be another environment, without the packages of this one.
    python = root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert _make(root, ".venv/bin/build-kernels").returncode == 0

    def said(**changes: str) -> str:
        path = f"{root / '.venv' / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["build-kernels", *changes.pop("arguments", "").split()],
            cwd=tmp_path,
            env={"PATH": path, **changes},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert said(arguments="--version").startswith("build-kernels ")
    readme = (ROOT / "README.md").read_text()
    assert 'eval "$(_BUILD_KERNELS_COMPLETE=bash_source build-kernels)"' in readme
    assert "complete " in said(_BUILD_KERNELS_COMPLETE="bash_source")
    words = {"COMP_WORDS": "build-kernels bui", "COMP_CWORD": "1"}
    assert said(_BUILD_KERNELS_COMPLETE="bash_complete", **words) == "plain,build\n"
