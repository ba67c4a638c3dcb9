"""The digest of what emulates: the sources of the translation and of the model.

Two records of emulation with the same digest were made by the same translation and the same
functions. Comments, docstrings, layout and names of files do not count. The compilers are not part
of it: a record names their packages. Imports nothing that compiles: the runner on the GPU compares
the digest too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from build_kernels.errors import BuildError
from router_runtime.format.source_digest import RUNTIME, CudaSources, PythonSources

_BUILDER = Path(__file__).parents[1]
#: What the translation and the model use of the rest counts by its name alone.
_BOUNDARIES = (
    "router_runtime",
    *("build_kernels.catalog", "build_kernels.compile", "build_kernels.errors"),
)
#: From here everything is reached: the translation, the numbers shared with the model, and how
#: model and kernels are compiled.
_START = "build_kernels.emulation.assembly"


def model_sha256(builder: Path = _BUILDER) -> str:
    """Return the digest, of the sources in the folder ``builder`` of a checkout."""
    folder = builder / "emulation" / "model"
    python = PythonSources(
        {"build_kernels": builder, "router_runtime": RUNTIME}, boundaries=_BOUNDARIES
    )
    available = {path.name: path.read_text(encoding="ascii") for path in folder.glob("*.cuh")}
    try:
        parts = (
            python.digest(_START),
            CudaSources(available).digest((folder / "model.cu").read_text(encoding="ascii")),
        )
    except ValueError as error:
        raise BuildError(f"emulation: {error}") from error
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
