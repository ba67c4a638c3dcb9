"""fp32 rounding of Python floats."""

from __future__ import annotations

import math
import struct


def fl32(number: float) -> float:
    """The nearest fp32 number, ties to even."""
    if math.isnan(number) or math.isinf(number):
        return number
    try:
        rounded: float = struct.unpack("f", struct.pack("f", number))[0]
        return rounded
    except OverflowError:
        return math.copysign(math.inf, number)
