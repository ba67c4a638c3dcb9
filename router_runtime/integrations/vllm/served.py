"""One MoE layer of vLLM whose routing these kernels do.

The engine calls its gate with hidden states for logits, then its router with the logits for
weights and ids. What is computed for the gate's call, by the kind of the layer:

- Experts selected by score: one launch for logits, weights and ids. Weights and ids wait at the
  logits, as an attribute, so they live as long as these and cannot be taken for those of others.
- The same with image tokens: the token ids say which bias selects, and a gate is not given them.
  The runner announces them before. To a gate whose caller announced nothing, only the logits
  count, and the router's call ranks them.
- Hash layers: one launch of ``hash_gate`` reads the announced token ids and computes the scores of
  the table's experts only, so there are no logits. The gate returns NaN in their place. Where
  logits are needed (no announcement, ranks that gather them, experts that take logits), gate and
  router are the engine's own.

A Router is built at the first batch, when the weights are loaded. vLLM runs one, of zeros, before
it measures its memory and captures graphs. Until then, within a function that is being compiled,
and for anything but bf16 rows, gate and router are the engine's own.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from router_runtime.errors import RouterRuntimeError
from router_runtime.integrations.vllm.engine import Engine
from router_runtime.integrations.vllm.images import ImageMasks
from router_runtime.integrations.vllm.report import Report
from router_runtime.integrations.vllm.sources import Sources
from router_runtime.integrations.vllm.variables import ACCEPT_VARIABLE
from router_runtime.ops.functions import activation_topk
from router_runtime.routing.call import Inputs
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router

#: The attribute of logits that holds what was routed by them.
_ROUTED = "_dsv4_routed"


class _Routed(NamedTuple):
    layer: ServedLayer
    weights: Tensor
    ids: Tensor


class _Announced(NamedTuple):
    """The token ids of the hidden states that the gate is about to be called with."""

    hidden_states: Tensor
    token_ids: Tensor


class ServedLayer:
    """Replaces ``forward`` of the layer's gate and ``_compute_routing`` of its router.

    Attributes:
        name: the layer's name in the engine.
        needs_token_ids: whether ``announce`` is of use.

    """

    def __init__(self, engine: Engine, report: Report, masks: ImageMasks, runner: Any) -> None:
        """Serve the layer of ``runner`` from its first batch on."""
        gate, router = runner.gate, runner.router
        self.name: str = runner.layer_name
        self._engine, self._report, self._masks = engine, report, masks
        self._runner, self._gate, self._router = runner, gate, router
        self._hash = router._hash_indices_table is not None
        self._images = False
        self.needs_token_ids = self._hash
        self._sources = Sources(gate, router, engine.default_loader)
        self._served: Router | None = None
        self._announced: _Announced | None = None
        self._ids_dtype: torch.dtype | None = None
        self._no_logits = torch.empty(0)
        self._engines_gate, self._engines_routing = gate.forward, router._compute_routing
        gate.forward, router._compute_routing = self._gate_forward, self._compute_routing
        report.wait(self.name)

    @property
    def is_serving(self) -> bool:
        """Whether a Router was built."""
        return self._served is not None

    def restore(self) -> None:
        """Give the layer its own gate and router back."""
        self.needs_token_ids = False
        self._served = self._announced = None
        self._sources.forget()
        for owner, name in ((self._gate, "forward"), (self._router, "_compute_routing")):
            # What was set over ours later stays, and finds the engine's own behind it.
            if vars(owner).get(name) in (self._gate_forward, self._compute_routing):
                delattr(owner, name)

    def announce(self, hidden_states: Tensor, token_ids: Tensor) -> None:
        """The token ids of hidden states that the runner is about to call the gate with."""
        if token_ids.shape[0] == hidden_states.shape[0]:
            self._announced = _Announced(hidden_states, token_ids)

    def refresh(self) -> None:
        """Give the Router the values that the engine's tensors have now."""
        if self._served is not None:
            self._write(self._served)

    # --- what the engine calls ---

    def _gate_forward(self, x: Tensor) -> Any:
        announced, self._announced = self._announced, None
        if x.dtype is not torch.bfloat16 or x.dim() != 2 or is_compiling():
            return self._engines_gate(x)
        router = self._current(x)
        if router is None:
            return self._engines_gate(x)
        token_ids = None
        if announced is not None and announced.hidden_states is x:
            token_ids = announced.token_ids
        if self._hash:
            logits = self._hash_gate(router, x, token_ids)
            if logits is None:
                return self._engines_gate(x)
        else:
            logits = self._dense_gate(router, x, token_ids)
        return (logits, None) if self._gate.return_bias else logits

    def _dense_gate(self, router: Router, x: Tensor, token_ids: Tensor | None) -> Tensor:
        if self._images and token_ids is None:
            return router.forward_with_logits(x)[2]
        weights, ids, logits = router.forward_with_logits(x, **self._inputs(x, token_ids))
        setattr(logits, _ROUTED, _Routed(self, weights, ids))
        return logits

    def _hash_gate(self, router: Router, x: Tensor, token_ids: Tensor | None) -> Tensor | None:
        if token_ids is None or self._logits_are_needed():
            return None
        weights, ids = router(x, token_ids, **self._inputs(x, token_ids))
        logits = self._no_logits.expand(x.shape[0], router.config.num_experts)
        setattr(logits, _ROUTED, _Routed(self, weights, ids))
        return logits

    def _logits_are_needed(self) -> bool:
        """Whether something between the gate and the router, or in the router's place, reads
        logits: ranks that gather rows before they route, or experts that route by themselves.
        """
        runner = self._runner
        return bool(
            runner.do_naive_dispatch_combine
            or runner.moe_config.pcp_size > 1
            or runner.is_monolithic
        )

    def _inputs(self, rows: Tensor, token_ids: Tensor | None) -> Inputs:
        """The serving inputs of a call for these rows."""
        inputs = Inputs()
        padding = self._engine.padding(rows.shape[0])
        if padding is not None:
            inputs["is_padding"] = padding
        if self._ids_dtype is not None:
            inputs["ids_dtype"] = self._ids_dtype
        if self._images and token_ids is not None:
            inputs["image_mask"] = self._masks.mask(token_ids, self._router.image_sentinel_lo)
        return inputs

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        routed: _Routed | None = getattr(router_logits, _ROUTED, None)
        if routed is not None and routed.layer is self:
            weights, ids = routed.weights, routed.ids
        elif self._ranks(router_logits, input_ids):
            weights, ids = self._rank(router_logits, input_ids)
        else:
            return self._engines_routing(  # type: ignore[no-any-return]
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
        wanted = torch.int32 if indices_type is None else indices_type
        if ids.dtype is not wanted:
            # The kernels write int64 themselves from the next call on.
            self._ids_dtype = torch.int64 if wanted is torch.int64 else None
            ids = ids.to(wanted)
        return weights, ids

    def _ranks(self, logits: Tensor, token_ids: Tensor | None) -> bool:
        """Whether ``_rank`` serves logits that this layer's gate did not compute."""
        return (
            self._served is not None
            and not self._hash
            and logits.dtype is torch.float32
            and logits.dim() == 2
            and logits.shape[1] == self._served.config.num_experts
            and (not self._images or (token_ids is not None and len(token_ids) == len(logits)))
            and not is_compiling()
        )

    def _rank(self, logits: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weights and the ids by logits; the biases are read from the engine's tensors."""
        router = self._router
        return activation_topk(
            logits,
            router.e_score_correction_bias.detach(),
            router.top_k,
            router.routed_scaling_factor,
            bool(router.renormalize),
            image_bias=router.bias_vl.detach() if self._images else None,
            **self._inputs(logits, token_ids),
        )

    # --- the Router ---

    def _current(self, x: Tensor) -> Router | None:
        """The Router with the weights as they are now, or None where it cannot be had."""
        router = self._served
        if router is not None and not self._sources.changed():
            return router
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # what is due waits for the device
        if router is None:
            return self._build(x)
        self._sources.find()
        self._sources.listen(self.refresh)
        return router if self._write(router) else None

    def _build(self, x: Tensor) -> Router | None:
        if self._runner.is_monolithic:
            self._give_up("its experts take logits and route by themselves", logging.INFO)
            return None
        self._sources.find()
        tensors: dict[str, Any] = self._sources.read()
        # Only now: a model may give its router the bias of image tokens after the runner is made.
        self._images = "image_bias" in tensors
        self.needs_token_ids = self._hash or self._images
        try:
            accept = os.environ.get(ACCEPT_VARIABLE) or None
            router = Router(self._config(tensors), **tensors, device=x.device, accept=accept)
            if not self._hash:
                # Loads its kernel, or is refused, here and not in a graph capture.
                no_rows = x.new_empty((0, router.config.num_experts), dtype=torch.float32)
                self._rank(no_rows, x.new_empty(0, dtype=torch.int64))
        except RouterRuntimeError as error:
            self._give_up(str(error), logging.WARNING)
            return None
        self._served = router
        self._no_logits = x.new_full((1, 1), torch.nan, dtype=torch.float32)
        self._sources.listen(self.refresh)
        kind = "hash" if self._hash else "dense"
        self._report.serve(self.name, f"{kind} with image tokens" if self._images else kind)
        return router

    def _config(self, tensors: dict[str, Tensor]) -> RouterConfig:
        router = self._router
        experts, hidden_size = tensors["weight"].shape
        mode: Literal["hash_gate", "dense"] = "hash_gate" if self._hash else "dense"
        return RouterConfig(
            hidden_size,
            experts,
            router.top_k,
            float(router.routed_scaling_factor),
            mode=mode,
            vocab_size=len(tensors["table"]) if self._hash else None,
            renormalize=bool(router.renormalize),
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
