"""What the builder knows about each of the two languages that kernels are written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from build_kernels.compile import cutedsl, nvrtc

Language = Literal["cuda", "cutedsl"]


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts of one language.

    Attributes:
        suffixes: Of its source files: the kernel's own first, then those that it includes.
        compiler: The module that compiles it, by its path in the package.
        recipe: The version of that module's way of compiling.
        flags: The compiler's options that are the same for every kernel.
        worker_per_target: Whether a worker process can compile for one target only.

    """

    suffixes: tuple[str, ...]
    compiler: str
    recipe: int
    flags: tuple[str, ...]
    worker_per_target: bool


LANGUAGES: Mapping[Language, Facts] = {
    "cuda": Facts(
        suffixes=(".cu", ".cuh"),
        compiler="compile/nvrtc.py",
        recipe=nvrtc.RECIPE_VERSION,
        flags=nvrtc.FLAGS,
        worker_per_target=False,
    ),
    "cutedsl": Facts(
        suffixes=(".py",),
        compiler="compile/cutedsl.py",
        recipe=cutedsl.RECIPE_VERSION,
        flags=cutedsl.FLAGS,
        worker_per_target=True,
    ),
}
