"""What a router computes: sizes, mode and constants of one gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from router_runtime.arguments import checks_arguments, explains_construction
from router_runtime.checkpoint.configs import config_fields
from router_runtime.evidence.choice import DENSE
from router_runtime.format.scoring import scoring_constants
from router_runtime.routing.checks import (
    MAX_EXPERTS,
    MAX_TOP_K,
    check_int,
    check_scale,
    check_scoring,
    check_temperature,
    wrong_value,
)

HIDDEN_MULTIPLE = 64

HASH_ROUTER = "hash_router"
HASH_GATE = "hash_gate"

#: The kernels that serve each mode.
KERNELS = {"dense": DENSE, "hash": (HASH_ROUTER,), "hash_gate": (HASH_GATE, DENSE[-1])}


@explains_construction
@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router computes.

    Attributes:
        hidden_size: H, the elements of a hidden state; a multiple of 64.
        num_experts: E, from 1 to 1024.
        top_k: k, the experts of a token; from 1 to 32 and at most E.
        routed_scaling_factor: r, the scale of the weights; finite, from 0 to 1e18. Mode ``hash``
            does not use it.
        mode: ``dense`` selects experts by the gate's scores (steps 1 to 6 of ``spec.py``);
            ``hash`` looks them up by token id and gives each the weight 1/k; ``hash_gate`` looks
            them up and weighs them by the gate's scores (steps 1 to 3 and 6).
        vocab_size: the rows of the table; required by the two hash modes.
        renormalize: whether the weights of a token are divided by the sum of its scores (step 6).
        sentinel: the id that is returned where there is no expert: for a padding token, a token id
            outside the vocabulary, or a given id outside [0, E).
        scoring: the function that makes scores of logits (step 3): ``sqrtsoftplus`` or ``sigmoid``.
            Mode ``hash`` does not use it. Kernels are built for one function and one temperature.
        gate_temperature: T, by which logits are divided before (step 2); from 2^-20 to 2^20, and
            rounded to fp32. Mode ``hash`` does not use it.

    Raises:
        InputError: a field is outside its range.

    """

    hidden_size: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    mode: Literal["dense", "hash", "hash_gate"] = "dense"
    vocab_size: int | None = None
    renormalize: bool = True
    sentinel: int = -1
    scoring: Literal["sqrtsoftplus", "sigmoid"] = "sqrtsoftplus"
    gate_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_int("hidden_size", self.hidden_size, HIDDEN_MULTIPLE, 2**20)
        if self.hidden_size % HIDDEN_MULTIPLE:
            raise wrong_value("hidden_size", f"a multiple of {HIDDEN_MULTIPLE}", self.hidden_size)
        check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_int("top_k", self.top_k, 1, min(MAX_TOP_K, self.num_experts))
        check_int("sentinel", self.sentinel, -(2**31), 2**31 - 1)
        if not isinstance(self.mode, str) or self.mode not in KERNELS:
            raise wrong_value("mode", f"one of {list(KERNELS)}", self.mode)
        if not isinstance(self.renormalize, bool):
            raise wrong_value("renormalize", "True or False", self.renormalize)
        if self.vocab_size is not None or self.mode != "dense":
            check_int("vocab_size", self.vocab_size, 1, 2**31 - 1)
        check_scale("routed_scaling_factor", self.routed_scaling_factor)
        check_scoring("scoring", self.scoring)
        check_temperature("gate_temperature", self.gate_temperature)

    def constants(self) -> dict[str, int | float | str]:
        """The compile-time constants of a kernel that serves this router."""
        shape = {"HIDDEN": self.hidden_size, "EXPERTS": self.num_experts, "TOP_K": self.top_k}
        return {**shape, **scoring_constants(self.scoring, self.gate_temperature)}

    @classmethod
    @checks_arguments
    def from_hf(cls, config: Any, *, layer: int | None = None) -> RouterConfig:
        """The configuration of the router of one layer of a DeepSeek-V4 model.

        Args:
            config: a transformers configuration, its dict, a ``config.json``, or the folder that
                holds one.
            layer: the number of the layer. The first layers of released checkpoints are hash
                layers, whose mode is ``hash_gate``. Without a number, the configuration is that of
                the layers that select experts by score.

        Raises:
            InputError: the model routes in another way, or an entry is missing.

        """
        return cls(**config_fields(config, layer))
