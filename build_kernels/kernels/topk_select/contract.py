"""Launch contract of topk_select.

A variant is three numbers: how many scores a lane holds, how many warps of a block share a row, how
many blocks of a cluster do. Their product with 32 is the longest row it serves.
"""

from __future__ import annotations

from router_runtime.format.contract import Constants, Contract, GridAxis, Parameter

WARP = 32


def contract(constants: Constants) -> Contract:
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
        # A grid has at most 2^31 - 1 blocks.
        limits={
            "rows": (1, (2**31 - 1) // blocks_per_row),
            "row_length": (1, capacity),
            "top_k": (1, 32),
        },
    )
