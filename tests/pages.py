"""The pages of the repository, what they name as code, and what their commands have to be.

Each of the two commands can be imported in one environment only, so tests of both use this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for pattern in ("*.md", "router_runtime/*.md", "build_kernels/kernels/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT).parent / page.stem)
)


def code(page: Path) -> Iterator[str]:
    """The inline code of a page (what it names) and the lines of its code blocks."""
    prose = []
    for index, part in enumerate(re.split(r"^```.*$", page.read_text(), flags=re.MULTILINE)):
        if index % 2:
            yield from part.splitlines()
        else:
            prose.append(part)
    yield from (" ".join(found.split()) for found in re.findall(r"`([^`]+)`", "".join(prose)))


def wrong_commands(page: Path, name: str, group: click.Group) -> list[str]:
    """What a page says of the command ``name`` that ``group`` lacks: commands and options."""
    wrong = []
    module = f"python -m {name.replace('-', '_')}"
    for text in code(page):
        typed = text.replace(module, name)
        for command, rest in re.findall(rf"\b{name} ([a-z-]+)([^#|(,]*)", typed):
            options = {
                option
                for parameter in getattr(group.commands.get(command), "params", ())
                if isinstance(parameter, click.Option)
                for option in parameter.opts
            }
            named = set(re.findall(r"(?<!\S)--[a-z-]+", rest))
            if command not in group.commands or not named <= options:
                wrong.append(text.strip())
    return wrong
