"""The version of the oracle suite follows the sources that decide what passes it."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from router_runtime.evidence.cases import SUITE_VERSION
from router_runtime.format.source_digest import RUNTIME, PythonSources

#: Suite version -> digest of the code of ``spec.py`` and of what runs and judges one case. A
#: version keeps its line when the code changes and what passes does not.
PINNED = {2: "ca0e69b35e5b7a7d1594ee887afd08978db67d875033764317f490406dc858f0"}

#: Rooms that decide nothing about what passes. The cases have a digest of their own in each record.
BOUNDARIES = ("errors", "evidence", "format")


def suite(folder: Path = RUNTIME) -> PythonSources:
    names = [f"router_runtime.{name}" for name in BOUNDARIES]
    return PythonSources({"router_runtime": folder}, boundaries=names)


def digest(folder: Path = RUNTIME) -> str:
    return suite(folder).digest("router_runtime.verification.examine")


def test_the_suites_version_is_of_these_sources() -> None:
    found = digest()
    assert PINNED.get(SUITE_VERSION) == found, (
        "the code of spec.py or of the oracle suite has changed. If a cubin that passed the suite "
        "could now fail, or one that failed could now pass: raise SUITE_VERSION in "
        "router_runtime/evidence/cases.py, which makes all evidence stale, and record it again "
        "(make verify-gpu). In either case put this line into PINNED here: "
        f'{SUITE_VERSION}: "{found}"'
    )


def test_what_the_pin_covers() -> None:
    reached = set(suite().reached("router_runtime.verification.examine"))
    assert "router_runtime.spec" in reached
    assert "router_runtime.verification.inputs" in reached
    assert "router_runtime.verification.judge" in reached
    assert not any(name.startswith("router_runtime.device") for name in reached)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "artifacts")
    return Path(shutil.copytree(RUNTIME, tmp_path / "router_runtime", ignore=ignored))


def test_comments_and_names_of_files_leave_the_version(copy: Path) -> None:
    room = copy / "verification"
    for path in (copy / "spec.py", *room.glob("*.py")):
        path.write_text(path.read_text().replace("\n\n\ndef ", "\n\n\n# Remark.\ndef "))
    (room / "judge.py").rename(room / "zz_verdict.py")
    for path in room.glob("*.py"):
        text = path.read_text().replace(
            "verification.judge import", "verification.zz_verdict import"
        )
        path.write_text(text)
    assert digest(copy) == digest()


@pytest.mark.parametrize("name", ["spec.py", "verification/inputs.py", "verification/judge.py"])
def test_a_number_changes_it(copy: Path, name: str) -> None:
    path = copy / name
    tree = ast.parse(path.read_text())
    number = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    )
    assert isinstance(number.value, int | float)
    number.value += 1
    path.write_text(ast.unparse(tree))
    assert digest(copy) != digest()
