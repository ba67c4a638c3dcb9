"""What is used of vLLM, and whether the installed one is known to have it in that form.

The classes and their signatures are those of vLLM 0.24 to 0.33.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from router_runtime.integrations.engines.contract import (
    UnknownEngine,
    check_signature,
    check_version,
    named,
)

OLDEST, NEWEST = (0, 24), (0, 33)

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class Engine(NamedTuple):
    """What is used of vLLM.

    Attributes:
        version: its version.
        runner: ``MoERunner``.
        router: ``FusedTopKBiasRouter``.
        gate: ``GateLinear``.
        unquantized: ``UnquantizedLinearMethod``, of a gate whose weight is a plain matrix.
        registered: the classes that plug-ins have registered in place of vLLM's, by name.
        default_loader: what loads a parameter that has no loader of its own.
        forward_pass: returns the object that describes the forward pass in progress, or None.
        skips_padding: whether vLLM marks padding rows for its routers.

    """

    version: str
    runner: Any
    router: type[Any]
    gate: type[Any]
    unquantized: type[Any]
    registered: dict[str, type[Any]]
    default_loader: Callable[..., Any]
    forward_pass: Callable[[], Any]
    skips_padding: bool

    def padding(self, rows: Tensor) -> Tensor | None:
        """Which of these rows of this forward pass are padding, bool ``[tokens]``, if that is
        known.
        """
        if not self.skips_padding:
            return None
        found = self.forward_pass()
        mask: Tensor | None = None if found is None else found.is_padding
        if mask is None:
            return None
        tokens = rows.shape[0]
        if mask.shape[0] < tokens:
            return None
        return mask if mask.shape[0] == tokens else mask[:tokens]


#: Methods that are overridden or replaced, and the names of their arguments.
_SIGNATURES = (
    (
        "runner",
        "_forward_impl",
        ("self", "hidden_states", "router_logits", "shared_experts_input", "input_ids"),
    ),
    (
        "router",
        "_compute_routing",
        ("self", "hidden_states", "router_logits", "indices_type", "input_ids"),
    ),
    ("gate", "forward", ("self", "x")),
)


def load_engine() -> Engine:
    """The installed vLLM. Raises UnknownEngine if it is none that this package knows."""
    try:
        version = str(importlib.import_module("vllm").__version__)
        check_version("vLLM", version, OLDEST, NEWEST)
        context = importlib.import_module("vllm.forward_context")
        available, current = context.is_forward_context_available, context.get_forward_context
        engine = Engine(
            version=version,
            runner=named(f"{_FUSED_MOE}.runner.moe_runner:MoERunner"),
            router=named(f"{_FUSED_MOE}.router.fused_topk_bias_router:FusedTopKBiasRouter"),
            gate=named(f"{_FUSED_MOE}.router.gate_linear:GateLinear"),
            unquantized=named("vllm.model_executor.layers.linear:UnquantizedLinearMethod"),
            registered=named("vllm.model_executor.custom_op:op_registry_oot"),
            default_loader=named(
                "vllm.model_executor.model_loader.weight_utils:default_weight_loader"
            ),
            forward_pass=lambda: current() if available() else None,
            # vLLM 0.24 has no such switch, and its routers know no padding.
            skips_padding=bool(
                getattr(importlib.import_module("vllm.envs"), "VLLM_MOE_SKIP_PADDING", False)
            ),
        )
    except (ImportError, AttributeError) as error:
        raise UnknownEngine(f"something that this package uses is not in it ({error})") from error
    _check_signatures(engine)
    return engine


def _check_signatures(engine: Engine) -> None:
    for owner, method, expected in _SIGNATURES:
        check_signature(getattr(engine, owner), method, expected)
    if "name" not in inspect.signature(engine.runner.register_oot).parameters:
        raise UnknownEngine("expected MoERunner.register_oot(name=...), found no such argument")
