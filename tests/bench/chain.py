"""The chain: routers with weights of their own, one after the other, each behind a link.

Sizes first. The weights and inputs of a chain are at least three times the L2 cache, so that a
router finds none of its weights there. Many tokens need few distinct inputs for that, which keeps
memory bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from build_kernels.catalog.models import Model
from router_runtime import spec
from tests.bench.machine import Machine

#: Inputs of a chain may take this much memory, and as much more as three times the L2 cache needs.
INPUT_BYTES = 4 << 30

#: The largest batch that a chain has token ids for.
MOST_TOKENS = 1 << 17

#: How many caches full the weights, and the inputs, of a chain are.
CACHES = 3

_BF16 = 2
_CHECKED_ROWS = 64

#: On logits of deviation 1.3 and weights below 2.5: a wrong result is off by far more, and a bf16
#: accumulation would be too.
_TOLERANCE = 1e-3

#: Of the rows checked, how many may differ from the oracle's ids: a peer that accumulates in its
#: own order may swap two experts whose keys nearly tie.
ALLOWED_ROWS = 2

#: Scales that give logits of deviation near 1.3, and a bias that moves some of the choices.
_WEIGHT_SCALE, _BIAS_SCALE = 0.02, 0.1


class Plan(NamedTuple):
    """How many routers a chain has, and how many distinct inputs they take in turn."""

    routers: int
    inputs: int


def plan(model: Model, tokens: int, l2_bytes: int, least_routers: int) -> Plan:
    weight_bytes = _BF16 * model.hidden * model.experts
    input_bytes = _BF16 * model.hidden * tokens
    routers = max(least_routers, -(-CACHES * l2_bytes // weight_bytes))
    inputs = max(-(-CACHES * l2_bytes // input_bytes), INPUT_BYTES // input_bytes, 1)
    return Plan(routers, min(routers, inputs))


@dataclass(frozen=True, slots=True)
class Layers:
    """The weights of a chain's routers, row-major as a checkpoint has them, and their tables. All
    routers of a batch see the same token ids: the first ones of ``token_ids``.
    """

    model: Model
    device: torch.device
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    token_ids: Tensor


def make_layers(model: Model, routers: int, device: torch.device) -> Layers:
    """Random weights; the same every time on one device and torch."""
    random = torch.Generator(device).manual_seed(1)
    shape = (model.experts, model.hidden)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, device=device)

    def integers(below: int, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(below, sizes, generator=random, device=device, dtype=dtype)

    return Layers(
        model,
        device,
        tuple((normal(*shape) * _WEIGHT_SCALE).bfloat16() for _ in range(routers)),
        tuple(normal(model.experts) * _BIAS_SCALE for _ in range(routers)),
        tuple(
            integers(model.experts, model.vocab, model.top_k, dtype=torch.int32)
            for _ in range(routers)
        ),
        integers(model.vocab, MOST_TOKENS, dtype=torch.int64),
    )


def make_inputs(model: Model, tokens: int, count: int, device: torch.device) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(2)
    shape = (tokens, model.hidden)
    return [
        torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)
        for _ in range(count)
    ]


class Output(NamedTuple):
    """What a router gave. Its first column feeds the link; ``ids`` is None for bare logits.
    ``mode`` is the mode of a Router that gives the same.
    """

    values: Tensor
    ids: Tensor | None
    mode: Literal["dense", "hash", "hash_gate"] = "dense"


#: Routes the hidden states by the layer of that index.
Route = Callable[[int, Tensor], Output]


@dataclass(frozen=True, slots=True)
class Chain:
    """One cell's workload: the same layers and inputs for every contender."""

    machine: Machine
    layers: Layers
    inputs: list[Tensor]
    first: Tensor

    def links(self, dependent: bool) -> None:
        """The tiny kernels alone."""
        for index in range(len(self.layers.weights)):
            self.machine.link(self.first, self.inputs[index % len(self.inputs)], dependent)

    def routed(self, route: Route, dependent: bool) -> Output:
        """Links and routers; returns the last router's output."""
        output = Output(self.first, None)
        for index in range(len(self.layers.weights)):
            x = self.inputs[index % len(self.inputs)]
            self.machine.link(output.values, x, dependent)
            output = route(index, x)
        return output

    def wrong_rows(self, output: Output) -> int:
        """Rows, among those checked, in which the last router of the chain is wrong.

        Its input still holds what the last link wrote, so this also says whether the chain's
        dependencies held.
        """
        last = len(self.layers.weights) - 1
        x = self.inputs[last % len(self.inputs)]
        count = min(x.shape[0], _CHECKED_ROWS)
        rows = torch.linspace(0, x.shape[0] - 1, count, device=x.device).round().long()
        weight, bias = self.layers.weights[last], self.layers.biases[last]
        model, x, found = self.layers.model, x[rows], output.values[rows]
        table, token_ids = self.layers.tables[last], self.layers.token_ids[rows]
        rule: Any = {"scoring": model.scoring, "gate_temperature": model.gate_temperature}
        if output.ids is None:
            exact = spec.dense_logits64(x, weight)
            wrong = ~((found - exact).abs() <= _TOLERANCE).all(dim=1)
        else:
            if output.mode == "dense":
                given = x, weight, bias, model.top_k, model.scale
                exact, ids = spec.dense_router(*given, **rule)
            elif output.mode == "hash":
                exact, ids = spec.hash_router(token_ids, table, model.top_k)
            else:
                exact, ids = spec.hash_gate(x, token_ids, weight, table, model.scale, **rule)
            wrong = (output.ids[rows] != ids).any(dim=1)
            wrong |= ~((found - exact).abs() <= _TOLERANCE).all(dim=1)
        return int(wrong.sum())


def make_chain(machine: Machine, layers: Layers, tokens: int, inputs: int) -> Chain:
    """A chain of every layer over that many tokens and distinct inputs."""
    model = layers.model
    first = torch.rand(tokens, model.top_k, device=layers.device)
    return Chain(machine, layers, make_inputs(model, tokens, inputs, layers.device), first)
