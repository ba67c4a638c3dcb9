"""Numbers of the hardware and of the selection that several launch contracts state."""

from __future__ import annotations

#: Lanes of a warp.
WARP = 32

#: CTAs that a grid may have in its first dimension.
MAX_GRID_X = 2**31 - 1

#: The most experts that can be selected for a token: one per lane of a warp.
MAX_TOP_K = WARP
