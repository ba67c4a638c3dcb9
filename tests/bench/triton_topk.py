"""A top-k epilogue in Triton: what one writes in place of ``activation_topk`` without this package.

It is a peer, for latency and for host time, so it is tuned like one: a warp a row, one reduction a
selected expert, scores recomputed for the k chosen ones only. Needs ``triton`` to be installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _score(logits):
    return tl.sqrt(tl.maximum(logits, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(logits))))


@triton.jit
def _topk_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    scale,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < EXPERTS
    logits = tl.load(logits_ptr + row * EXPERTS + columns, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    keys = tl.where(inside, _score(logits) + bias, float("-inf"))
    ranks = tl.arange(0, RANKS)
    ids = tl.zeros([RANKS], dtype=tl.int32)
    for rank in tl.static_range(TOP_K):
        best = tl.argmax(keys, axis=0, tie_break_left=True)
        ids = tl.where(ranks == rank, best, ids)
        keys = tl.where(columns == best, float("-inf"), keys)
    chosen = ranks < TOP_K
    scores = _score(tl.load(logits_ptr + row * EXPERTS + ids, mask=chosen, other=0.0))
    scores = tl.where(chosen, scores, 0.0)
    weights = scores / (tl.sum(scores, axis=0) + 1e-20) * scale
    tl.store(weights_ptr + row * TOP_K + ranks, weights, mask=chosen)
    tl.store(ids_ptr + row * TOP_K + ranks, ids, mask=chosen)


def topk(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """(weights, ids) of contiguous fp32 logits ``[tokens, experts]``."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    _topk_kernel[(tokens,)](
        logits,
        bias,
        weights,
        ids,
        scale,
        EXPERTS=experts,
        COLUMNS=triton.next_power_of_2(experts),
        TOP_K=k,
        RANKS=triton.next_power_of_2(k),
        num_warps=1,
    )
    return weights, ids
