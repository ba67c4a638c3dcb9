"""Hugging Face transformers: serve the routers of a loaded DeepSeek-V4 model with these kernels.

``install(model)`` gives every ``DeepseekV4TopKRouter`` and ``DeepseekV4HashRouter`` another
``forward``. The class stays, because transformers records router logits by class. The results are
those of the original, ``(logits [tokens, experts], weights [tokens, k], ids int64 [tokens, k])``,
but for this:

- The ids of a token are in rank order (the original's are in no order), equal keys the lower id
  first.
- Logits and weights of a bf16 model are fp32. The original computes and rounds them in bf16, in
  which keys that are close become equal, so for close keys it may choose other experts.

These kernels have no backward, so the original serves wherever there may be one: in grad mode, if
the hidden states or the weight require grad, and in training mode (``model.train()``), where
gradient checkpointing may run a layer without grad first and again with it: both runs have to
choose the same experts.

A bf16 gate is one launch of the dense kernels, with weights repacked at installation. An fp32 gate
goes through ``F.linear`` and ``dsv4::activation_topk``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from router_runtime.arguments import checks_arguments
from router_runtime.errors import InputError, RouterRuntimeError, explain, install_extra
from router_runtime.ops.functions import activation_topk
from router_runtime.ops.schemas import NAMESPACE
from router_runtime.routing.checks import (
    MAX_EXPERTS,
    MAX_TOP_K,
    check_int,
    refuse_grad,
    wrong_tensor,
)
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router, unregister_router
from router_runtime.routing.versions import State, count_optimizer_steps, state_of

_MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_AGAIN = "call install(model) again"

_log = logging.getLogger(__name__)

#: What a module's weight and bias were like when they were installed.
_State = tuple[State, ...]


@dataclass(eq=False)
class _Gate:
    """What serves one module: its router (none for fp32), and the values that the router has.

    ``earlier`` are routers that served it before, in another dtype or on another device, and that
    captured graphs may still launch.
    """

    router: Router | None
    state: _State
    earlier: tuple[Router, ...] = ()

    def routers(self) -> tuple[Router, ...]:
        return self.earlier if self.router is None else (*self.earlier, self.router)


_gates: weakref.WeakKeyDictionary[nn.Module, _Gate] = weakref.WeakKeyDictionary()
#: The op finds a gate by the address of its weight, so one compiled block serves every layer; the
#: number of a layer would be compiled into it.
_by_address: weakref.WeakValueDictionary[int, _Gate] = weakref.WeakValueDictionary()


@checks_arguments
def install(
    model: nn.Module,
    *,
    artifacts: str | os.PathLike[str] | None = None,
    variants: Mapping[str, str] | None = None,
    accept: str | None = None,
) -> list[str]:
    """Let these kernels serve every router of ``model``; returns the names of the modules.

    Call it once the model is on its device in its dtype, and again after its weights changed: a
    call with other weights than those that were installed is refused, not served. In training mode
    and in grad mode the model's own routers serve, with the weights as they are. Calling it again
    without a change does nothing. ``artifacts``, ``variants`` and ``accept`` are those of
    ``Router``, for bf16 gates. Either all routers are served or none: on an error the model is as
    it was.

    Raises InputError for a model without such routers, or with one that cannot be served (its
    dtype, its activation, a ``forward`` set by something else); ResolutionError if no kernel fits a
    gate's shape.
    """
    dense, hashed = _router_classes()
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, dense | hashed)
    }
    if not found:
        raise InputError(
            explain(
                "install",
                expected=f"a model with {dense.__name__} or {hashed.__name__} modules",
                found=f"none in {type(model).__name__}",
                remedy="pass a loaded DeepseekV4ForCausalLM, or its decoder",
            )
        )
    made: dict[str, _Gate] = {}
    for name, module in found.items():
        try:
            made[name] = _gate_for(module, isinstance(module, hashed), artifacts, variants, accept)
        except RouterRuntimeError as error:
            raise type(error)(f"{name}: {error}") from error
    for name, module in found.items():
        gate = made[name]
        _gates[module] = gate
        _by_address[gate.state[0][0]] = gate
        forward = _FORWARDS[isinstance(module, hashed), gate.router is None]
        if getattr(module.forward, "__func__", None) is not forward:
            module.forward = types.MethodType(forward, module)
    return list(found)


@checks_arguments
def uninstall(model: nn.Module, *, force: bool = False) -> list[str]:
    """Restore the ``forward`` of the routers of ``model`` and free the memory of ours.

    Returns the names of the modules that had another ``forward``.

    A CUDA graph that has captured a module launches the router behind it, which is registered and
    stays (``unregister_router``); then nothing is changed and InputError is raised. ``force``
    uninstalls all the same: for when no such graph will be replayed again.
    """
    found = {name: module for name, module in model.named_modules() if _installed(module)}
    gates = {name: _gates[module] for name, module in found.items() if module in _gates}
    captured = [
        name for name, gate in gates.items() if any(each.is_captured for each in gate.routers())
    ]
    if captured and not force:
        raise InputError(
            explain(
                "uninstall",
                expected="a model of which no CUDA graph has captured a router",
                found=f"captured: {', '.join(captured)}; a replay would read its memory",
                remedy="drop the graphs, then call uninstall(model, force=True)",
            )
        )
    # First what may refuse: a capture of just now.
    for gate in gates.values():
        for router in gate.routers():
            if router.is_registered:
                unregister_router(router.router_id, force=force)
    for module in found.values():
        del module.forward
        _gates.pop(module, None)
    return list(found)


def _router_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    try:
        modeling = importlib.import_module(_MODELING)
    except ImportError as error:
        raise InputError(
            explain(
                "install",
                expected="a transformers release with DeepSeek-V4",
                found=error,
                remedy=install_extra("transformers"),
            )
        ) from error
    return modeling.DeepseekV4TopKRouter, modeling.DeepseekV4HashRouter


def _installed(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", None) in _FORWARDS.values()


def _gate_for(
    module: Any,
    hashed: bool,
    artifacts: str | os.PathLike[str] | None,
    variants: Mapping[str, str] | None,
    accept: str | None,
) -> _Gate:
    """The gate of a module: the one it has, brought up to date, or a new one."""
    weight: Tensor = module.weight
    bias: Tensor | None = None if hashed else module.e_score_correction_bias
    _check_module(module, weight, bias)
    if hashed:
        _check_table(module.tid2eid, module.num_experts)
    count_optimizer_steps(weight)
    if bias is not None:
        count_optimizer_steps(bias)
    scale = module.routed_scaling_factor
    known = _gates.get(module) if _installed(module) else None
    state = _state(weight, bias)
    if known is not None and known.state == state:
        return known
    before = () if known is None else tuple(each for each in known.routers() if each.is_captured)
    if weight.dtype is torch.float32:
        # One row, so that what it needs is loaded, or refused, here and not in a graph capture.
        _warm_up(weight, module.num_experts, module.top_k, scale)
        return _Gate(None, state, before)
    config = RouterConfig(module.hidden_dim, module.num_experts, module.top_k, scale)
    fp32 = (
        torch.zeros_like(weight[:, 0], dtype=torch.float32)
        if bias is None
        else bias.detach().float()
    )
    router = None if known is None else known.router
    # Detached, because the op sees changes of the module's own weight and bias before the Router.
    given = weight.detach()
    if router is not None and (router.config, router.device) == (config, weight.device):
        # In place: graphs that were captured see the new values too.
        router.update_weights(weight=given, bias=fp32)
    else:
        router = Router(
            config,
            weight=given,
            bias=fp32,  # of no effect in a hash gate, whose experts are not chosen by score
            device=weight.device,
            artifacts=artifacts,
            variants=variants,
            accept=accept,
        )
    if hashed:
        _warm_up(weight, module.top_k, module.top_k, scale)
    return _Gate(router, state, tuple(each for each in before if each is not router))


def _warm_up(weight: Tensor, experts: int, k: int, scale: float) -> None:
    row = weight.new_zeros((1, experts), dtype=torch.float32)
    activation_topk(row, row[0], k, scale, True)


def _check_module(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    if "forward" in vars(module) and not _installed(module):
        raise InputError(
            explain(
                "its forward",
                expected="the one of its class",
                found="another, set by something else (such as the hooks of device_map)",
                remedy="load the model on one device without hooks, then install",
            )
        )
    activation = type(module.score_fn).__name__
    if activation != "SqrtSoftplusActivation":
        raise InputError(
            explain(
                "its activation",
                expected="scoring_func 'sqrtsoftplus'",
                found=activation,
                remedy="leave this model to transformers",
            )
        )
    biases = (torch.float32,) if weight.dtype is torch.float32 else (torch.float32, torch.bfloat16)
    if weight.dtype not in (torch.bfloat16, torch.float32) or weight.is_meta:
        raise wrong_tensor("its weight", "bf16 or fp32 with values", weight)
    if bias is not None and (bias.dtype not in biases or bias.device != weight.device):
        raise wrong_tensor("its bias", f"one of {biases} on {weight.device}", bias)
    check_int("its num_experts", module.num_experts, 1, MAX_EXPERTS)
    check_int("its top_k", module.top_k, 1, min(MAX_TOP_K, module.num_experts))


def _check_table(table: Tensor, experts: int) -> None:
    outside = int(((table < 0) | (table >= experts)).sum())
    if outside:
        raise InputError(
            explain(
                "its tid2eid",
                expected=f"entries from 0 to {experts - 1}",
                found=f"{outside} others",
                remedy="load the checkpoint's own table",
            )
        )


def _state(weight: Tensor, bias: Tensor | None) -> _State:
    return tuple(state_of(tensor) for tensor in (weight, bias) if tensor is not None)


# --- what the modules do ---

#: What the ``forward`` of a router returns: logits, weights and ids.
_Outputs = tuple[Tensor, Tensor, Tensor]


def _unless_differentiated(forward: Callable[..., _Outputs]) -> Callable[..., _Outputs]:
    """Return ``forward``, but for calls that a backward pass may follow: the ``forward`` of the
    module's class serves these.
    """

    @functools.wraps(forward)
    def served(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> _Outputs:
        if self.training or (
            torch.is_grad_enabled() and (hidden_states.requires_grad or self.weight.requires_grad)
        ):
            if not (self.training or is_compiling()):
                _say_that_grad_mode_is_on()
            return type(self).forward(self, hidden_states, *arguments, **options)  # type: ignore[no-any-return]
        return forward(self, hidden_states, *arguments, **options)

    return served


@functools.cache
def _say_that_grad_mode_is_on() -> None:
    """Once in a process: who wants a backward knows it, who forgot ``no_grad`` does not."""
    _log.warning(
        "transformers' own routers serve a call in grad mode, which these kernels have no backward "
        "for. To have the kernels serve, call the model under torch.no_grad() or "
        "torch.inference_mode()"
    )


@_unless_differentiated
def _dense(self: Any, hidden_states: Tensor) -> _Outputs:
    flat = hidden_states.reshape(-1, self.hidden_dim)
    weights, ids, logits = torch.ops.dsv4.transformers_gate(
        flat, self.weight, self.e_score_correction_bias, self.top_k
    )
    return logits, weights, ids.long()


@_unless_differentiated
def _dense_fp32(self: Any, hidden_states: Tensor) -> _Outputs:
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    bias = self.e_score_correction_bias
    weights, ids = torch.ops.dsv4.activation_topk(
        logits, bias, self.top_k, self.routed_scaling_factor, True
    )
    return logits, weights, ids.long()


@_unless_differentiated
def _hash(self: Any, hidden_states: Tensor, input_ids: Tensor) -> _Outputs:
    flat = hidden_states.reshape(-1, self.hidden_dim)
    _, _, logits = torch.ops.dsv4.transformers_gate(flat, self.weight, None, self.top_k)
    return logits, *_chosen(self, logits, input_ids)


@_unless_differentiated
def _hash_fp32(self: Any, hidden_states: Tensor, input_ids: Tensor) -> _Outputs:
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    return logits, *_chosen(self, logits, input_ids)


def _chosen(self: Any, logits: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of the experts that the table names, in the table's order."""
    ids = self.tid2eid[input_ids.reshape(-1)].long()
    chosen = logits.gather(1, ids)
    ranked, places = torch.ops.dsv4.activation_topk(
        chosen, chosen.new_zeros(self.top_k), self.top_k, self.routed_scaling_factor, True
    )
    return torch.empty_like(ranked).scatter(1, places.long(), ranked), ids


#: By (is a hash router, is fp32).
_FORWARDS: dict[tuple[bool, bool], Callable[..., _Outputs]] = {
    (False, False): _dense,
    (False, True): _dense_fp32,
    (True, False): _hash,
    (True, True): _hash_fp32,
}


# --- the op ---


def _transformers_gate(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    gate = _by_address.get(weight.data_ptr())
    if gate is None or gate.router is None or gate.state != _state(weight, bias):
        raise InputError(
            explain(
                "router weights of this model",
                expected="those that install(model) saw",
                found="none" if gate is None else "values changed since",
                remedy=_AGAIN,
            )
        )
    return gate.router.forward_with_logits(hidden_states)


def _transformers_gate_fake(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_grad("hidden_states", hidden_states)
    tokens, experts = hidden_states.shape[0], weight.shape[0]
    return (
        hidden_states.new_empty((tokens, top_k), dtype=torch.float32),
        hidden_states.new_empty((tokens, top_k), dtype=torch.int32),
        hidden_states.new_empty((tokens, experts), dtype=torch.float32),
    )


_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "transformers_gate(Tensor hidden_states, Tensor weight, Tensor? bias, int top_k)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
for _device in ("CPU", "CUDA"):
    _library.impl("transformers_gate", _transformers_gate, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    f"{NAMESPACE}::transformers_gate", _transformers_gate_fake, lib=_library
)
