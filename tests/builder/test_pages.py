"""What the pages of the repository name exists: files, commands, options, make targets, links."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
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


# --- environment variables -----------------------------------------------------------------------

#: Set by the builder for its own worker processes.
INTERNAL = {"CUTE_DSL_ARCH"}
#: Set by make itself.
OF_MAKE = {"CURDIR", "MAKE", "MAKECMDGOALS", "MAKEFILE_LIST"}


def variables_read(trees: Iterable[ast.Module]) -> set[str]:
    """The names that modules look up in the environment, as text or as a constant of a module."""
    trees = list(trees)
    constants: dict[str, str] = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for name in node.targets:
                    if isinstance(name, ast.Name):
                        constants[name.id] = str(node.value.value)
    return {
        _text(key, constants) for tree in trees for node in ast.walk(tree) for key in _keys(node)
    }


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    """The expression of the name that a node looks up in the environment, if it does."""
    if isinstance(node, ast.Subscript) and _is_environment(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and any(map(_is_environment, node.comparators)):
        yield node.left
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        called, owner = node.func.attr, node.func.value
        if called == "getenv" or (
            called in ("get", "pop", "setdefault") and _is_environment(owner)
        ):
            yield node.args[0]


def _is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _text(key: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(key, ast.Constant):
        return str(key.value)
    name = key.attr if isinstance(key, ast.Attribute) else getattr(key, "id", "")
    return constants[name]  # a name that is computed cannot be listed in a page


def variables_of_make(text: str) -> set[str]:
    """The variables that a Makefile uses and takes from the environment."""
    defined = set(re.findall(r"^([A-Z_]+) =", text, re.MULTILINE))
    return set(re.findall(r"\$\(([A-Z_]+)\)", text)) - defined - OF_MAKE


def test_the_readme_names_every_environment_variable_in_one_place() -> None:
    trees = [
        ast.parse(path.read_text())
        for package in ("router_runtime", "build_kernels")
        for path in (ROOT / package).rglob("*.py")
    ]
    section = (ROOT / "README.md").read_text().partition("\n## Environment variables\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    read = variables_read(trees) - INTERNAL
    assert {"ROUTER_RUNTIME_ARTIFACTS", "ROUTER_RUNTIME_EVIDENCE"} < read
    assert named == read | variables_of_make((ROOT / "Makefile").read_text())


def test_variables_are_found() -> None:
    """However they are read."""
    module = """
import os
NAME = "A"
os.environ.get(NAME)
os.environ["B"]
os.getenv("C")
"D" in os.environ
os.environ.pop(module.NAME, None)
{**os.environ}
"""
    assert variables_read([ast.parse(module)]) == {"A", "B", "C", "D"}
    assert variables_of_make("X = 1\nall:\n\t$(X) $(Y) $(MAKE)\n") == {"Y"}


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
