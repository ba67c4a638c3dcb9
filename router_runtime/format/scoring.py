"""How a model scores its experts, as compile-time constants of its kernels.

A scoring function and a gate temperature T, a number of fp32: ``score = f(fl32(z * fl32(1 / T)))``
(step 3 of ``spec.py``). An entry that scores states both; an entry without them scores nothing.
"""

from __future__ import annotations

import math
import struct

#: The scoring functions, as the configurations of models name them. The first one is DeepSeek-V4's.
SQRT_SOFTPLUS, SIGMOID = SCORINGS = ("sqrtsoftplus", "sigmoid")

#: The constants that state both.
CONSTANTS = ("SCORING", "GATE_TEMPERATURE")

#: The least and the largest gate temperature. In this range neither 1 / T nor a product with a
#: logit of any use is subnormal or infinite.
TEMPERATURES = (2.0**-20, 2.0**20)


def single(value: float) -> float:
    """Return the number of fp32 that is nearest to ``value``."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def is_temperature(value: float) -> bool:
    """Whether a gate temperature is one that kernels are built for."""
    return math.isfinite(value) and TEMPERATURES[0] <= value <= TEMPERATURES[1]


def scoring_constants(scoring: str, temperature: float) -> dict[str, int | float | str]:
    """Return the constants of an entry with that scoring function and that gate temperature."""
    return dict(zip(CONSTANTS, (scoring, single(temperature)), strict=True))
