"""Where the builder and the kernels' sources are."""

from __future__ import annotations

from pathlib import Path

from build_kernels.compile.languages import LANGUAGES

PACKAGE = Path(__file__).parents[1]
KERNELS = PACKAGE / "kernels"


def headers(kernel: str, kernels: Path = KERNELS) -> dict[str, str]:
    """Return the text of each header that a CUDA kernel can include, by what its ``#include`` says:
    ``<name>.cuh`` of its own folder, ``common/<name>.cuh`` of the shared one.
    """
    _, suffix = LANGUAGES["cuda"].suffixes
    found = {}
    for prefix, folder in (("", kernels / kernel), ("common/", kernels / "common")):
        for path in sorted(folder.glob(f"*{suffix}")):
            found[prefix + path.name] = path.read_text(encoding="utf-8")
    return found
