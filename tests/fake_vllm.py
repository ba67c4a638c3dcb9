"""A double of the parts of vLLM that the plug-in uses: the same modules, classes, signatures and
order of calls, on a CPU. ``make test-engines`` holds it against the real package.

Where vLLM runs kernels, the double computes in plain torch, by none of our code: ``softplus_topk``.
The experts of a layer return the weights and the ids that they were given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import fake_engine

FUSED_MOE = "vllm.model_executor.layers.fused_moe"


@dataclasses.dataclass
class ForwardContext:
    """Of one forward pass."""

    is_padding: Tensor | None = None


class _Current:
    context: ForwardContext | None = None


@contextlib.contextmanager
def forward_pass(is_padding: Tensor | None = None) -> Iterator[None]:
    """A forward pass, with its padding."""
    _Current.context = ForwardContext(is_padding)
    try:
        yield
    finally:
        _Current.context = None


def softplus_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    renormalize: bool,
    scale: float,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    image_bias: Tensor | None = None,
    first_image: int = 0,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V4's routing by logits."""
    scores = F.softplus(logits.double()).sqrt()
    keys = scores if bias is None else scores + bias
    images = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
    if image_bias is not None and first_image > 0:
        assert token_ids is not None
        images = ((token_ids >= first_image) & (token_ids < first_image + 5))[:, None]
        keys = torch.where(images, scores + image_bias, keys)
    ids = keys.topk(k).indices
    if table is not None:
        assert token_ids is not None
        ids = torch.where(images, ids, table[token_ids.long()].long())
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    weights = weights * scale
    if padding is not None:
        weights = weights.masked_fill(padding[:, None], 0)
        ids = ids.masked_fill(padding[:, None], -1)
    return weights.float(), ids


def default_weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
    """As vLLM: written past the version counter."""
    param.data.copy_(loaded_weight)


class UnquantizedLinearMethod:
    """Of a layer whose weight is a plain matrix."""


class GateLinear(nn.Module):
    """A gate. ``calls`` counts how often its own ``forward`` ran."""

    def __init__(self, hidden_size: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(experts, hidden_size, dtype=dtype), requires_grad=False
        )
        self.weight.weight_loader = self.weight_loader  # type: ignore[attr-defined]
        self.bias = None
        self.out_dtype: torch.dtype | None = torch.float32
        self.return_bias = True
        self.quant_method: Any = UnquantizedLinearMethod()
        self.calls = 0

    def weight_loader(self, param: Tensor, loaded_weight: Tensor) -> None:
        param.data.copy_(loaded_weight)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        logits = F.linear(x.float(), self.weight.float())
        return (logits, None) if self.return_bias else logits


class FusedTopKBiasRouter:
    """A router. ``calls`` counts how often its own ``_compute_routing`` ran."""

    def __init__(
        self,
        top_k: int,
        e_score_correction_bias: Tensor | None = None,
        renormalize: bool = True,
        routed_scaling_factor: float = 1.0,
        *,
        scoring_func: str = "sqrtsoftplus",
        hash_indices_table: Tensor | None = None,
        num_fused_shared_experts: int = 0,
        bias_vl: Tensor | None = None,
        image_sentinel_lo: int = 0,
    ) -> None:
        self.top_k = top_k
        self.e_score_correction_bias = e_score_correction_bias
        self.renormalize = renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.scoring_func = scoring_func
        self._hash_indices_table = hash_indices_table
        self.num_fused_shared_experts = num_fused_shared_experts
        self.bias_vl = bias_vl
        self.image_sentinel_lo = image_sentinel_lo
        self.capture_fn: Callable[[Tensor], None] | None = None
        self.physical_ids: Tensor | None = None
        self.calls = 0

    def select_experts(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the base class does: routing, capture, expert map, dtype."""
        weights, ids = self._compute_routing(
            hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids
        )
        if self.capture_fn is not None:
            self.capture_fn(ids)
        if self.physical_ids is not None:
            ids = torch.where(ids < 0, ids, self.physical_ids[ids.clamp(0).long()])
        return weights, ids if topk_indices_dtype is None else ids.to(topk_indices_dtype)

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        context = _Current.context
        padding = None if context is None else context.is_padding
        weights, ids = softplus_topk(
            router_logits,
            self.e_score_correction_bias,
            self.top_k,
            renormalize=self.renormalize,
            scale=self.routed_scaling_factor,
            token_ids=input_ids,
            table=self._hash_indices_table,
            image_bias=self.bias_vl,
            first_image=self.image_sentinel_lo,
            padding=None if padding is None else padding[: len(router_logits)],
        )
        return weights, ids.to(torch.int32 if indices_type is None else indices_type)


class PluggableLayer(nn.Module):
    """A layer in whose place a plug-in can register another class."""

    registered: dict[str, type[Any]]

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return super().__new__(cls.registered.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, _decorated_layer_cls: Any = None, name: str | None = None) -> Any:
        def decorator(layer: type[Any]) -> type[Any]:
            key = name or cls.__name__
            assert key not in cls.registered
            cls.registered[key] = layer
            return layer

        return decorator


class MoERunner(PluggableLayer):
    """A MoE layer; ``method`` is its quantization method, ``gathered`` what another rank adds."""

    def __init__(
        self,
        layer_name: str,
        router: Any,
        gate: nn.Module | None = None,
        method: Any = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer_name, self.router, self.gate = layer_name, router, gate
        self.method = method or SimpleNamespace(is_monolithic=False, topk_indices_dtype=None)
        self.moe_config = SimpleNamespace(pcp_size=1)
        self._fse_fuse_gate = shared_expert_gate is not None
        self.gathered: tuple[Tensor, Tensor] | None = None

    @property
    def is_monolithic(self) -> bool:
        return bool(self.method.is_monolithic)

    @property
    def do_naive_dispatch_combine(self) -> bool:
        return self.gathered is not None

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Any:
        return self._forward_impl(hidden_states, hidden_states, None, input_ids)

    def _forward_impl(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None = None,
    ) -> Any:
        if self.gate is not None:
            router_logits, _ = self.gate(hidden_states)
        if self.gathered is not None:
            states, logits = self.gathered
            hidden_states = torch.cat([hidden_states, states])
            router_logits = torch.cat([router_logits, logits])
        if self.is_monolithic:
            return router_logits
        return self.router.select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            topk_indices_dtype=self.method.topk_indices_dtype,
            input_ids=input_ids,
        )


def modules(version: str = "0.33.0") -> dict[str, types.ModuleType]:
    """The double's modules, by name, with classes of their own."""
    registered: dict[str, type[Any]] = {}
    layer = type("PluggableLayer", (PluggableLayer,), {"registered": registered})
    # A copy of the class, so that what one test does to it is gone in the next.
    runner = type("MoERunner", (MoERunner, layer), {})
    runner._forward_impl = MoERunner._forward_impl  # type: ignore[attr-defined]
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.envs": {"VLLM_MOE_SKIP_PADDING": True},
        "vllm.forward_context": {
            "is_forward_context_available": lambda: _Current.context is not None,
            "get_forward_context": lambda: _Current.context,
        },
        "vllm.model_executor.custom_op": {"op_registry_oot": registered},
        "vllm.model_executor.layers.linear": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
        "vllm.model_executor.model_loader.weight_utils": {
            "default_weight_loader": default_weight_loader
        },
        f"{FUSED_MOE}.runner.moe_runner": {"MoERunner": runner},
        f"{FUSED_MOE}.router.fused_topk_bias_router": {"FusedTopKBiasRouter": FusedTopKBiasRouter},
        f"{FUSED_MOE}.router.gate_linear": {"GateLinear": GateLinear},
    }
    return fake_engine.made(contents)


@contextlib.contextmanager
def installed(version: str = "0.33.0") -> Iterator[dict[str, types.ModuleType]]:
    """The double in place of vLLM, if that is installed or not."""
    made = modules(version)
    with fake_engine.in_place_of("vllm", made):
        yield made
