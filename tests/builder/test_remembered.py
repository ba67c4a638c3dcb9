"""The cache of compiler results that small test projects share (remembered.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builder.conftest import Project
from tests.builder.remembered import REMEMBERED

SCALE = ("--kernel", "scale", "--target", "sm_90a", "--out")


def _cubin(folder: Path) -> bytes:
    (path,) = folder.glob("*.cubin")
    return path.read_bytes()


def test_an_answer_belongs_to_its_request_and_sources(
    fresh: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    monkeypatch.setenv(REMEMBERED, str(answers))
    fresh.build(*SCALE, "one")
    cubin = _cubin(fresh.root / "one")
    (answer,) = (path for path in answers.iterdir() if path.read_bytes() == cubin)
    answer.write_bytes(b"another answer")
    assert "found b'anothe'" in fresh.run("build", *SCALE, "two").stdout
    # Another target, and the same request where nothing is remembered.
    fresh.build("--kernel", "scale", "--target", "sm_100a", "--out", "three")
    monkeypatch.setenv(REMEMBERED, "")
    fresh.build(*SCALE, "two")
    assert _cubin(fresh.root / "two") == cubin
    monkeypatch.setenv(REMEMBERED, str(answers))
    source = fresh.kernel_file("common/factor.cuh")
    text = source.read_text()
    source.write_text("this is no C++\n")
    for _ in range(2):
        assert "factor.cuh:1: error: " in fresh.run("build", *SCALE, "four").stdout
    source.write_text(text + "// Another byte.\n")
    fresh.build(*SCALE, "four")
    assert _cubin(fresh.root / "four") == cubin
