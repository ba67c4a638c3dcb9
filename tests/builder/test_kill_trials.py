"""A few trials of ``kill_trials``; before a release, run it with hundreds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.builder import kill_trials
from tests.builder.conftest import Project


def test_killed_builds() -> None:
    outcomes = kill_trials.builds(8, random.Random(5))
    assert sum(outcomes.values()) == 8
    assert sum(number for name, number in outcomes.items() if name.startswith("killed")) >= 2


def test_killed_releases() -> None:
    outcomes = kill_trials.releases(6, random.Random(5))
    assert sum(outcomes.values()) == 6
    assert sum(number for name, number in outcomes.items() if name.startswith("killed")) >= 2


def test_the_trials_notice_a_mixed_folder(project: Project, tmp_path: Path) -> None:
    assert kill_trials.state(project.artifacts)
    assert kill_trials.state(tmp_path) is None
    cubin = next(project.artifacts.glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="expected"):
        kill_trials.state(project.artifacts)
    cubin.unlink()
    with pytest.raises(FileNotFoundError):
        kill_trials.state(project.artifacts)
