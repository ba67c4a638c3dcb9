"""Which weights each warp of the decode form reads: all of them once, and nothing else.

``load_weight`` runs as the Python that it is, with addresses as plain numbers.
"""

from __future__ import annotations

import types
from typing import Any

import pytest

from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.geometry import search
from build_kernels.kernels.dense.geometry.common import LANES
from build_kernels.kernels.dense.geometry.decode import MMA_SYNC_M, DecodeGeometry
from build_kernels.kernels.dense.mma import mma_sync
from build_kernels.kernels.dense.mma.mma_sync import DecodeMmaSync

FRAGMENT = 16

#: (hidden, experts, k).
SHAPES = [(4096, 256, 6), (5120, 128, 3), (2688, 160, 6), (7168, 896, 16)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of all loads since the test began."""
    found: list[int] = []
    replaced: dict[str, Any] = {
        "memory": types.SimpleNamespace(load_weight_v4=found.append),
        "arith": types.SimpleNamespace(min_s32=min),
        "Int32": int,
        "Int64": int,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(mma_sync, name, value)
    return found


def first_lanes(g: DecodeGeometry) -> int:
    """Make lane 0 of every warp read its weights. Returns how many warps have no slab."""
    lane: Any = 0
    image: Any = types.SimpleNamespace(toint=lambda: 0)
    spare = 0
    per_slab = g.m_tiles // g.warp_m
    for k_rank in range(g.cluster_k):
        for warp in range(g.warps):
            slab: Any = k_rank * g.cta_slabs + warp // per_slab
            spare += slab >= g.slabs
            for e_part in range(g.groups * g.cluster_e):
                m_tile: Any = e_part * g.cta_experts // MMA_SYNC_M + warp % per_slab * g.warp_m
                DecodeMmaSync(g).load_weight(image, m_tile, slab, lane)
    return spare


@pytest.mark.parametrize(("hidden", "experts", "top_k"), SHAPES)
def test_reads_lie_inside_the_packed_weights(
    reads: list[int], hidden: int, experts: int, top_k: int
) -> None:
    found = search.divisions("decode", "mma_sync", (hidden, experts, top_k, 256), 64)
    uneven = 0
    for g in found:
        assert isinstance(g, DecodeGeometry)
        reads.clear()
        uneven += first_lanes(g) > 0
        end = g.padded_experts * hidden * 2
        assert min(reads) >= 0
        assert max(reads) + LANES * FRAGMENT <= end, search.stated("decode", "mma_sync", g)
    assert found
    assert uneven


def test_every_weight_is_read_once_by_the_warps_that_have_a_slab(reads: list[int]) -> None:
    shape = {"HIDDEN": 5120, "EXPERTS": 128, "TOP_K": 3, "MAX_TOKENS": 64}
    division = {"GROUPS": 1, "CLUSTER_E": 2, "CLUSTER_K": 7, "WARP_M": 2, "TOKENS_TILE": 13}
    constants = {**CONSTANTS, **shape, **division, "FORM": "decode", "MMA": "mma_sync"}
    g = DecodeGeometry.of(constants)
    first_lanes(g)
    (recipe,) = contract(constants).repacks
    fragments = recipe.rows * 5120 * 2 // (LANES * FRAGMENT)
    # The spare warps are the last ones: one for each e rank and pair of m-tiles.
    read = [address // (LANES * FRAGMENT) for address in reads]
    assert sorted(read[:fragments]) == list(range(fragments))
    per_warp = g.warp_m * g.slab_steps
    assert len(read) == fragments + g.groups * g.cluster_e * g.m_tiles // g.warp_m * per_warp
    # They read the last slab of 20 once more.
    assert all(fragment % (5120 // 16) >= 19 * 16 for fragment in read[fragments:])
