"""The SGLang plug-in on a GPU, without the engine: the double's block in a CUDA graph, replayed
with other hidden states, padding and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from router_runtime.integrations.sglang import plugin
from tests import fake_sglang
from tests.fake_sglang import MODEL, HashTopK, MoEGate, Process, TopK, TopKConfig
from tests.gpu.clear_rows import clear_rows
from tests.gpu.graphs import captured

TOKENS, VOCABULARY, SCALE = 24, 512, 1.5


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(kind: str, hidden: int, experts: int, top_k: int) -> dict[str, Tensor]:
    weight = torch.randn(experts, hidden, device="cuda").bfloat16() / hidden**0.5
    if kind == "hash":
        scores = torch.rand(VOCABULARY, experts, device="cuda")
        return {"weight": weight, "table": scores.topk(top_k).indices.int()}
    return {"weight": weight, "bias": torch.randn(experts, device="cuda")}


def own_tensors(block: Any) -> dict[str, Tensor]:
    if isinstance(block.topk, HashTopK):
        return {"weight": block.gate.weight, "table": block.topk.tid2eid}
    return {"weight": block.gate.weight, "bias": block.gate.e_score_correction_bias}


def make_block(engine: Any, top_k: int, values: dict[str, Tensor]) -> Any:
    experts, hidden = values["weight"].shape
    hashed = engine["sglang.srt.layers.moe.hash_topk"].HashTopK

    def topk() -> Any:
        if "table" in values:
            return hashed(top_k, values["table"].clone(), SCALE, True)
        return TopK(
            TopKConfig(
                top_k, routed_scaling_factor=SCALE, apply_routed_scaling_factor_on_output=True
            )
        )

    def gate() -> MoEGate:
        bias = values.get("bias")
        made = MoEGate(hidden, experts, None if bias is None else bias.clone()).cuda()
        made.weight.copy_(values["weight"])
        return made

    config = SimpleNamespace(is_deepseek_v4=True, gate=gate, topk=topk)
    return engine[MODEL].DeepseekV2MoE(config, 0)


@pytest.mark.parametrize("kind", ["dense", "hash"])
def test_a_captured_block(kind: str, models: Any, gate_models: Any) -> None:
    hidden, experts, top_k = (gate_models if kind == "hash" else models)[0]
    with fake_sglang.installed() as engine:
        values = tensors(kind, hidden, experts, top_k)
        without = make_block(engine, top_k, values)
        plugin.register()
        engine["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()
        with_us = make_block(engine, top_k, values)
        load = engine["sglang.srt.model_loader.weight_utils"].default_weight_loader
        try:
            x = torch.zeros(TOKENS, hidden, dtype=torch.bfloat16, device="cuda")
            words = torch.zeros(TOKENS, dtype=torch.int32, device="cuda")
            Process.valid = torch.full((1,), TOKENS, dtype=torch.int32, device="cuda")
            graph, found = captured(lambda: with_us(x, input_ids_global=words), warmups=2)
            assert with_us.gate.forward.__self__.is_serving
            for step in range(4):
                if step == 2:
                    new = tensors(kind, hidden, experts, top_k)
                    for block in (without, with_us):
                        for name, tensor in own_tensors(block).items():
                            load(tensor, new[name])
                words.copy_(torch.randint(0, VOCABULARY, (TOKENS,)))
                Process.valid.fill_(TOKENS - 5 * step)
                biases = [without.gate.e_score_correction_bias]
                x.copy_(clear_rows(without.gate.weight, biases, top_k, TOKENS))
                expected = without(x, input_ids_global=words)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(found.topk_ids, expected.topk_ids)
                torch.testing.assert_close(
                    found.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-7
                )
        finally:
            plugin.uninstall()
