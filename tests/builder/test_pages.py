"""What the pages of the repository name exists: files, commands, options, make targets, links."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from build_kernels.cli import main
from tests.pages import PAGES, ROOT, code, every_page, wrong_commands

#: Folders that a path in a page starts with.
FOLDERS = ("artifacts/", "build_kernels/", "router_runtime/", "tests/", ".ci/", ".github/")
#: Made by a build, or placeholders.
NOT_TRACKED = re.compile(r"[<*]|NAME|artifacts/(manifest\.json|evidence/)")


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
def test_commands_of_the_builder_exist(page: Path) -> None:
    assert wrong_commands(page, "build-kernels", main) == []


# --- docstrings and comments ---------------------------------------------------------------------

SOURCES = [
    path
    for folder in ("build_kernels", "router_runtime", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cu", ".cuh", ".toml", ".in") and path != Path(__file__)
] + [ROOT / "Makefile", ROOT / "pyproject.toml", *sorted((ROOT / ".github").rglob("*.yml"))]


def prose(path: Path) -> str:
    """Docstrings and comments of a file, or all of it where it is not Python."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(found)


def test_nothing_refers_to_a_document_outside_the_repository() -> None:
    outside = re.compile(r"\bsection \d|§|\bDESIGN\b|\bthe design\b|\bissue \d")
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in [*SOURCES, *PAGES]
        for match in outside.finditer(prose(path))
    }
    assert found == set()


def test_files_that_comments_name_exist() -> None:
    names = {path.name for path in [*SOURCES, *PAGES]}
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in re.findall(r"(?<![\w.*<>{-])[A-Za-z_]\w*\.(?:py|cuh?|toml|md)\b", prose(path))
        if name not in names and not name.startswith("NAME.")
    }
    assert found == set()


@pytest.mark.parametrize("package", ["build_kernels", "router_runtime"])
def test_contributing_lists_every_room_once(package: str) -> None:
    parts = (ROOT / "CONTRIBUTING.md").read_text().split("\n\n")
    (table,) = (part for part in parts if part.startswith(f"| `{package}/` | "))
    listed = re.findall(r"`(\w+)/`", "".join(re.findall(r"^\|[^|]*\|", table, re.MULTILINE)[2:]))
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert sorted(listed) == sorted(rooms)
