"""Which division of a router is predicted to be the fastest, for any model.

The divisions of a form are those that its geometry accepts and whose sums fit the registers of a
thread. Like ``cost.py``, this is read by the plan of a build and by no contract: what it finds goes
into an entry's constants.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from build_kernels.kernels.dense.geometry import cost
from build_kernels.kernels.dense.geometry.common import (
    MAX_CLUSTER,
    MAX_SHARED_BYTES,
    Geometry,
    ceil_div,
)
from build_kernels.kernels.dense.geometry.decode import REGISTERS, DecodeGeometry
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.table import GEOMETRIES
from build_kernels.kernels.dense.geometry.tile import MOST_KEPT, TileGeometry
from router_runtime.format.contract import Constants

#: More groups of experts would take longer to merge than they save.
MAX_GROUPS = 16

#: Threads of the form split_k: more would leave too few registers for a tile's sums.
MAX_THREADS = 512

#: Most tokens of a tile of swap_ab: columns of an MMA.
MAX_TILE = 256

#: Registers of a thread besides its sums: addresses, counters, the masks of screening; with
#: ``mma.sync`` operands as well, with ``tcgen05`` what is loaded from tensor memory at a time.
OTHER_REGISTERS: Mapping[str, int] = {"wgmma": 40, "mma_sync": 74, "tcgen05": 56}

#: Further registers with ``mma.sync`` where slices differ. Found by compiling: with fewer, some
#: entries spill.
UNEVEN_REGISTERS = 8

_Division = dict[str, int]


def best(
    forms: Sequence[str], mma: str, shape: Constants, tokens: Sequence[int], machine: cost.Machine
) -> Constants | None:
    """Return the constants FORM, MMA and those of the division with the least predicted time.

    Args:
        forms: Which forms to try.
        mma: The MMA.
        shape: The constants HIDDEN, EXPERTS, TOP_K and K_CHUNK.
        tokens: Numbers of tokens that count alike, ascending. The last one is the most tokens of a
            launch, for a form that has a limit.
        machine: The GPU.

    None: no form has a division for this router.

    """
    return next((constants for _, constants in ranked(forms, mma, shape, tokens, machine)), None)


def ranked(
    forms: Sequence[str], mma: str, shape: Constants, tokens: Sequence[int], machine: cost.Machine
) -> list[tuple[float, Constants]]:
    """Return (microseconds, constants) of every division, the fastest first.

    The arguments and the constants are those of ``best``; the microseconds are the geometric mean
    of those predicted for ``tokens``.
    """
    sizes = tuple(int(shape[name]) for name in ("HIDDEN", "EXPERTS", "TOP_K", "K_CHUNK"))

    def together(g: Geometry) -> float:
        product = math.prod(cost.microseconds(g, mma, count, machine) for count in tokens)
        return float(product ** (1 / len(tokens)))

    found = [
        (together(g), form, g)
        for form in forms
        if (form, mma) in GEOMETRIES
        for g in divisions(form, mma, sizes, tokens[-1])
    ]
    found.sort(key=lambda item: item[0])
    return [(predicted, stated(form, mma, g)) for predicted, form, g in found]


def stated(form: str, mma: str, g: Geometry) -> Constants:
    """Return the constants FORM, MMA and those of a division."""
    own = {field.name for field in dataclasses.fields(g)}
    names = own - {field.name for field in dataclasses.fields(Geometry)}
    return {"FORM": form, "MMA": mma, **g.constants(*sorted(names))}


@functools.lru_cache(maxsize=64)
def divisions(form: str, mma: str, sizes: tuple[int, ...], max_tokens: int) -> tuple[Geometry, ...]:
    """Return the divisions of a form that can be built.

    ``sizes``: hidden elements, experts, k, chunk. ``max_tokens``: of a launch, where the form has a
    limit.
    """
    kind = GEOMETRIES[form, mma]
    shape = dict(zip(("HIDDEN", "EXPERTS", "TOP_K", "K_CHUNK"), sizes, strict=True))
    shape["MAX_TOKENS"] = max_tokens
    found = []
    for division in _TRIED[form](kind, shape):
        try:
            g = kind.of({**shape, **division})
        except ValueError:
            continue
        if fits(g, mma):
            found.append(g)
    return tuple(found)


def fits(g: Geometry, mma: str) -> bool:
    """Return whether a division fits registers, shared memory and a cluster.

    This is what the geometry's own ``check`` leaves open.
    """
    if isinstance(g, DecodeGeometry):
        return g.fits
    if isinstance(g, SplitKGeometry):
        return g.threads <= MAX_THREADS
    if isinstance(g, SwapAbGeometry):
        if _spills(g, mma):
            return False
        # Sums of a chunk, of a slice, totals and those that arrive, 4 registers for each n-tile.
        # With ``tcgen05`` those of a chunk are in tensor memory.
        own = 2 if g.split_k > 1 else min(g.cta_slices, 2)
        if mma == "tcgen05":
            own -= 1
        kept = g.held_n_tiles * (g.buffers if g.split_k > 1 else 1)
        if mma == "tcgen05" and g.split_k > 1:
            kept += g.held_n_tiles
        sums = 4 * (own * g.n_tiles + kept)
        other = OTHER_REGISTERS[mma]
        if mma == "mma_sync" and not g.even:
            other += UNEVEN_REGISTERS
        return sums + other <= g.consumer_registers
    assert isinstance(g, TileGeometry)
    return (
        not _serialises(g, mma)
        and (g.parked_sums == 0 or g.sums - g.parked_sums <= MOST_KEPT)
        and g.cluster <= MAX_CLUSTER
        and g.image_bias_offset + g.bias_bytes <= g.bias_offset
        and g.shared_bytes <= MAX_SHARED_BYTES
    )


def _spills(g: SwapAbGeometry, mma: str) -> bool:
    """Return whether ptxas is known to spill although the count of registers fits.

    Found by compiling, with ``mma.sync``: tiles of 120 tokens spill, those of 112 do not. With all
    of K in a CTA, tiles of more than 80 tokens spill if slices differ. More than 4 e ranks without
    a multicast of weights are refused for every tile; 5 and 7 were seen to spill, with 64 to 80
    tokens.
    """
    if mma != "mma_sync":
        return False
    if g.split_k == 1 and g.tile_tokens > 80 and not g.even:
        return True
    return g.tile_tokens > 112 or (g.split_k == 1 and g.cluster_t == 1 and g.cluster_e > 4)


def _serialises(g: TileGeometry, mma: str) -> bool:
    """Return whether ptxas may put a barrier before each wgmma, which a build refuses.

    Found by compiling: it does with a short last chunk and 144 to 160 experts in a pass, for some
    hidden sizes (2624 to 2752), and with 136 or 168 for none.
    """
    return mma == "wgmma" and g.last_k_blocks > 0 and 136 < g.mma_n < 168


def _decode(kind: type[Geometry], shape: Mapping[str, int]) -> Iterator[_Division]:
    """Tiles of a few sizes; few more groups than hold the weights: merging them costs time."""
    weights = 2 * shape["HIDDEN"] * shape["EXPERTS"]
    least = ceil_div(weights, MAX_CLUSTER * 4 * REGISTERS)
    for groups, cluster_e, warp_m, tile in itertools.product(
        range(least, min(least + 7, MAX_GROUPS) + 1), (1, 2, 4), (1, 2), (8, 13, 16, 24, 32)
    ):
        for cluster_k in range(1, MAX_CLUSTER // cluster_e + 1):
            yield {
                "GROUPS": groups,
                "CLUSTER_E": cluster_e,
                "CLUSTER_K": cluster_k,
                "WARP_M": warp_m,
                "TOKENS_TILE": tile,
            }


def _split_k(kind: type[Geometry], shape: Mapping[str, int]) -> Iterator[_Division]:
    """Every number of CTAs that divides the chunks."""
    chunks = shape["HIDDEN"] // shape["K_CHUNK"]
    for groups, cluster_k, tile in itertools.product(
        range(1, MAX_GROUPS + 1), range(1, MAX_CLUSTER + 1), (16, 24, 32, 40, 48, 64, 96, 128)
    ):
        if chunks and chunks % cluster_k == 0:
            yield {"GROUPS": groups, "CLUSTER_K": cluster_k, "TOKENS_TILE": tile}


def _swap_ab(kind: type[Geometry], shape: Mapping[str, int]) -> Iterator[_Division]:
    """Two to four warpgroups of experts; one suffices for 64 experts."""
    widths = (64, 128) if shape["EXPERTS"] <= 64 else (128, 192, 256)
    for experts, tile, cluster_t, split_k in itertools.product(
        widths, range(16, MAX_TILE + 1, 8), (1, 2, 4, 8), range(1, MAX_CLUSTER + 1)
    ):
        if ceil_div(shape["EXPERTS"], experts) * cluster_t * split_k <= MAX_CLUSTER:
            yield {
                "TILE_EXPERTS": experts,
                "TILE_TOKENS": tile,
                "CLUSTER_T": cluster_t,
                "SPLIT_K": split_k,
            }


def _tile(kind: type[Geometry], shape: Mapping[str, int]) -> Iterator[_Division]:
    """One pass; two where a CTA has more experts than one pass has sums for, at most 256."""
    assert issubclass(kind, TileGeometry)
    for cluster_e, cluster_t in itertools.product((1, 2, 4, 8), (1, 2)):
        experts = ceil_div(shape["EXPERTS"], cluster_e)
        if experts <= kind.most_experts:
            yield {"CLUSTER_E": cluster_e, "CLUSTER_T": cluster_t, "PASSES": 1}
        elif experts <= 256 and kind is TileGeometry:
            yield {"CLUSTER_E": cluster_e, "CLUSTER_T": cluster_t, "PASSES": 2}


_TRIED: Mapping[str, Callable[[type[Geometry], Mapping[str, int]], Iterator[_Division]]] = {
    "decode": _decode,
    "split_k": _split_k,
    "swap_ab": _swap_ab,
    "tile": _tile,
}
