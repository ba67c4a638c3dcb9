"""The SGLang plug-in on a double of SGLang (tests/fake_sglang.py), on a CPU.

Each block is made twice, before the plug-in is there and after; ids are compared exactly, weights
to 2e-6 relative: 4e-7 of a score twice, and the roundings of logits, sum, quotient and scale.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime.integrations.engines import variables
from router_runtime.integrations.sglang import plugin
from router_runtime.integrations.sglang.plugin import LOG
from tests import fake_sglang
from tests.fake_sglang import MODEL, HashTopK, MoEGate, Process, TopK, TopKConfig, TopKOutputFormat
from tests.runtime.engine_layers import (
    BIAS,
    ENTRY_POINTS,
    SCALE,
    TABLE,
    WEIGHT,
    E,
    H,
    K,
    draw,
    load_entry_points,
    states,
    words,
)
from tests.runtime.routers import build_on_the_fake_gpu

KINDS = ("dense", "hash")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As in the engine; its gates require grad."""
    with torch.no_grad():
        yield


def make_block(engine: Any, kind: str = "dense", layer_id: int = 0, **given: Any) -> Any:
    """A block as a model makes it, with its weights loaded."""
    options: dict[str, Any] = {"gate": {}, "topk": {}, "moe": {}, "v4": True, "apply": False}
    options |= given
    apply = {"apply_routed_scaling_factor_on_output": options["apply"]}
    hashed = engine["sglang.srt.layers.moe.hash_topk"].HashTopK

    def topk() -> nn.Module:
        if kind == "hash":
            return hashed(K, TABLE.clone(), SCALE, options["apply"])  # type: ignore[no-any-return]
        settings = {"routed_scaling_factor": SCALE, **apply, **options["topk"]}
        return TopK(TopKConfig(K, **settings))

    def gate() -> MoEGate:
        bias = None if kind == "hash" else BIAS.clone()
        made = MoEGate(H, E, **{"bias": bias, **options["gate"]})
        made.weight.data.copy_(WEIGHT)
        return made

    config = SimpleNamespace(is_deepseek_v4=options["v4"], gate=gate, topk=topk)
    return engine[MODEL].DeepseekV2MoE(config, layer_id, **options["moe"])


@pytest.fixture
def engine() -> Iterator[dict[str, Any]]:
    """The double, before the plug-in is loaded; afterwards nothing of the plug-in is left."""
    with fake_sglang.installed() as modules:
        yield modules
        plugin.uninstall()


def load_plugin() -> None:
    """What SGLang does in each of its processes."""
    load_entry_points("sglang.srt.plugins")
    sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()


Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(engine: dict[str, Any]) -> Pair:
    """Makes a block without the plug-in, and one with it."""

    def make(kind: str = "dense", **given: Any) -> tuple[Any, Any]:
        plugin.uninstall()
        without = make_block(engine, kind, **given)
        load_plugin()
        return without, make_block(engine, kind, **given)

    return make


def same(found: Any, expected: Any) -> None:
    assert found.topk_ids.dtype == expected.topk_ids.dtype
    assert torch.equal(found.topk_ids, expected.topk_ids)
    torch.testing.assert_close(found.topk_weights, expected.topk_weights, rtol=2e-6, atol=0)


def call(block: Any, tokens: int) -> Any:
    return block(states(tokens), input_ids_global=words(tokens))


# --- the same results -----------------------------------------------------------------------------


def test_the_entry_point_is_of_the_group_that_sglang_loads() -> None:
    assert list(ENTRY_POINTS["sglang.srt.plugins"]) == ["dsv4_router"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("tokens", [1, 60])
def test_ids_and_weights(pair: Pair, kind: str, apply: bool, tokens: int) -> None:
    without, with_us = pair(kind, apply=apply)
    Process.physical_ids = torch.arange(E).flip(0)
    for valid in (None, tokens // 2, tokens // 2):
        Process.valid = valid
        same(call(with_us, tokens), call(without, tokens))
        found, expected = Process.recorded[-2:]
        assert torch.equal(found, expected)
    # The engine's own gate may serve the first batch, before a Router is there.
    assert with_us.gate.calls <= (kind == "hash")
    assert kind == "hash" or with_us.topk.calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_under_inference_mode(pair: Pair, engine: dict[str, Any], kind: str) -> None:
    """SGLang's workers run under it."""
    without, with_us = pair(kind, apply=True)
    load = engine["sglang.srt.model_loader.weight_utils"].default_weight_loader
    for values in (OTHERS, OTHERS | {"weight": WEIGHT}):
        with torch.inference_mode():
            for _ in range(2):
                same(call(with_us, 9), call(without, 9))
        for block in (without, with_us):
            for name, tensor in parameters(block).items():
                load(tensor, values[name])
        same(call(with_us, 9), call(without, 9))


@pytest.mark.parametrize("fused", [False, True])
def test_both_ways_to_look_experts_up(
    pair: Pair, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HashTopK, "fused", fused)
    without, with_us = pair("hash")
    for _ in range(2):
        same(call(with_us, 9), call(without, 9))
    by_place = with_us(states(9), None, None, words(9), words(9))
    same(by_place, call(without, 9))


def test_without_renormalization(pair: Pair) -> None:
    without, with_us = pair(topk={"renormalize": False})
    same(call(with_us, 9), call(without, 9))


def test_logits_that_are_ranked_twice(pair: Pair) -> None:
    """The engine scales the weights in place, and masks the ids."""
    without, with_us = pair(apply=True)
    x, Process.valid = states(9), 5
    logits, theirs = with_us.gate(x), without.gate(x)
    for _ in range(2):
        same(with_us.topk(x, logits), without.topk(x, theirs))


def test_logits_that_something_has_written_into(pair: Pair) -> None:
    without, with_us = pair()
    call(with_us, 9)
    Process.fakes_dispatch = True
    same(call(with_us, 9), call(without, 9))


def test_logits_of_another_gate(pair: Pair, engine: dict[str, Any]) -> None:
    without, with_us = pair()
    other = make_block(engine, gate={"bias": -BIAS})
    x = states(9)
    call(with_us, 9), call(other, 9)
    same(with_us.topk(x, other.gate(x)), without.topk(x, without.gate(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_router_called_by_others(pair: Pair, kind: str) -> None:
    """Two-batch overlap calls gate and router without the block, which would pass the token ids."""
    without, with_us = pair(kind)
    call(with_us, 9)
    x, given = states(9), {"input_ids": words(9)} if kind == "hash" else {}
    same(with_us.topk(x, with_us.gate(x), **given), without.topk(x, without.gate(x), **given))


def test_a_hash_block_without_token_ids_of_each_row(pair: Pair) -> None:
    without, with_us = pair("hash")
    call(with_us, 9)
    for block in (with_us, without):
        with pytest.raises(AssertionError):
            block(states(9), input_ids_global=words(8))
    same(call(with_us, 9), call(without, 9))


# --- what is left alone ---------------------------------------------------------------------------


def untouched(block: Any) -> bool:
    """Whether gate, router and block are the engine's own."""
    own = (block.gate, block.topk, block)
    config = getattr(block.topk, "topk_config", TopKConfig(1))
    return config.custom_routing_function is None and not any("forward" in vars(x) for x in own)


def test_disabled(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(variables.DISABLE_VARIABLE, "1")
    load_plugin()
    assert caplog.messages == ["SGLang routes by itself: DSV4_ROUTER_DISABLE is set"]
    assert untouched(make_block(engine))


@pytest.mark.parametrize("version", ["0.5.22", "0.5.12.post1", "0.6.0", "1.0", "dev"])
def test_unknown_version(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with fake_sglang.installed(version) as engine:
        load_plugin()
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"expected SGLang 0.5.23 or a newer 0.5, found {version}" in record.message
        assert "run: pip install 'sglang>=0.5.23,<0.6'" in record.message
        assert untouched(make_block(engine))


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.30rc1"])
def test_known_version(version: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with fake_sglang.installed(version):
        load_plugin()
        assert f"SGLang {version}: DeepSeek-V4 routers will be served" in caplog.text
        plugin.uninstall()


@pytest.mark.parametrize(
    ("module", "name", "changed", "said"),
    [
        (MODEL, "MoEGate.forward", lambda self, x: x, r"MoEGate.forward\(.* found \(self, x\)"),
        (
            MODEL,
            "DeepseekV2MoE.forward",
            lambda self, hidden_states: 0,
            r"expected DeepseekV2MoE.forward\(input_ids_global=...\), found none",
        ),
        (MODEL, "DeepseekV2MoE.__init__", lambda self: None, r"DeepseekV2MoE.__init__\(self, conf"),
        (
            "sglang.srt.layers.moe.hash_topk",
            "HashTopK._forward_torch",
            lambda self: 0,
            "HashTopK._forward_torch",
        ),
        ("sglang.kernels.ops.moe.dsv4", "hash_topk", None, "hash_topk"),
        ("sglang.srt.layers.moe.topk", "TopKOutputFormat", None, "TopKOutputFormat"),
        ("sglang.srt.plugins.hook_registry", "HookType", None, "HookType"),
    ],
)
def test_changed_engine(
    module: str,
    name: str,
    changed: Any,
    said: str,
    engine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner: Any = engine[module]
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, owner)
    if changed is None:
        monkeypatch.delattr(owner, last)
    else:
        monkeypatch.setattr(owner, last, changed)
    load_plugin()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("SGLang routes by itself: ")
    assert re.search(said, record.message)


@pytest.mark.parametrize(
    "target",
    [
        "sglang.kernels.ops.moe.dsv4.hash_topk",
        "sglang.srt.layers.moe.hash_topk.HashTopK._forward_torch",
        "sglang.srt.model_loader.weight_utils.default_weight_loader",
    ],
)
def test_a_hook_that_was_not_applied(
    target: str, engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang only logs that, and a hash layer's logits would be NaN."""
    registry = engine["sglang.srt.plugins.hook_registry"].HookRegistry
    registry._patched.add(target)
    load_plugin()
    block = make_block(engine, "hash")
    name = "HashTopK._forward_torch" if "HashTopK" in target else target.rpartition(".")[2]
    assert f"SGLang did not apply the hook on {name}" in caplog.text
    assert untouched(block)


def test_loading_twice_registers_once(engine: dict[str, Any]) -> None:
    registry = engine["sglang.srt.plugins.hook_registry"].HookRegistry
    load_plugin()
    load_plugin()
    plugin.uninstall()
    load_plugin()
    assert [len(hooks) for hooks in registry._hooks.values()] == [1, 1, 1, 1]
    block = make_block(engine)
    call(block, 3)
    assert [layer.name for layer in plugin.layers()] == ["layer 0"]


@pytest.mark.parametrize(
    ("kind", "given", "said", "level"),
    [
        ("dense", {"v4": False}, "a model: expected DeepSeek-V4, found an earlier one", "INFO"),
        ("dense", {"topk": {"scoring_func": "sigmoid"}}, "a scoring function: exp", "WARNING"),
        ("dense", {"topk": {"num_shared_topk_slots": 1}}, "shared experts: expected", "WARNING"),
        ("dense", {"topk": {"use_grouped_topk": True}}, "no groups of experts", "WARNING"),
        (
            "dense",
            {"topk": {"custom_routing_function": lambda **_: 0}},
            "no custom routing function, found one",
            "WARNING",
        ),
        (
            "dense",
            {"topk": {"output_format": TopKOutputFormat.BYPASSED}},
            "its experts take logits and route by themselves",
            "WARNING",
        ),
        ("dense", {"gate": {"bias": None}}, "a bias or a hash table, found neither", "WARNING"),
        (
            "dense",
            {"gate": {"bias": BIAS.bfloat16()}},
            "a gate's bias: expected torch.float32 [24], found torch.bfloat16",
            "WARNING",
        ),
        (
            "dense",
            {"gate": {"dtype": torch.float32}},
            "expected torch.bfloat16 [experts, hidden], found torch.float32",
            "WARNING",
        ),
    ],
)
def test_blocks_that_are_left_alone(
    kind: str,
    given: Any,
    said: str,
    level: str,
    pair: Pair,
    engine: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    _, block = pair(kind, **given)
    make_block(engine, kind, 1, **given)
    reasons = [record for record in caplog.records if "layers like it" in record.message]
    assert [record.levelname for record in reasons] == [level]  # once for both
    assert reasons[0].message.startswith("SGLang routes layer 0, and layers like it, by itself: ")
    assert said in reasons[0].message
    assert "forward" not in vars(block.gate)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("dense", lambda m: setattr(m.gate, "forward", abs), "a gate's forward: expected the one"),
        ("dense", lambda m: setattr(m, "gate", nn.Linear(H, E)), "expected MoEGate, found Linear"),
        ("dense", lambda m: setattr(m, "topk", nn.Linear(H, E)), "expected TopK, found Linear"),
        (
            "dense",
            lambda m: setattr(m.gate, "e_score_correction_bias_vl", BIAS),
            "no bias for image tokens, found one, by which SGLang routes itself",
        ),
        ("dense", lambda m: delattr(m.topk.topk_config, "top_k"), "an attribute that was expected"),
        ("dense", lambda m: delattr(m, "layer_id"), "an attribute that was expected is missing"),
        ("hash", lambda m: setattr(m.topk, "score_func", "sigmoid"), "a scoring function: expect"),
        ("hash", lambda m: setattr(m.topk, "num_shared_topk_slots", 1), "shared experts: expected"),
        ("hash", lambda m: setattr(m.topk, "topk", K + 1), "a hash table: expected [vocabulary, 5"),
        ("hash", lambda m: setattr(m, "forward", abs), "a MoE block's forward: expected the one"),
    ],
)
def test_parts_that_are_left_alone(
    kind: str,
    change: Callable[[Any], None],
    said: str,
    engine: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_plugin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_registration", None)
        block = make_block(engine, kind)
    change(block)
    assert plugin._registration is not None
    plugin._registration.serve(block)
    assert said in caplog.text
    assert plugin.layers() == []


def test_another_class_of_block(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    load_plugin()
    kind = engine[MODEL].DeepseekV2MoE
    engine[MODEL].DeepseekV2MoE = type("Theirs", (kind,), {})
    block = make_block(engine)
    assert "a MoE block: expected DeepseekV2MoE, found Theirs" in caplog.text
    assert untouched(block)


def test_experts_that_take_logits_after_all(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    without, with_us = pair()
    for block in (without, with_us):
        block.topk.topk_config.output_format = TopKOutputFormat.BYPASSED
    torch.testing.assert_close(call(with_us, 3), call(without, 3))
    assert "its experts take logits and route by themselves" in caplog.text
    assert untouched(with_us)


def test_weights_that_are_refused(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    without, with_us = pair()
    for block in (without, with_us):
        block.gate.weight.data[3, 5] = torch.nan
    assert torch.equal(call(with_us, 3).topk_ids, call(without, 3).topk_ids)
    assert "weight: expected finite values" in caplog.text
    assert untouched(with_us)


@pytest.mark.parametrize("rows", [states(4).float(), states(4).view(2, 2, H)], ids=str)
def test_rows_of_another_kind(pair: Pair, rows: Tensor) -> None:
    without, with_us = pair()
    call(with_us, 4)
    assert torch.equal(with_us.gate(rows, None), without.gate(rows, None))
    assert with_us.gate.calls == 1


def test_a_compiled_block_ranks_the_engines_logits(pair: Pair) -> None:
    """As in a piecewise graph: tensors carry nothing there, and nothing breaks the graph."""
    without, with_us = pair(apply=True)
    call(with_us, 4)
    torch._dynamo.reset()
    Process.recorded = []

    def routed(x: Tensor) -> tuple[Tensor, Tensor]:
        config = with_us.topk.topk_config
        weights, ids = config.custom_routing_function(
            hidden_states=x, gating_output=with_us.gate(x), topk=K, renormalize=True
        )
        return weights * SCALE, ids

    found = torch.compile(routed, backend="eager", fullgraph=True)(states(9))
    expected = call(without, 9)
    assert torch.equal(found[1], expected.topk_ids)
    torch.testing.assert_close(found[0], expected.topk_weights, rtol=2e-6, atol=0)
    torch._dynamo.reset()


def test_a_compiled_router_ranks_logits_that_come_from_elsewhere(pair: Pair) -> None:
    """What waits at the logits of one call must not be compiled into the next."""
    without, with_us = pair()
    call(with_us, 4)
    torch._dynamo.reset()
    route = with_us.topk.topk_config.custom_routing_function

    def routed(x: Tensor, logits: Tensor) -> Any:
        return route(hidden_states=x, gating_output=logits, topk=K, renormalize=True)

    compiled = torch.compile(routed, backend="eager", fullgraph=True)
    for seed in range(3):
        x = states(9, seed)
        weights, ids = compiled(x, with_us.gate(x))
        expected = without(x)
        assert torch.equal(ids, expected.topk_ids)
        torch.testing.assert_close(weights, expected.topk_weights, rtol=2e-6, atol=0)
    torch._dynamo.reset()


def test_a_compiled_hash_block_is_the_engines_own(pair: Pair) -> None:
    without, with_us = pair("hash")
    call(with_us, 4)
    torch._dynamo.reset()
    found = torch.compile(lambda x: with_us(x, input_ids_global=words(9)), backend="eager")(
        states(9)
    )
    same(found, call(without, 9))
    torch._dynamo.reset()


# --- the log --------------------------------------------------------------------------------------


def test_the_log_names_what_is_served(
    engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_plugin()
    blocks = [make_block(engine, kind, i) for i, kind in enumerate(("hash", "dense", "dense"))]
    blocks.append(make_block(engine, "dense", 3, topk={"num_shared_topk_slots": 1}))
    for _ in range(2):
        for block in blocks[:3]:
            call(block, 3)
    draft = make_block(engine, "dense", 0, moe={"is_nextn": True})
    call(draft, 3)
    assert [record.message for record in caplog.records if record.name == LOG.name] == [
        "SGLang 0.5.23: DeepSeek-V4 routers will be served; after the first batch follows which "
        "layers are",
        "SGLang routes layer 3, and layers like it, by itself: shared experts: expected beside the "
        "routed ones, found in places after them",
        "MoE layers routed by router_runtime: hash: layer 0, dense: 2 (layer 1 to layer 2)",
        "MoE layers routed by router_runtime: dense: draft layer 0",
    ]


# --- new weights ----------------------------------------------------------------------------------


def parameters(block: Any) -> dict[str, Tensor]:
    found = {"weight": block.gate.weight}
    if isinstance(block.topk, HashTopK):
        return found | {"table": block.topk.tid2eid}
    return found | {"bias": block.gate.e_score_correction_bias}


OTHERS = {
    "weight": draw(E, H, seed=7).bfloat16() / 8,
    "bias": draw(E, seed=8),
    "table": TABLE.flip(0),
}


def served(block: Any) -> Any:
    """What serves a block."""
    return block.gate.forward.__self__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_loaded_weights_are_there_without_a_call(
    pair: Pair, engine: dict[str, Any], kind: str, own: bool
) -> None:
    """A captured graph is replayed without any Python, and reads the Router's own tensors."""
    without, with_us = pair(kind)
    if own:  # a loader of the parameter's own, which does not call the default one
        for block in (without, with_us):
            for tensor in parameters(block).values():
                tensor.weight_loader = lambda param, value: param.data.copy_(value)  # type: ignore[attr-defined]
    for _ in range(2):
        call(with_us, 9)
    router, address = served(with_us).served, served(with_us).served.state_dict()
    default = engine["sglang.srt.model_loader.weight_utils"].default_weight_loader
    for block in (without, with_us):
        for name, tensor in parameters(block).items():
            getattr(tensor, "weight_loader", default)(tensor, OTHERS[name])
    now = served(with_us).served.state_dict()
    assert served(with_us).served is router
    assert all(torch.equal(now[name], OTHERS[name]) for name in parameters(with_us))
    assert all(now[name].data_ptr() == address[name].data_ptr() for name in now)
    same(call(with_us, 9), call(without, 9))


def test_values_written_in_place_are_seen_by_the_next_call(pair: Pair) -> None:
    without, with_us = pair()
    call(with_us, 9)
    for block in (without, with_us):
        for name, tensor in parameters(block).items():
            tensor.copy_(OTHERS[name])
    same(call(with_us, 9), call(without, 9))
    for block in (without, with_us):
        block.gate.weight.data.copy_(WEIGHT)  # past every notice
    plugin.refresh()
    same(call(with_us, 9), call(without, 9))


def test_new_weights_that_are_refused(
    pair: Pair, engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    without, with_us = pair()
    call(with_us, 3)
    for block in (without, with_us):
        engine["sglang.srt.model_loader.weight_utils"].default_weight_loader(
            block.gate.weight, WEIGHT * torch.nan
        )
    assert "new weights are refused" in caplog.text
    assert untouched(with_us)
    assert torch.equal(call(with_us, 3).topk_ids, call(without, 3).topk_ids)


# --- uninstalling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_uninstalling_restores(pair: Pair, engine: dict[str, Any], kind: str) -> None:
    without, block = pair(kind)
    for _ in range(2):
        call(block, 3)
    router = weakref.ref(served(block).served)
    assert router() is not None
    assert plugin.uninstall() == ["layer 0"]
    assert untouched(block)
    gc.collect()
    assert router() is None
    same(call(block, 3), call(without, 3))
    assert untouched(make_block(engine))
    assert plugin.uninstall() == []


def test_a_block_can_be_collected(pair: Pair) -> None:
    _, block = pair()
    call(block, 3)
    router = weakref.ref(served(block).served)
    del block
    gc.collect()
    assert router() is None
    assert plugin.layers() == []


# --- what a call costs ----------------------------------------------------------------------------


def test_a_call_is_one_launch(
    gpu: Any, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    load_plugin()
    block = make_block(engine, apply=True)
    call(block, 3)
    gpu.launches.clear()
    call(block, 3)
    assert len(gpu.launches) == 1


# --- without SGLang -------------------------------------------------------------------------------


def test_without_sglang(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    group = "sglang.srt.plugins"
    (value,) = ENTRY_POINTS[group].values()
    importlib.metadata.EntryPoint("dsv4_router", value, group).load()()
    assert "SGLang routes by itself: something that this package uses is not in it" in caplog.text
