"""Launch contract of topk_indices: the positions of the largest scores of long, ragged rows."""

from __future__ import annotations

from build_kernels.kernels.common.limits import MAX_GRID_X
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

#: The longest row, in columns.
MAX_ROW_LENGTH = 2**21

#: Size of a score in bytes -> its type.
_SCORES = {4: "ptr:f32", 2: "ptr:bf16"}


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``SCORE_BYTES``, ``BLOCKS_PER_ROW`` (the cluster's CTAs), ``THREADS`` of a CTA,
            ``MAX_TOP_K``, ``HELD``: the vectors of 16 bytes that a thread holds, 0 in the streamed
            form, which has ``LOADS`` and ``STAGES`` of its rings and the ``CAPACITY`` of its list.

    Returns:
        Parameters: ``scores`` ``[rows, row_length]`` with ``row_stride`` elements from row to row;
        ``row_starts``, ``row_ends``, ``requests`` and ``offsets`` ``[rows]``, each may be null;
        ``page_table`` ``[page_rows, page_columns]`` with ``page_stride`` elements from row to row,
        or null; ``values_out``, ``ids_out`` and ``slots_out`` ``[rows, top_k]``, each may be null.

    """
    blocks_per_row = int(constants["BLOCKS_PER_ROW"])
    score_bytes = int(constants["SCORE_BYTES"])
    return Contract(
        parameters=(
            Parameter("scores", _SCORES[score_bytes]),
            Parameter("row_starts", "ptr:i32"),
            Parameter("row_ends", "ptr:i32"),
            Parameter("page_table", "ptr:i32"),
            Parameter("requests", "ptr:i32"),
            Parameter("offsets", "ptr:i32"),
            Parameter("values_out", "ptr:f32"),
            Parameter("ids_out", "ptr:i32"),
            Parameter("slots_out", "ptr:i32"),
            Parameter("rows", "i32"),
            Parameter("row_length", "i32"),
            Parameter("row_stride", "i64"),
            Parameter("top_k", "i32"),
            Parameter("page_rows", "i32"),
            Parameter("page_columns", "i32"),
            Parameter("page_stride", "i64"),
            Parameter("page_size", "i32"),
            Parameter("sorted", "i32"),
            Parameter("nan_first", "i32"),
        ),
        grid=(
            GridAxis("ceil", value=blocks_per_row, argument="rows"),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(int(constants["THREADS"]), 1, 1),
        cluster=(blocks_per_row, 1, 1),
        dynamic_shared_memory=_dynamic_shared_memory(constants),
        programmatic_dependent_launch=True,
        limits={
            "rows": (1, MAX_GRID_X // blocks_per_row),
            "row_length": (1, _longest_row(constants)),
            "top_k": (1, int(constants["MAX_TOP_K"])),
        },
    )


def _dynamic_shared_memory(constants: Constants) -> int:
    """Bytes: of the candidates of a row in rank order, or of the rings and the list."""
    if constants["HELD"]:
        return 8 * int(constants["MAX_TOP_K"])
    ring = 16 * int(constants["LOADS"]) * int(constants["STAGES"])
    return ring * int(constants["THREADS"]) + 8 * int(constants["CAPACITY"])


def _longest_row(constants: Constants) -> int:
    """The longest row, in scores: all that the threads of the cluster hold."""
    if not constants["HELD"]:
        return MAX_ROW_LENGTH
    threads = int(constants["BLOCKS_PER_ROW"]) * int(constants["THREADS"])
    return threads * int(constants["HELD"]) * 16 // int(constants["SCORE_BYTES"])
