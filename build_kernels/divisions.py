"""The dense variants of a model that the catalog does not name, and their predicted latencies.

A model of the catalog has the divisions that are listed there. Any other one gets, for the batches
of each variant, the division that ``kernels/dense/geometry/search.py`` finds, unless its file
states one (``catalog/measured.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.latency import Latency
from build_kernels.catalog.measured import divisions_of
from build_kernels.catalog.models import Model
from build_kernels.catalog.targets import HOPPER
from build_kernels.errors import BuildError
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import cost, search
from build_kernels.kernels.dense.geometry.table import geometry_of
from router_runtime.format.contract import Constants

#: A variant is left out where others are predicted to take no more than this times its time.
WORTH = 1.03

#: ``mma.sync`` on the family 10.x, predicted: as many clocks as on an H100, each 1.07 times as
#: long; latency.toml says where that ratio comes from.
_PORTABLE_BLACKWELL = dataclasses.replace(cost.H100, clock=cost.H100.clock / 1.07)


def searched(kernel: Kernel, model: Model) -> dict[str, Constants]:
    """Return variant -> constants of the variants of a kernel that ``model`` gets by search.

    A variant is left out if no form that it may have can divide this router, or if the others with
    the same MMA, the best one for each batch, are predicted to take at most ``WORTH`` times as
    long.
    """
    shape = {**CONSTANTS, **model.constants()}
    found: dict[str, Constants] = {}
    for variant in kernel.variants:
        if variant.batches:
            mma = str(variant.constants["MMA"])
            division = search.best(
                variant.forms, mma, shape, variant.batches, machine(mma, variant.targets)
            )
            if division is not None:
                found[variant.name] = division
    by_name = {variant.name: variant for variant in kernel.variants}
    for name in list(found):
        rivals = [other for other in found if other != name and _alike(found, name, other)]
        if rivals and _served(shape, by_name[name], found, rivals):
            del found[name]
    return found


def stated(kernel: Kernel, model: Model) -> dict[str, Constants]:
    """Return variant -> constants of the divisions that a model file states.

    Raises BuildError for one that no kernel can have.
    """
    found = divisions_of(model, kernel)
    for variant, division in found.items():
        try:
            geometry_of({**CONSTANTS, **model.constants(), **division})
        except ValueError as error:
            raise BuildError(
                f"model {model.name}: divisions.{kernel.name}.{variant}: {error}; next: correct "
                "the model file, or remove this table"
            ) from error
    return found


def predicted(constants: Constants, target: str, tokens: Iterable[int]) -> Latency:
    """Return the predicted microseconds of an entry, for as many of ``tokens`` as a launch takes.

    ``constants``: those of a dense entry, its division included.
    """
    mma = str(constants["MMA"])
    g = geometry_of(constants)
    most = getattr(g, "max_tokens", math.inf)
    gpu = machine(mma, (target,))
    return tuple(
        (count, round(cost.microseconds(g, mma, count, gpu), 1))
        for count in tokens
        if count <= most
    )


def machine(mma: str, targets: tuple[str, ...]) -> cost.Machine:
    """Return the GPU that divisions with an MMA are searched for.

    One division of ``mma_sync`` serves all targets, so that evidence of one counts for the others;
    it is searched for on the one that was measured.

    Args:
        mma: The MMA.
        targets: Those that have the variant; empty: all.

    """
    if mma == "tcgen05":
        return cost.B200
    return cost.H100 if not targets or targets[0] in HOPPER else _PORTABLE_BLACKWELL


def _alike(found: Mapping[str, Constants], name: str, other: str) -> bool:
    return found[name]["MMA"] == found[other]["MMA"]


def _served(
    shape: Constants, variant: Variant, found: Mapping[str, Constants], rivals: Iterable[str]
) -> bool:
    """Whether ``rivals`` serve the batches of a variant about as fast as itself."""

    def times(name: str) -> dict[int, float]:
        return dict(predicted({**shape, **found[name]}, HOPPER[0], variant.batches))

    own = times(variant.name)
    others = [times(name) for name in rivals]
    return all(
        min(other.get(count, math.inf) for other in others) <= WORTH * own[count]
        for count in variant.batches
    )
