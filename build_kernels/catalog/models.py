"""The models that a full build serves. Data only.

To add a model, add a row to ``MODELS``, or pass ``--model-file`` and touch no code at all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants

#: In place of a model's name: every model that has no row of its own.
ANY = "any"


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a model's routers, and how they score.

    ``scale`` is the routed scaling factor r, which kernels take as a launch argument. The first
    ``hash_layers`` MoE layers route by a table over ``vocab`` token ids. ``scoring`` is a name of
    ``router_runtime.format.scoring.SCORINGS``; logits are divided by ``gate_temperature`` first.
    ``measured`` has what a model file says of its kernels beside the shape, number by path
    (``catalog/measured.py``).
    """

    name: str
    hidden: int
    experts: int
    top_k: int
    scale: float
    hash_layers: int
    vocab: int
    scoring: str = SQRT_SOFTPLUS
    gate_temperature: float = 1.0
    measured: tuple[tuple[str, int | float], ...] = ()

    def shape(self) -> dict[str, int | float | str]:
        """Return everything but the name and what has its default value: values by their paths in
        a model file.
        """
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "measured") and getattr(self, field.name) != field.default
        }
        return {**own, **dict(self.measured)}

    def constants(self) -> dict[str, int | float | str]:
        """Return the compile-time constants of a kernel that is compiled for this model."""
        shape = {"HIDDEN": self.hidden, "EXPERTS": self.experts, "TOP_K": self.top_k}
        return {**shape, **scoring_constants(self.scoring, self.gate_temperature)}


# fmt: off
MODELS = (
    #     name            hidden  experts  top_k  scale  hash_layers  vocab
    Model("dsv4-flash",   4096,   256,     6,     1.5,   3,           129280),
    Model("dsv4-pro",     7168,   384,     6,     2.5,   3,           129280),
    Model("dsv41-flash",  5120,   384,     6,     1.5,   0,           129280),
    # The draft layers of dsv41-flash. Its released config.json has their number of experts and k
    # (dspark_n_routed_experts, dspark_num_experts_per_tok) and one routed_scaling_factor for all
    # layers.
    Model("dsv41-dspark", 5120,   128,     3,     1.5,   0,           129280),
)
# fmt: on
