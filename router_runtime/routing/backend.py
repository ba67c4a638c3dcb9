"""What a Router calls: one gate on one kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.call import Call, ExpertMap, Results


class Backend(Protocol):
    """One gate on one kind of device.

    Attributes:
        token_ranges: which kernel serves how many tokens; empty where one serves all.

    """

    token_ranges: tuple[TokenRange, ...]

    @property
    def route(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """A call without serving inputs: of the hidden states (dense), of the token ids (hash), or
        of both (hash_gate). Returns the weights and the ids.
        """

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """A call with serving inputs, which also holds hash_gate's token ids."""

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Call ``captured`` once, when the next CUDA graph captures a launch."""


class DenseBackend(Backend, Protocol):
    """A dense gate, which can also return the logits that it routed by."""

    @property
    def logits_token_ranges(self) -> tuple[TokenRange, ...]:
        """``token_ranges`` of calls that also want logits."""

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``route``, and the logits, fp32 ``[tokens, num_experts]``."""
