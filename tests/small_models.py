"""A transformers DeepSeek-V4 of a few narrow layers, drawn at random. Needs transformers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def deepseek_v4(
    hidden: int,
    experts: int,
    top_k: int,
    vocab: int,
    *,
    layers: int,
    hashed: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Any:
    """``layers`` layers, the first ``hashed`` of them hash layers. Biases and tables are drawn too:
    transformers' own are zero.
    """
    transformers = importlib.import_module("transformers")
    config = transformers.DeepseekV4Config(
        vocab_size=vocab,
        hidden_size=hidden,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        head_dim=32,
        q_lora_rank=32,
        num_experts_per_tok=top_k,
        n_routed_experts=experts,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=16,
        num_hash_layers=hashed,
        max_position_embeddings=256,
        compress_ratios=[0] * layers,
        partial_rotary_factor=0.5,
        pad_token_id=0,
    )
    # The one form of the experts that a graph can capture: it counts nothing on the host.
    config._experts_implementation = "batched_mm"
    torch.manual_seed(1)
    with torch.device(device):
        model = transformers.DeepseekV4ForCausalLM(config).eval().requires_grad_(False)
        for module in gates(model).values():
            module.weight.normal_(std=hidden**-0.5)
            if hasattr(module, "tid2eid"):
                rows = [torch.randperm(experts)[:top_k] for _ in range(vocab)]
                module.tid2eid.copy_(torch.stack(rows))
            else:
                module.e_score_correction_bias.normal_(std=0.1)
    return model.to(dtype)


def gates(model: nn.Module) -> dict[str, Any]:
    """The routers of a model by name."""
    modeling = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    kinds = (modeling.DeepseekV4TopKRouter, modeling.DeepseekV4HashRouter)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dense(model: nn.Module) -> list[Any]:
    return [module for module in gates(model).values() if not hasattr(module, "tid2eid")]


def hashed(model: nn.Module) -> list[Any]:
    return [module for module in gates(model).values() if hasattr(module, "tid2eid")]


def by_id(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, weights), each row sorted by id: transformers leaves the order of a row open."""
    order = ids.sort(dim=1)
    return order.values, weights.gather(1, order.indices)


def unexplained(
    logits: Tensor, bias: Tensor, ours: Tensor, theirs: Tensor, scores: Tensor
) -> tuple[int, int]:
    """How many rows of ids choose another set of experts, and in how many of these that is not
    because the keys in question are closer than what bf16 rounds.

    Half a bf16 step, 2^-9 relative, for each of: the logit (whose score moves at most half as
    much), the softplus, the root, the bias that is added in bf16, the sum; and as much again.
    """
    here = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    there = here.clone().scatter_(1, theirs, True)
    here.scatter_(1, ours, True)
    differing = (here != there).any(dim=1)
    keys = scores + bias
    bound = 2.0**-8 * (logits.abs() + 3 * scores + keys.abs())
    lost = torch.where(here & ~there, keys - bound, torch.inf).amin(dim=1)
    won = torch.where(there & ~here, keys + bound, -torch.inf).amax(dim=1)
    return int(differing.sum()), int((differing & (lost > won)).sum())
