"""Launch contract of hash_gate: experts from a table, weights from their scores, one CTA per
token."""

from __future__ import annotations

from build_kernels.kernels.common.limits import MAX_GRID_X, WARP
from build_kernels.kernels.common.numerics import gather_tag
from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

#: Warps of a CTA where the catalog does not tune them: with more, a thread has too few registers.
MAX_WARPS = 16

#: Chunks of the longest hidden dimension. A CTA keeps 32 fp32 sums of each chunk, 40 KiB in all,
#: and the logits of an image token in its 48 KiB of static shared memory.
MAX_CHUNKS = 320


def derive(constants: Constants) -> dict[str, int | float | str]:
    """Return the constants that follow from the model where the catalog gives none: ``WARPS``.

    Args:
        constants: ``HIDDEN``, elements of a hidden state; ``K_CHUNK``, elements of a chunk.

    Raises:
        ValueError: ``HIDDEN`` has more than ``MAX_CHUNKS`` chunks.

    """
    chunks = -(-int(constants["HIDDEN"]) // int(constants["K_CHUNK"]))
    if chunks > MAX_CHUNKS:
        raise ValueError(
            f"expected HIDDEN to be at most {MAX_CHUNKS * int(constants['K_CHUNK'])}, "
            f"found {constants['HIDDEN']}"
        )
    return {"WARPS": min(chunks, MAX_WARPS)}


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``WARPS``, the warps of a CTA.

    Returns:
        Parameters: ``hidden_states`` ``[tokens, HIDDEN]`` with ``row_stride`` elements from row to
        row, ``token_ids`` ``[tokens]`` as int32 or int64, ``weight`` ``[EXPERTS, HIDDEN]``,
        ``table`` ``[vocab, TOP_K]``, then those of common/parameters.py. Grid: one CTA per token.

    """
    return Contract(
        parameters=(
            Parameter("hidden_states", "ptr:bf16"),
            Parameter("token_ids_i32", "ptr:i32"),
            Parameter("token_ids_i64", "ptr:i64"),
            Parameter("weight", "ptr:bf16"),
            Parameter("table", "ptr:i32"),
            Parameter("row_stride", "i64"),
            Parameter("vocab", "i32"),
            *ROUTING,
        ),
        grid=(
            GridAxis("ceil", argument="tokens"),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(int(constants["WARPS"]) * WARP, 1, 1),
        programmatic_dependent_launch=True,
        limits={"tokens": (1, MAX_GRID_X)},
    )


numerics = gather_tag
