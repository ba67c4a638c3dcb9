"""The score's operation sequence, emulated, against FP64: every exponent, both signs, the edges."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.kernels.common.numerics import CONSTANTS
from tests.kernels.emulation import Singles, fma, score, sigmoid
from tests.kernels.fit_scoring import exp_coefficients, log1p_coefficients

#: Bound on the relative error of a score, and what is left of it below -80, where exp underflows.
RELATIVE = 4e-7
UNDERFLOW = 4e-23
#: The error that numerics.py states: all logits were tried when the coefficients were chosen.
MEASURED = 1.43e-7
#: The same for the sigmoid: below -80 it is a subnormal exponential at worst.
SIGMOID_MEASURED = 1.77e-7
SIGMOID_UNDERFLOW = 2.0**-149


def reference(logits: Singles) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    scores: NDArray[np.float64] = np.sqrt(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))))
    return scores


def sigmoid_reference(logits: Singles) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    u = np.exp(-np.abs(z))
    scores: NDArray[np.float64] = np.where(z >= 0, 1, u) / (1 + u)
    return scores


def singles(*values: float) -> Singles:
    return np.array(values, dtype=np.float32)


def sample() -> Singles:
    """About 1.5 million finite logits: 6000 of every exponent and sign up to 2^7, 600 beyond."""
    random = np.random.default_rng(2)
    exponents = np.concatenate(
        [np.repeat(np.arange(134), 6000), np.repeat(np.arange(134, 255), 600)]
    )
    patterns = exponents.astype(np.uint32) << np.uint32(23)
    patterns |= random.integers(0, 2**23, patterns.size, dtype=np.uint32)
    positive = patterns.view(np.float32)
    return np.concatenate([positive, -positive, np.linspace(-105, 90, 200_001, dtype=np.float32)])


def test_error_bound() -> None:
    logits = sample()
    exact = reference(logits)
    error = np.abs(score(logits) - exact)
    ordinary = logits >= -80
    assert np.max(error[ordinary] / exact[ordinary]) <= MEASURED < RELATIVE
    assert np.max(error[~ordinary] - RELATIVE * exact[~ordinary]) <= UNDERFLOW


def test_error_bound_of_the_sigmoid() -> None:
    logits = sample()
    exact = sigmoid_reference(logits)
    error = np.abs(sigmoid(logits) - exact)
    ordinary = logits >= -80
    assert np.max(error[ordinary] / exact[ordinary]) <= SIGMOID_MEASURED < RELATIVE
    assert np.max(error[~ordinary] - RELATIVE * exact[~ordinary]) <= SIGMOID_UNDERFLOW


def test_edges_of_the_sigmoid() -> None:
    given = singles(np.inf, 3.4e38, 18, -np.inf, -3.4e38, -104.5, np.nan, -np.nan, 0.0, -0.0, 1e-45)
    found = sigmoid(given)
    assert np.array_equal(found, singles(1, 1, 1, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5))
    assert not np.signbit(found).any()


@pytest.mark.parametrize(
    ("logits", "scores"),
    [
        (singles(np.inf, CONSTANTS["LOGIT_MAX"]), np.sqrt(np.float32(CONSTANTS["LOGIT_MAX"]))),
        (singles(-np.inf, -CONSTANTS["LOGIT_MAX"], -104.5), np.float32(0)),
        (singles(np.nan, -np.nan), np.float32(0)),
    ],
)
def test_edges(logits: Singles, scores: np.float32) -> None:
    found = score(logits)
    assert np.all(found == scores)
    assert not np.signbit(found).any()


def test_zeros_and_subnormals_score_alike() -> None:
    found = score(singles(0.0, -0.0, 1e-45, -1e-45))
    assert np.all(found == np.float32(np.sqrt(np.log(2))))


def test_subnormal_exponentials_are_kept() -> None:
    logits = np.linspace(-103, -88, 1000, dtype=np.float32)
    assert np.all(score(logits) > 0)
    assert np.all(np.diff(score(logits)) >= 0)


def test_emulated_fma_rounds_once() -> None:
    random = np.random.default_rng(3)
    a, b = random.standard_normal((2, 3000)).astype(np.float32)
    near = -(a * b)  # cancellation, and sums that lie close to a tie
    far = (random.standard_normal(3000) * 2.0**26).astype(np.float32)
    tie = np.float32(1) + np.float32(2**-23) * random.integers(0, 9, 3000).astype(np.float32)
    small = np.float32(2**-12) * np.ones(3000, np.float32)
    for x, y, z in ((a, b, near), (a, b, far), (small, small, tie), (small, -small, tie)):
        for found, p, q, r in zip(fma(x, y, z), x, y, z, strict=True):
            exact = Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
            neighbours = (np.nextafter(found, np.float32(s * np.inf)) for s in (-1, 1))
            distance = abs(Fraction(float(found)) - exact)
            assert all(distance <= abs(Fraction(float(n)) - exact) for n in neighbours)


@pytest.mark.parametrize(
    ("prefix", "compute", "low", "high"),
    [("EXP_C", exp_coefficients, -0.3466, 0.3466), ("LOG1P_C", log1p_coefficients, 0.0, 1.0)],
)
def test_coefficients_are_the_fitted_ones(
    prefix: str, compute: Callable[[], list[float]], low: float, high: float
) -> None:
    fitted = compute()
    stored = [CONSTANTS[f"{prefix}{power}"] for power in range(len(fitted))]
    assert f"{prefix}{len(fitted)}" not in CONSTANTS
    # Not bit for bit: the solver of another numpy may round otherwise.
    x = np.linspace(low, high, 1001)
    difference = np.polynomial.Polynomial(np.array(fitted) - np.array(stored))(x)
    assert np.max(np.abs(difference)) < 1e-8


def test_constants_are_single_precision() -> None:
    """A kernel gets the values of this module, except for RENORM_EPSILON, which it rounds."""
    for name, value in CONSTANTS.items():
        if isinstance(value, float) and name != "RENORM_EPSILON":
            assert float(np.float32(value)) == value, name


def test_argument_reduction_constants() -> None:
    assert CONSTANTS["EXP_SHIFT"] == 3 * 2**22 + 30
    assert CONSTANTS["EXP_UNSCALE"] == 2.0**-30
    assert CONSTANTS["EXP_NEG_LOG2E"] == -float(np.float32(np.log2(np.e)))
    assert CONSTANTS["EXP_NEG_LN2_HI"] == -float(np.float32(np.log(2)))
    assert CONSTANTS["EXP_NEG_LN2_HI"] + CONSTANTS["EXP_NEG_LN2_LO"] == pytest.approx(
        -np.log(2), rel=1e-15
    )
