"""The SGLang plug-in in the real SGLang, on a CPU.

The MoE block, its gate, both kinds of its router, the registry of hooks and the loader of weights
are SGLang's own. The experts are not: theirs return the weights and the ids that they were given.
SGLang ranks by plain torch here, and leaves the order of a row open, so rows are compared by id.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime.integrations.sglang import plugin
from router_runtime.integrations.sglang.engine import is_hooked, load_engine

pytest.importorskip("sglang", reason="SGLang is not installed")

# SGLang warns of what it cannot do without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore")

H, E, K, V, SCALE = 128, 24, 4, 50, 1.5
KINDS = ("dense", "hash")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WEIGHT = torch.randn(E, H, generator=seeded(0)).bfloat16() / 8
BIAS = torch.randn(E, generator=seeded(1))
TABLE = torch.rand(V, E, generator=seeded(3)).topk(K).indices.int()


def states(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=seeded(tokens)).bfloat16()


def words(tokens: int) -> Tensor:
    return torch.arange(tokens) * 7 % V


class Routed:
    """What the experts were given; the block multiplies it by the scaling factor."""

    def __init__(self, given: Any) -> None:
        self.weights, self.ids = given.topk_weights, given.topk_ids

    def __imul__(self, factor: float) -> Routed:
        return self


class Experts(nn.Module):
    """Experts that return what they were given."""

    fuses = False
    runner_backend = None
    routing_method_type = None

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.should_fuse_routed_scaling_factor_in_topk = self.fuses
        self.moe_runner_config = SimpleNamespace(inplace=False)
        self.quant_method = None

    def forward(self, hidden_states: Tensor, topk_output: Any) -> Routed:
        return Routed(topk_output)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process of SGLang, in its deterministic mode, whose gate computes in fp32."""
    from sglang.srt.models import deepseek_v2
    from sglang.srt.runtime_context import get_context, get_parallel

    monkeypatch.setenv("SGLANG_OPT_USE_FUSED_HASH_TOPK", "0")  # its kernel, for GPUs only
    monkeypatch.setattr(deepseek_v2, "get_moe_impl_class", lambda _: Experts)
    with (
        get_context().override_server_args(device="cpu", enable_deterministic_inference=True),
        get_parallel().override(tp_rank=0, tp_size=1, moe_ep_size=1, moe_ep_rank=0),
        torch.no_grad(),
    ):
        yield
    plugin.uninstall()


def load_plugin() -> None:
    """What SGLang does in each of its processes."""
    from sglang.srt import plugins

    plugins._plugins_loaded = False
    plugins.load_plugins()


def make_block(kind: str = "dense") -> Any:
    """A MoE block with its weights loaded, as a model makes it."""
    from sglang.srt.model_loader.weight_utils import default_weight_loader
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    config = SimpleNamespace(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=K,
        num_hash_layers=1,
        n_shared_experts=None,
        routed_scaling_factor=SCALE,
        moe_intermediate_size=32,
        vocab_size=V,
        hidden_act="silu",
        topk_method="noaux_tc",
        scoring_func="sqrtsoftplus",
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        model_type="deepseek_v4",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        block = DeepseekV2MoE(config, 0 if kind == "hash" else 1, is_deepseek_v4=True)
    finally:
        torch.set_default_dtype(torch.float32)
    default_weight_loader(block.gate.weight, WEIGHT)
    if kind == "hash":
        default_weight_loader(block.topk.tid2eid, TABLE)
    else:
        default_weight_loader(block.gate.e_score_correction_bias, BIAS)
    return block


def call(block: Any, tokens: int) -> Routed:
    found = block(
        states(tokens),
        input_ids_global=words(tokens),
        skip_shared_experts=True,
        return_moe_output=True,
    ).routed
    assert isinstance(found, Routed)
    return found


def same(found: Routed, expected: Routed) -> None:
    (ours, weights), (theirs, others) = (
        (order.values, each.weights.gather(1, order.indices))
        for each in (found, expected)
        for order in [each.ids.long().sort(dim=1)]
    )
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(weights, others, rtol=4e-6, atol=0)


def served(block: Any) -> Any:
    return block.gate.forward.__self__


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_and_weights(
    kind: str, fuses: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Experts, "fuses", fuses)
    caplog.set_level(logging.INFO)
    without = make_block(kind)
    load_plugin()
    with_us = make_block(kind)
    for tokens in (1, 60, 60):
        same(call(with_us, tokens), call(without, tokens))
    assert served(with_us).is_serving
    assert f"MoE layers routed by router_runtime: {kind}: layer" in caplog.text


def test_it_is_found_through_the_entry_point() -> None:
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group

    found = load_plugins_by_group(GENERAL_PLUGINS_GROUP)
    assert found["dsv4_router"][0] is plugin.register
    load_plugin()
    assert all(is_hooked(function, hook) for function, (hook, _) in plugin._HOOKS.items())


def test_the_version_is_one_that_is_known() -> None:
    assert load_engine().version == importlib.metadata.version("sglang")


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_router_called_by_others(kind: str) -> None:
    """Two-batch overlap calls gate and router without the block, which would pass the token ids."""
    without = make_block(kind)
    load_plugin()
    with_us = make_block(kind)
    call(with_us, 9)
    x, given = states(9), {"input_ids": words(9)} if kind == "hash" else {}
    same(
        Routed(with_us.topk(x, with_us.gate(x), **given)),
        Routed(without.topk(x, without.gate(x), **given)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_updated_weights_are_there_without_a_call(kind: str) -> None:
    """As the engine updates them, by two of its ways."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    load_plugin()
    block = make_block(kind)
    call(block, 3)
    router = served(block).served
    name, other = (
        ("topk.tid2eid", "table")
        if kind == "hash"
        else (
            "gate.e_score_correction_bias",
            "bias",
        )
    )
    values = {
        "gate.weight": WEIGHT.flip(0),
        name: TABLE.flip(0) if kind == "hash" else BIAS.flip(0),
    }
    weight_updater._model_load_weights_direct(block, list(values.items()))
    state = router.state_dict()
    assert torch.equal(state["weight"], values["gate.weight"])
    assert torch.equal(state[other], values[name])
    assert served(block).served is router


def test_a_model_of_an_earlier_generation_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_plugin()
    block = make_block()
    config = block.config
    config.scoring_func = "sigmoid"
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    other = DeepseekV2MoE(config, 5)
    assert "forward" not in vars(other.gate)
    assert "a model: expected DeepSeek-V4, found an earlier one" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_uninstalling_restores(kind: str) -> None:
    without = make_block(kind)
    load_plugin()
    with_us = make_block(kind)
    call(with_us, 3)
    assert len(plugin.uninstall()) == 1
    assert not vars(with_us.gate).keys() & {"forward"}
    same(call(with_us, 9), call(without, 9))
    assert "forward" not in vars(make_block(kind).gate)
