"""Which geometry each pair of form and MMA has. The device code has the same pairs (program.py)."""

from __future__ import annotations

from collections.abc import Mapping

from build_kernels.kernels.dense.geometry.common import Geometry
from build_kernels.kernels.dense.geometry.decode import DecodeGeometry
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.tcgen05 import SwapAbTcgen05Geometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry, TileMmaSyncGeometry
from router_runtime.format.contract import Constants

GEOMETRIES: Mapping[tuple[str, str], type[Geometry]] = {
    ("decode", "mma_sync"): DecodeGeometry,
    ("split_k", "tcgen05"): SplitKGeometry,
    ("swap_ab", "wgmma"): SwapAbGeometry,
    ("swap_ab", "mma_sync"): SwapAbGeometry,
    ("swap_ab", "tcgen05"): SwapAbTcgen05Geometry,
    ("tile", "wgmma"): TileGeometry,
    ("tile", "mma_sync"): TileMmaSyncGeometry,
}


def form_and_mma(constants: Constants) -> tuple[str, str]:
    """Return the constants FORM and MMA of an entry. Raises ValueError for a pair without code."""
    found = (str(constants.get("FORM")), str(constants.get("MMA")))
    if found not in GEOMETRIES:
        pairs = ", ".join(f"{form} with {mma}" for form, mma in GEOMETRIES)
        raise ValueError(
            f"expected FORM and MMA to be one of {pairs}, found {found[0]} with {found[1]}"
        )
    return found


def geometry_of(constants: Constants) -> Geometry:
    """Return the geometry of an entry. Raises ValueError if it cannot be built."""
    return GEOMETRIES[form_and_mma(constants)].of(constants)
