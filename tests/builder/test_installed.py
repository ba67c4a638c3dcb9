"""What an installed wheel advises: commands that work there, which is without a checkout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builder.conftest import Released, run_installed

REINSTALL = "pip install --force-reinstall --no-deps FILE.whl"
#: What only a checkout has.
CHECKOUT = re.compile(r"\bmake \b|build_kernels|build-kernels|\.venv")


@pytest.fixture
def copy(site: Path, tmp_path: Path) -> Path:
    """An installed release to damage."""
    return Path(shutil.copytree(site, tmp_path / "site"))


def _artifacts(site: Path) -> Path:
    return site / "router_runtime" / "artifacts"


def _error(site: Path, *arguments: str | Path) -> str:
    """What the doctor says to do about the error; none of what it says is for a checkout."""
    said = run_installed(site, "-m", "router_runtime", "doctor", "--json", *arguments)
    assert said.returncode == 1, said.stderr
    problems = json.loads(said.stdout)["problems"]
    assert not any(CHECKOUT.search(f"{each['text']} {each['next']}") for each in problems)
    # The environment of these tests has no torch, which is an error of its own.
    errors = [each["next"] for each in problems if each["severity"] == "error"]
    (error,) = (each for each in errors if each != "pip install torch")
    return str(error)


def _cut(end: str) -> Callable[[Path], None]:
    """Cut a file's end off."""

    def damage(folder: Path) -> None:
        path = next(path for path in sorted(folder.rglob("*")) if path.name.endswith(end))
        path.write_bytes(path.read_bytes()[:-10])

    return damage


def _remove(end: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(f"*{end}")).unlink()


def _mix(folder: Path) -> None:
    """The manifest of another release."""
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b" ")


@pytest.mark.parametrize(
    "damage",
    [
        *(_cut(".cubin"), _cut("manifest.json"), _cut(".release.json"), _cut("gpu.json")),
        *(_remove(".cubin"), _remove("manifest.json"), _mix),
        lambda folder: (folder / "manifest.json").write_text('{"format_version": 99}'),
    ],
)
def test_a_damaged_wheel_is_to_be_installed_again(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(_artifacts(copy))
    assert REINSTALL in _error(copy)


def test_a_damaged_folder_that_was_named_is_not_the_wheels(copy: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(_artifacts(copy), tmp_path / "mine"))
    _cut(".cubin")(mine)
    assert _error(copy, "--artifacts", mine) == f"copy {mine} again from where it was built"


def test_a_wheel_cannot_be_used_without_installing_it(released: Released, tmp_path: Path) -> None:
    """On the path, or as the artifacts folder."""
    wheel = next(released.folder.glob("*.whl"))
    file = Path(shutil.copy(wheel, tmp_path))
    assert f"cubins need a folder: run: pip install {file}" in _error(file)
    said = run_installed(file, "-m", "router_runtime", "verify-release", file)
    assert said.returncode == 1
    assert f"found the zip file {file}; run: pip install {file}" in said.stderr


def test_a_wheel_in_place_of_the_artifacts_folder(copy: Path, released: Released) -> None:
    wheel = next(released.folder.glob("*.whl"))
    assert f"cubins need a folder: install the wheel (pip install {wheel})" in _error(
        copy, "--artifacts", wheel
    )


def test_the_advice_mends_the_installation(copy: Path, released: Released) -> None:
    wheel = next(released.folder.glob("*.whl"))
    _cut(".cubin")(_artifacts(copy))
    command = re.search(r"pip install [^;]*FILE\.whl", _error(copy))
    assert command is not None
    words = command[0].replace("FILE.whl", str(wheel)).split()[1:]
    where = ["--no-index", "--target", str(copy), "--upgrade"]
    said = run_installed(copy, "-m", "pip", *words, *where)
    assert said.returncode == 0, said.stderr
    doctor = run_installed(copy, "-m", "router_runtime", "doctor", "--json")
    assert json.loads(doctor.stdout)["artifacts"]["intact"] == 4
