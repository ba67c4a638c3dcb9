"""spec.py against Hugging Face transformers' router, in FP32 on the CPU.

Their router adds the scores in another order and leaves the order of ids within a row open, so
pairs are compared sorted by id, and weights to a few roundings. Rows in which two keys at the edge
of the top k are closer than fp32 tells apart are left out (there are a handful in thousands).
"""

from __future__ import annotations

import pytest
import torch

from router_runtime import spec

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    reason="this transformers has no DeepSeek-V4",
)

MODELS = {"dsv4-flash": (4096, 256, 1.5), "dsv4-pro": (7168, 384, 2.5), "small": (64, 24, 1.0)}
TOP_K, TOKENS = 6, 97


def routers(cls, hidden, experts, scale):
    config = transformers.DeepseekV4Config(
        hidden_size=hidden,
        n_routed_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        routed_scaling_factor=scale,
        vocab_size=512,
        scoring_func="sqrtsoftplus",
    )
    module = cls(config)
    assert module.weight.dtype == torch.float32
    assert (module.num_experts, module.hidden_dim, module.top_k) == (experts, hidden, TOP_K)
    return module


def by_id(weights, ids):
    order = ids.long().sort(dim=1)
    return order.values, weights.gather(1, order.indices)


@pytest.mark.parametrize("model", MODELS)
def test_topk_router(model):
    hidden, experts, scale = MODELS[model]
    module = routers(modeling.DeepseekV4TopKRouter, hidden, experts, scale)
    generator = torch.Generator().manual_seed(7)
    # bf16 values in fp32 tensors: both sides multiply the same numbers.
    x = torch.randn(TOKENS, hidden, generator=generator).bfloat16()
    weight = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).bfloat16()
    bias = torch.randn(experts, generator=generator) * 0.1
    with torch.no_grad():
        module.weight.copy_(weight)
        module.e_score_correction_bias.copy_(bias)
        logits, expected_weights, expected_ids = module(x.float())
    assert (logits - spec.dense_logits(x, weight)).abs().max() < 1e-4

    weights, ids = spec.dense_router(x, weight, bias, TOP_K, scale)
    scores = spec.expert_scores(logits)
    ranked = spec.topk_select(spec.selection_keys(scores, bias, logits), TOP_K + 1)[0]
    decided = ranked[:, TOP_K - 1] - ranked[:, TOP_K] > 1e-5
    assert decided.sum() > 0.9 * TOKENS
    found, expected = by_id(weights, ids), by_id(expected_weights, expected_ids)
    assert torch.equal(found[0][decided], expected[0][decided])
    torch.testing.assert_close(found[1][decided], expected[1][decided], rtol=2e-5, atol=0)

    # From the same logits there is nothing left but a few roundings.
    weights, ids = spec.activation_topk(logits, bias, TOP_K, scale)
    found = by_id(weights, ids)
    assert torch.equal(found[0][decided], expected[0][decided])
    torch.testing.assert_close(found[1][decided], expected[1][decided], rtol=1e-6, atol=0)


def test_hash_router_ids():
    """Their hash router takes ids from the same table (its weights are hash_gate's)."""
    module = routers(modeling.DeepseekV4HashRouter, 64, 24, 1.5)
    table = torch.stack([torch.randperm(24)[:TOP_K] for _ in range(512)])
    token_ids = torch.arange(512).flip(0)
    with torch.no_grad():
        module.weight.normal_()
        module.tid2eid.copy_(table)
        _, _, expected = module(torch.randn(512, 64), token_ids)
    _, ids = spec.hash_router(token_ids, table.int(), TOP_K)
    assert torch.equal(ids.long(), expected)
