"""Launch contract of dense_router_prefill."""

from __future__ import annotations

from collections.abc import Mapping

from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, Geometry, ceil_div
from build_kernels.numerics import dense_tag
from router_runtime.manifest import Contract, GridAxis, Parameter, Repack, TensorMap


def derive(constants: Mapping[str, int | float]) -> Mapping[str, int | float]:
    """A division for a model that the catalog does not tune: a block's partial sums and totals of
    192 experts fill the registers."""
    cluster_e = next(e for e in (1, 2, 4, 8) if ceil_div(int(constants["EXPERTS"]), e) <= 192)
    return {"CLUSTER_E": cluster_e, "CLUSTER_T": 1, "PASSES": 1}


def contract(constants: Mapping[str, int | float]) -> Contract:
    g = Geometry.of(constants)
    return Contract(
        parameters=(
            Parameter("hidden_states", "tensormap"),
            Parameter("packed_weight", "ptr:bf16"),
            Parameter("bias", "ptr:f32"),
            Parameter("weights_out", "ptr:f32"),
            Parameter("ids_out", "ptr:i32"),
            Parameter("tokens", "i32"),
            Parameter("scale", "f32"),
            Parameter("renormalize", "i32"),
        ),
        grid=(
            GridAxis("constant", g.cluster_e),
            GridAxis("ceil", g.cluster_t, "tokens", g.tokens_tile * g.cluster_t),
            GridAxis("constant"),
        ),
        block=(g.threads, 1, 1),
        cluster=(g.cluster_e, g.cluster_t, 1),
        dynamic_shared_memory=g.shared_bytes,
        programmatic_dependent_launch=True,
        tensor_maps=(
            TensorMap(
                parameter="hidden_states",
                argument="hidden_states",
                dtype="bf16",
                box=(K_BLOCK, g.owned_tokens),
                swizzle="128B",
            ),
        ),
        repacks=(
            # The shared-memory image of the stages: for every 64 hidden elements, the 8 x 8 core
            # matrices of the unswizzled K-major layout, 8 along the hidden dimension, then experts.
            Repack(
                parameter="packed_weight",
                argument="weight",
                rows=g.padded_experts,
                shape=(g.padded_experts // 8, 8, g.blocks, 8, 8),
                order=(2, 0, 3, 1, 4),
            ),
        ),
        limits={"tokens": (1, 1 << 22)},
    )


numerics = dense_tag
