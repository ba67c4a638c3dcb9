"""Divisions of the split-K form, on sm_90a."""

from __future__ import annotations

import pytest

from build_kernels.catalog.models import MODELS
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry

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
