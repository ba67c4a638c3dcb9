"""Where a launcher's arguments lie in memory, and how they are packed there with ``struct``."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from typing import Any

from router_runtime.format.contract import Contract

#: Parameter type -> struct format. Native alignment in ``struct`` is the C layout of the arguments.
_FORMATS = {"i32": "i", "i64": "q", "f32": "f"}


class ArgumentLayout:
    """Where a launcher keeps each argument of a kernel.

    Scalars and pointers are packed into one block of bytes, first those that change from launch to
    launch (``changing``), then the others, so that one ``pack_into`` writes all that change. Tensor
    maps have memory of their own.

    ``places`` has a number for each parameter, in the order of the contract: the byte offset into
    the block, or -1-i for tensor map i.
    """

    def __init__(self, contract: Contract, varying: tuple[str, ...]) -> None:
        types = {parameter.name: parameter.type for parameter in contract.parameters}
        recipes = {recipe.parameter: recipe for recipe in contract.tensor_maps}
        scalars = [name for name, kind in types.items() if kind != "tensormap"]
        self.changing = [name for name in scalars if name in varying]
        self.packed = [*self.changing, *(name for name in scalars if name not in varying)]
        self.maps = [recipes[name] for name, kind in types.items() if kind == "tensormap"]
        offsets = {recipe.parameter: -1 - index for index, recipe in enumerate(self.maps)}
        format_ = "@"
        for name in self.packed:
            code = _FORMATS.get(types[name], "Q")
            format_ += code
            offsets[name] = struct.calcsize(format_) - struct.calcsize(code)
        self.pack = struct.Struct(format_).pack
        self.pack_into = struct.Struct(format_[: 1 + len(self.changing)]).pack_into
        self.places = [offsets[name] for name in types]


def selector(indices: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return the function that takes a tuple's items at ``indices``, always as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: tuple(values[index] for index in indices)
