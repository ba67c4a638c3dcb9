"""How the tile form divides shared memory among rings, parked sums and, later, logits."""

from __future__ import annotations

import pytest

from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import search
from build_kernels.kernels.dense.geometry.common import MAX_SHARED_BYTES
from build_kernels.kernels.dense.geometry.tile import (
    MIN_STAGES,
    MOST_KEPT,
    TileGeometry,
    TileMmaSyncGeometry,
)
from build_kernels.plan import plan

K_CHUNK = int(CONSTANTS["K_CHUNK"])

JOBS = {
    f"{job.model}-{job.variant}": job.constants
    for job in plan(targets=["sm_90a"])
    if job.constants.get("FORM") == "tile"
}


def check(g: TileGeometry) -> None:
    """Raise AssertionError unless everything has a place of its own."""
    assert g.hidden_stages >= max(MIN_STAGES, g.chunk_k_blocks if g.passes > 1 else 0)
    assert g.weight_stages >= MIN_STAGES
    assert g.weight_offset == g.hidden_stages * g.hidden_stage_bytes
    assert g.parked_offset == g.weight_offset + g.weight_stages * g.weight_stage_bytes
    assert g.bias_offset == g.parked_offset + g.parked_bytes
    assert g.shared_bytes <= MAX_SHARED_BYTES
    assert g.parked_sums % 4 == 0
    kept = g.sums - g.parked_sums
    assert g.sums // g.passes + g.sums + kept <= (g.most_sums if g.parked_sums == 0 else 208)
    assert g.parked_sums == 0 or 0 <= kept <= MOST_KEPT
    # Logits, masks and the biases of image tokens take the place of the rings and the parked sums.
    assert g.image_bias_offset + g.bias_bytes <= g.bias_offset


@pytest.mark.parametrize("name", JOBS)
def test_entries_of_the_catalog(name: str) -> None:
    constants = JOBS[name]
    kind = TileMmaSyncGeometry if constants["MMA"] == "mma_sync" else TileGeometry
    check(kind.of(constants))


@pytest.mark.parametrize("mma", ["wgmma", "mma_sync"])
@pytest.mark.parametrize("experts", [8, 24, 96, 128, 130, 192, 256, 384, 512, 896, 1024])
def test_a_model_that_the_catalog_does_not_tune(experts: int, mma: str) -> None:
    found = search.divisions("tile", mma, (4160, experts, 8, K_CHUNK), 1 << 20)
    assert found
    for g in found:
        assert isinstance(g, TileGeometry)
        check(g)
