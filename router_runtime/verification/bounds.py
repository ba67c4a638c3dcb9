"""The intervals in which the scores, keys and weights of a correct kernel lie.

Nothing here is a fitted tolerance: ``TOLERANCES`` lists the error bounds that the kernels promise,
each with its reason, and every interval follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from router_runtime import spec

TOLERANCES: Mapping[str, float] = MappingProxyType(
    {
        # |z - z64| <= LOGIT * sum |x W|: fp32 accumulation in the canonical chunked order.
        "LOGIT": 2.0**-20,
        # Relative error of a score: one fp32 softplus, one square root, their roundings; of a
        # sigmoid: one fp32 exponential, an addition and a division.
        "SCORE": 4e-7,
        # Below a logit of -80 the softplus itself nears the subnormals: absolute error of a score,
        # and of one that is a sigmoid, which is there the exponential.
        "SCORE_UNDERFLOW": 4e-23,
        "SIGMOID_UNDERFLOW": 2.0**-149,
        # Relative error of one fp32 rounding.
        "ROUNDING": 2.0**-24,
        # Absolute error of one fp32 rounding among the subnormals.
        "SUBNORMAL": 2.0**-150,
    }
)
_UNDERFLOW = {"sqrtsoftplus": "SCORE_UNDERFLOW", "sigmoid": "SIGMOID_UNDERFLOW"}
_UNDERFLOW_LOGIT = -80.0


@dataclass(frozen=True, slots=True)
class Interval:
    """The smallest and largest value that a correct kernel can compute, element by element.

    ``low`` and ``high`` have the same shape; float64 for scores and weights, fp32 for keys.
    """

    low: Tensor
    high: Tensor

    def rows(self, rows: Tensor) -> Interval:
        """The interval of some rows: indices ``[M]`` or a bool mask ``[N]``."""
        return Interval(self.low[rows], self.high[rows])


def score_interval(
    logits: Tensor, slack: Tensor, scoring: str = "sqrtsoftplus", gate_temperature: float = 1.0
) -> Interval:
    """The scores of logits that are known up to ``slack``.

    Args:
        logits: float64 ``[N, E]``.
        slack: The largest absolute error of each logit, float64 ``[N, E]``.
        scoring: The scoring function, of ``spec.SCORINGS``.
        gate_temperature: T.

    Returns:
        The scores of both ends (each scoring function is monotone), widened by the promised error
        of the scoring function; float64 ``[N, E]``, never below 0.

    """
    lowest = _tempered(logits - slack, gate_temperature, -1)
    low = spec.SCORINGS[scoring](lowest)
    high = spec.SCORINGS[scoring](_tempered(logits + slack, gate_temperature, 1))
    allowed = TOLERANCES[_UNDERFLOW[scoring]]
    underflow = torch.where(lowest < _UNDERFLOW_LOGIT, allowed, 0.0)
    low = (low * (1 - TOLERANCES["SCORE"]) - underflow).clamp(min=0.0)
    return Interval(low, high * (1 + TOLERANCES["SCORE"]) + underflow)


def _tempered(logits: Tensor, temperature: float, direction: int) -> Tensor:
    """``spec.tempered``, and one fp32 rounding further: up for the direction 1, down for -1."""
    if temperature == 1:
        return logits
    z = spec.tempered(logits, temperature)
    rounding = TOLERANCES["ROUNDING"] * z.abs() + TOLERANCES["SUBNORMAL"]
    # An infinity stays what it is.
    return torch.where(z.isinf(), z, z + direction * rounding)


def key_interval(scores: Interval, bias: Tensor, logits: Tensor) -> Interval:
    """The selection keys of scores in an interval, fp32 ``[N, E]``: both ends plus the fp32 bias
    ``[E]``, rounded to fp32 as the kernel rounds (rounding is monotone). A NaN logit gives -inf.
    """
    return Interval(rounded_key(scores.low, bias, logits), rounded_key(scores.high, bias, logits))


def rounded_key(scores: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """The fp32 keys of float64 scores: the float64 sum rounded to fp32 is the fp32 sum."""
    return spec.selection_keys(scores, bias.double(), logits).float()


def weight_interval(
    scores: Interval, exact: Tensor, scale: float, renormalize: bool
) -> tuple[Interval, Tensor]:
    """The weights of the chosen experts.

    Args:
        scores: The scores of the chosen experts, float64 ``[N, k]``.
        exact: The same without any error, float64 ``[N, k]``.
        scale: The factor r of the weights, as fp32 holds it.
        renormalize: Whether the weights of a row are divided by the sum of its scores.

    Returns:
        The interval of the weights, widened by the roundings of the kernel's own arithmetic, and
        the weights of the exact scores; all float64 ``[N, k]``.

    """
    low, high = scores.low, scores.high
    if renormalize:
        # A weight grows with its own score and shrinks with the others'.
        others_low = low.sum(dim=1, keepdim=True) - low
        others_high = high.sum(dim=1, keepdim=True) - high
        low = low / (low + others_high + spec.RENORM_EPSILON)
        high = high / (high + others_low + spec.RENORM_EPSILON)
        exact = exact / (exact.sum(dim=1, keepdim=True) + spec.RENORM_EPSILON)
        # Roundings: k - 1 additions of scores, the addition of epsilon, of epsilon itself to FP32,
        # of the division, and of the product with the scale.
        roundings = exact.shape[1] + 3
    else:
        roundings = 1
    slack = 1 + roundings * TOLERANCES["ROUNDING"]
    # Where a number is subnormal its rounding error is absolute: at most SUBNORMAL each for the
    # quotient, which is then multiplied by the scale, and for the product.
    subnormal = (scale + 1) * TOLERANCES["SUBNORMAL"]
    interval = Interval(low * scale / slack - subnormal, high * scale * slack + subnormal)
    return interval, exact * scale
