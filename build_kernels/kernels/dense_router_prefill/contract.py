"""Launch contract of dense_router_prefill."""

from __future__ import annotations

from collections.abc import Mapping

from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, Geometry
from build_kernels.numerics import EPILOGUE_VERSION
from router_runtime.manifest import Contract, GridAxis, Parameter, Repack, TensorMap


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


def numerics(constants: Mapping[str, int | float]) -> str:
    """What decides the bits of a logit, and of what follows: MMA family, chunk, epilogue."""
    return f"bf16-k16-f32/chunk{int(constants['K_CHUNK'])}/epilogue{EPILOGUE_VERSION}"
