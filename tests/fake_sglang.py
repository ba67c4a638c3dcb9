"""A double of the parts of SGLang that the plug-in uses: the same modules, classes, arguments and
order of calls, on a CPU. ``make test-engines`` holds it against the real package.

Where SGLang runs kernels, the double computes in plain torch, by none of our code:
``softplus_topk``. The experts of a block return the weights and the ids that they were given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import fake_engine
from tests.fake_vllm import softplus_topk

MODEL = "sglang.srt.models.deepseek_v2"


class HookType(enum.Enum):
    """When a hook is called."""

    AFTER = "after"
    AROUND = "around"


class HookRegistry:
    """Hooks of plug-ins. As SGLang's: applied once for a target, and failures are only logged."""

    _hooks: dict[str, list[tuple[Callable[..., Any], HookType]]]
    _patched: set[str]

    @classmethod
    def register(
        cls,
        target: str,
        hook: Callable[..., Any],
        hook_type: HookType = HookType.AFTER,
        *,
        source: object = None,
    ) -> None:
        cls._hooks.setdefault(target, []).append((hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hooks in cls._hooks.items():
            if target in cls._patched:
                continue
            try:
                owner, name = _resolved(target)
                for hook, kind in hooks:
                    setattr(owner, name, _wrapped(getattr(owner, name), hook, kind))
                cls._patched.add(target)
            except Exception:
                logging.getLogger("sglang").exception("Failed to apply hooks to %s", target)


def _resolved(target: str) -> tuple[Any, str]:
    """The owner of what is hooked: a module, or a class in one."""
    path, _, name = target.rpartition(".")
    if path in sys.modules:
        return sys.modules[path], name
    module, _, owner = path.rpartition(".")
    return getattr(importlib.import_module(module), owner), name


def _wrapped(
    original: Callable[..., Any], hook: Callable[..., Any], kind: HookType
) -> Callable[..., Any]:
    @functools.wraps(original)
    def after(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        changed = hook(result, *arguments, **options)
        return result if changed is None else changed

    @functools.wraps(original)
    def around(*arguments: Any, **options: Any) -> Any:
        return hook(original, *arguments, **options)

    return after if kind is HookType.AFTER else around


class TopKOutputFormat(enum.IntEnum):
    """What experts take."""

    STANDARD = enum.auto()
    BYPASSED = enum.auto()


class StandardTopKOutput(NamedTuple):
    """Of the standard format."""

    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


@dataclasses.dataclass
class TopKConfig:
    """How experts are selected. ``physical_ids`` stands for the expert map."""

    top_k: int
    correction_bias: Tensor | None = None
    use_grouped_topk: bool = False
    renormalize: bool = True
    custom_routing_function: Callable[..., Any] | None = None
    routed_scaling_factor: float = 1.0
    apply_routed_scaling_factor_on_output: bool = False
    output_format: TopKOutputFormat | None = TopKOutputFormat.STANDARD
    scoring_func: str = "sqrtsoftplus"
    num_shared_topk_slots: int = 0


class Process:
    """What SGLang keeps for a process: how many tokens of the batch are none of padding, what
    writes random logits for a benchmark, the expert map, and the ids that were recorded.
    """

    valid: int | Tensor | None = None
    fakes_dispatch = False
    physical_ids: Tensor | None = None
    recorded: list[Tensor]


def _finished(weights: Tensor, ids: Tensor, logits: Tensor) -> StandardTopKOutput:
    """What follows the ranking: the expert map, padding in place, recording."""
    if Process.physical_ids is not None:
        ids = Process.physical_ids[ids.long()].int()
    if Process.valid is not None:
        rows = torch.arange(len(ids), device=ids.device)
        ids.masked_fill_((rows >= Process.valid)[:, None], -1)
    Process.recorded.append(ids)
    return StandardTopKOutput(weights, ids, logits)


class TopK(nn.Module):
    """Selects experts by score. ``calls`` counts how often its own ranking ran."""

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.topk_config = config
        self.calls = 0

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Any:
        config = self.topk_config
        if config.output_format is not TopKOutputFormat.STANDARD:
            return router_logits
        if Process.fakes_dispatch:
            router_logits.copy_(torch.arange(router_logits.numel()).view_as(router_logits) * 7 % 5)
        if config.custom_routing_function is None:
            self.calls += 1
            weights, ids = softplus_topk(
                router_logits,
                config.correction_bias,
                config.top_k,
                renormalize=config.renormalize,
                scale=1.0,
            )
            ids = ids.int()
        else:
            weights, ids = config.custom_routing_function(
                hidden_states=hidden_states,
                gating_output=router_logits,
                topk=config.top_k,
                renormalize=config.renormalize,
            )
        if config.apply_routed_scaling_factor_on_output:
            weights *= config.routed_scaling_factor
        return _finished(weights, ids, router_logits)


def hash_topk(
    router_logits: Tensor,
    input_ids: Tensor,
    tid2eid: Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sqrtsoftplus",
) -> tuple[Tensor, Tensor]:
    """SGLang's kernel for hash layers."""
    weights, ids = softplus_topk(
        router_logits,
        None,
        tid2eid.shape[1],
        renormalize=True,
        scale=1.0,
        token_ids=input_ids,
        table=tid2eid,
    )
    return weights, ids.int()


class HashTopK(nn.Module):
    """Looks experts up. ``fused``: by the kernel."""

    fused = True

    def __init__(self, topk: int, table: Tensor, scale: float, apply: bool) -> None:
        super().__init__()
        self.topk = topk
        self.score_func = "sqrtsoftplus"
        self.num_shared_topk_slots = 0
        self.tid2eid = nn.Parameter(table, requires_grad=False)
        self.routed_scaling_factor = scale
        self.apply_routed_scaling_factor_on_output = apply

    def _forward_torch(self, router_logits: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return hash_topk(router_logits, input_ids, self.tid2eid)

    def forward(
        self, hidden_states: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> StandardTopKOutput:
        assert len(input_ids) == len(hidden_states) == len(router_logits)
        if self.fused:
            kernel = importlib.import_module("sglang.kernels.ops.moe.dsv4").hash_topk
            weights, ids = kernel(
                router_logits=router_logits, input_ids=input_ids, tid2eid=self.tid2eid
            )
        else:
            weights, ids = self._forward_torch(router_logits, input_ids)
        if self.apply_routed_scaling_factor_on_output:
            weights = weights * self.routed_scaling_factor
        return _finished(weights, ids, router_logits)


class MoEGate(nn.Module):
    """A gate. ``calls`` counts how often its own ``forward`` ran."""

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        bias: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size, dtype=dtype))
        self.e_score_correction_bias = None if bias is None else nn.Parameter(bias)
        self.e_score_correction_bias_vl: Tensor | None = None
        self.calls = 0

    def forward(
        self,
        hidden_states: Tensor,
        gemm_output_zero_allocator: object = None,
        forward_batch: object = None,
    ) -> Tensor:
        self.calls += 1
        return F.linear(hidden_states.float(), self.weight.float())


class DeepseekV2MoE(nn.Module):
    """A MoE block. ``config`` has the arguments of its parts."""

    def __init__(
        self, config: Any, layer_id: int, quant_config: object = None, is_nextn: bool = False
    ) -> None:
        super().__init__()
        self.config, self.layer_id, self.is_nextn = config, layer_id, is_nextn
        self.is_deepseek_v4 = config.is_deepseek_v4
        self.gate, self.topk = config.gate(), config.topk()
        if isinstance(self.topk, TopK):
            self.topk.topk_config.correction_bias = self.gate.e_score_correction_bias

    def forward(
        self,
        hidden_states: Tensor,
        forward_batch: object = None,
        gemm_output_zero_allocator: object = None,
        input_ids: Tensor | None = None,
        input_ids_global: Tensor | None = None,
    ) -> Any:
        router_logits = self.gate(hidden_states, gemm_output_zero_allocator)
        token_ids = {"input_ids": input_ids_global} if isinstance(self.topk, HashTopK) else {}
        return self.topk(hidden_states, router_logits, **token_ids)


def default_weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
    """As SGLang: written past the version counter."""
    param.data.copy_(loaded_weight)


def modules(version: str = "0.5.23") -> dict[str, types.ModuleType]:
    """The double's modules, by name, with classes of their own."""
    registry = type("HookRegistry", (HookRegistry,), {"_hooks": {}, "_patched": set()})

    def copied(kind: type[Any]) -> type[Any]:
        """So that what one test does to the class is gone in the next."""
        return type(kind.__name__, (kind,), {name: vars(kind)[name] for name in ("__init__",)})

    hashed = copied(HashTopK)
    hashed._forward_torch = HashTopK._forward_torch
    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": HookType},
        MODEL: {"DeepseekV2MoE": copied(DeepseekV2MoE), "MoEGate": MoEGate},
        "sglang.srt.layers.moe.topk": {"TopK": TopK, "TopKOutputFormat": TopKOutputFormat},
        "sglang.srt.layers.moe.hash_topk": {"HashTopK": hashed},
        "sglang.kernels.ops.moe.dsv4": {"hash_topk": hash_topk},
        "sglang.srt.model_loader.weight_utils": {"default_weight_loader": default_weight_loader},
    }
    return fake_engine.made(contents)


@contextlib.contextmanager
def installed(version: str = "0.5.23") -> Iterator[dict[str, types.ModuleType]]:
    """The double in place of SGLang, if that is installed or not."""
    made = modules(version)
    Process.valid, Process.physical_ids, Process.recorded = None, None, []
    Process.fakes_dispatch = False
    with fake_engine.in_place_of("sglang", made):
        yield made
