"""The digests of the real kernels: what changes them, and that they miss no file."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_kernels.catalog.kernels import KERNELS, Kernel
from build_kernels.compile.languages import LANGUAGES, Language
from build_kernels.compile.sources import PACKAGE, headers
from build_kernels.digests import Sources
from router_runtime.format.source_digest import CudaSources, PythonSources

ROOT = PACKAGE.parent
LANGUAGE_OF = {kernel.name: kernel.language for kernel in KERNELS}
Identities = dict[str, tuple[str, str]]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the builder to change."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "build_kernels", ignore=ignored))


def identities(package: Path) -> dict[str, str]:
    """Kernel -> its identity."""
    sources = Sources(package)
    return {name: sources.identity(name, language) for name, language in LANGUAGE_OF.items()}


def digests(package: Path) -> Identities:
    """Kernel -> its identity, and the digest of its exact inputs."""
    sources = Sources(package)
    return {
        name: (sources.identity(name, language), sources.exact(name, language))
        for name, language in LANGUAGE_OF.items()
    }


def reached(package: Path) -> dict[str, set[Path]]:
    """Kernel -> every file that its identity covers."""
    python = PythonSources({"build_kernels": package, "router_runtime": ROOT}, ("router_runtime",))
    found = {}
    for name, language in LANGUAGE_OF.items():
        files = set(python.reached(f"build_kernels.kernels.{name}.contract").values())
        if language == "cuda":
            folder = package / "kernels"
            source = folder / name / f"{name}.cu"
            includes = CudaSources(headers(name, folder)).reached(source.read_text())
            files |= {source}
            files |= {
                folder / path if path.startswith("common/") else folder / name / path
                for path in includes
            }
        else:
            files |= set(python.reached(f"build_kernels.kernels.{name}.{name}").values())
        found[name] = files
    return found


def affected(before: Identities, after: Identities, part: int) -> set[str]:
    return {name for name in before if before[name][part] != after[name][part]}


def test_comments_and_docstrings_do_not_count(package: Path) -> None:
    before = digests(package)
    for path in sorted((package / "kernels").rglob("*.*")):
        if path.suffix == ".py":
            text = re.sub(r"(?m)$(?=\n\n\nclass |\n\n\ndef )", "  # Remark.", path.read_text())
            path.write_text(text + '\n\n"""A text."""\n')
        elif path.suffix in (".cu", ".cuh"):
            path.write_text("// Remark.\n" + path.read_text().replace(";\n", "; /* here */\n"))
    after = digests(package)
    assert affected(before, after, 0) == set()
    assert affected(before, after, 1) == set(LANGUAGE_OF)


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def test_docstrings_and_layout_do_not_count(package: Path) -> None:
    before = digests(package)
    for path in (package / "kernels").rglob("*.py"):
        path.write_text(without_docstrings(path.read_text()))
    assert affected(before, digests(package), 0) == set()


def with_other_literal(path: Path) -> str | None:
    """The file's text with its last number changed, None if it has none."""
    text = path.read_text()
    if path.suffix != ".py":
        numbers = [
            found
            for found in re.finditer(r"(?m)(?<![\w.%])(\d+)(?=[;)\]])", text)
            if "//" not in text[text.rfind("\n", 0, found.start()) : found.start()]
        ]
        if not numbers:
            return None
        last = numbers[-1]
        return text[: last.start()] + str(int(last[1]) + 1) + text[last.end() :]
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            row, start, end = node.lineno - 1, node.col_offset, node.end_col_offset
            line = lines[row].encode()
            changed = line[:start] + str(node.value + 1).encode() + line[end:]
            return "".join([*lines[:row], changed.decode(), *lines[row + 1 :]])
    return None


def test_a_number_in_any_file_counts_for_the_kernels_that_reach_it(package: Path) -> None:
    before = identities(package)
    of_kernel = reached(package)
    changed = 0
    for path in sorted(set.union(*of_kernel.values()))[::3]:
        text = path.read_text()
        other = with_other_literal(path)
        if other is None:
            continue
        path.write_text(other)
        expected = {name for name, files in of_kernel.items() if path in files}
        after = identities(package)
        assert {name for name in before if before[name] != after[name]} == expected, path
        path.write_text(text)
        changed += 1
    assert changed > 8


def test_an_operator_counts(package: Path) -> None:
    before = digests(package)
    scoring = package / "kernels" / "common" / "scoring.cuh"
    text = scoring.read_text()
    found = re.search(r"(?<=, )-(?=\w+\);)", text)
    assert found is not None
    scoring.write_text(text[: found.start()] + text[found.end() :])
    assert affected(before, digests(package), 0) == {"activation_topk", "hash_gate"}


def rename(package: Path, path: Path) -> None:
    """Give a file another name and adjust every import or include of it."""
    new = path.with_name(f"zz_{path.name}")
    path.rename(new)
    for other in (package / "kernels").rglob("*.*"):
        if path.suffix == ".py" and other.suffix == ".py":
            importing(package, other, path.relative_to(package).with_suffix("").parts, new.stem)
        elif other.suffix in (".cu", ".cuh"):
            text = other.read_text()
            for place in (path.name, f"common/{path.name}"):
                text = text.replace(f'"{place}"', f'"{place.replace(path.name, new.name)}"')
            other.write_text(text)


def importing(package: Path, other: Path, parts: tuple[str, ...], new: str) -> None:
    """Let a module import another under the name ``new``."""
    module = ".".join(("build_kernels", *parts))
    folder, _, stem = module.rpartition(".")
    text = other.read_text()
    if stem not in text:
        return
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            node.module = f"{folder}.{new}"
        elif isinstance(node, ast.ImportFrom) and node.module == folder:
            for alias in node.names:
                if alias.name == stem:
                    alias.name, alias.asname = new, alias.asname or stem
    other.write_text(ast.unparse(tree) + "\n")


def test_names_of_files_do_not_count(package: Path) -> None:
    """Every file except those in a kernel's own folder."""
    before = digests(package)
    entries = {(name, name) for name in LANGUAGE_OF} | {(name, "contract") for name in LANGUAGE_OF}
    renamed = 0
    for path in sorted(set.union(*reached(package).values())):
        if (path.parent.name, path.stem) in entries or path.name == "__init__.py":
            continue
        rename(package, path)
        renamed += 1
    after = digests(package)
    assert renamed > 20
    assert affected(before, after, 0) == set()
    assert affected(before, after, 1) == set(LANGUAGE_OF)


LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted(name for name in sys.modules if name.startswith("build_kernels.kernels.")))
"""


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_module_that_is_imported_is_covered(kernel: Kernel) -> None:
    names = ["contract"] + ([kernel.name] if kernel.language == "cutedsl" else [])
    sources = PythonSources(
        {"build_kernels": PACKAGE, "router_runtime": ROOT / "router_runtime"}, ("router_runtime",)
    )
    for name in names:
        module = f"build_kernels.kernels.{kernel.name}.{name}"
        loaded = subprocess.run(
            [sys.executable, "-c", LOADED, module],
            cwd=ROOT,
            env={**os.environ, "CUTE_DSL_ARCH": "sm_90a"},
            capture_output=True,
            text=True,
            check=True,
        )
        covered = sources.reached(module)
        for found in loaded.stdout.split():
            if found not in covered:
                # A package on the way to a module: nothing is in it but a docstring.
                file = PACKAGE.parent.joinpath(*found.split("."), "__init__.py")
                code = ast.parse(without_docstrings(file.read_text()))
                assert ast.unparse(code) in ("", "pass"), found


#: Language -> recipe version -> digest of the code of its compiler module. A version keeps its
#: line when the code changes and the cubins do not.
COMPILERS = {
    "cuda": {1: "e6a05adf3a075f5df2c0eb877b22ae0317dee095f4ac3a1b42df4b9b096e7b32"},
    "cutedsl": {1: "55ff94a890a1fcd3d99605956c54d4c5f1f4472622023554c52a77c06b87b1ad"},
}


@pytest.mark.parametrize("language", COMPILERS)
def test_the_recipes_version_is_of_this_code(language: Language) -> None:
    module = f"build_kernels.{LANGUAGES[language].compiler.removesuffix('.py').replace('/', '.')}"
    sources = PythonSources(
        {"build_kernels": PACKAGE, "router_runtime": ROOT / "router_runtime"},
        boundaries=("build_kernels.errors", "router_runtime"),
    )
    found, version = sources.digest(module), LANGUAGES[language].recipe
    assert COMPILERS[language].get(version) == found, (
        f"the code of {module} has changed. If the same source, constants and flags now give "
        "another cubin, raise RECIPE_VERSION there. In either case put this line into COMPILERS "
        f'here: {version}: "{found}"'
    )
