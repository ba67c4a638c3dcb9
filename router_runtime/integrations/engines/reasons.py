"""Why a layer is left to its engine: sentences, and the checks that all engines need."""

from __future__ import annotations

import torch
from torch import Tensor

SCORING = "sqrtsoftplus"


def reason(what: str, expected: object, found: object) -> str:
    """The sentence for a layer that is left alone."""
    return f"{what}: expected {expected}, found {found}"


def why_not_weight(weight: Tensor) -> str | None:
    """What a gate's weight is that is not served."""
    if weight.dtype is not torch.bfloat16 or weight.dim() != 2:
        return reason("a gate's weight", "torch.bfloat16 [experts, hidden]", _kind(weight))
    return None


def why_not_bias(what: str, bias: Tensor, experts: int) -> str | None:
    """What a bias that selects is that is not served."""
    if bias.dtype is not torch.float32 or bias.shape != (experts,):
        return reason(what, f"torch.float32 [{experts}]", _kind(bias))
    return None


def why_not_table(table: Tensor, top_k: int) -> str | None:
    """What a hash layer's table is that is not served."""
    if table.dim() != 2 or table.shape[1] != top_k:
        return reason("a hash table", f"[vocabulary, {top_k}]", _kind(table))
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
