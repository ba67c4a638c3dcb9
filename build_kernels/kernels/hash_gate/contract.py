"""Launch contract of hash_gate: experts from a table, weights from their scores, one CTA per
token."""

from __future__ import annotations

from build_kernels.kernels.common.limits import WARP
from build_kernels.kernels.common.numerics import SLICES, dense_tag
from build_kernels.kernels.common.parameters import ROUTING
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter, Repack

#: Most warps of a CTA where the catalog does not tune them: with more, a thread has few registers.
MAX_WARPS = 16

#: Most tokens of a launch: as many as of a dense kernel, which may serve the same router.
MAX_TOKENS = 1 << 22

#: The static shared memory of a CTA, and the chunks of the longest hidden dimension, with which one
#: warp fits beside the 32 fp32 sums of each chunk.
SHARED_BYTES = 48 * 1024
MAX_CHUNKS = 320

#: Elements of a step of the MMA m16n8k16, and its columns.
STEP, COLUMNS = 16, 8


def derive(constants: Constants) -> dict[str, int | float | str] | None:
    """Return the constants that follow from the model: ``WARPS``, ``EXPERT_WARPS`` where the
    catalog gives none, and ``SLICES``. None for a variant that is the one without
    ``EXPERT_WARPS``.

    Args:
        constants: ``HIDDEN``, elements of a hidden state; ``EXPERTS``; ``TOP_K``; ``K_CHUNK``,
            elements of a chunk; perhaps ``EXPERT_WARPS``, the warps for each group of chunks.

    Raises:
        ValueError: ``HIDDEN`` has more than ``MAX_CHUNKS`` chunks.

    """
    chunks = _chunks(constants)
    if chunks > MAX_CHUNKS:
        raise ValueError(
            f"expected HIDDEN to be at most {MAX_CHUNKS * int(constants['K_CHUNK'])}, "
            f"found {constants['HIDDEN']}"
        )
    fitting = (SHARED_BYTES - _fixed_bytes(constants)) // _bytes_of_warp(constants)
    most = min(MAX_WARPS, fitting)
    groups = min(chunks // together(constants), most)
    turns = -(-int(constants["TOP_K"]) * together(constants) // COLUMNS)
    if turns == 1 and "EXPERT_WARPS" in constants:
        return None
    expert_warps = int(constants.get("EXPERT_WARPS", min(turns, most // groups)))
    return {"WARPS": groups * expert_warps, "EXPERT_WARPS": expert_warps, "SLICES": SLICES}


def _fixed_bytes(constants: Constants) -> int:
    """Return the shared memory for the sums of all chunks, the logits of an image token, and
    less than 1 KiB for the selection among them."""
    return _chunks(constants) * WARP * 4 + int(constants["EXPERTS"]) * 4 + 1024


def _bytes_of_warp(constants: Constants) -> int:
    """Return the shared memory for a warp's group of chunks, each in bf16 and 16 bytes longer."""
    return together(constants) * (int(constants["K_CHUNK"]) * 2 + 16)


def together(constants: Constants) -> int:
    """Return how many chunks a warp computes side by side: ``TOGETHER`` of dot_product.cuh."""
    hidden, chunk = int(constants["HIDDEN"]), int(constants["K_CHUNK"])
    return next(count for count in (4, 2, 1) if hidden % (count * chunk) == 0 or count == 1)


def _chunks(constants: Constants) -> int:
    return -(-int(constants["HIDDEN"]) // int(constants["K_CHUNK"]))


def packed_weight(constants: Constants) -> Repack:
    """Return how the weight is packed, so that a warp's loads read whole cache lines.

    Of a step, lane q of four has the elements 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. The order in a row
    is: group of chunks, pair of steps, chunk, lane, step of the pair, element.
    """
    experts, hidden = int(constants["EXPERTS"]), int(constants["HIDDEN"])
    pair = (2, 2, 4, 2)  # steps, halves of a step, lanes, elements
    if hidden % int(constants["K_CHUNK"]):
        # Chunks are not side by side, and the last one has fewer pairs.
        shape: tuple[int, ...] = (experts, hidden // (2 * STEP), *pair)
        order: tuple[int, ...] = (0, 1, 4, 2, 3, 5)
    else:
        side_by_side, pairs = together(constants), int(constants["K_CHUNK"]) // (2 * STEP)
        groups = _chunks(constants) // side_by_side
        shape = (experts, groups, side_by_side, pairs, *pair)
        order = (0, 1, 3, 2, 6, 4, 5, 7)
    return Repack("packed_weight", "weight", experts, shape, order)


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``WARPS``, the warps of a CTA; ``HIDDEN``, ``EXPERTS`` and ``K_CHUNK``.

    Returns:
        Parameters: ``hidden_states`` ``[tokens, HIDDEN]`` with ``row_stride`` elements from row to
        row, ``token_ids`` ``[tokens]`` as int32 or int64, the weight ``[EXPERTS, HIDDEN]`` as
        ``packed_weight`` says, ``table`` ``[vocab, TOP_K]``, then those of common/parameters.py.
        Grid: one CTA per token.

    """
    return Contract(
        parameters=(
            Parameter("hidden_states", "ptr:bf16"),
            Parameter("token_ids_i32", "ptr:i32"),
            Parameter("token_ids_i64", "ptr:i64"),
            Parameter("packed_weight", "ptr:bf16"),
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
        repacks=(packed_weight(constants),),
        limits={"tokens": (1, MAX_TOKENS)},
    )


def numerics(constants: Constants) -> str:
    """Return the tag of the dense kernels with mma.sync, whose order this kernel has."""
    return dense_tag({**constants, "MMA": "mma_sync"})
