"""What a Router calls: one gate on one kind of device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from router_runtime.device.kernels import Kernels
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.call import Call, Results
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cpu import CpuDense, CpuHash, CpuHashGate
from router_runtime.routing.cuda_dense import CudaDense
from router_runtime.routing.cuda_hash import CudaHash, CudaHashGate
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights


class Backend(Protocol):
    """One gate on one kind of device.

    Attributes:
        token_ranges: which kernel serves how many tokens; empty where one serves all.
        evidence: key of each entry that serves -> its evidence status; empty on a CPU.

    """

    token_ranges: tuple[TokenRange, ...]
    evidence: Mapping[str, str]

    @property
    def route(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """A call without serving inputs: of the hidden states (dense), of the token ids (hash), or
        of both (hash_gate). Returns the weights and the ids.
        """

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """Route with the serving inputs in ``call``, which also has the token ids of hash_gate."""

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Have ``captured`` called, once: by the next launch that a CUDA graph captures."""


class DenseBackend(Backend, Protocol):
    """A dense gate, which can also return the logits that it routed by."""

    @property
    def logits_token_ranges(self) -> tuple[TokenRange, ...]:
        """``token_ranges`` of calls that also want logits."""

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``route``, and the logits, fp32 ``[tokens, num_experts]``."""


def make_backend(
    config: RouterConfig,
    weights: Weights,
    kernels: Kernels | None,
    selection: Selection,
) -> Backend | DenseBackend:
    """The gate of ``config.mode``: on the GPU that ``kernels`` are for, or on a CPU if None."""
    mode = config.mode
    if kernels is None:
        if mode == "dense":
            return CpuDense(config, weights)
        return CpuHash(config, weights) if mode == "hash" else CpuHashGate(config, weights)
    given = config, weights, kernels, selection
    if mode == "dense":
        return CudaDense(*given)
    return CudaHash(*given) if mode == "hash" else CudaHashGate(*given)
