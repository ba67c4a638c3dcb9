"""Launch contract of hash_gate."""

from __future__ import annotations

from build_kernels.kernels.common.numerics import gather_tag
from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

WARP = 32

#: Warps of a block where no model says better: with more, a thread has too few registers.
MAX_WARPS = 16

#: A block keeps 32 sums of every chunk in its 48 KiB of static shared memory, and more.
MAX_CHUNKS = 320


def derive(constants: Constants) -> dict[str, int | float | str]:
    """The number of warps. Raises ValueError for a hidden dimension that is too long."""
    chunks = -(-int(constants["HIDDEN"]) // int(constants["K_CHUNK"]))
    if chunks > MAX_CHUNKS:
        raise ValueError(
            f"expected HIDDEN to be at most {MAX_CHUNKS * int(constants['K_CHUNK'])}, "
            f"found {constants['HIDDEN']}"
        )
    return {"WARPS": min(chunks, MAX_WARPS)}


def contract(constants: Constants) -> Contract:
    return Contract(
        parameters=(
            Parameter("hidden_states", "ptr:bf16"),
            Parameter("token_ids_i32", "ptr:i32"),
            Parameter("token_ids_i64", "ptr:i64"),
            Parameter("weight", "ptr:bf16"),
            Parameter("table", "ptr:i32"),
            Parameter("row_stride", "i64"),
            Parameter("vocab", "i32"),
            # No replay of given ids: that is for dense routers.
            *(parameter for parameter in ROUTING if not parameter.name.startswith("given_ids")),
        ),
        grid=(
            GridAxis("ceil", argument="tokens"),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(int(constants["WARPS"]) * WARP, 1, 1),
        programmatic_dependent_launch=True,
        limits={"tokens": (1, 2**31 - 1)},
    )


numerics = gather_tag
