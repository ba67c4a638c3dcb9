"""Launch contract of hash_router: experts from a table, equal weights."""

from __future__ import annotations

from build_kernels.kernels.common.limits import MAX_GRID_X, MAX_TOP_K
from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

#: The parameters of common/parameters.py that it does not need, because it scores nothing.
_SCORING_ONLY = frozenset(
    (
        *("scale", "renormalize", "image_mask", "image_bias"),
        *("given_ids_i32", "given_ids_i64", "given_mask"),
    )
)


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``THREADS`` and ``TOKENS_PER_BLOCK`` of a CTA.

    Returns:
        Parameters: ``token_ids`` ``[tokens]`` as int32 or int64, ``table`` ``[vocab, top_k]``, then
        those of common/parameters.py that concern no score. Grid: one CTA per ``TOKENS_PER_BLOCK``
        tokens.

    """
    return Contract(
        parameters=(
            Parameter("token_ids_i32", "ptr:i32"),
            Parameter("token_ids_i64", "ptr:i64"),
            Parameter("table", "ptr:i32"),
            Parameter("vocab", "i32"),
            Parameter("top_k", "i32"),
            *(parameter for parameter in ROUTING if parameter.name not in _SCORING_ONLY),
        ),
        grid=(
            GridAxis("ceil", argument="tokens", divisor=int(constants["TOKENS_PER_BLOCK"])),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(int(constants["THREADS"]), 1, 1),
        programmatic_dependent_launch=True,
        limits={"tokens": (1, MAX_GRID_X), "top_k": (1, MAX_TOP_K)},
    )
