"""Divisions of the split-K form, on sm_90a."""

from __future__ import annotations

import pytest

from build_kernels.catalog.models import MODELS
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.tcgen05 import SplitKTcgen05Geometry

PRO = next(model for model in MODELS if model.name == "dsv4-pro")
CONSTANTS_OF_PRO = {**CONSTANTS, **PRO.constants(), "MAX_TOKENS": 128}


@pytest.mark.parametrize(
    ("groups", "cluster_k", "most"), [(3, 14, 96), (6, 7, 48)], ids=["two chunks", "four chunks"]
)
def test_all_hidden_states_of_a_slice_fit_at_once(groups: int, cluster_k: int, most: int) -> None:
    """A ring of them would be gone through by several warpgroups side by side, and one of them
    could take a stage's last phase for the one that it waits for."""
    division = {**CONSTANTS_OF_PRO, "GROUPS": groups, "CLUSTER_K": cluster_k}
    g = SplitKGeometry.of({**division, "TOKENS_TILE": most})
    assert g.hidden_stages == g.k_blocks
    assert g.threads == g.consumer_threads
    with pytest.raises(ValueError, match=f"all {g.k_blocks} stages of hidden states"):
        SplitKGeometry.of({**division, "TOKENS_TILE": most + 8})


@pytest.mark.parametrize(("tokens", "fits"), [(96, True), (160, False)])
def test_all_sums_of_a_tile_fit_at_once(tokens: int, fits: bool) -> None:
    """Only the tcgen05 variant stages its sums in parts."""
    flash = next(model for model in MODELS if model.name == "dsv4-flash")
    constants = {**CONSTANTS, **flash.constants(), "MAX_TOKENS": 256, "TOKENS_TILE": tokens}
    constants |= {"GROUPS": 1, "CLUSTER_K": 16}
    if fits:
        assert SplitKGeometry.of(constants).parts == 1
    else:
        with pytest.raises(ValueError, match="expected sums that fit"):
            SplitKGeometry.of(constants)
        assert SplitKTcgen05Geometry.of(constants).parts > 1
