"""Why a layer of vLLM is left alone, as far as that is known before its first batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_runtime.integrations.engines.reasons import (
    SCORING,
    reason,
    why_not_bias,
    why_not_table,
    why_not_weight,
)
from router_runtime.integrations.vllm.engine import Engine


def is_deepseek_v4(engine: Engine, runner: Any) -> bool:
    """Whether the layer routes as DeepSeek-V4 does."""
    router = runner.router
    return type(router) is engine.router and router.scoring_func == SCORING


def why_not(engine: Engine, runner: Any) -> str | None:
    """What the layer has that is not served, as expected and found; None if it can be served."""
    router, gate = runner.router, runner.gate
    if type(router) is not engine.router:
        return reason("a router", engine.router.__name__, type(router).__name__)
    if router.scoring_func != SCORING:
        return reason("a scoring function", SCORING, router.scoring_func)
    if getattr(router, "num_fused_shared_experts", 0):
        return reason("shared experts", "beside the routed ones", "in places after them")
    if type(gate) is not engine.gate:
        return reason("a gate that the runner calls", engine.gate.__name__, type(gate).__name__)
    if runner._fse_fuse_gate:
        return reason("a gate of its own", "no gate of shared experts", "one fused with it")
    return _why_not_gate(engine, gate) or _why_not_tensors(router, gate.weight)


def _why_not_gate(engine: Engine, gate: Any) -> str | None:
    if type(gate.quant_method) is not engine.unquantized:
        return reason("a gate's weight", "no quantization", type(gate.quant_method).__name__)
    if gate.bias is not None:
        return reason("a gate", "no additive bias", "one")
    if gate.out_dtype is not torch.float32:
        return reason("a gate's logits", torch.float32, gate.out_dtype)
    if "forward" in vars(gate):
        return reason("a gate's forward", "the one of its class", "another")
    return why_not_weight(gate.weight)


def _why_not_tensors(router: Any, weight: Tensor) -> str | None:
    experts = weight.shape[0]
    table: Tensor | None = router._hash_indices_table
    bias: Tensor | None = router.e_score_correction_bias
    images: Tensor | None = getattr(router, "bias_vl", None)
    if table is not None:
        found = why_not_table(table, router.top_k)
    elif bias is None:
        found = reason("a router", "a bias or a hash table", "neither")
    else:
        found = why_not_bias("a router's bias", bias, experts)
    if found is None and images is not None:
        found = why_not_bias("the bias of image tokens", images, experts)
    return found
