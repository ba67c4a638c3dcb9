"""What may import what in ``router_runtime`` and ``build_kernels``, read from their syntax trees.

The rules: a room of the runtime imports only rooms below it; the builder imports only the parts of
the runtime that need no torch; there are no import cycles; our own modules are
imported at the top of a file; an underscore name is used in its own module only.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("router_runtime", "build_kernels")

#: The rooms of the runtime from the highest to the lowest: each imports only those after it.
ROOMS = (
    *("", "__main__", "cli", "integrations", "ops", "verification", "routing", "device"),
    *("evidence", "trust", "checkpoint", "format", "spec"),
    *("arguments", "errors", "version"),
)

#: What the builder imports of the runtime: none of it needs torch.
SHARED = (
    *("router_runtime.format", "router_runtime.evidence", "router_runtime.trust.dsse"),
    *("router_runtime.errors", "router_runtime.version"),
)


@dataclass(frozen=True)
class Import:
    """One import of one of our modules. ``names`` are what is taken out of the module."""

    module: str
    names: tuple[str, ...]
    line: int
    in_function: bool


@dataclass(frozen=True)
class Source:
    """A module: its dotted name and its syntax tree."""

    name: str
    tree: ast.Module

    def imports(self, modules: frozenset[str]) -> list[Import]:
        """Every import of our modules in this one, ``from package import module`` included."""
        return list(_imports(self.tree, modules, in_function=False))


def _imports(node: ast.AST, modules: frozenset[str], in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                if alias.name in modules:
                    yield Import(alias.name, (), child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: expected an absolute import"
            names: list[str] = []
            for alias in child.names:
                if f"{child.module}.{alias.name}" in modules:
                    yield Import(f"{child.module}.{alias.name}", (), child.lineno, in_function)
                else:
                    names.append(alias.name)
            if names and child.module in modules:
                yield Import(child.module, tuple(names), child.lineno, in_function)
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _imports(child, modules, inside)


def parse(name: str, text: str) -> Source:
    return Source(name, ast.parse(text))


@functools.cache
def sources() -> tuple[Source, ...]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(parse(".".join(parts), path.read_text()))
    return tuple(found)


def names_of(found: tuple[Source, ...]) -> frozenset[str]:
    return frozenset(source.name for source in found)


def room(module: str) -> str:
    """The room of a module of the runtime: the second part of its name."""
    return [*module.split("."), ""][1]


def upward_imports(found: tuple[Source, ...]) -> list[str]:
    """Imports from a room of the runtime into one above it, or into the builder."""
    wrong = []
    for source in found:
        if source.name.split(".")[0] != "router_runtime":
            continue
        for each in source.imports(names_of(found)):
            here, there = room(source.name), room(each.module)
            if not each.module.startswith("router_runtime") or (
                ROOMS.index(there) < ROOMS.index(here)
            ):
                wrong.append(f"{source.name}:{each.line} imports {each.module}")
    return wrong


def builder_imports(found: tuple[Source, ...]) -> list[str]:
    """Imports of the builder that reach into a part of the runtime that is not shared."""
    return [
        f"{source.name}:{each.line} imports {each.module}"
        for source in found
        if source.name.split(".")[0] == "build_kernels"
        for each in source.imports(names_of(found))
        if each.module.startswith("router_runtime")
        and not any(f"{each.module}.".startswith(f"{shared}.") for shared in SHARED)
    ]


def late_imports(found: tuple[Source, ...]) -> list[str]:
    """Imports of our own modules inside a function."""
    return [
        f"{source.name}:{each.line} imports {each.module}"
        for source in found
        for each in source.imports(names_of(found))
        if each.in_function
    ]


def cycle(found: tuple[Source, ...]) -> list[str]:
    """The modules of one import cycle, or nothing."""
    graph = {
        source.name: {each.module for each in source.imports(names_of(found))} for source in found
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _members(tree: ast.Module) -> set[str]:
    """Every underscore name that a module gives to an object: attributes, methods, slots."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for child in ast.walk(node):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    own.add(child.name)
                elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                    own.add(child.value)  # a name in ``__slots__``
                elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    own.add(child.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    return {name for name in own if _private(name)}


def private_uses(found: tuple[Source, ...]) -> list[str]:
    """Uses of underscore names of another one of our modules: imported from it, read from the
    module, or read from an object whose attribute only another module defines.
    """
    members = {source.name: _members(source.tree) for source in found}
    wrong = []
    for source in found:
        imported: set[str] = set()
        for each in source.imports(names_of(found)):
            if not each.names:
                imported.add(each.module.rpartition(".")[2])
            for name in filter(_private, (*each.names, each.module.rpartition(".")[2])):
                wrong.append(f"{source.name}:{each.line} imports {name} of {each.module}")
        foreign = set().union(*members.values()) - members[source.name]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and _private(node.attr):
                of_module = isinstance(node.value, ast.Name) and node.value.id in imported
                if of_module or node.attr in foreign:
                    wrong.append(f"{source.name}:{node.lineno} uses .{node.attr}")
    return wrong


def test_a_room_imports_only_rooms_below_it() -> None:
    assert upward_imports(sources()) == []


def test_every_room_has_its_place() -> None:
    runtime = [source.name for source in sources() if source.name.startswith("router_runtime")]
    assert {room(name) for name in runtime} == set(ROOMS)


def test_the_builder_imports_only_what_needs_no_torch() -> None:
    assert builder_imports(sources()) == []


def test_our_modules_are_imported_at_the_top() -> None:
    assert late_imports(sources()) == []


def test_no_compiler_leaves_files_at_the_top() -> None:
    """A compiler that runs there leaves its PTX and cubins, which would then be committed."""
    assert [path.name for path in ROOT.iterdir() if path.suffix in {".ptx", ".cubin"}] == []


def test_no_circle_of_imports() -> None:
    assert cycle(sources()) == []


def test_underscore_names_stay_in_their_module() -> None:
    assert private_uses(sources()) == []


#: A small tree that breaks each rule once.
BROKEN = (
    parse("router_runtime", ""),
    parse("router_runtime.format", ""),
    parse("router_runtime.format.files", "from router_runtime.device import driver\n"),
    parse("router_runtime.device", ""),
    parse(
        "router_runtime.device.driver",
        "def check():\n    from router_runtime.format import files\n    return files._limit\n",
    ),
    parse("router_runtime.errors", "_limit = 1\n"),
    parse("build_kernels", "from router_runtime.device.driver import check\n"),
    parse("build_kernels.plan", "from router_runtime.errors import _limit\n"),
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            upward_imports,
            ["router_runtime.format.files:1 imports router_runtime.device.driver"],
        ),
        (builder_imports, ["build_kernels:1 imports router_runtime.device.driver"]),
        (late_imports, ["router_runtime.device.driver:2 imports router_runtime.format.files"]),
        (
            private_uses,
            [
                "router_runtime.device.driver:3 uses ._limit",
                "build_kernels.plan:1 imports _limit of router_runtime.errors",
            ],
        ),
    ],
)
def test_a_broken_rule_is_found(rule: object, expected: list[str]) -> None:
    assert callable(rule)
    assert rule(BROKEN) == expected


def test_a_circle_is_found() -> None:
    assert set(cycle(BROKEN)) == {"router_runtime.format.files", "router_runtime.device.driver"}
