"""The operation sequence of ``numerics.py`` in numpy, rounded after the same operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from build_kernels.kernels.common.numerics import CONSTANTS

Singles = NDArray[np.float32]


def constant(name: str) -> np.float32:
    return np.float32(CONSTANTS[name])


def fma(a: Singles, b: Singles | np.float32, c: Singles | np.float32) -> Singles:
    """fma.rn.f32. The product is exact in double precision. The sum is rounded to odd there, which
    keeps the second rounding, to single precision, from rounding a false tie.
    """
    product = a.astype(np.float64) * np.float64(b)
    addend = np.float64(c)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    pattern = total.view(np.int64)
    outward = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where((lost != 0) & (pattern % 2 == 0), pattern + outward, pattern)
    return odd.view(np.float64).astype(np.float32)


def horner(prefix: str, x: Singles) -> Singles:
    names = [name for name in CONSTANTS if name.removeprefix(prefix).isdecimal()]
    value = np.full_like(x, constant(f"{prefix}{len(names) - 1}"))
    for power in reversed(range(len(names) - 1)):
        value = fma(value, x, constant(f"{prefix}{power}"))
    return value


def score(logits: Singles) -> Singles:
    """sqrt(softplus(logits)) as the kernels compute it, bit for bit."""
    # By comparison, which takes the other operand for a NaN: numpy's fmin and fmax may return a
    # signalling one.
    positive = np.where(logits > 0, np.minimum(logits, constant("LOGIT_MAX")), np.float32(0))
    u = exponential(logits)
    return np.sqrt(fma(u, horner("LOG1P_C", u), positive))


def sigmoid(logits: Singles) -> Singles:
    """1 / (1 + exp(-logits)) as the kernels compute it, bit for bit."""
    u = exponential(logits)
    scores: Singles = np.where(logits >= 0, np.float32(1), u) / (np.float32(1) + u)
    return scores


def exponential(logits: Singles) -> Singles:
    """exp(-|logits|) as the kernels compute it, bit for bit; 0 for a NaN."""
    near = np.abs(logits) < constant("EXP_CLAMP")
    magnitude = np.where(near, np.abs(logits), constant("EXP_CLAMP"))
    shifted = fma(magnitude, constant("EXP_NEG_LOG2E"), constant("EXP_SHIFT"))
    n = shifted - constant("EXP_SHIFT")
    r = fma(n, constant("EXP_NEG_LN2_HI"), -magnitude)
    r = fma(n, constant("EXP_NEG_LN2_LO"), r)
    p = horner("EXP_C", r)
    scaled = (p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
    return scaled * constant("EXP_UNSCALE")
