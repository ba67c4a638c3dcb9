"""Computes the polynomial coefficients of ``common/numerics.py``.

Run: python fit_scoring.py

Remez exchange in double precision on a fine grid, minimising the relative error. Coefficients are
rounded to single precision one after the other, the lowest power first since it weighs most; after
each the remaining ones are fitted again, so that they make up for its rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

POINTS = 4001


def minimax(columns: Doubles, target: Doubles) -> Doubles:
    """The c that minimises max |columns @ c - target|, by exchange of alternating extrema."""
    points, terms = columns.shape
    signs = (-1.0) ** np.arange(terms + 1)
    angles = np.pi * np.arange(terms + 1) / terms
    reference = np.unique(np.round((points - 1) * (1 - np.cos(angles)) / 2).astype(int))
    for _ in range(60):
        system = np.column_stack([columns[reference], signs])
        solution = np.linalg.solve(system, target[reference])[:terms]
        error = columns @ solution - target
        runs = np.split(np.arange(points), np.flatnonzero(np.diff(np.sign(error))) + 1)
        extrema = [run[np.argmax(np.abs(error[run]))] for run in runs]
        while len(extrema) > terms + 1:
            weaker_end = 0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1
            extrema.pop(weaker_end)
        if len(extrema) < terms + 1 or np.array_equal(extrema, reference):
            break
        reference = np.array(extrema)
    return solution


def fit(x: Doubles, y: Doubles, degree: int, leading: tuple[float, ...] = ()) -> list[float]:
    """Single-precision coefficients of y, lowest power first; the first ones are ``leading``."""
    coefficients: list[float] = []
    rest = y.copy()
    for power in range(degree + 1):
        if power < len(leading):
            value = leading[power]
        else:
            columns = np.column_stack([x**p / y for p in range(power, degree + 1)])
            value = float(np.float32(minimax(columns, rest / y)[0]))
        coefficients.append(value)
        rest = rest - value * x**power
    return coefficients


def exp_coefficients() -> list[float]:
    # A little beyond ln(2)/2: n is the integer nearest to a rounded product.
    x = -np.log(2) / 2 * (1 + 1e-5) * np.cos(np.pi * np.arange(POINTS) / (POINTS - 1))
    return fit(x, np.exp(x), 6)


def log1p_coefficients() -> list[float]:
    u = (1 - np.cos(np.pi * np.arange(POINTS) / (POINTS - 1))) / 2
    quotient = np.ones(POINTS)  # its limit at 0
    quotient[1:] = np.log1p(u[1:]) / u[1:]
    return fit(u, quotient, 8, leading=(1.0,))


if __name__ == "__main__":
    for name, found in (("exp", exp_coefficients()), ("log1p", log1p_coefficients())):
        print(name, [value.hex() for value in found])
