"""The MoE runner that vLLM makes in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from router_runtime.integrations.vllm.engine import Engine
from router_runtime.integrations.vllm.served import ServedLayer

#: The name by which vLLM looks for another class in place of its runner.
RUNNER = "MoERunner"
_MARK = "dsv4_router_runner"


def is_ours(runner: type[Any] | None) -> bool:
    """Whether ``runner_class`` made this class."""
    return runner is not None and _MARK in vars(runner)


def runner_class(engine: Engine, serve: Callable[[Any], ServedLayer | None]) -> type[Any]:
    """vLLM's MoE runner with ``serve(runner)`` for each that is made: what serves it, or None."""

    class RoutedMoERunner(engine.runner):  # type: ignore[misc, name-defined]
        """vLLM's MoE runner; see ``runner_class``."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.dsv4_router = serve(self)

        def _forward_impl(
            self,
            hidden_states: Tensor,
            router_logits: Tensor,
            shared_experts_input: Tensor | None,
            input_ids: Tensor | None = None,
        ) -> Any:
            layer = self.dsv4_router
            if layer is not None and layer.needs_token_ids and input_ids is not None:
                layer.announce(hidden_states, input_ids)
            return super()._forward_impl(
                hidden_states, router_logits, shared_experts_input, input_ids
            )

    setattr(RoutedMoERunner, _MARK, True)
    return RoutedMoERunner
