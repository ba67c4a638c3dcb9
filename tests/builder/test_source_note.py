"""What the doctor of a checkout knows of sources that changed since its artifacts were built."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from build_kernels import plan
from build_kernels.compile.sources import PACKAGE
from router_runtime.format.source_digest import own_digest
from router_runtime.format.source_note import SOURCES_NAME, changed_since, note
from tests.builder.conftest import Project

DIFFER = "artifacts differ from the sources"


def _doctor(project: Project, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "router_runtime", "doctor", *arguments],
        cwd=project.root,
        env=project.environment({"COLUMNS": "1000"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr
    return " ".join(result.stdout.split())


@pytest.fixture
def checkout(project: Project) -> Project:
    (project.root / "Makefile").touch()  # by which the runtime knows a checkout
    return project


def _replaced(name: str, old: str, new: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        path = project.root / "build_kernels" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (_replaced("kernels/common/factor.cuh", "FACTOR", "FACTOR + 1.0f"), True),
        (_replaced("kernels/shift/shift.py", "* 128", "* 64 * 2"), True),
        (_replaced("kernels/scale/contract.py", "divisor=128", "divisor=64"), True),
        (_replaced("catalog/kernels.py", '"FACTOR": 2.0', '"FACTOR": 3.0'), True),
        (_replaced("catalog/latency.toml", "[1]", "[1, 2]"), True),
        (lambda project: project.kernel_file("scale/own.cuh").unlink(), True),
        (_replaced("kernels/common/factor.cuh", "FACTOR", "FACTOR /* a comment */"), False),
        (
            _replaced(
                "kernels/shift/shift.py", "import cutlass\n", "# A comment.\nimport cutlass\n"
            ),
            False,
        ),
        (_replaced("cli.py", "import json\n", "import json\nimport math\n"), False),
    ],
)
def test_the_doctor_says_which_sources_changed(
    checkout: Project, change: Callable[[Project], None], changed: bool
) -> None:
    assert DIFFER not in _doctor(checkout)
    change(checkout)
    said = _doctor(checkout)
    assert (f"{DIFFER}: build_kernels/" in said) == changed
    assert (" of this checkout changed since the build" in said) == changed
    assert ("run: make build-cubins" in said.partition(DIFFER)[2]) == changed


def test_a_folder_of_its_own_is_compared_with_its_own_sources(checkout: Project) -> None:
    checkout.build("--kernel", "scale", "--out", "out")
    _replaced("kernels/shift/shift.py", "* 128", "* 64 * 2")(checkout)
    assert DIFFER not in _doctor(checkout, "--artifacts", "out")
    _replaced("kernels/scale/own.cuh", "128", "256")(checkout)
    said = _doctor(checkout, "--artifacts", "out")
    assert f"{DIFFER}: build_kernels/kernels/scale/own.cuh of this checkout changed" in said
    assert "next: repeat the build that made them" in said


def test_without_a_checkout_or_a_note_nothing_is_said(project: Project) -> None:
    _replaced("kernels/common/factor.cuh", "FACTOR", "FACTOR + 1.0f")(project)
    assert DIFFER not in _doctor(project)
    (project.root / "Makefile").touch()
    assert DIFFER in _doctor(project)
    for text in ("", "[]", "{"):
        (project.artifacts / SOURCES_NAME).write_text(text)
        assert DIFFER not in _doctor(project)
    (project.artifacts / SOURCES_NAME).unlink()
    assert DIFFER not in _doctor(project)


def test_the_note_names_every_source_of_the_real_kernels() -> None:
    root = PACKAGE.parent
    files = {path.relative_to(root).as_posix() for path in plan.sources(plan.plan())}
    for name in (
        *(
            "kernels/common/scoring.py",
            "kernels/common/scoring.cuh",
            "kernels/hash_gate/hash_gate.cu",
        ),
        *("kernels/hash_gate/dot_product.cuh", "kernels/dense/contract.py", "toolchain.lock"),
        *("catalog/kernels.py", "catalog/models.py", "catalog/targets.py", "catalog/latency.toml"),
    ):
        assert f"build_kernels/{name}" in files


def test_digests_of_single_files(tmp_path: Path) -> None:
    same = {
        "a.py": ("x = 1  # a\n", '"""A docstring."""\nx=1\n'),
        "a.cu": ("int a; // a\n", "int   a;\n"),
    }
    other = {
        "a.py": ("x = 1\n", "x = 2\n"),
        "b.py": ("from a import b\n", "from a import c\n"),
        "a.cuh": ("int a;\n", "int b;\n"),
        "b.cuh": ('#include "a"\n', '#include "b"\n'),
        "a.toml": ("a = 1\n", "a  = 1\n"),
        "c.py": ("def (\n", "def ( \n"),
    }
    for pairs, equal in ((same, True), (other, False)):
        for name, texts in pairs.items():
            digests = set()
            for text in texts:
                (tmp_path / name).write_text(text)
                digests.add(own_digest(tmp_path / name))
            assert (len(digests) == 1) == equal, name
    data = note(tmp_path, [tmp_path / "a.toml", tmp_path / "a.py"])
    assert list(json.loads(data)) == ["a.py", "a.toml"]
    (tmp_path / SOURCES_NAME).write_bytes(data)
    assert changed_since(tmp_path, tmp_path) == ()
    (tmp_path / "a.toml").unlink()
    assert changed_since(tmp_path, tmp_path) == ("a.toml",)
