"""One MoE layer of an engine whose routing these kernels do: what is the same in every engine.

An engine calls its gate with hidden states for logits, then its router with the logits for weights
and ids. What is computed for the gate's call, by the kind of the layer:

- Experts selected by score: one launch for logits, weights and ids. Weights and ids wait at the
  logits, as an attribute, so they live as long as these and cannot be taken for those of others.
- The same with image tokens: the token ids say which bias selects, and a gate is not given them.
  The plug-in announces them before. To a gate whose caller announced nothing, only the logits
  count, and the router's call ranks them.
- Hash layers: one launch of ``hash_gate`` reads the announced token ids and computes the scores of
  the table's experts only, so there are no logits. The gate returns NaN in their place. Where
  logits are needed (no announcement, ranks that gather them, experts that take logits), gate and
  router are the engine's own.

A Router is built at the first batch, when the weights are loaded. Engines run one, of zeros, before
they measure their memory and capture graphs. Until then, within a function that is being compiled,
and for anything but bf16 rows, gate and router are the engine's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from router_runtime.errors import RouterRuntimeError
from router_runtime.integrations.engines.report import Report
from router_runtime.integrations.engines.sources import Sources, version_of
from router_runtime.integrations.engines.variables import ACCEPT_VARIABLE
from router_runtime.ops.functions import activation_topk
from router_runtime.routing.call import Inputs
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router

#: The attribute of logits that holds what was routed by them.
_ROUTED = "_dsv4_routed"
#: In place of a value that an object has not itself, but by its class.
_OF_THE_CLASS = object()


class Constants(NamedTuple):
    """What a layer's Router computes, beside its sizes."""

    top_k: int
    scale: float
    renormalize: bool


#: What a gate attaches to its logits: the layer, weights and ids, and the logits' version at that
#: time. A plain tuple: every call makes one, and a NamedTuple takes six times as long to make.
_Routed = tuple[object, Tensor, Tensor, int]


def attached_to(logits: Tensor, layer: object) -> tuple[Tensor, Tensor] | None:
    """The weights and the ids that wait at logits of that layer's gate; None where there are none,
    or where something has written into the logits since.
    """
    routed: _Routed | None = getattr(logits, _ROUTED, None)
    if routed is None:
        return None
    owner, weights, ids, version = routed
    if owner is not layer or version != version_of(logits):
        return None
    return weights, ids


def taken(logits: Tensor, layer: object = None) -> tuple[Tensor, Tensor] | None:
    """As ``attached_to``, for a caller that writes into them, and finds them once. Without a layer:
    those of any gate.
    """
    if layer is None and (routed := getattr(logits, _ROUTED, None)) is not None:
        layer = routed[0]
    found = attached_to(logits, layer)
    if found is not None:
        delattr(logits, _ROUTED)
    return found


class EngineLayer:
    """Replaces ``forward`` of a layer's gate, once an engine's subclass says with what else.

    Attributes:
        name: the layer's name in the engine.
        gate: the engine's gate.
        constants: of the Router.
        hashed: whether experts are looked up by token id.
        images: whether another bias selects for image tokens; known once there is a Router.
        needs_token_ids: whether ``announce`` is of use.
        served: the Router, or None before the first batch and after ``restore``.

    """

    def __init__(
        self,
        name: str,
        report: Report,
        gate: nn.Module,
        constants: Constants,
        *,
        hashed: bool,
        default_loader: Callable[..., Any] | None,
    ) -> None:
        """Serve a layer from its first batch on.

        ``report`` is told what becomes of it; ``default_loader`` is that of ``Sources``; the others
        are the attributes of these names.
        """
        self.name = name
        self._report, self.gate, self.constants, self.hashed = report, gate, constants, hashed
        self.images = False
        self.needs_token_ids = hashed
        self._sources = Sources(gate, self._tensors, default_loader)
        self.served: Router | None = None
        # Hidden states that the gate is about to be called with, and their token ids.
        self._announced: tuple[Tensor, Tensor] | None = None
        self._no_logits = torch.empty(0)
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._engines_gate = gate.forward
        self.replace(gate, "forward", self._gate_forward)
        report.wait(name)

    @property
    def is_serving(self) -> bool:
        """Whether a Router was built."""
        return self.served is not None

    def restore(self) -> None:
        """Give the layer its own gate and router back."""
        self.needs_token_ids = False
        self.served = self._announced = None
        self._sources.forget()
        for owner, name, ours, before in self._replaced:
            # What was set over ours later stays, and finds the engine's own behind it.
            if vars(owner).get(name) != ours:
                continue
            if before is _OF_THE_CLASS:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._replaced = []

    def announce(self, hidden_states: Tensor, token_ids: Tensor) -> None:
        """The token ids of hidden states that the gate is about to be called with."""
        if token_ids.shape[0] == hidden_states.shape[0]:
            self._announced = hidden_states, token_ids

    def refresh(self) -> None:
        """Give the Router the values that the engine's tensors have now."""
        if self.served is not None:
            self._write(self.served)

    def told(self, tensor: Any) -> None:
        """Values were loaded into ``tensor``, which may be one of this layer's."""
        self._sources.told(tensor)

    # --- what an engine's subclass says ---

    def _tensors(self) -> dict[str, Tensor]:
        """The engine's tensors as they are now, by the names that they have in a Router."""
        raise NotImplementedError

    def _why_not_now(self) -> str | None:
        """Why the layer cannot be served, of what is known at its first batch only."""
        return None

    def _logits_are_needed(self) -> bool:
        """Whether something between the gate and the router, or in the router's place, reads a hash
        layer's logits.
        """
        return False

    def _inputs(self, rows: Tensor, token_ids: Tensor | None) -> Inputs:
        """The serving inputs of a call for these rows."""
        return {}

    def _gates_result(self, logits: Tensor) -> Any:
        """What the engine's gate returns for these logits."""
        return logits

    def _started(self) -> None:
        """The first Router is there."""

    # --- what the engine calls ---

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """Set an attribute of one of the engine's objects, until ``restore``."""
        before = vars(owner).get(name, _OF_THE_CLASS)
        setattr(owner, name, ours)
        self._replaced.append((owner, name, ours, before))

    def _gate_forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        announced, self._announced = self._announced, None
        if x.dtype is not torch.bfloat16 or x.dim() != 2 or is_compiling():
            return self._engines_gate(x, *arguments, **options)
        router = self.served
        if router is None or self._sources.changed():
            router = self._renewed(x)
            if router is None:
                return self._engines_gate(x, *arguments, **options)
        token_ids = None
        if announced is not None and announced[0] is x:
            token_ids = announced[1]
        if not self.hashed:
            logits = self._dense_gate(router, x, token_ids)
        elif token_ids is None or self._logits_are_needed():
            return self._engines_gate(x, *arguments, **options)
        else:
            logits = self._hash_gate(router, x, token_ids)
        return self._gates_result(logits)

    def _dense_gate(self, router: Router, x: Tensor, token_ids: Tensor | None) -> Tensor:
        if self.images and token_ids is None:
            return router.forward_with_logits(x)[2]
        weights, ids, logits = router.forward_with_logits(x, **self._inputs(x, token_ids))
        setattr(logits, _ROUTED, (self, weights, ids, version_of(logits)))
        return logits

    def _hash_gate(self, router: Router, x: Tensor, token_ids: Tensor) -> Tensor:
        weights, ids = router(x, token_ids, **self._inputs(x, token_ids))
        logits = self._no_logits.expand(x.shape[0], router.config.num_experts)
        setattr(logits, _ROUTED, (self, weights, ids, version_of(logits)))
        return logits

    def rank(self, logits: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights and the ids by logits; the biases are read from the engine's tensors."""
        tensors, constants = self._tensors(), self.constants
        return activation_topk(
            logits,
            tensors["bias"].detach(),
            constants.top_k,
            constants.scale,
            constants.renormalize,
            image_bias=tensors["image_bias"].detach() if self.images else None,
            **self._inputs(logits, token_ids),
        )

    # --- the Router ---

    def _renewed(self, x: Tensor) -> Router | None:
        """Return the Router, built at the first call and given changed weights later. None: neither
        is possible now.
        """
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # what is due waits for the device
        router = self.served
        if router is None:
            return self._build(x)
        self._sources.find()
        self._sources.listen(self.refresh)
        return router if self._write(router) else None

    def _build(self, x: Tensor) -> Router | None:
        reason = self._why_not_now()
        if reason is not None:
            self._give_up(reason, logging.INFO)
            return None
        self._sources.find()
        tensors: dict[str, Any] = self._sources.read()
        # Only now: a model may give its router the bias of image tokens after the layer is made.
        self.images = "image_bias" in tensors
        self.needs_token_ids = self.hashed or self.images
        try:
            accept = os.environ.get(ACCEPT_VARIABLE) or None
            router = Router(self._config(tensors), **tensors, device=x.device, accept=accept)
            if not self.hashed:
                # Loads its kernel, or is refused, here and not in a graph capture.
                no_rows = x.new_empty((0, router.config.num_experts), dtype=torch.float32)
                self.rank(no_rows, x.new_empty(0, dtype=torch.int64))
        except RouterRuntimeError as error:
            self._give_up(str(error), logging.WARNING)
            return None
        self.served = router
        self._no_logits = x.new_full((1, 1), torch.nan, dtype=torch.float32)
        self._sources.listen(self.refresh)
        self._started()
        kind = "hash" if self.hashed else "dense"
        self._report.serve(self.name, f"{kind} with image tokens" if self.images else kind)
        return router

    def _config(self, tensors: dict[str, Tensor]) -> RouterConfig:
        constants = self.constants
        experts, hidden_size = tensors["weight"].shape
        mode: Literal["hash_gate", "dense"] = "hash_gate" if self.hashed else "dense"
        return RouterConfig(
            hidden_size,
            experts,
            constants.top_k,
            constants.scale,
            mode=mode,
            vocab_size=len(tensors["table"]) if self.hashed else None,
            renormalize=constants.renormalize,
        )

    def _write(self, router: Router) -> bool:
        """Write new weights in place: captured graphs use them. False if they are refused."""
        try:
            router.load_state_dict(self._sources.read())
        except RuntimeError as error:  # torch reports the values that a Router refuses so
            self._give_up(f"new weights are refused ({error})", logging.WARNING)
            return False
        return True

    def _give_up(self, reason: str, level: int) -> None:
        self.restore()
        self._report.leave(self.name, reason, level)
