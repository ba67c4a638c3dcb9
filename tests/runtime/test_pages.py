"""The commands of the runtime that pages state exist, with the options that they state."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_runtime.cli.main import main
from tests.pages import every_page, wrong_commands

pytestmark = pytest.mark.one_torch


@every_page
def test_commands_of_the_runtime_exist(page: Path) -> None:
    assert wrong_commands(page, "router-runtime", main) == []


def test_wrong_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `router-runtime doctor --json`, `router-runtime dokter`,\n"
        "```\nrouter-runtime verify --record --evidence DIR\nrouter-runtime verify --all\n```\n"
    )
    wrong = ["router-runtime verify --all", "router-runtime dokter"]
    assert wrong_commands(page, "router-runtime", main) == wrong
