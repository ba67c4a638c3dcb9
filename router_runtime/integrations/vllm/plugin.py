"""The plug-in that vLLM finds: installing this package beside vLLM is all that is needed.

vLLM calls ``register``, the entry point ``dsv4_router`` of the group ``vllm.general_plugins``, in
each of its processes. It registers a subclass of vLLM's ``MoERunner`` by the engine's own means,
``@MoERunner.register_oot(name="MoERunner")``: from then on the engine makes that class wherever it
would make a ``MoERunner``. Nothing of vLLM is patched. In a layer that is served, two methods of
two objects are replaced, while their classes stay:

- ``forward`` of the gate: one launch gives logits, weights and ids. The weights and ids are kept
  as an attribute of the logits.
- ``_compute_routing`` of the router: returns what the logits carry. For other logits (those that
  were gathered from all ranks, or computed by a LoRA gate) it is ``activation_topk``, one launch.

The router's base class goes on doing what follows: capture of ids, expert map, load recording.

The subclass overrides one method, ``_forward_impl``, because a gate is not given the token ids that
hash layers and image tokens need. ``engines/layer.py`` describes these two.

What is not known stays as it was, and the log says why: the logger
``router_runtime.integrations.vllm`` names each reason once, and after the first batch which layers
are served.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from router_runtime.integrations.engines.plugin import find_engine, restore, say_registered
from router_runtime.integrations.engines.report import Report, share_handlers
from router_runtime.integrations.engines.variables import DISABLE_VARIABLE
from router_runtime.integrations.vllm.engine import Engine, load_engine
from router_runtime.integrations.vllm.images import ImageMasks
from router_runtime.integrations.vllm.reasons import is_deepseek_v4, why_not
from router_runtime.integrations.vllm.runner import RUNNER, is_ours, runner_class
from router_runtime.integrations.vllm.served import ServedLayer

#: Other loggers below ``router_runtime`` have a line for each Router: too many for an engine.
LOG = logging.getLogger("router_runtime.integrations.vllm")


class _Registration:
    """Our class in an engine, and the layers that it was made for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.report = Report("vLLM", LOG)
        self.layers: weakref.WeakSet[ServedLayer] = weakref.WeakSet()
        self._masks = ImageMasks(engine.forward_pass)
        engine.runner.register_oot(name=RUNNER)(runner_class(engine, self._serve))

    def _serve(self, runner: Any) -> ServedLayer | None:
        """What serves a layer, or None. One that surprises is left alone: the engine must start."""
        try:
            reason = why_not(self.engine, runner)
            if reason is None:
                layer = ServedLayer(self.engine, self.report, self._masks, runner)
                self.layers.add(layer)
                return layer
            level = logging.WARNING if is_deepseek_v4(self.engine, runner) else logging.INFO
        except AttributeError as error:
            reason, level = f"an attribute that was expected is missing ({error})", logging.WARNING
        self.report.leave(getattr(runner, "layer_name", "a layer"), reason, level)
        return None


_registration: _Registration | None = None


def register() -> None:
    """Have vLLM make our MoE runner. Calling it again does nothing.

    It never raises for an engine that it does not know: the engine then works as without us.
    """
    global _registration
    share_handlers(LOG, logging.getLogger("vllm"))
    if _registration is not None:
        return
    engine = find_engine("vLLM", "a vLLM", LOG, load_engine)
    if engine is None:
        return
    taken = engine.registered.get(RUNNER)
    if taken is not None:
        LOG.warning(
            "vLLM routes by itself: expected nobody's class registered for %s, found %s.%s of "
            "another plug-in. Leave one of the two out by VLLM_PLUGINS, or set %s=1",
            *(RUNNER, taken.__module__, taken.__qualname__, DISABLE_VARIABLE),
        )
        return
    _registration = _Registration(engine)
    say_registered("vLLM", engine.version, LOG)


def layers() -> list[ServedLayer]:
    """The layers of this process that are served or wait for their first batch."""
    if _registration is None:
        return []
    return sorted(_registration.layers, key=lambda layer: layer.name)


def refresh() -> None:
    """Read the weights of every served layer anew, for captured graphs too.

    vLLM's weight loaders do this by themselves. It is for code that writes into the engine's
    parameters in another way while only captured graphs are replayed.
    """
    for layer in layers():
        layer.refresh()


def uninstall() -> list[str]:
    """Give the engine its own routing back, in layers that exist and in those to come.

    Returns the names of the layers that were served. A graph that was captured before goes on
    replaying our kernels, whose memory stays as long as the process.
    """
    global _registration
    if _registration is None:
        return []
    registered, known = _registration.engine.registered, layers()
    if is_ours(registered.get(RUNNER)):
        del registered[RUNNER]
    _registration = None
    return restore(known)
