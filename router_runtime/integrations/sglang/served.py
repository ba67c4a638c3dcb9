"""One MoE block of SGLang whose routing these kernels do; ``engines.layer`` says how.

The weights have no scaling factor: SGLang multiplies by it, in the weights that a custom routing
function returned or in the experts' results. It does the same for padding, the expert map, shared
experts, load recording and capture.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from router_runtime.integrations.engines.layer import Constants, EngineLayer, taken
from router_runtime.integrations.engines.report import Report
from router_runtime.integrations.sglang.engine import Engine
from router_runtime.integrations.sglang.reasons import why_not_format


class ServedLayer(EngineLayer):
    """Replaces ``forward`` of the block's gate. For experts that are selected by score, it is also
    the custom routing function of the block's ``TopK``, from the first batch on; for experts that
    are looked up, it replaces ``forward`` of the block, which is given the token ids.
    """

    def __init__(self, engine: Engine, report: Report, moe: Any, name: str) -> None:
        """Serve the block ``moe`` from its first batch on."""
        self._engine, self._topk = engine, moe.topk
        hashed = type(moe.topk) is engine.hash_topk
        self._topk_config = None if hashed else moe.topk.topk_config
        constants = (
            Constants(moe.topk.topk, 1.0, True)
            if self._topk_config is None
            else Constants(self._topk_config.top_k, 1.0, bool(self._topk_config.renormalize))
        )
        # The plug-in hooks the default loader itself.
        super().__init__(name, report, moe.gate, constants, hashed=hashed, default_loader=None)
        if hashed:
            self._blocks_forward = moe.forward
            self.replace(moe, "forward", self._block_forward)

    def _tensors(self) -> dict[str, Tensor]:
        # As the modules' attributes, which torch takes long to find.
        own: dict[str, Any] = self.gate._parameters
        if self.hashed:
            return {"weight": own["weight"], "table": self._topk._parameters["tid2eid"]}
        return {"weight": own["weight"], "bias": own["e_score_correction_bias"]}

    def _why_not_now(self) -> str | None:
        return (
            None if self._topk_config is None else why_not_format(self._engine, self._topk_config)
        )

    def _started(self) -> None:
        if self._topk_config is not None:
            self.replace(self._topk_config, "custom_routing_function", self._route)

    def _route(
        self, *, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """What SGLang's ``TopK`` calls. It scales the weights and masks the ids in place."""
        # A tensor of a function that is being compiled carries nothing.
        routed = None if is_compiling() else taken(gating_output, self)
        return self.rank(gating_output.float()) if routed is None else routed

    def _block_forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        if self.needs_token_ids and not is_compiling():
            token_ids = self._engine.token_ids(arguments, options)
            if token_ids is not None:
                self.announce(hidden_states, token_ids)
        return self._blocks_forward(hidden_states, *arguments, **options)
