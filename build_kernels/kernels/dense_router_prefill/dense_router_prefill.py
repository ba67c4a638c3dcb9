"""dense_router_prefill: the whole dense router for many tokens, in one launch (CuTe DSL).

The forms divide the same work differently and give the same bits: ``split_k`` for small batches,
``expert_rows`` for those between, ``tile`` for large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from build_kernels.kernels.common import finish
from build_kernels.kernels.dense_router_prefill import expert_rows, split_k, split_tcgen05
from build_kernels.kernels.dense_router_prefill.geometry import Geometry
from build_kernels.kernels.dense_router_prefill.tile import DenseRouterPrefill
from build_kernels.kernels.dense_router_prefill.tile_tcgen05 import TileTcgen05


def program(constants: Mapping[str, int | float]) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    if "TOKENS_TILE" in constants:
        if "TCGEN05" in constants:
            return split_tcgen05.program(constants)
        return split_k.program(constants)
    if "TILE_TOKENS" in constants:
        return expert_rows.program(constants)
    form = DenseRouterPrefill
    if "TCGEN05" in constants:
        form = TileTcgen05
    kinds = ("ptr:bf16", "ptr:bf16", "ptr:f32", "i64")
    return form(Geometry.of(constants)), finish.arguments(*kinds)
