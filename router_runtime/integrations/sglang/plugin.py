"""The plug-in that SGLang finds: installing this package beside SGLang is all that is needed.

SGLang calls ``register``, the entry point ``dsv4_router`` of the group ``sglang.srt.plugins``, in
each of its processes, and then applies the hooks that the plug-ins have registered with it:

- after ``DeepseekV2MoE.__init__``: the block is served, or left alone. In a block that is served,
  ``forward`` of the gate is replaced: one launch gives logits, weights and ids. The weights and ids
  are kept as an attribute of the logits. The block's ``TopK`` gets a custom routing function, which
  returns what the logits carry. For other logits (in functions that are compiled, such as those of
  piecewise graphs) it is ``activation_topk``, one launch.
- around both functions that look experts up for ``HashTopK``: they return what the logits carry, if
  these carry anything.
- after the loader of weights: captured graphs use the new ones.

SGLang's own code goes on doing what follows: scaling factor, padding, expert map, load recording,
capture of ids.

What is not known stays as it was, and the log says why: the logger
``router_runtime.integrations.sglang`` names each reason once, and after the first batch which
layers are served. SGLang only logs a hook that it could not apply, so a block is served only if all
of them are in place.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from router_runtime.integrations.engines.layer import taken
from router_runtime.integrations.engines.plugin import find_engine, restore, say_registered
from router_runtime.integrations.engines.report import Report
from router_runtime.integrations.sglang.engine import (
    HASH_TOPK,
    HASH_TOPK_IN_TORCH,
    LOADER,
    MOE_INIT,
    Engine,
    is_hooked,
    load_engine,
)
from router_runtime.integrations.sglang.reasons import is_deepseek_v4, why_not
from router_runtime.integrations.sglang.served import ServedLayer

#: Other loggers below ``router_runtime`` have a line for each Router: too many for an engine.
LOG = logging.getLogger("router_runtime.integrations.sglang")


class _Registration:
    """The layers of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.report = Report("SGLang", LOG)
        self.layers: weakref.WeakSet[ServedLayer] = weakref.WeakSet()

    def serve(self, moe: Any) -> None:
        """Serve a block, or not. One that surprises is left alone: the engine must start."""
        name, level = "a MoE block", logging.WARNING
        try:
            name = f"layer {moe.layer_id}"
            if moe.is_nextn:
                name = f"draft {name}"
            reason = why_not(self.engine, moe) or _missing_hook()
            if reason is None:
                self.layers.add(ServedLayer(self.engine, self.report, moe, name))
                return
            if not is_deepseek_v4(moe):
                level = logging.INFO
        except AttributeError as error:
            reason = f"an attribute that was expected is missing ({error})"
        self.report.leave(name, reason, level)


_registration: _Registration | None = None
#: The registries of hooks that have ours, which cannot be taken back.
_hooked: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_moe_init(result: None, moe: Any, *arguments: Any, **options: Any) -> None:
    if _registration is not None:
        _registration.serve(moe)


def _around_hash_topk(original: Any, router_logits: Tensor, *rest: Any, **options: Any) -> Any:
    routed = taken(router_logits)
    return original(router_logits, *rest, **options) if routed is None else routed


def _around_hash_topk_in_torch(
    original: Any, topk: Any, router_logits: Tensor, *rest: Any, **options: Any
) -> Any:
    routed = taken(router_logits)
    return original(topk, router_logits, *rest, **options) if routed is None else routed


def _after_loading(result: None, param: Any, *arguments: Any, **options: Any) -> None:
    if _registration is not None:
        for layer in list(_registration.layers):
            layer.told(param)


#: What is hooked -> the hook, and its kind.
_HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    MOE_INIT: (_after_moe_init, "AFTER"),
    HASH_TOPK: (_around_hash_topk, "AROUND"),
    HASH_TOPK_IN_TORCH: (_around_hash_topk_in_torch, "AROUND"),
    LOADER: (_after_loading, "AFTER"),
}


def _missing_hook() -> str | None:
    for function, (hook, _) in _HOOKS.items():
        if not is_hooked(function, hook):
            return f"SGLang did not apply the hook on {function.rpartition(':')[2]}"
    return None


def register() -> None:
    """Have SGLang call our hooks. Calling it again does nothing.

    It never raises for an engine that it does not know: the engine then works as without us.
    """
    global _registration
    if _registration is not None:
        return
    engine = find_engine("SGLang", "an SGLang", LOG, load_engine)
    if engine is None:
        return
    if engine.hooks not in _hooked:
        for function, (hook, kind) in _HOOKS.items():
            engine.hook(function, hook, engine.kinds[kind])
        _hooked.add(engine.hooks)
    _registration = _Registration(engine)
    say_registered("SGLang", engine.version, LOG)


def layers() -> list[ServedLayer]:
    """The layers of this process that are served or wait for their first batch."""
    if _registration is None:
        return []
    return sorted(_registration.layers, key=lambda layer: layer.name)


def refresh() -> None:
    """Read the weights of every served layer anew, for captured graphs too.

    SGLang's weight loaders do this by themselves. It is for code that writes into the engine's
    parameters in another way while only captured graphs are replayed.
    """
    for layer in layers():
        layer.refresh()


def uninstall() -> list[str]:
    """Give the engine its own routing back, in layers that exist and in those to come.

    Returns the names of the layers that were served. SGLang keeps the hooks, which do nothing from
    now on. A graph that was captured before goes on replaying our kernels, whose memory stays as
    long as the process.
    """
    global _registration
    known = layers()
    _registration = None
    return restore(known)
