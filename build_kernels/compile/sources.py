"""Where the kernels' sources lie, and which files each language reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from build_kernels.catalog.kernels import Language

PACKAGE = Path(__file__).parents[1]
KERNELS = PACKAGE / "kernels"

#: The suffixes of a language's files: the kernel's own first, then those that it includes.
SUFFIXES: Mapping[Language, tuple[str, ...]] = {"cuda": (".cu", ".cuh"), "cutedsl": (".py",)}
