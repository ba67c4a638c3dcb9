"""GPU tests start processes whose code is a string in the test, which no linter checks. Here each
name that such code imports from the runtime or from tests/, and each attribute of one that it
reads, is looked up.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_torch

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"


#: The packages whose names are looked up.
OURS = ("router_runtime", "tests")


def programs(path: Path) -> Iterator[ast.AST]:
    """The syntax-tree nodes of each string in a test file that is Python code of several lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            try:
                yield from ast.walk(ast.parse(node.value))
            except SyntaxError:
                continue


def imported(nodes: list[ast.AST]) -> dict[str, object]:
    """Name in the code -> the object that is imported. Raises ImportError if there is none."""
    found: dict[str, object] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith(OURS) and name.asname:
                    found[name.asname] = importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            package = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(package, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                found[name.asname or name.name] = getattr(package, name.name)
    return found


CODE = {
    path.name: nodes
    for path in sorted(GPU_TESTS.glob("test_*.py"))
    if imported(nodes := list(programs(path)))
}


def test_there_is_such_code() -> None:
    assert "test_process_gpu.py" in CODE


@pytest.mark.parametrize("name", CODE)
def test_every_name_exists(name: str) -> None:
    known = imported(CODE[name])
    used = [
        (node.value.id, node.attr)
        for node in CODE[name]
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in known
    ]
    assert used
    missing = [f"{owner}.{attr}" for owner, attr in used if not hasattr(known[owner], attr)]
    assert not missing
