"""Launch contract of topk_select: the largest scores of every row and their columns.

A variant serves one class of row lengths. Its constants say how many scores a lane holds, how many
warps of a CTA share a row and how many CTAs of a cluster do; 32 times their product is the longest
row.
"""

from __future__ import annotations

from build_kernels.kernels.common.limits import MAX_GRID_X, MAX_TOP_K, WARP
from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter


def contract(constants: Constants) -> Contract:
    """Return the contract of one variant.

    Args:
        constants: ``VALUES_PER_LANE``, ``WARPS_PER_ROW``, ``BLOCKS_PER_ROW`` (the cluster's CTAs)
            and ``THREADS`` of a CTA.

    Returns:
        Parameters: ``scores`` ``[rows, row_length]`` with ``row_stride`` elements from row to row;
        ``values_out`` and ``ids_out`` ``[rows, top_k]``. Grid: ``BLOCKS_PER_ROW`` CTAs for the rows
        of a CTA, of which there are several only where a warp has a row of its own.

    """
    threads = int(constants["THREADS"])
    warps_per_row = int(constants["WARPS_PER_ROW"])
    blocks_per_row = int(constants["BLOCKS_PER_ROW"])
    capacity = int(constants["VALUES_PER_LANE"]) * WARP * warps_per_row * blocks_per_row
    return Contract(
        parameters=(
            Parameter("scores", "ptr:f32"),
            Parameter("values_out", "ptr:f32"),
            Parameter("ids_out", "ptr:i32"),
            Parameter("rows", "i32"),
            Parameter("row_length", "i32"),
            Parameter("row_stride", "i64"),
            Parameter("top_k", "i32"),
        ),
        grid=(
            GridAxis(
                "ceil",
                value=blocks_per_row,
                argument="rows",
                divisor=threads // (WARP * warps_per_row),
            ),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(threads, 1, 1),
        cluster=(blocks_per_row, 1, 1),
        programmatic_dependent_launch=True,
        limits={
            "rows": (1, MAX_GRID_X // blocks_per_row),
            "row_length": (1, capacity),
            "top_k": (1, MAX_TOP_K),
        },
    )
