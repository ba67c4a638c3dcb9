"""The vLLM plug-in in the real vLLM, on a CPU.

The gate, the router, the runner, the registry of plug-ins, the forward context and the reload of
weights are vLLM's own. Two things are not, because vLLM has them for GPUs only:

- its kernel that ranks logits: ``softplus_topk`` of the double stands in for the op;
- the experts: theirs return the weights and the ids that they were given.

vLLM's gate computes in bf16 on a CPU. So that its logits are exact, hidden states have four
elements that are not zero, and weights are multiples of 1/16.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime.integrations.vllm import plugin
from router_runtime.integrations.vllm.engine import NEWEST, load_engine
from tests import fake_vllm

H, E, K, V, SCALE, FIRST_IMAGE = 128, 24, 4, 50, 1.5, 40
KINDS = ("dense", "dense images", "hash", "hash images")

pytestmark = pytest.mark.usefixtures("process")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, (E, H), generator=seeded(seed)).bfloat16() / 16


def states(tokens: int) -> Tensor:
    places = torch.rand(tokens, H, generator=seeded(tokens)).topk(4).indices
    return torch.zeros(tokens, H).scatter(1, places, 1).bfloat16()


def words(tokens: int) -> Tensor:
    return torch.arange(tokens) * 7 % V


BIAS = torch.randn(E, generator=seeded(1))
IMAGE_BIAS = torch.randn(E, generator=seeded(2))
TABLE = torch.rand(V, E, generator=seeded(3)).topk(K).indices.int()


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)


class Experts(nn.Module):
    """Experts that return what they were given."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.quant_method = SimpleNamespace(
            is_monolithic=False, topk_indices_dtype=dtype, supports_internal_mk=True
        )

    def _ensure_moe_quant_config_init(self) -> None:
        pass

    def forward_modular(self, topk_weights: Tensor, topk_ids: Tensor, **_: Any) -> Any:
        return topk_weights, topk_ids


_names = (f"model.layers.{number}.ffn.experts" for number in itertools.count())


def make_layer(kind: str = "dense", dtype: torch.dtype | None = None) -> nn.Module:
    """The MoE layer of a model: its gate and its runner."""
    engine = load_engine()
    name = next(_names)
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = engine.gate(H, E, bias=False, out_dtype=torch.float32, prefix=f"{name}.gate")
    finally:
        torch.set_default_dtype(torch.float32)
    gate.weight.weight_loader(gate.weight, weights())
    gate._cpu_skip_gemm_dispatch = True  # some CPUs' kernels would take the weight away
    gate.quant_method.process_weights_after_loading(gate)
    gate.e_score_correction_bias = None if "hash" in kind else parameter(BIAS)
    gate.tid2eid = parameter(TABLE) if "hash" in kind else None
    gate.bias_vl = parameter(IMAGE_BIAS) if "images" in kind else None
    router = engine.router(
        K,
        E,
        gate.e_score_correction_bias,
        routed_scaling_factor=SCALE,
        scoring_func="sqrtsoftplus",
        hash_indices_table=gate.tid2eid,
        bias_vl=gate.bias_vl,
        image_sentinel_lo=FIRST_IMAGE if "images" in kind else 0,
    )
    config = SimpleNamespace(dp_size=1, pcp_size=1, is_sequence_parallel=False)
    model = nn.Module()
    model.gate = gate
    model.experts = engine.runner(
        layer_name=name,
        moe_config=config,
        router=router,
        routed_experts=Experts(dtype),
        gate=gate,
    )
    return model


def topk_op(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    routed_scaling_factor: float,
    e_score_correction_bias: Tensor | None,
    input_tokens: Tensor | None,
    hash_indices_table: Tensor | None,
    *,
    is_padding: Tensor | None,
    bias_vl: Tensor | None,
    image_sentinel_lo: int,
) -> None:
    """In place of the op that vLLM has for GPUs only."""
    found = fake_vllm.softplus_topk(
        gating_output,
        e_score_correction_bias,
        topk_indices.shape[1],
        renormalize=renormalize,
        scale=routed_scaling_factor,
        token_ids=input_tokens,
        table=hash_indices_table,
        image_bias=bias_vl,
        first_image=image_sentinel_lo,
        padding=is_padding,
    )
    topk_weights.copy_(found[0])
    topk_indices.copy_(found[1])


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM with the op, and without the plug-in before and after."""
    ops = importlib.import_module("vllm._custom_ops")
    assert list(inspect.signature(ops.topk_hash_softplus_sqrt).parameters) == list(
        inspect.signature(topk_op).parameters
    )
    monkeypatch.setattr(ops, "topk_hash_softplus_sqrt", topk_op)
    plugin.uninstall()
    yield
    plugin.uninstall()


def load_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own function, once more in this process."""
    plugins = importlib.import_module("vllm.plugins")
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()


def run(model: Any, tokens: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A forward pass of the layer, as the op of the runner makes it."""
    context = importlib.import_module("vllm.forward_context")
    config = importlib.import_module("vllm.config").get_current_vllm_config()
    x = states(tokens)
    with context.set_forward_context(None, config, num_tokens=tokens, is_padding=padding):
        found: Any = model.experts._forward_impl(x, x, None, words(tokens))
    return found[0], found[1]


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[1].dtype == expected[1].dtype
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)


def test_this_is_the_newest_vllm_that_the_plug_in_knows() -> None:
    assert importlib.metadata.version("vllm").startswith(".".join(map(str, NEWEST)) + ".")


def test_vllm_finds_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins(monkeypatch)
    model: Any = make_layer()
    assert type(model.experts).__name__ == "RoutedMoERunner"
    assert isinstance(model.experts, load_engine().runner)
    assert model.experts.dsv4_router is not None


def test_vllm_can_leave_it_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    load_plugins(monkeypatch)
    model: Any = make_layer()
    assert type(model.experts).__name__ == "MoERunner"


@pytest.mark.parametrize(
    ("kind", "double", "methods"),
    [
        ("gate", fake_vllm.GateLinear, ("forward", "weight_loader")),
        ("router", fake_vllm.FusedTopKBiasRouter, ("_compute_routing", "select_experts")),
        ("runner", fake_vllm.MoERunner, ("_forward_impl", "register_oot")),
    ],
)
def test_the_double_has_the_real_signatures(kind: str, double: Any, methods: Any) -> None:
    real = getattr(load_engine(), kind)
    for method in methods:
        found = inspect.signature(getattr(real, method)).parameters
        assert list(found) == list(inspect.signature(getattr(double, method)).parameters), method
    loaders = load_engine().default_loader, fake_vllm.default_weight_loader
    assert len({tuple(inspect.signature(loader).parameters) for loader in loaders}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
def test_ids_and_weights(
    kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without: Any = make_layer(kind, dtype)
    load_plugins(monkeypatch)
    with_us: Any = make_layer(kind, dtype)
    assert type(with_us.experts) is not type(without.experts)
    for tokens in (1, 40):
        for padding in (None, torch.arange(tokens) % 5 == 2):
            for _ in range(2):
                same(run(with_us, tokens, padding), run(without, tokens, padding))
    assert with_us.experts.dsv4_router.is_serving


def test_the_routers_of_other_models_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="router_runtime")
    factory = importlib.import_module(f"{fake_vllm.FUSED_MOE}.router.router_factory")
    load_plugins(monkeypatch)
    engine = load_engine()
    # What vLLM itself makes for a CPU is one of these too.
    router = factory.create_fused_moe_router(
        top_k=K, global_num_experts=E, scoring_func="sqrtsoftplus", e_score_correction_bias=BIAS
    )
    engine.runner(
        layer_name=next(_names),
        moe_config=SimpleNamespace(),
        router=router,
        routed_experts=Experts(None),
    )
    assert "a router: expected FusedTopKBiasRouter, found CPURouter" in caplog.text
    assert "_compute_routing" not in vars(router)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_weights_that_vllm_loads(
    kind: str, layer_by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loaders of the parameters, and by its reload of a model that serves: without another
    call, because captured graphs make none.
    """
    reload = importlib.import_module("vllm.model_executor.model_loader.reload")
    config = importlib.import_module("vllm.config").get_current_vllm_config()
    load_plugins(monkeypatch)
    model: Any = make_layer(kind)
    reload.record_metadata_for_reloading(model)
    run(model, 9)
    new = {
        "weight": weights(7),
        "e_score_correction_bias": BIAS.flip(0),
        "tid2eid": TABLE.flip(0),
        "bias_vl": IMAGE_BIAS.flip(0),
    }
    before = dict(model.gate.named_parameters())
    if layer_by_layer:
        reload.initialize_layerwise_reload(model)
    for name, tensor in list(model.gate.named_parameters()):
        loader = getattr(tensor, "weight_loader", load_engine().default_loader)
        loader(tensor, new[name])
    if layer_by_layer:
        reload.finalize_layerwise_reload(model, config.model_config)
    for name, tensor in model.gate.named_parameters():
        assert tensor is before[name]
        assert torch.equal(tensor, new[name])
    router = model.experts.dsv4_router.served
    names = {
        "weight": "weight",
        "bias": "e_score_correction_bias",
        "image_bias": "bias_vl",
        "table": "tid2eid",
    }
    for name, values in router.state_dict().items():
        assert torch.equal(values, new[names[name]]), name
    found = run(model, 9)
    plugin.uninstall()
    same(found, run(model, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_uninstalling_restores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins(monkeypatch)
    model: Any = make_layer(kind)
    run(model, 9)
    found = run(model, 9)
    assert plugin.uninstall() == [model.experts.layer_name]
    assert "forward" not in vars(model.gate)
    assert "register_parameter" not in vars(model.gate)
    assert "_compute_routing" not in vars(model.experts.router)
    same(found, run(model, 9))
    assert "MoERunner" not in load_engine().registered
    later: Any = make_layer(kind)
    assert type(later.experts) is load_engine().runner
