"""The tensor map by which split_k, swap_ab and tile fetch their hidden states."""

from __future__ import annotations

from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.dense.geometry.common import K_BLOCK


def hidden_map(
    hidden_states: cute.Pointer, tokens: Int32, hidden: int, row_stride: Int64, rows: int
) -> cute.CopyAtom:
    """Return an atom that copies 64 hidden elements of ``rows`` tokens into swizzled rows.

    ``hidden_states`` is [tokens, hidden] in bf16, with ``row_stride`` elements from row to row.
    Only the atom's type matters: it becomes the tensor-map parameter, which the runtime encodes
    from the contract.
    """
    matrix = cute.make_tensor(
        hidden_states, cute.make_layout((tokens, hidden), stride=(row_stride, 1))
    )
    box = cute.make_composed_layout(
        cute.make_swizzle(3, 4, 3), 0, cute.make_layout((rows, K_BLOCK), stride=(K_BLOCK, 1))
    )
    atom, _ = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), matrix, box, (rows, K_BLOCK)
    )
    return atom
