"""Launch contract of hash_router."""

from __future__ import annotations

from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

#: Nothing is scored, so there is nothing to scale, to select otherwise or to weigh.
_UNSCORED = (
    *("scale", "renormalize", "image_mask", "image_bias", "given_ids_i32", "given_ids_i64"),
)


def contract(constants: Constants) -> Contract:
    return Contract(
        parameters=(
            Parameter("token_ids_i32", "ptr:i32"),
            Parameter("token_ids_i64", "ptr:i64"),
            Parameter("table", "ptr:i32"),
            Parameter("vocab", "i32"),
            Parameter("top_k", "i32"),
            *(parameter for parameter in ROUTING if parameter.name not in _UNSCORED),
        ),
        grid=(
            GridAxis("ceil", argument="tokens", divisor=int(constants["TOKENS_PER_BLOCK"])),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(int(constants["THREADS"]), 1, 1),
        programmatic_dependent_launch=True,
        limits={"tokens": (1, 2**31 - 1), "top_k": (1, 32)},
    )
