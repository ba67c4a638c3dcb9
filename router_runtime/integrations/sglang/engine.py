"""What is used of SGLang, and whether the installed one is known to have it in that form.

The classes and their arguments are those of SGLang 0.5.23. Older releases refuse a custom routing
function together with padding (to 0.5.16) or with a scaling factor in the weights (to 0.5.22).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from router_runtime.integrations.engines.contract import (
    UnknownEngine,
    check_first_arguments,
    check_version,
    named,
)

OLDEST, NEWEST = (0, 5, 23), (0, 5)

_REGISTRY = "sglang.srt.plugins.hook_registry"
_MODEL = "sglang.srt.models.deepseek_v2"
_MOE = "sglang.srt.layers.moe"

#: The functions that are hooked.
MOE_INIT = f"{_MODEL}:DeepseekV2MoE.__init__"
HASH_TOPK = "sglang.kernels.ops.moe.dsv4:hash_topk"
HASH_TOPK_IN_TORCH = f"{_MOE}.hash_topk:HashTopK._forward_torch"
LOADER = "sglang.srt.model_loader.weight_utils:default_weight_loader"

_MOE_FORWARD = f"{_MODEL}:DeepseekV2MoE.forward"

#: What is hooked, called or replaced -> the names of its first arguments.
_ARGUMENTS = {
    MOE_INIT: ("self", "config", "layer_id"),
    _MOE_FORWARD: ("self", "hidden_states"),
    f"{_MODEL}:MoEGate.forward": ("self", "hidden_states"),
    HASH_TOPK: ("router_logits", "input_ids", "tid2eid"),
    HASH_TOPK_IN_TORCH: ("self", "router_logits", "input_ids"),
    LOADER: ("param", "loaded_weight"),
    f"{_REGISTRY}:HookRegistry.register": ("target", "hook", "hook_type"),
}
_TOKEN_IDS = "input_ids_global"


class Engine(NamedTuple):
    """What is used of SGLang.

    Attributes:
        version: its version.
        moe: ``DeepseekV2MoE``, the MoE block of DeepSeek models of all generations.
        gate: ``MoEGate``.
        topk: ``TopK``, of experts that are selected by score.
        hash_topk: ``HashTopK``, of experts that are looked up.
        standard: the format of outputs that have weights and ids.
        hooks: ``HookRegistry``.
        kinds: ``HookType``.
        token_ids_place: the place of the token ids among the arguments of a MoE block's ``forward``
            that follow the hidden states.

    """

    version: str
    moe: Any
    gate: Any
    topk: Any
    hash_topk: Any
    standard: Any
    hooks: Any
    kinds: Any
    token_ids_place: int

    def hook(self, function: str, hook: Callable[..., Any], kind: Any) -> None:
        """Have SGLang put ``hook`` around a function, once all plug-ins are loaded."""
        self.hooks.register(function.replace(":", "."), hook, kind)

    def token_ids(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The token ids in a call of a MoE block's ``forward``, or None."""
        if len(arguments) > self.token_ids_place:
            return arguments[self.token_ids_place]
        return options.get(_TOKEN_IDS)


def load_engine() -> Engine:
    """The installed SGLang. Raises UnknownEngine if it is none that this package knows."""
    try:
        version = str(importlib.import_module("sglang").__version__)
        check_version("SGLang", version, OLDEST, NEWEST)
        found = {
            path: check_first_arguments(path, expected) for path, expected in _ARGUMENTS.items()
        }
        if _TOKEN_IDS not in found[_MOE_FORWARD]:
            raise UnknownEngine(f"expected DeepseekV2MoE.forward({_TOKEN_IDS}=...), found none")
        return Engine(
            version=version,
            moe=named(f"{_MODEL}:DeepseekV2MoE"),
            gate=named(f"{_MODEL}:MoEGate"),
            topk=named(f"{_MOE}.topk:TopK"),
            hash_topk=named(f"{_MOE}.hash_topk:HashTopK"),
            standard=named(f"{_MOE}.topk:TopKOutputFormat.STANDARD"),
            hooks=named(f"{_REGISTRY}:HookRegistry"),
            kinds=named(f"{_REGISTRY}:HookType"),
            token_ids_place=found[_MOE_FORWARD].index(_TOKEN_IDS) - 2,
        )
    except (ImportError, AttributeError) as error:
        raise UnknownEngine(f"something that this package uses is not in it ({error})") from error


def is_hooked(function: str, hook: Callable[..., Any]) -> bool:
    """Whether SGLang has put ``hook`` around a function: what it cannot hook, it only logs."""
    found: Any = named(function)
    while found is not None:
        if any(cell.cell_contents is hook for cell in getattr(found, "__closure__", None) or ()):
            return True
        found = getattr(found, "__wrapped__", None)
    return False
