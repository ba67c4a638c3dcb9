"""The files that are marked one_torch, and so not run with the oldest torch, use neither torch nor
a driver.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_torch

MARK = "pytestmark = pytest.mark.one_torch"
FILES = [
    path for path in Path(__file__).parent.glob("test_*.py") if MARK in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_marked_file_uses_neither_torch_nor_a_driver(path: Path) -> None:
    used = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            used |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.arg):
            used.add(node.arg)
    assert not used & {"torch", "cuda", "fake", "gpu"}
