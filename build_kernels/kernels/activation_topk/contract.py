"""Launch contract of activation_topk."""

from __future__ import annotations

from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

WARP = 32


def contract(constants: Constants) -> Contract:
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
            "tokens": (1, 2**31 - 1),
            "experts": (1, int(constants["EXPERTS_CAPACITY"])),
            "top_k": (1, 32),
        },
    )
