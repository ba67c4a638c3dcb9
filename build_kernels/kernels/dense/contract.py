"""Launch contracts of all dense forms."""

from __future__ import annotations

from build_kernels.kernels.common.parameters import DENSE_ROUTING
from build_kernels.kernels.dense.geometry.common import K_BLOCK, MMA_K
from build_kernels.kernels.dense.geometry.decode import MMA_SYNC_M, DecodeGeometry
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.table import geometry_of
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from router_runtime.format.contract import (
    Constants,
    Contract,
    GridAxis,
    Parameter,
    Repack,
    TensorMap,
)

#: Parameters of the forms that can store their logits, and of those that merge groups of experts.
LOGITS_OUT = Parameter("logits_out", "ptr:f32")
WORKSPACE = Parameter("workspace", "ptr:u32")

#: Most tokens of a launch whose form does not bound them.
MAX_TOKENS = 1 << 22


def contract(constants: Constants) -> Contract:
    """Return the contract of an entry. Raises ValueError if its geometry cannot be built."""
    g = geometry_of(constants)
    if isinstance(g, DecodeGeometry):
        return _decode(g)
    if isinstance(g, SplitKGeometry):
        return _streamed(
            g,
            own=(LOGITS_OUT, WORKSPACE),
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
    if isinstance(g, SwapAbGeometry):
        return _streamed(
            g,
            own=(LOGITS_OUT,),
            grid=(
                GridAxis("constant", g.cluster_x),
                GridAxis("ceil", g.cluster_t, "tokens", g.tile_tokens * g.cluster_t),
                GridAxis("constant"),
            ),
            cluster=(g.cluster_x, g.cluster_t, 1),
            box_rows=g.tile_tokens,
        )
    assert isinstance(g, TileGeometry)
    return _streamed(
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


def _decode(g: DecodeGeometry) -> Contract:
    """Return the contract of the form that keeps its weights in registers."""
    return Contract(
        parameters=(
            Parameter("hidden_states", "ptr:bf16"),
            Parameter("packed_weight", "ptr:bf16"),
            Parameter("bias", "ptr:f32"),
            LOGITS_OUT,
            WORKSPACE,
            Parameter("row_stride", "i64"),
            *DENSE_ROUTING,
        ),
        grid=(
            GridAxis("constant", g.ctas),
            GridAxis("ceil", 1, "tokens", g.tokens_tile),
            GridAxis("constant"),
        ),
        block=(g.threads, 1, 1),
        cluster=(g.cluster, 1, 1),
        dynamic_shared_memory=g.shared_bytes,
        programmatic_dependent_launch=True,
        workspace_bytes=g.workspace_bytes,
        repacks=(fragment_image(g.padded_experts, g.hidden),),
        limits={"tokens": (1, g.max_tokens)},
    )


def _streamed(
    g: SplitKGeometry | SwapAbGeometry | TileGeometry,
    own: tuple[Parameter, ...],
    grid: tuple[GridAxis, GridAxis, GridAxis],
    cluster: tuple[int, int, int],
    box_rows: int,
    max_tokens: int = MAX_TOKENS,
    workspace_bytes: int = 0,
) -> Contract:
    """Return a contract of a form whose operands come by bulk copies.

    Hidden states come by a tensor map with boxes of ``box_rows`` tokens, weights as an image of the
    stages. ``own`` are the parameters of this form alone.
    """
    return Contract(
        parameters=(
            Parameter("hidden_states", "tensormap"),
            Parameter("packed_weight", "ptr:bf16"),
            Parameter("bias", "ptr:f32"),
            *own,
            *DENSE_ROUTING,
        ),
        grid=grid,
        block=(g.threads, 1, 1),
        cluster=cluster,
        dynamic_shared_memory=g.shared_bytes,
        programmatic_dependent_launch=True,
        workspace_bytes=workspace_bytes,
        tensor_maps=(hidden_map(box_rows),),
        repacks=(stage_image(g.padded_experts, g.hidden),),
        limits={"tokens": (1, max_tokens)},
    )


def hidden_map(rows: int) -> TensorMap:
    """Return the tensor map of the hidden states: boxes of 64 elements of ``rows`` tokens."""
    return TensorMap(
        parameter="hidden_states",
        argument="hidden_states",
        dtype="bf16",
        box=(K_BLOCK, rows),
        swizzle="128B",
    )


def stage_image(padded_experts: int, hidden: int) -> Repack:
    """Return how weights are packed as the stages hold them.

    For every 64 hidden elements: the 8 x 8 core matrices of the unswizzled K-major layout, first 8
    along the hidden dimension, then along the experts.
    """
    return Repack(
        parameter="packed_weight",
        argument="weight",
        rows=padded_experts,
        shape=(padded_experts // 8, 8, hidden // K_BLOCK, 8, 8),
        order=(2, 0, 3, 1, 4),
    )


def fragment_image(padded_experts: int, hidden: int) -> Repack:
    """Return how weights are packed as the A fragments of ``mma.m16n8k16``.

    Of a 16 x 16 tile, lane 4 r + q holds the pairs (row r | r + 8) x (columns 2 q | 2 q + 8),
    columns outermost.
    """
    return Repack(
        parameter="packed_weight",
        argument="weight",
        rows=padded_experts,
        shape=(padded_experts // MMA_SYNC_M, 2, 8, hidden // MMA_K, 2, 4, 2),
        order=(0, 3, 2, 5, 4, 1, 6),
    )
