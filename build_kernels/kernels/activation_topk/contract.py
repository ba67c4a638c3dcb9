"""Launch contract of activation_topk: experts and weights from logits, one warp per token."""

from __future__ import annotations

from build_kernels.kernels.common.limits import MAX_GRID_X, MAX_TOP_K, WARP
from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``TOKENS_PER_BLOCK``, the warps (and tokens) of a CTA; ``EXPERTS_CAPACITY``, the
            longest row of logits.

    Returns:
        Parameters: ``logits`` ``[tokens, experts]`` with ``row_stride`` elements from row to row,
        ``bias`` ``[experts]``, then those of common/parameters.py. Grid: one CTA per
        ``TOKENS_PER_BLOCK`` tokens.

    """
    tokens_per_block = int(constants["TOKENS_PER_BLOCK"])
    return Contract(
        parameters=(
            Parameter("logits", "ptr:f32"),
            Parameter("bias", "ptr:f32"),
            Parameter("experts", "i32"),
            Parameter("row_stride", "i64"),
            Parameter("top_k", "i32"),
            *ROUTING,
        ),
        grid=(
            GridAxis("ceil", argument="tokens", divisor=tokens_per_block),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(tokens_per_block * WARP, 1, 1),
        programmatic_dependent_launch=True,
        limits={
            "tokens": (1, MAX_GRID_X),
            "experts": (1, int(constants["EXPERTS_CAPACITY"])),
            "top_k": (1, MAX_TOP_K),
        },
    )
