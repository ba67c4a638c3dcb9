"""One MoE layer of vLLM whose routing these kernels do; ``engines.layer`` says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from router_runtime.integrations.engines.layer import Constants, EngineLayer, attached_to
from router_runtime.integrations.engines.report import Report
from router_runtime.integrations.vllm.engine import Engine
from router_runtime.integrations.vllm.images import ImageMasks
from router_runtime.routing.call import Inputs


class ServedLayer(EngineLayer):
    """Replaces ``forward`` of the layer's gate and ``_compute_routing`` of its router."""

    def __init__(self, engine: Engine, report: Report, masks: ImageMasks, runner: Any) -> None:
        """Serve the layer of ``runner`` from its first batch on."""
        self._engine, self._masks = engine, masks
        self._runner, self._router = runner, runner.router
        self._ids_dtype: torch.dtype | None = None
        router = self._router
        super().__init__(
            runner.layer_name,
            report,
            runner.gate,
            Constants(router.top_k, float(router.routed_scaling_factor), bool(router.renormalize)),
            hashed=router._hash_indices_table is not None,
            default_loader=engine.default_loader,
        )
        self._engines_routing = router._compute_routing
        self.replace(router, "_compute_routing", self._compute_routing)

    def _tensors(self) -> dict[str, Tensor]:
        router = self._router
        # As the module's attribute, which torch takes long to find.
        own: dict[str, Any] = self.gate._parameters
        found: dict[str, Tensor] = {"weight": own["weight"]}
        if self.hashed:
            # Some checkpoints have a bias here too, which selects nothing.
            found["table"] = router._hash_indices_table
        else:
            found["bias"] = router.e_score_correction_bias
        if getattr(router, "bias_vl", None) is not None and router.image_sentinel_lo > 0:
            found["image_bias"] = router.bias_vl
        return found

    def _why_not_now(self) -> str | None:
        if self._runner.is_monolithic:
            return "its experts take logits and route by themselves"
        return None

    def _logits_are_needed(self) -> bool:
        runner = self._runner
        return bool(
            runner.do_naive_dispatch_combine
            or runner.moe_config.pcp_size > 1
            or runner.is_monolithic
        )

    def _inputs(self, rows: Tensor, token_ids: Tensor | None) -> Inputs:
        inputs: Inputs = {}
        padding = self._engine.padding(rows)
        if padding is not None:
            inputs["is_padding"] = padding
        if self._ids_dtype is not None:
            inputs["ids_dtype"] = self._ids_dtype
        if self.images and token_ids is not None:
            inputs["image_mask"] = self._masks.mask(token_ids, self._router.image_sentinel_lo)
        return inputs

    def _gates_result(self, logits: Tensor) -> Any:
        return (logits, None) if self.gate.return_bias else logits

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        routed = attached_to(router_logits, self)
        if routed is None:
            if not self._ranks(router_logits, input_ids):
                return self._engines_routing(  # type: ignore[no-any-return]
                    hidden_states, router_logits, indices_type, input_ids=input_ids
                )
            routed = self.rank(router_logits, input_ids)
        weights, ids = routed
        wanted = torch.int32 if indices_type is None else indices_type
        if ids.dtype is not wanted:
            # The kernels write int64 themselves from the next call on.
            self._ids_dtype = torch.int64 if wanted is torch.int64 else None
            ids = ids.to(wanted)
        return weights, ids

    def _ranks(self, logits: Tensor, token_ids: Tensor | None) -> bool:
        """Whether ``_rank`` serves logits that this layer's gate did not compute."""
        return (
            self.served is not None
            and not self.hashed
            and logits.dtype is torch.float32
            and logits.dim() == 2
            and logits.shape[1] == self.served.config.num_experts
            and (not self.images or (token_ids is not None and len(token_ids) == len(logits)))
            and not is_compiling()
        )
