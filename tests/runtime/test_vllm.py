"""The vLLM plug-in on a double of vLLM (tests/fake_vllm.py), on a CPU.

Each layer is made twice, before the plug-in is there and after; ids are compared exactly, weights
to 2e-6 relative: 4e-7 of a score twice, and the roundings of logits, sum, quotient and scale.
"""

from __future__ import annotations

import builtins
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

from router_runtime.device import kernels
from router_runtime.integrations.engines import layer, variables
from router_runtime.integrations.engines.report import share_handlers
from router_runtime.integrations.vllm import plugin
from router_runtime.integrations.vllm.engine import load_engine
from router_runtime.integrations.vllm.plugin import LOG
from router_runtime.routing.router import ROUTERS, Router
from tests import fake_vllm
from tests.fake_vllm import FusedTopKBiasRouter, GateLinear, forward_pass
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

FIRST_IMAGE = 40
IMAGE_BIAS = draw(E, seed=2)


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)


def tensors(kind: str) -> dict[str, Any]:
    """The arguments of the router of a kind of layer."""
    found: dict[str, Any] = {}
    if "hash" in kind:
        found["hash_indices_table"] = parameter(TABLE)
    else:
        found["e_score_correction_bias"] = parameter(BIAS)
    if "images" in kind:
        found |= {"bias_vl": parameter(IMAGE_BIAS), "image_sentinel_lo": FIRST_IMAGE}
    return found


KINDS = ("dense", "dense images", "hash", "hash images")


def make_layer(
    engine: Any, kind: str = "dense", name: str = "layers.0.experts", **given: Any
) -> Any:
    """A layer as a model makes it, with its weights loaded."""
    options = {"router": {}, "runner": {}} | given
    gate = GateLinear(H, E)
    gate.weight_loader(gate.weight, WEIGHT)
    router = FusedTopKBiasRouter(
        K, **{"routed_scaling_factor": SCALE, **tensors(kind), **options["router"]}
    )
    module = engine[f"{fake_vllm.FUSED_MOE}.runner.moe_runner"]
    return module.MoERunner(name, router, **{"gate": gate, **options["runner"]})


@pytest.fixture
def engine() -> Iterator[dict[str, Any]]:
    """The double, before the plug-in is loaded; afterwards nothing of the plug-in is left."""
    with fake_vllm.installed() as modules:
        yield modules
        plugin.uninstall()


def load_plugin() -> None:
    """What vLLM does in each of its processes."""
    load_entry_points("vllm.general_plugins")


Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(engine: dict[str, Any]) -> Pair:
    """Makes a layer without the plug-in, and one with it."""

    def make(kind: str = "dense", **given: Any) -> tuple[Any, Any]:
        plugin.uninstall()
        without = make_layer(engine, kind, **given)
        load_plugin()
        return without, make_layer(engine, kind, **given)

    return make


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[1].dtype == expected[1].dtype
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)


# --- the same results -----------------------------------------------------------------------------


def test_the_entry_point_is_of_the_group_that_vllm_loads() -> None:
    assert list(ENTRY_POINTS["vllm.general_plugins"]) == ["dsv4_router"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 60])
def test_ids_and_weights(pair: Pair, kind: str, dtype: torch.dtype | None, tokens: int) -> None:
    method = SimpleNamespace(is_monolithic=False, topk_indices_dtype=dtype)
    without, with_us = pair(kind, runner={"method": method})
    x, ids = states(tokens), words(tokens)
    padding = torch.arange(tokens + 4) % 5 == 2
    for mask in (None, padding, padding):
        with forward_pass(mask):
            for token_ids in (ids, ids.int()):
                same(with_us(x, token_ids), without(x, token_ids))
    # The engine's own gate may serve the first batch, before a Router is there.
    assert with_us.gate.calls == with_us.router.calls
    assert with_us.gate.calls <= ("hash" in kind)


@pytest.mark.parametrize("renormalize", [True, False])
def test_constants_of_the_router(pair: Pair, renormalize: bool) -> None:
    without, with_us = pair(router={"renormalize": renormalize, "routed_scaling_factor": 2.5})
    same(with_us(states(9)), without(states(9)))


@pytest.mark.parametrize("kind", ["dense", "dense images"])
def test_logits_of_the_gate(pair: Pair, kind: str) -> None:
    """They are the products: a fused front of the engine takes them without our weights and ids."""
    without, with_us = pair(kind)
    for _ in range(2):
        found, expected = with_us.gate(states(9))[0], without.gate(states(9))[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_gate_that_returns_logits_alone(pair: Pair) -> None:
    without, with_us = pair()
    without.gate.return_bias = with_us.gate.return_bias = False
    torch.testing.assert_close(with_us.gate(states(9)), without.gate(states(9)))


def test_batch_invariant_mode_keeps_ours(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    _, with_us = pair()
    all_rows = with_us(states(60))
    one_row = with_us(states(60)[7:8])
    assert with_us.gate.calls == 0
    assert torch.equal(all_rows[0][7:8], one_row[0])
    assert torch.equal(all_rows[1][7:8], one_row[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_router_called_by_others(pair: Pair, kind: str) -> None:
    """The engine's specialised decode calls both without the runner, so nothing is announced."""
    without, with_us = pair(kind)
    x, ids = states(9), words(9)
    with_us(x, ids)  # a Router is there

    def call(runner: Any) -> Any:
        logits, _ = runner.gate(x)
        return runner.router.select_experts(
            hidden_states=x, router_logits=logits, topk_indices_dtype=torch.int64, input_ids=ids
        )

    same(call(with_us), call(without))


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_logits(pair: Pair, kind: str) -> None:
    """Naive data parallelism: the rows of all ranks are routed by logits that were gathered."""
    without, with_us = pair(kind)
    x, ids = states(9), words(13)
    with_us(x, ids[:9])
    others = states(4, seed=1)
    logits, _ = without.gate(others)
    for runner in (without, with_us):
        runner.gathered = others, logits
    assert len(without(x, ids)[0]) == 13
    same(with_us(x, ids), without(x, ids))


def test_logits_of_another_layer_are_not_taken(pair: Pair, engine: dict[str, Any]) -> None:
    without, with_us = pair()
    other = make_layer(engine, router={"e_score_correction_bias": parameter(-BIAS)})
    x = states(9)
    expected = without(x)
    with_us(x), other(x)
    found = with_us.router.select_experts(x, other.gate(x)[0], torch.int32)
    same(found, expected)


def test_the_base_class_goes_on_with_our_ids(pair: Pair) -> None:
    """Capture sees logical ids, the expert map follows."""
    seen: dict[str, list[Tensor]] = {"without": [], "with": []}
    results = []
    for name, runner in zip(seen, pair(), strict=True):
        runner.router.capture_fn = seen[name].append
        runner.router.physical_ids = torch.arange(E).flip(0)
        results.append(runner(states(9)))
    same(results[1], results[0])
    assert torch.equal(seen["with"][0], seen["without"][0])


# --- what is left alone ---------------------------------------------------------------------------


def untouched(runner: Any) -> bool:
    """Whether gate and router are the engine's own."""
    own = [each for each in (runner.gate, runner.router) if each is not None]
    return not any(vars(each).keys() & {"forward", "_compute_routing"} for each in own)


def test_disabled(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(variables.DISABLE_VARIABLE, "1")
    load_plugin()
    assert caplog.messages == ["vLLM routes by itself: DSV4_ROUTER_DISABLE is set"]
    assert untouched(make_layer(engine))
    monkeypatch.setenv(variables.DISABLE_VARIABLE, "0")
    load_plugin()
    assert not untouched(make_layer(engine))


@pytest.mark.parametrize("version", ["0.23.9", "0.34.0", "1.0.0", "dev"])
def test_unknown_version(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with fake_vllm.installed(version) as engine:
        load_plugin()
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"expected vLLM 0.24 to 0.33, found {version}" in record.message
        assert "run: pip install 'vllm>=0.24,<0.34'" in record.message
        assert untouched(make_layer(engine))


@pytest.mark.parametrize("version", ["0.24.0", "0.29.1rc1", "0.33.1.dev3+gabc"])
def test_known_version(version: str) -> None:
    with fake_vllm.installed(version):
        assert load_engine().version == version


def changed_method(owner: str, method: str, changed: Any) -> Callable[[Any, Any], None]:
    def change(engine: Any, monkeypatch: Any) -> None:
        module = next(each for each in engine.values() if hasattr(each, owner))
        monkeypatch.setattr(getattr(module, owner), method, changed)

    return change


def removed(module: str, name: str) -> Callable[[Any, Any], None]:
    return lambda engine, _: delattr(engine[module], name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_method("GateLinear", "forward", lambda self, x, y: x), r"found \(self, x, y\)"),
        (
            changed_method("MoERunner", "_forward_impl", lambda self, hidden_states: 0),
            r"expected MoERunner._forward_impl\(.*found \(self, hidden_states\)",
        ),
        (
            changed_method("FusedTopKBiasRouter", "_compute_routing", lambda self: 0),
            r"expected FusedTopKBiasRouter._compute_routing\(",
        ),
        (changed_method("MoERunner", "register_oot", lambda layer: 0), "register_oot"),
        (removed("vllm.model_executor.custom_op", "op_registry_oot"), "op_registry_oot"),
        (removed(f"{fake_vllm.FUSED_MOE}.router.gate_linear", "GateLinear"), "GateLinear"),
    ],
)
def test_changed_engine(
    change: Any,
    said: str,
    engine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(engine, monkeypatch)
    load_plugin()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("vLLM routes by itself: ")
    assert re.search(said, record.message)
    assert engine["vllm.model_executor.custom_op"].__dict__.get("op_registry_oot", {}) == {}


def test_another_plug_in_was_first(
    engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    runner = engine[f"{fake_vllm.FUSED_MOE}.runner.moe_runner"].MoERunner
    theirs = runner.register_oot(name="MoERunner")(type("Theirs", (runner,), {}))
    load_plugin()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Theirs of another plug-in" in record.message
    assert engine["vllm.model_executor.custom_op"].op_registry_oot == {"MoERunner": theirs}


def test_loading_twice_registers_once(engine: dict[str, Any]) -> None:
    load_plugin()
    registered = dict(engine["vllm.model_executor.custom_op"].op_registry_oot)
    load_plugin()
    assert engine["vllm.model_executor.custom_op"].op_registry_oot == registered


class OtherRouter(FusedTopKBiasRouter):
    pass


def changed(attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda gate: setattr(gate, attribute, value)


@pytest.mark.parametrize(
    ("given", "said", "level"),
    [
        ({"router": {"scoring_func": "sigmoid"}}, "a scoring function: expected", "INFO"),
        ({"router": {"num_fused_shared_experts": 1}}, "shared experts: expected", "WARNING"),
        ({"router": {"e_score_correction_bias": None}}, "a bias or a hash table", "WARNING"),
        (
            {"router": {"e_score_correction_bias": BIAS.double()}},
            r"a router's bias: expected torch.float32 [24], found torch.float64",
            "WARNING",
        ),
        ({"router": {"hash_indices_table": TABLE[:, :2]}}, "a hash table: expected", "WARNING"),
        (
            {"router": {"bias_vl": BIAS[1:], "image_sentinel_lo": 4}},
            "the bias of image tokens: expected",
            "WARNING",
        ),
        ({"runner": {"gate": None}}, "expected GateLinear, found NoneType", "WARNING"),
        ({"runner": {"gate": nn.Linear(H, E)}}, "expected GateLinear, found Linear", "WARNING"),
        (
            {"runner": {"gate": GateLinear(H, E, torch.float32)}},
            "expected torch.bfloat16 [experts, hidden], found torch.float32",
            "WARNING",
        ),
        ({"runner": {"shared_expert_gate": nn.Linear(H, 1)}}, "no gate of shared", "WARNING"),
    ],
)
def test_layers_that_are_left_alone(
    given: Any,
    said: str,
    level: str,
    pair: Pair,
    engine: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    _, runner = pair(**given)
    make_layer(engine, name="layers.1.experts", **given)
    reasons = [record for record in caplog.records if "layers like it" in record.message]
    assert [record.levelname for record in reasons] == [level]  # once for both
    assert reasons[0].message.startswith("vLLM routes layers.0.experts, and layers like it, by it")
    assert said in reasons[0].message
    assert untouched(runner)


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("quant_method", object(), "a gate's weight: expected no quantization"),
        ("out_dtype", torch.bfloat16, "a gate's logits: expected torch.float32"),
        ("bias", torch.zeros(E), "a gate: expected no additive bias"),
        ("forward", lambda x: x, "a gate's forward: expected the one of its class"),
    ],
)
def test_gates_that_are_left_alone(
    attribute: str,
    value: Any,
    said: str,
    engine: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = GateLinear(H, E)
    setattr(gate, attribute, value)
    load_plugin()
    runner = make_layer(engine, runner={"gate": gate})
    assert said in caplog.text
    assert "_compute_routing" not in vars(runner.router)


def test_another_class_of_router(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_plugin()
    module = engine[f"{fake_vllm.FUSED_MOE}.runner.moe_runner"]
    runner = module.MoERunner("a", OtherRouter(K, BIAS), gate=GateLinear(H, E))
    assert "a router: expected FusedTopKBiasRouter, found OtherRouter" in caplog.text
    assert untouched(runner)


def test_an_attribute_that_is_missing(
    engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    load_plugin()
    gate = GateLinear(H, E)
    del gate.out_dtype
    runner = make_layer(engine, runner={"gate": gate})
    assert "an attribute that was expected is missing" in caplog.text
    assert untouched(runner)


def test_weights_that_are_refused(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """What a Router refuses is known at the first batch only. The engine serves it."""
    without, with_us = pair()
    for runner in (without, with_us):
        runner.gate.weight.data[3, 5] = torch.nan
    (_, found), (_, expected) = with_us(states(3)), without(states(3))
    assert torch.equal(found, expected)
    assert "weight: expected finite values" in caplog.text
    assert untouched(with_us)


def test_emulated_kernels_serve_if_a_variable_accepts_them(
    gpu: Any,
    engine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "status", lambda *_: "emulated")
    load_plugin()
    refused = make_layer(engine)
    refused(states(3))
    assert "accept='emulated'" in caplog.text
    assert untouched(refused)
    monkeypatch.setenv(variables.ACCEPT_VARIABLE, "emulated")
    made: list[Router] = []

    def router(*arguments: Any, **options: Any) -> Router:
        made.append(Router(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(layer, "Router", router)
    make_layer(engine)(states(3))
    assert len(made) == 1
    assert set(made[0].evidence.values()) == {"emulated"}


def test_experts_that_route_by_themselves(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    method = SimpleNamespace(is_monolithic=True)
    for kind in KINDS:
        without, with_us = pair(kind, runner={"method": method})
        torch.testing.assert_close(with_us(states(3), words(3)), without(states(3), words(3)))
    assert "its experts take logits and route by themselves" in caplog.text
    assert untouched(with_us)


@pytest.mark.parametrize(
    "rows", [states(4).float(), states(4).half(), states(4).view(2, 2, H)], ids=str
)
def test_rows_of_another_kind(pair: Pair, rows: Tensor) -> None:
    without, with_us = pair()
    with_us(states(4))
    assert torch.equal(with_us.gate(rows)[0], without.gate(rows)[0])
    assert with_us.gate.calls == 1


def test_while_a_function_is_compiled_the_engines_own_is_traced(pair: Pair) -> None:
    without, with_us = pair()
    with_us(states(4))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: with_us.gate(x)[0] * 2, backend="eager")
    assert torch.equal(compiled(states(4)), without.gate(states(4))[0] * 2)


# --- the log --------------------------------------------------------------------------------------


def test_the_log_names_what_is_served(
    engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def messages() -> list[str]:
        return [record.message for record in caplog.records if record.name == LOG.name]

    load_plugin()
    kinds = ["hash", "dense", "dense", "dense images"]
    runners = [make_layer(engine, kind, f"layers.{i}") for i, kind in enumerate(kinds)]
    runners.append(
        make_layer(
            engine,
            "dense",
            "layers.4",
            runner={"method": SimpleNamespace(is_monolithic=True, topk_indices_dtype=None)},
        )
    )
    for _ in range(2):
        for runner in runners:
            runner(states(3), words(3))
    assert messages() == [
        "vLLM 0.33.0: DeepSeek-V4 routers will be served; after the first batch follows which "
        "layers are",
        "vLLM routes layers.4, and layers like it, by itself: its experts take logits and route "
        "by themselves",
        "MoE layers routed by router_runtime: hash: layers.0, dense: 2 (layers.1 to layers.2), "
        "dense with image tokens: layers.3; left to vLLM: layers.4",
    ]
    draft = make_layer(engine, "dense", "draft.0")
    draft(states(3))
    assert messages()[-1] == "MoE layers routed by router_runtime: dense: draft.0"


def test_the_log_goes_where_the_engines_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, handler = logging.getLogger("vllm"), logging.StreamHandler()
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "level", logging.INFO)
    monkeypatch.setattr(LOG, "handlers", [])
    monkeypatch.setattr(LOG, "level", logging.NOTSET)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])
    share_handlers(LOG, theirs)
    assert LOG.handlers == []  # the application has given it a place
    monkeypatch.setattr(logging.root, "handlers", [])
    share_handlers(LOG, theirs)
    share_handlers(LOG, theirs)
    assert LOG.handlers == [handler]
    assert LOG.level == logging.INFO


@pytest.mark.parametrize("kind", KINDS)
def test_under_inference_mode(pair: Pair, kind: str) -> None:
    """vLLM's workers run under it, and load weights outside of it."""
    without, with_us = pair(kind)
    with torch.inference_mode():
        for _ in range(2):
            same(with_us(states(9), words(9)), without(states(9), words(9)))
    load_by_loaders(with_us, other_weights())
    load_by_loaders(without, other_weights())
    for inference in (True, False):
        with torch.inference_mode(inference):
            same(with_us(states(9), words(9)), without(states(9), words(9)))


# --- new weights ----------------------------------------------------------------------------------


def other_weights() -> dict[str, Tensor]:
    return {
        "weight": draw(E, H, seed=7).bfloat16() / 8,
        "bias": draw(E, seed=8),
        "image": draw(E, seed=9),
        "table": TABLE.flip(0),
    }


def parameters(runner: Any) -> dict[str, Tensor]:
    router = runner.router
    found = {
        "weight": runner.gate.weight,
        "bias": router.e_score_correction_bias,
        "image": router.bias_vl,
        "table": router._hash_indices_table,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def router_of(runner: Any) -> Any:
    """The Router behind a layer, which a captured graph would launch."""
    return runner.dsv4_router.served


def holds(runner: Any, values: dict[str, Tensor]) -> bool:
    found = router_of(runner).state_dict()
    names = {"weight": "weight", "bias": "bias", "image": "image_bias", "table": "table"}
    return all(torch.equal(found[names[name]], values[name]) for name in parameters(runner))


def load_by_loaders(runner: Any, values: dict[str, Tensor]) -> None:
    """As a model's ``load_weights``: by the loader of a parameter, or the default one."""
    for name, tensor in parameters(runner).items():
        loader = getattr(tensor, "weight_loader", fake_vllm.default_weight_loader)
        loader(tensor, values[name])


def load_layer_by_layer(runner: Any, values: dict[str, Tensor]) -> None:
    """As a layer-by-layer reload: temporary parameters, a copy into those that the layer had, and
    these registered again.
    """
    gate, kept = runner.gate, runner.gate.weight
    for values_of_it in (torch.full_like(kept, torch.nan), values["weight"]):
        del gate.weight
        gate.register_parameter("weight", parameter(values_of_it))
        gate.weight.weight_loader = kept.weight_loader
    gate.weight.weight_loader(gate.weight, values["weight"])
    kept.data.copy_(gate.weight)
    del gate.weight
    gate.register_parameter("weight", kept)
    for name, tensor in parameters(runner).items():
        if name != "weight":
            tensor.weight_loader(tensor, values[name])  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", [load_by_loaders, load_layer_by_layer])
def test_loaded_weights_are_there_without_a_call(pair: Pair, kind: str, load: Any) -> None:
    """A captured graph is replayed without any Python, and reads the Router's own tensors."""
    without, with_us = pair(kind)
    for _ in range(2):
        with_us(states(9), words(9))
    router, address = router_of(with_us), router_of(with_us).weight.data_ptr()
    values = other_weights()
    load(with_us, values)
    assert holds(with_us, values)
    assert router_of(with_us) is router
    assert router.weight.data_ptr() == address
    load_by_loaders(without, values)
    same(with_us(states(9), words(9)), without(states(9), words(9)))


@pytest.mark.parametrize("kind", KINDS)
def test_values_written_in_place_are_seen_by_the_next_call(pair: Pair, kind: str) -> None:
    without, with_us = pair(kind)
    for _ in range(2):
        with_us(states(9), words(9))
    for runner in (without, with_us):
        for name, tensor in parameters(runner).items():
            tensor.copy_(other_weights()[name])
    same(with_us(states(9), words(9)), without(states(9), words(9)))
    assert holds(with_us, other_weights())


def test_another_parameter_is_seen_by_the_next_call(pair: Pair) -> None:
    without, with_us = pair()
    with_us(states(9))
    values = other_weights()
    for runner in (without, with_us):
        runner.gate.weight = parameter(values["weight"])
    same(with_us(states(9)), without(states(9)))
    fake_vllm.default_weight_loader(with_us.gate.weight, WEIGHT)  # past every notice
    plugin.refresh()
    assert torch.equal(router_of(with_us).weight, WEIGHT)


def test_new_weights_that_are_refused(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    without, with_us = pair()
    with_us(states(3))
    for runner in (without, with_us):
        runner.gate.weight.weight_loader(runner.gate.weight, WEIGHT * torch.nan)
    assert "new weights are refused" in caplog.text
    assert "expected finite values" in caplog.text
    assert untouched(with_us)
    assert torch.equal(with_us(states(3))[1], without(states(3))[1])


# --- uninstalling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_uninstalling_restores(pair: Pair, engine: dict[str, Any], kind: str) -> None:
    _, runner = pair(kind)
    loader = runner.gate.weight.weight_loader
    for _ in range(2):
        runner(states(3), words(3))
    router = weakref.ref(router_of(runner))
    assert router() is not None
    assert runner.gate.weight.weight_loader != loader
    assert plugin.uninstall() == ["layers.0.experts"]
    assert untouched(runner)
    assert runner.gate.weight.weight_loader == loader
    assert "register_parameter" not in vars(runner.gate)
    bias = runner.router.e_score_correction_bias
    assert bias is None or "weight_loader" not in vars(bias)
    gc.collect()
    assert router() is None
    assert engine["vllm.model_executor.custom_op"].op_registry_oot == {}
    calls = runner.gate.calls
    runner(states(3), words(3))
    assert runner.gate.calls == calls + 1
    assert type(make_layer(engine)).__name__ == "MoERunner"
    assert plugin.uninstall() == []


def test_a_captured_router_outlives_uninstalling(pair: Pair) -> None:
    _, runner = pair()
    runner(states(3))
    router = weakref.ref(router_of(runner))
    router_id = ROUTERS.register(router_of(runner))  # as the capture of a graph does
    plugin.uninstall()
    gc.collect()
    assert router() is not None
    ROUTERS.unregister(router_id)


def test_a_layer_can_be_collected(pair: Pair) -> None:
    _, runner = pair()
    runner(states(3))
    router = weakref.ref(router_of(runner))
    del runner
    gc.collect()
    assert router() is None
    assert plugin.layers() == []


# --- what a call costs ----------------------------------------------------------------------------


@pytest.fixture
def gpu_layer(gpu: Any, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer whose Router has the back end of a GPU, which the fake driver runs."""
    build_on_the_fake_gpu(monkeypatch)
    load_plugin()
    runner = make_layer(engine)
    runner(states(3))
    return runner


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_call_is_one_launch(gpu_layer: Any, gpu: Any, dtype: torch.dtype) -> None:
    gpu_layer.method.topk_indices_dtype = dtype
    with forward_pass(torch.tensor([False, True, False])):
        gpu_layer(states(3))
        gpu.launches.clear()
        weights, ids = gpu_layer(states(3))
    assert len(gpu.launches) == 1
    assert ids.dtype == dtype
    assert ids[1].tolist() == [-1] * K
    assert weights[1].tolist() == [0] * K


def test_a_call_imports_nothing_and_does_not_wait(gpu_layer: Any, gpu: Any) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("not on every call")

    x, padding = states(3), torch.zeros(3, dtype=torch.bool)
    gpu.execute = False
    with forward_pass(padding), pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib, "import_module", refused)
        patch.setattr(torch.cuda, "synchronize", refused)
        for name in ("item", "tolist", "cpu", "__bool__", "nonzero"):
            patch.setattr(Tensor, name, refused)
        patch.setattr(builtins, "__import__", refused)  # last: to patch imports
        gpu_layer(x)


def test_results_live_as_long_as_their_logits(pair: Pair) -> None:
    _, runner = pair()
    logits, _ = runner.gate(states(3))
    found = layer.attached_to(logits, runner.dsv4_router)
    assert found is not None
    weights = weakref.ref(found[0])
    del found
    assert weights() is not None
    del logits
    assert weights() is None


def test_one_image_mask_for_the_layers_of_a_forward_pass(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_plugin()
    runners = [make_layer(engine, "dense images", f"layers.{i}") for i in range(3)]
    x, ids = states(9), words(9)
    for runner in runners:
        runner(x, ids)
    computed = []

    def compare(one: Tensor, other: Any) -> Tensor:
        if isinstance(other, int) and other == FIRST_IMAGE:
            computed.append(one)
        return one.ge(other)

    monkeypatch.setattr(Tensor, "__ge__", compare)
    for _ in range(2):
        with forward_pass():
            for runner in runners:
                runner(x, ids)
    assert len(computed) == 2
    with forward_pass():
        runners[0](x, ids)
        same(runners[1](x, ids.flip(0)), runners[2](x, ids.flip(0).clone()))
    assert len(computed) == 5


# --- without vLLM ---------------------------------------------------------------------------------


def test_without_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is imported above needs none: this environment has no vLLM either."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    load_plugin()
    assert "vLLM routes by itself: something that this package uses is not in it" in caplog.text
