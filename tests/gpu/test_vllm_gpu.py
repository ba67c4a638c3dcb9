"""The vLLM plug-in on a GPU, without the engine: the double's layer in a CUDA graph, replayed with
other hidden states, padding and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime.integrations.vllm import plugin
from tests import fake_vllm
from tests.fake_vllm import FusedTopKBiasRouter, GateLinear
from tests.gpu.clear_rows import clear_rows
from tests.gpu.graphs import captured

TOKENS, VOCABULARY, SCALE = 24, 512, 1.5
FIRST_IMAGE = 400
KINDS = ("dense", "dense images", "hash", "hash images")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def tensors(kind: str, hidden: int, experts: int, top_k: int) -> dict[str, Tensor]:
    found = {"weight": draw(experts, hidden).bfloat16() / hidden**0.5}
    if "hash" in kind:
        scores = torch.rand(VOCABULARY, experts, device="cuda")
        found["hash_indices_table"] = scores.topk(top_k).indices.int()
    else:
        found["e_score_correction_bias"] = draw(experts)
    if "images" in kind:
        found["bias_vl"] = draw(experts)
    return found


def make_layer(engine: Any, top_k: int, values: dict[str, Tensor]) -> Any:
    experts, hidden = values["weight"].shape
    gate = GateLinear(hidden, experts).cuda()
    gate.weight.data.copy_(values["weight"])
    rest: dict[str, Any] = {
        name: parameter(tensor) for name, tensor in values.items() if name != "weight"
    }
    router = FusedTopKBiasRouter(
        top_k, routed_scaling_factor=SCALE, image_sentinel_lo=FIRST_IMAGE, **rest
    )
    runner = engine[f"{fake_vllm.FUSED_MOE}.runner.moe_runner"].MoERunner
    layer = runner("layer", router, gate=gate)
    layer.method.topk_indices_dtype = torch.int64
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_layer(kind: str, models: Any, gate_models: Any) -> None:
    hidden, experts, top_k = (gate_models if "hash" in kind else models)[0]
    with fake_vllm.installed() as engine:
        values = tensors(kind, hidden, experts, top_k)
        without = make_layer(engine, top_k, values)
        plugin.register()
        with_us = make_layer(engine, top_k, values)
        try:
            x = torch.zeros(TOKENS, hidden, dtype=torch.bfloat16, device="cuda")
            words = torch.zeros(TOKENS, dtype=torch.int32, device="cuda")
            padding = torch.zeros(TOKENS, dtype=torch.bool, device="cuda")

            def call() -> Any:
                with fake_vllm.forward_pass(padding):
                    return with_us(x, words)

            graph, found = captured(call, warmups=2)
            for step in range(4):
                if step == 2:
                    new = tensors(kind, hidden, experts, top_k)
                    for layer in (without, with_us):
                        own = vars(layer.router) | {"weight": layer.gate.weight}
                        own["hash_indices_table"] = layer.router._hash_indices_table
                        for name, tensor in new.items():
                            loader = getattr(
                                own[name], "weight_loader", fake_vllm.default_weight_loader
                            )
                            loader(own[name], tensor)
                words.copy_(torch.randint(0, VOCABULARY, (TOKENS,)))
                padding.copy_(torch.rand(TOKENS) < 0.3)
                router = without.router
                biases = [router.e_score_correction_bias, router.bias_vl]
                x.copy_(clear_rows(without.gate.weight, biases, top_k, TOKENS))
                with fake_vllm.forward_pass(padding):
                    expected = without(x, words)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(found[1], expected[1])
                torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
        finally:
            plugin.uninstall()
