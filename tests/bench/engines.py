"""The host time that a plug-in adds to the eager op of one layer call, in microseconds.

The engines are the doubles of the tests, and only what the plug-in has put into them is called: the
gate's ``forward``, then the routing function, as the engine calls them. A stand-in for the Router
returns ready results. The plug-in's part is the time of a layer call less that of the stand-in
alone, so no GPU is needed. Figures are minima over batches, since a disturbance only adds time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from router_runtime.integrations.engines.layer import EngineLayer
from router_runtime.integrations.sglang import plugin as sglang_plugin
from router_runtime.integrations.vllm import plugin as vllm_plugin
from tests import fake_sglang, fake_vllm
from tests.bench.host import submit_times
from tests.runtime.engine_layers import BIAS, SCALE, WEIGHT, E, H, K, load_entry_points, states

#: Most microseconds that a plug-in may add.
BAR_US = 3.0

TOKENS = 4
CALLS_PER_BATCH = 1000

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class PluginCell:
    """Microseconds of a layer call, and of the stand-in alone: minima over batches."""

    engine: str
    call_us: float
    router_us: float

    @property
    def added_us(self) -> float:
        return self.call_us - self.router_us


class ReadyRouter:
    """A stand-in for a Router, which returns the same results at every call."""

    def __init__(self) -> None:
        self.results = (
            torch.ones(TOKENS, K),
            torch.zeros(TOKENS, K, dtype=torch.int32),
            torch.zeros(TOKENS, E),
        )

    def forward_with_logits(self, tensor: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.results


def measure(batches: int) -> list[PluginCell]:
    """Return the figures of both plug-ins, each over that many batches of calls."""
    found = []
    for name, served in ENGINES.items():
        with served() as (layer, call):
            found.append(_measured(name, layer, call, batches))
    return found


def _measured(
    name: str, layer: EngineLayer, call: Callable[[], tuple[Tensor, Tensor]], batches: int
) -> PluginCell:
    ready, x = ReadyRouter(), states(TOKENS)
    layer.served = ready  # type: ignore[assignment]
    assert call()[1] is ready.results[1]
    calls: dict[str, Call] = {"call": call, "router": lambda: ready.forward_with_logits(x)}
    # One batch more than is counted: the first is slow.
    times = submit_times(calls, lambda: None, batches + 1, CALLS_PER_BATCH)
    return PluginCell(name, min(times["call"]), min(times["router"]))


Served = tuple[EngineLayer, Callable[[], tuple[Tensor, Tensor]]]


@contextlib.contextmanager
def _vllm() -> Iterator[Served]:
    with fake_vllm.installed() as modules:
        load_entry_points("vllm.general_plugins")
        try:
            gate = fake_vllm.GateLinear(H, E)
            gate.weight_loader(gate.weight, WEIGHT)
            bias = nn.Parameter(BIAS.clone(), requires_grad=False)
            router = fake_vllm.FusedTopKBiasRouter(K, bias, routed_scaling_factor=SCALE)
            runner = modules[f"{fake_vllm.FUSED_MOE}.runner.moe_runner"].MoERunner
            x = states(TOKENS)
            runner("layer", router, gate)(x)
            (layer,) = vllm_plugin.layers()
            forward, route = gate.forward, router._compute_routing

            def call() -> tuple[Tensor, Tensor]:
                logits, _ = forward(x)
                return route(x, logits, torch.int32, input_ids=None)

            with fake_vllm.forward_pass():
                yield layer, call
        finally:
            vllm_plugin.uninstall()


@contextlib.contextmanager
def _sglang() -> Iterator[Served]:
    with fake_sglang.installed() as modules, torch.no_grad():
        load_entry_points("sglang.srt.plugins")
        sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()
        try:
            gate = fake_sglang.MoEGate(H, E, BIAS.clone())
            gate.weight.copy_(WEIGHT)
            topk = fake_sglang.TopK(fake_sglang.TopKConfig(K, routed_scaling_factor=SCALE))
            parts = SimpleNamespace(is_deepseek_v4=True, gate=lambda: gate, topk=lambda: topk)
            block = modules[fake_sglang.MODEL].DeepseekV2MoE(parts, 0)
            x = states(TOKENS)
            block(x)
            (layer,) = sglang_plugin.layers()
            forward, route = gate.forward, topk.topk_config.custom_routing_function
            assert route is not None

            def call() -> tuple[Tensor, Tensor]:
                logits = forward(x, None)
                return route(hidden_states=x, gating_output=logits, topk=K, renormalize=True)  # type: ignore[no-any-return]

            yield layer, call
        finally:
            sglang_plugin.uninstall()


ENGINES = {"vLLM": _vllm, "SGLang": _sglang}
