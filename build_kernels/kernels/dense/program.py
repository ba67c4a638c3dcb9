"""The device code of every dense entry: one table from form and MMA to its classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cutlass import BFloat16, Float32, Int16, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_ptr

from build_kernels.kernels.common.parameters import DENSE_ROUTING, Routing
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.exchange.split_k import SumsExchange
from build_kernels.kernels.dense.forms.decode import Decode
from build_kernels.kernels.dense.forms.split_k import SplitK
from build_kernels.kernels.dense.forms.swap_ab import SwapAb
from build_kernels.kernels.dense.forms.tile import Tile
from build_kernels.kernels.dense.geometry.table import form_and_mma, geometry_of
from build_kernels.kernels.dense.mma.mma_sync import DecodeMmaSync
from build_kernels.kernels.dense.mma.mma_sync_stages import SwapAbMmaSync, TileMmaSync
from build_kernels.kernels.dense.mma.tcgen05_split_k import SplitKTcgen05
from build_kernels.kernels.dense.mma.tcgen05_swap_ab import SwapAbTcgen05
from build_kernels.kernels.dense.mma.wgmma import SwapAbWgmma, TileWgmma
from router_runtime.format.contract import Constants


def _decode(g: Any, rule: Scoring) -> Decode:
    return Decode(g, DecodeMmaSync(g), rule)


def _split_k_tcgen05(g: Any, rule: Scoring) -> SplitK:
    mma = SplitKTcgen05(g)
    return SplitK(g, mma, SumsExchange(g, mma), rule)


def _swap_ab_wgmma(g: Any, rule: Scoring) -> SwapAb:
    return SwapAb(g, SwapAbWgmma(g), rule)


def _swap_ab_mma_sync(g: Any, rule: Scoring) -> SwapAb:
    return SwapAb(g, SwapAbMmaSync(g), rule)


def _swap_ab_tcgen05(g: Any, rule: Scoring) -> SwapAb:
    return SwapAb(g, SwapAbTcgen05(g), rule)


def _tile_wgmma(g: Any, rule: Scoring) -> Tile:
    return Tile(g, TileWgmma(g), rule)


def _tile_mma_sync(g: Any, rule: Scoring) -> Tile:
    return Tile(g, TileMmaSync(g), rule)


#: (form, MMA) -> what makes the form's object of a geometry, with how it scores.
PROGRAMS: Mapping[tuple[str, str], Callable[[Any, Scoring], Any]] = {
    ("decode", "mma_sync"): _decode,
    ("split_k", "tcgen05"): _split_k_tcgen05,
    ("swap_ab", "wgmma"): _swap_ab_wgmma,
    ("swap_ab", "mma_sync"): _swap_ab_mma_sync,
    ("swap_ab", "tcgen05"): _swap_ab_tcgen05,
    ("tile", "wgmma"): _tile_wgmma,
    ("tile", "mma_sync"): _tile_mma_sync,
}

#: The DSL's type of a contract's element, and the alignment in bytes of a pointer to it.
_ELEMENTS = {
    "bf16": BFloat16,
    "f32": Float32,
    "i16": Int16,
    "i32": Int32,
    "u32": Int32,
    "i64": Int64,
    "u8": Uint8,
}
_ALIGNMENTS = {"bf16": 16, "f32": 4, "i16": 2, "i32": 4, "u32": 16, "i64": 8, "u8": 1}


def program(constants: Constants) -> tuple[Callable[..., None], tuple[object, ...]]:
    """Return the host function of an entry, and placeholder arguments to compile it with.

    Raises ValueError for a pair of FORM and MMA without code, and for a geometry that cannot be
    built. The kernel's symbol is ``symbol(form, mma)`` and the DSL's number: no name of a file, a
    class or an argument gets into the cubin.
    """
    form, mma = form_and_mma(constants)
    found = PROGRAMS[form, mma](geometry_of(constants), Scoring.of(constants))
    # The DSL keeps the name with the class's function: it is set anew for each program.
    found.kernel.set_name_prefix(
        symbol(form, mma), remove_cutlass_symbol=True, keep_mangled_name=False
    )
    return found, _arguments(constants)


def symbol(form: str, mma: str) -> str:
    """Return the name of a pair's kernel, without the number that the DSL adds.

    ptxas compiles kernels with "cutlass" in their name in another way: without it, 44 of 50 entries
    had other code, which has never been measured. So the name contains it, as the DSL's own does.
    """
    return f"dense_router_{form}_{mma}_cutlass"


def _arguments(constants: Constants) -> tuple[object, ...]:
    """Return placeholders for the contract's parameters, the last of which are one Routing.

    The host function makes the tensor map: it takes the pointer in its place and, behind the form's
    other parameters, the stride of the rows.
    """
    own = [parameter.type for parameter in contract(constants).parameters[: -len(DENSE_ROUTING)]]
    if own[0] == "tensormap":
        own = ["ptr:bf16", *own[1:], "i64"]
    routing = Routing(*(_placeholder(parameter.type) for parameter in DENSE_ROUTING))
    return (*(_placeholder(kind) for kind in own), routing)


def _placeholder(kind: str) -> object:
    """Return an argument of that contract type."""
    _, pointer, element = kind.partition("ptr:")
    if not pointer:
        return _ELEMENTS[kind](1)
    address_space = cute.AddressSpace.gmem
    return make_ptr(_ELEMENTS[element], 0, address_space, assumed_align=_ALIGNMENTS[element])
