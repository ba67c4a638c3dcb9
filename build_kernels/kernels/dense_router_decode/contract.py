"""Launch contract of dense_router_decode."""

from __future__ import annotations

from collections.abc import Mapping

from build_kernels.kernels.common.numerics import dense_tag
from build_kernels.kernels.common.parameters import ROUTING
from build_kernels.kernels.dense_router_decode.geometry import MMA_K, MMA_M, Geometry
from build_kernels.kernels.dense_router_prefill.contract import split_contract, split_derive
from build_kernels.kernels.dense_router_prefill.split_geometry import SplitGeometry
from router_runtime.format.contract import Contract, GridAxis, Parameter, Repack


def derive(constants: Mapping[str, int | float]) -> Mapping[str, int | float] | None:
    """A geometry for a model that the catalog does not tune."""
    if "TCGEN05" in constants:
        return split_derive(constants)
    names = ("HIDDEN", "EXPERTS", "TOP_K", "K_CHUNK", "MAX_TOKENS", "TOKENS_TILE")
    return Geometry.search(*(int(constants[name]) for name in names)).constants()


def contract(constants: Mapping[str, int | float]) -> Contract:
    if "TCGEN05" in constants:
        return split_contract(SplitGeometry.of(constants))
    g = Geometry.of(constants)
    return Contract(
        parameters=(
            Parameter("hidden_states", "ptr:bf16"),
            Parameter("packed_weight", "ptr:bf16"),
            Parameter("bias", "ptr:f32"),
            Parameter("logits_out", "ptr:f32"),
            Parameter("workspace", "ptr:u32"),
            Parameter("row_stride", "i64"),
            *ROUTING,
        ),
        grid=(
            GridAxis("constant", g.blocks),
            GridAxis("ceil", 1, "tokens", g.tokens_tile),
            GridAxis("constant"),
        ),
        block=(g.threads, 1, 1),
        cluster=(g.cluster_e * g.cluster_k, 1, 1),
        dynamic_shared_memory=g.shared_bytes,
        programmatic_dependent_launch=True,
        workspace_bytes=g.workspace_bytes,
        repacks=(
            # The A fragments of mma.m16n8k16: of a 16 x 16 tile, lane 4 r + q holds the pairs
            # (row r | r + 8) x (columns 2 q | 2 q + 8), columns outermost.
            Repack(
                parameter="packed_weight",
                argument="weight",
                rows=g.padded_experts,
                shape=(g.padded_experts // MMA_M, 2, 8, g.hidden // MMA_K, 2, 4, 2),
                order=(0, 3, 2, 5, 4, 1, 6),
            ),
        ),
        limits={"tokens": (1, g.max_tokens)},
    )


numerics = dense_tag
