"""Where the builder and the kernels' sources are."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
KERNELS = PACKAGE / "kernels"
