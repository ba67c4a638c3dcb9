"""Tensor maps: the descriptors that TMA instructions take in place of a pointer."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from router_runtime.device import driver
from router_runtime.errors import DriverError, explain
from router_runtime.format.contract import TensorMap

_BYTES, _ALIGNMENT = 128, 64

#: dtype -> (CUtensorMapDataType, bytes per element).
ELEMENT_TYPES = {"bf16": (9, 2), "f32": (7, 4)}
#: Swizzle -> CUtensorMapSwizzle.
SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
_INTERLEAVE_NONE = 0
_L2_PROMOTION_256B = 3
_FILL_ZERO = 0


class Matrix(NamedTuple):
    """A row-major matrix in device memory: its address, its shape, its row stride in elements."""

    address: int
    rows: int
    columns: int
    row_stride: int


class EncodedTensorMap:
    """One tensor map of one thread. It is encoded again only when it is to describe another matrix.

    The driver encodes it at an address aligned to 64 bytes, and copies it into the launch. What the
    recipe fixes is laid out once: that takes half the time of building every argument again.
    """

    def __init__(self, recipe: TensorMap) -> None:
        self._recipe = recipe
        memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
        self.address = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
        self._matrix: Matrix | None = None
        element, self._element_bytes = ELEMENT_TYPES[recipe.dtype]
        self._extents = (ctypes.c_uint64 * 2)()
        self._strides = (ctypes.c_uint64 * 1)()
        box = (ctypes.c_uint32 * 2)(*recipe.box)
        steps = (ctypes.c_uint32 * 2)(1, 1)
        self._keep = (memory, box, steps)
        self._encode = driver.tensor_map_encoder()
        self._first = (self.address, element, 2)
        self._last = (
            *(ctypes.addressof(part) for part in (self._extents, self._strides, box, steps)),
            *(_INTERLEAVE_NONE, SWIZZLES[recipe.swizzle]),
            *(_L2_PROMOTION_256B, _FILL_ZERO),
        )

    def hold(self, matrix: Matrix) -> None:
        """Describe ``matrix``. Raises DriverError if its address or row stride is not aligned."""
        if matrix == self._matrix:
            return
        self._matrix = None  # should the encoding fail
        address, self._extents[1], self._extents[0], row_stride = matrix
        self._strides[0] = row_stride * self._element_bytes
        status = self._encode(*self._first, address, *self._last)
        if status:
            recipe = self._recipe
            raise DriverError(
                explain(
                    f"tensor map of {recipe.parameter}",
                    expected="an address and a row stride that are multiples of 16 bytes, and a "
                    f"box {recipe.box} that fits swizzle {recipe.swizzle}",
                    found=f"{matrix} refused with CUresult {status}",
                    remedy="pass the matrix contiguous and aligned",
                )
            )
        self._matrix = matrix
