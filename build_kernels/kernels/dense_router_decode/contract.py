"""Launch contract of dense_router_decode (kernels/dense)."""

from __future__ import annotations

from build_kernels.kernels.common.numerics import dense_tag
from build_kernels.kernels.dense import contract as dense
from router_runtime.format.contract import Constants, Contract


def contract(constants: Constants) -> Contract:
    """Return the contract of an entry."""
    return dense.contract(constants)


numerics = dense_tag
