"""dense_router_decode: the dense router for few tokens (kernels/dense)."""

from __future__ import annotations

from collections.abc import Callable

from build_kernels.kernels.dense import program as dense
from router_runtime.format.contract import Constants


def program(constants: Constants) -> tuple[Callable[..., None], tuple[object, ...]]:
    """Return the host function of an entry, and placeholder arguments to compile it with."""
    return dense.program(constants)
