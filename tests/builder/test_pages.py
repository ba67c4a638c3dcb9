"""What the pages of the repository name exists: files, commands, options, make targets, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from build_kernels import cli as build_kernels
from router_runtime.cli import main as router_runtime

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for pattern in ("*.md", "router_runtime/*.md", "build_kernels/kernels/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
#: Folders that a path in a page starts with.
FOLDERS = ("artifacts/", "build_kernels/", "router_runtime/", "tests/", ".ci/", ".github/")
#: Made by a build, or placeholders.
NOT_TRACKED = re.compile(r"[<*]|NAME|artifacts/(manifest\.json|evidence/)")
COMMANDS = {"build-kernels": build_kernels.main, "router-runtime": router_runtime.main}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code(page: Path) -> Iterator[str]:
    """The inline code of a page (what it names) and the lines of its code blocks."""
    prose = []
    for index, part in enumerate(re.split(r"^```.*$", page.read_text(), flags=re.MULTILINE)):
        if index % 2:
            yield from part.splitlines()
        else:
            prose.append(part)
    yield from (" ".join(found.split()) for found in re.findall(r"`([^`]+)`", "".join(prose)))


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "GLOSSARY.md", "PROMISES.md"} <= {p.name for p in PAGES}


@every_page
def test_files_exist(page: Path) -> None:
    named = {word.rstrip(".,:;)") for text in code(page) for word in text.split()}
    paths = {
        name.partition("::")[0]
        for name in named
        if name.startswith(FOLDERS) and not NOT_TRACKED.search(name)
    }
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        found for text in code(page) for found in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", text)
    }
    assert named <= targets


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in code(page):
        for found in re.finditer(r"(build-kernels|router-runtime) ([a-z-]+)([^#|(,]*)", text):
            name, command, rest = found.groups()
            group = COMMANDS[name]
            assert command in group.commands, text
            options = {
                option
                for parameter in group.commands[command].params
                if isinstance(parameter, click.Option)
                for option in parameter.opts
            }
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options, text
