"""Launch contract of dense_router_prefill."""

from __future__ import annotations

from collections.abc import Mapping

from build_kernels.kernels.common.numerics import dense_tag
from build_kernels.kernels.common.parameters import ROUTING
from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, Geometry, ceil_div
from build_kernels.kernels.dense_router_prefill.rows_geometry import RowsGeometry
from build_kernels.kernels.dense_router_prefill.split_geometry import SplitGeometry
from router_runtime.format.contract import Contract, GridAxis, Parameter, Repack, TensorMap


def derive(constants: Mapping[str, int | float]) -> Mapping[str, int | float]:
    """A division for a model that the catalog does not tune: a block's partial sums and totals of
    192 experts fill the registers; with the partial sums in tensor memory, 256."""
    most = 256 if "TCGEN05" in constants else 192
    cluster_e = next(e for e in (1, 2, 4, 8) if ceil_div(int(constants["EXPERTS"]), e) <= most)
    return {"CLUSTER_E": cluster_e, "CLUSTER_T": 1, "PASSES": 1}


def split_derive(constants: Mapping[str, int | float]) -> Mapping[str, int | float] | None:
    """A division for the split form, or None where it has none."""
    if "TOKENS_TILE" in constants:
        return {}
    found = SplitGeometry.search(constants)
    return found.constants() if found else None


def contract(constants: Mapping[str, int | float]) -> Contract:
    if "TOKENS_TILE" in constants:
        return split_contract(SplitGeometry.of(constants))
    if "TILE_TOKENS" in constants:
        return rows_contract(RowsGeometry.of(constants))
    g = Geometry.of(constants)
    return _contract(
        g,
        own=(),
        grid=(
            GridAxis("constant", g.cluster_e),
            GridAxis("ceil", g.cluster_t, "tokens", g.tokens_tile * g.cluster_t),
            GridAxis("constant"),
        ),
        cluster=(g.cluster_e, g.cluster_t, 1),
        box_rows=g.owned_tokens,
    )


def split_contract(g: SplitGeometry) -> Contract:
    return _contract(
        g,
        own=(Parameter("logits_out", "ptr:f32"), Parameter("workspace", "ptr:u32")),
        grid=(
            GridAxis("constant", g.cluster_k),
            GridAxis("ceil", 1, "tokens", g.tokens_tile),
            GridAxis("constant", g.groups),
        ),
        cluster=(g.cluster_k, 1, 1),
        box_rows=g.tokens_tile,
        max_tokens=g.max_tokens,
        workspace_bytes=g.workspace_bytes,
    )


def rows_contract(g: RowsGeometry) -> Contract:
    return _contract(
        g,
        own=(Parameter("logits_out", "ptr:f32"),),
        grid=(
            GridAxis("constant", g.cluster_x),
            GridAxis("ceil", g.cluster_t, "tokens", g.tile_tokens * g.cluster_t),
            GridAxis("constant"),
        ),
        cluster=(g.cluster_x, g.cluster_t, 1),
        box_rows=g.tile_tokens,
    )


def _contract(
    g: Geometry | SplitGeometry | RowsGeometry,
    own: tuple[Parameter, ...],
    grid: tuple[GridAxis, GridAxis, GridAxis],
    cluster: tuple[int, int, int],
    box_rows: int,
    max_tokens: int = 1 << 22,
    workspace_bytes: int = 0,
) -> Contract:
    """What the forms have in common: hidden states by a tensor map, weights as a stage image."""
    return Contract(
        parameters=(
            Parameter("hidden_states", "tensormap"),
            Parameter("packed_weight", "ptr:bf16"),
            Parameter("bias", "ptr:f32"),
            *own,
            *ROUTING,
        ),
        grid=grid,
        block=(g.threads, 1, 1),
        cluster=cluster,
        dynamic_shared_memory=g.shared_bytes,
        programmatic_dependent_launch=True,
        workspace_bytes=workspace_bytes,
        tensor_maps=(tensor_map(box_rows),),
        repacks=(stage_image(g.padded_experts, g.hidden),),
        limits={"tokens": (1, max_tokens)},
    )


def tensor_map(rows: int) -> TensorMap:
    """A box of 64 hidden elements of so many tokens, in the layout that the MMA reads."""
    return TensorMap(
        parameter="hidden_states",
        argument="hidden_states",
        dtype="bf16",
        box=(K_BLOCK, rows),
        swizzle="128B",
    )


def stage_image(padded_experts: int, hidden: int) -> Repack:
    """The weights as the stages hold them: for every 64 hidden elements, the 8 x 8 core matrices of
    the unswizzled K-major layout, 8 along the hidden dimension, then experts."""
    return Repack(
        parameter="packed_weight",
        argument="weight",
        rows=padded_experts,
        shape=(padded_experts // 8, 8, hidden // K_BLOCK, 8, 8),
        order=(2, 0, 3, 1, 4),
    )


numerics = dense_tag
