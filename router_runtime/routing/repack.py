"""Weights in the order in which a kernel reads them, by the recipe in its contract."""

from __future__ import annotations

import math

from torch import Tensor

from router_runtime.format.contract import Repack
from router_runtime.routing.checks import wrong_value


def packed_shape(recipe: Repack, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the buffer for a matrix of that size. Raises InputError if it does not fit."""
    if recipe.rows < rows or math.prod(recipe.shape) != recipe.rows * columns:
        raise wrong_value(
            f"repack recipe of {recipe.parameter}",
            f"at least {rows} rows, and a shape of that many times {columns} elements",
            f"{recipe.rows} rows, shape {recipe.shape}",
        )
    return tuple(recipe.shape[axis] for axis in recipe.order)


def repack(recipe: Repack, matrix: Tensor, buffer: Tensor) -> None:
    """Write ``matrix`` into ``buffer``, of the shape that ``packed_shape`` says."""
    rows, columns = matrix.shape
    if recipe.rows > rows:
        padded = matrix.new_zeros(recipe.rows, columns)
        padded[:rows] = matrix
        matrix = padded
    buffer.copy_(matrix.reshape(recipe.shape).permute(recipe.order))


def repacked(recipe: Repack, matrix: Tensor) -> Tensor:
    """``matrix`` in a new buffer."""
    buffer = matrix.new_empty(packed_shape(recipe, *matrix.shape))
    repack(recipe, matrix, buffer)
    return buffer
