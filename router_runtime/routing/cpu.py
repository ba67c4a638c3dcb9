"""Gates on a CPU: ``spec.py`` itself, which needs neither artifacts nor a driver."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import check_activations, check_token_ids, wrong_token_ids
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.options import Sizes
from router_runtime.routing.placement import CPU
from router_runtime.routing.weights import Weights


class _CpuBackend:
    token_ranges: tuple[TokenRange, ...] = ()
    evidence: Mapping[str, str] = types.MappingProxyType({})

    def __init__(self, config: RouterConfig, weights: Weights) -> None:
        self._config, self._weights = config, weights
        self._sizes = Sizes.of(config, weights)

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Nothing: no CUDA graph captures work of a CPU."""


class CpuDense(_CpuBackend):
    """A dense gate on a CPU."""

    logits_token_ranges: tuple[TokenRange, ...] = ()

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the ids for bf16 hidden states ``[tokens, hidden_size]``."""
        return self.serve(tensor, Call(), None)[:2]

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``route``, and the logits, fp32 ``[tokens, num_experts]``."""
        weights, ids, logits, *_ = self.serve(tensor, Call(logits=True), None)
        return weights, ids, typing.cast(Tensor, logits)

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        config, weights = self._config, self._weights.current()
        tokens = check_activations(tensor, config.hidden_size, CPU.device)
        results = call.prepare(CPU, tokens, self._sizes)
        logits = spec.dense_logits(tensor, weights.weight)
        result = spec.activation_topk(
            logits,
            weights.bias,
            config.top_k,
            config.routed_scaling_factor,
            config.renormalize,
            image_mask=call.image_mask,
            image_bias=weights.image_bias,
            given_ids=call.given_ids,
            given_mask=call.given_mask,
            padding=call.padding(torch.arange(tokens)),
            scoring=config.scoring,
            gate_temperature=config.gate_temperature,
        )
        if results.logits is not None:
            results.logits.copy_(logits)
        return call.store(results, *result, config.sentinel, expert_map)


class CpuHash(_CpuBackend):
    """A table of experts by token id, on a CPU."""

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the ids for token ids ``[tokens]``."""
        return self.serve(tensor, Call(), None)[:2]

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        config = self._config
        tokens = check_token_ids(tensor, CPU.device)
        results = call.prepare(CPU, tokens, self._sizes)
        padding = call.padding(torch.arange(tokens))
        table = self._weights.current().table
        result = spec.hash_router(tensor, table, config.top_k, spec.NO_EXPERT, padding)
        return call.store(results, *result, config.sentinel, expert_map)


class CpuHashGate(_CpuBackend):
    """A table of experts by token id, weighed by the gate's scores, on a CPU."""

    def route(
        self, hidden_states: Tensor, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights and the ids for hidden states and their token ids."""
        if token_ids is None:
            raise wrong_token_ids("hash_gate", given=False)
        return self.serve(hidden_states, Call(token_ids=token_ids), None)[:2]

    def serve(self, hidden_states: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        """The results of a call with serving inputs."""
        config, weights = self._config, self._weights.current()
        tokens = check_activations(hidden_states, config.hidden_size, CPU.device)
        token_ids = typing.cast(Tensor, call.token_ids)
        check_token_ids(token_ids, CPU.device, tokens)
        results = call.prepare(CPU, tokens, self._sizes)
        result = spec.hash_gate(
            hidden_states,
            token_ids,
            weights.weight,
            weights.table,
            config.routed_scaling_factor,
            config.renormalize,
            spec.NO_EXPERT,
            image_mask=call.image_mask,
            image_bias=weights.image_bias,
            given_ids=call.given_ids,
            given_mask=call.given_mask,
            padding=call.padding(torch.arange(tokens)),
            scoring=config.scoring,
            gate_temperature=config.gate_temperature,
        )
        return call.store(results, *result, config.sentinel, expert_map)
