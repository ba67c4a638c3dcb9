"""The kernels and their variants, each with its compile-time constants. Data only.

To add a kernel, add its folder under ``kernels/`` and a row to ``KERNELS``. A variant whose
constants depend on the model has a table with one row for each variant and model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from build_kernels.catalog.models import ANY, Model
from build_kernels.catalog.targets import BLACKWELL, HOPPER
from build_kernels.compile.languages import Language
from router_runtime.format.contract import Constants
from router_runtime.format.scoring import SIGMOID, SQRT_SOFTPLUS, scoring_constants

#: The algorithms of the dense kernels, and the MMA instructions that they are written for.
Form = Literal["decode", "split_k", "swap_ab", "tile"]
Mma = Literal["mma_sync", "wgmma", "tcgen05"]


#: Form -> the constants of a division, in the order of the tables below.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "decode": ("MAX_TOKENS", "TOKENS_TILE", "GROUPS", "CLUSTER_E", "CLUSTER_K", "WARP_M"),
    "split_k": ("MAX_TOKENS", "TOKENS_TILE", "GROUPS", "CLUSTER_K"),
    "swap_ab": ("TILE_EXPERTS", "TILE_TOKENS", "CLUSTER_T", "SPLIT_K"),
    "tile": ("CLUSTER_E", "CLUSTER_T", "PASSES"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel.

    Attributes:
        name: Last part of the entry's key.
        constants: The same for every model.
        by_model: Model name -> constants for that model. The row ``any`` is for every model that
            is not named. Without it, a model that is not named has the variant only if ``batches``
            is not empty. None: the variant has no constants that depend on the model, and every
            model has it.
        targets: Those that have the variant's instructions. Empty: all.
        batches: Numbers of tokens that a dense variant is for, ascending. A model that no row of
            the kernel names gets the division that is predicted to be the fastest for them
            (``divisions.py``), of one of the forms ``forms``.
        forms: Forms that may serve those batches.

    """

    name: str
    constants: Constants = field(default_factory=dict)
    by_model: Mapping[str, Constants] | None = None
    targets: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    forms: tuple[Form, ...] = ()

    def has(self, model: Model | None) -> bool:
        """Return whether ``model`` has this variant. None: the kernel is the same for all."""
        return self.by_model is None or ANY in self.by_model or _name(model) in self.by_model

    def constants_of(self, model: Model | None) -> dict[str, int | float | str]:
        """Return the constants for ``model``: the variant's, the model's own, those of its row."""
        own = {} if model is None else model.constants()
        rows = self.by_model or {}
        return {**self.constants, **own, **rows.get(_name(model), rows.get(ANY, {}))}


def _name(model: Model | None) -> str:
    return ANY if model is None else model.name


@dataclass(frozen=True, slots=True)
class Kernel:
    """A folder of ``kernels/``.

    ``scores`` kernels get the constants of ``kernels/common/numerics.py``. ``per_model`` kernels
    are compiled once for each model, with the model's own constants.
    """

    name: str
    language: Language
    per_model: bool
    scores: bool
    variants: tuple[Variant, ...]

    def names(self, model: Model | None) -> bool:
        """Return whether a row of a variant names ``model``."""
        return any(_name(model) in (variant.by_model or {}) for variant in self.variants)


def _table(
    header: str, *rows: tuple[str | int | None, ...]
) -> dict[str, dict[str, dict[str, int | float | str]]]:
    """Return variant -> model -> constants from rows of (variant, model, value...).

    ``header`` names the columns. None in a row: the kernel's contract derives the constant.
    """
    names = header.split()[2:]
    found: dict[str, dict[str, dict[str, int | float | str]]] = {}
    for variant, model, *values in rows:
        found.setdefault(str(variant), {})[str(model)] = {
            name: value for name, value in zip(names, values, strict=True) if isinstance(value, int)
        }
    return found


# fmt: off

#: Each variant serves one class of row lengths: the longest row that a warp, a CTA or a cluster
#: holds in registers.
_TOPK_SELECT = _table(
    "variant     model VALUES_PER_LANE WARPS_PER_ROW BLOCKS_PER_ROW THREADS",
    ("row256",   ANY,  8,              1,            1,             128),
    ("row1024",  ANY,  32,             1,            1,             128),
    ("row8192",  ANY,  32,             8,            1,             256),
    ("row65536", ANY,  32,             8,            8,             256),
)

#: Few rows: a cluster per row. Many rows: fewer CTAs for each, which take longer for a row. A ring
#: has STAGES chunks of LOADS vectors for each lane of its warp.
_TOPK_INDICES = _table(
    "variant         model HELD SCORE_BYTES BLOCKS_PER_ROW BLOCKS_PER_SM THREADS LOADS STAGES"
    " CAPACITY MAX_TOP_K",
    ("block",         ANY,  0,   4, 1, 2, 512, 8, 1, 4608, 2048),
    ("pair",          ANY,  0,   4, 2, 1, 512, 8, 3, 3072, 2048),
    ("pair_4096",     ANY,  0,   4, 2, 1, 512, 8, 2, 8192, 4096),
    ("quad",          ANY,  0,   4, 4, 1, 512, 8, 2, 8192, 4096),
    ("cluster8",      ANY,  0,   4, 8, 1, 512, 8, 2, 8192, 4096),
    ("block_bf16",    ANY,  0,   2, 1, 2, 512, 4, 2, 4608, 2048),
    ("cluster8_bf16", ANY,  0,   2, 8, 1, 512, 4, 3, 8192, 4096),
)

#: The scores are in registers, HELD vectors of each thread: short rows in a CTA, few long ones in a
#: cluster.
_TOPK_INDICES_HELD = _table(
    "variant          model HELD SCORE_BYTES BLOCKS_PER_ROW BLOCKS_PER_SM THREADS SAMPLES"
    " MAX_TOP_K",
    ("held8k",        ANY,  8,   4,          1,             2,            256,    0,      2048),
    ("held16k",       ANY,  16,  4,          1,             2,            256,    0,      2048),
    ("held256k",      ANY,  16,  4,          8,             1,            512,    512,    4096),
    ("held256k_wide", ANY,  8,   4,          16,            1,            512,    512,    4096),
    ("held512k",      ANY,  16,  4,          16,            1,            512,    512,    4096),
    ("held16k_bf16",  ANY,  8,   2,          1,             2,            256,    0,      2048),
    ("held256k_bf16", ANY,  8,   2,          8,             1,            512,    512,    4096),
)

_ACTIVATION_TOPK = _table(
    "variant        model EXPERTS_CAPACITY TOKENS_PER_BLOCK",
    ("experts256",  ANY,  256,             4),
    ("experts384",  ANY,  384,             4),
    ("experts1024", ANY,  1024,            4),
)
_ACTIVATION_TOPK_SIGMOID = _table(
    "variant        model EXPERTS_CAPACITY TOKENS_PER_BLOCK",
    ("sigmoid256",  ANY,  256,             4),
    ("sigmoid384",  ANY,  384,             4),
    ("sigmoid1024", ANY,  1024,            4),
)

#: The warps of a CTA divide the chunks of the hidden dimension into groups. ``EXPERT_WARPS`` warps
#: work on each group and divide the token's experts among them. For few tokens, none is without an
#: expert, and a CTA has at most 16 warps. For many tokens it is 1, so that more tokens are in
#: flight on a multiprocessor. Image tokens are selected by their scores for all experts.
_HASH_GATE = _table(
    "variant        model           IMAGES EXPERT_WARPS",
    ("portable",    "dsv4-pro",     0,     3),
    ("portable",    ANY,            0,     None),
    ("many_tokens", ANY,            0,     1),
    ("images",      ANY,            1,     None),
)

#: Decode: the whole GPU holds the weights in registers. Smaller tiles are faster, as long as the
#: clusters of two launches fit the GPU together: the next launch's weights arrive while this one
#: runs.
_DECODE = _table(
    "variant        model           MAX_TOKENS TOKENS_TILE GROUPS CLUSTER_E CLUSTER_K WARP_M",
    ("portable",    "dsv4-flash",   64,        13,         1,     4,        4,        2),
    ("portable",    "dsv4-pro",     64,        32,         3,     1,        14,       2),
    ("portable",    "dsv41-flash",  64,        32,         3,     4,        4,        2),
    ("portable",    "dsv41-dspark", 64,        13,         1,     4,        4,        2),
    ("portable_32", "dsv4-pro",     32,        16,         3,     2,        7,        2),
    ("portable_32", "dsv41-flash",  32,        16,         3,     4,        4,        2),
)

#: Split-K: the hidden dimension is split over the CTAs of a cluster.
_SPLIT_K = _table(
    "variant        model           MAX_TOKENS TOKENS_TILE GROUPS CLUSTER_K",
    ("tcgen05",     "dsv4-flash",   64,        16,         1,     16),
    ("tcgen05",     "dsv4-pro",     64,        32,         3,     14),
    ("tcgen05",     "dsv41-flash",  64,        32,         3,     10),
    ("tcgen05",     "dsv41-dspark", 64,        16,         1,     10),
)

#: Swap A/B: experts are the rows of the MMA, and one wave of clusters takes the whole batch. Models
#: with 384 experts have a variant for 128 tokens: its clusters would need two waves for 256 tokens.
#: The model with 128 experts begins with the variant for 512.
_SWAP_AB = _table(
    "variant       model           TILE_EXPERTS TILE_TOKENS CLUSTER_T SPLIT_K",
    ("wgmma_128",  "dsv4-pro",     128,         32,         1,        4),
    ("wgmma_128",  "dsv41-flash",  128,         32,         1,        4),
    ("wgmma_256",  "dsv4-flash",   128,         32,         2,        4),
    ("wgmma_256",  "dsv4-pro",     128,         40,         1,        4),
    ("wgmma_256",  "dsv41-flash",  128,         40,         1,        4),
    ("wgmma_512",  "dsv4-flash",   128,         40,         2,        4),
    ("wgmma_512",  "dsv4-pro",     192,         40,         2,        4),
    ("wgmma_512",  "dsv41-flash",  128,         80,         1,        4),
    ("wgmma_512",  "dsv41-dspark", 128,         32,         1,        4),
    ("wgmma_1024", "dsv4-flash",   128,         72,         1,        4),
    ("wgmma_1024", "dsv4-pro",     192,         80,         2,        4),
    ("wgmma_1024", "dsv41-flash",  192,         72,         1,        4),
    ("wgmma_1024", "dsv41-dspark", 128,         40,         1,        4),
    ("wgmma_4096", "dsv4-flash",   128,         64,         1,        1),
    ("wgmma_4096", "dsv4-pro",     192,         72,         2,        1),
    ("wgmma_4096", "dsv41-flash",  192,         72,         2,        1),
    ("wgmma_4096", "dsv41-dspark", 128,         72,         2,        2),
)

#: The same with mma.sync, for GPUs on which no entry with another MMA is verified. Models with 384
#: experts have no row for 4096 tokens: ``portable`` is as fast from there on.
_SWAP_AB_PORTABLE = _table(
    "variant          model           TILE_EXPERTS TILE_TOKENS CLUSTER_T SPLIT_K",
    ("portable_256",  "dsv4-flash",   128,         32,         1,        4),
    ("portable_256",  "dsv4-pro",     128,         40,         1,        4),
    ("portable_256",  "dsv41-flash",  128,         40,         1,        4),
    ("portable_512",  "dsv4-flash",   128,         40,         2,        4),
    ("portable_512",  "dsv4-pro",     192,         40,         2,        4),
    ("portable_512",  "dsv41-flash",  128,         80,         1,        4),
    ("portable_512",  "dsv41-dspark", 128,         32,         1,        4),
    ("portable_1024", "dsv4-flash",   128,         72,         1,        4),
    ("portable_1024", "dsv4-pro",     192,         40,         4,        2),
    ("portable_1024", "dsv41-flash",  192,         40,         4,        2),
    ("portable_1024", "dsv41-dspark", 128,         40,         1,        4),
    ("portable_4096", "dsv4-flash",   128,         72,         2,        1),
    ("portable_4096", "dsv41-dspark", 128,         72,         2,        2),
)

#: The same with tcgen05: divisions by the cost model, since no device has measured one.
_SWAP_AB_TCGEN05 = _table(
    "variant         model           TILE_EXPERTS TILE_TOKENS CLUSTER_T SPLIT_K",
    ("tcgen05_256",  "dsv4-flash",   128,         32,         1,        4),
    ("tcgen05_256",  "dsv4-pro",     128,         48,         1,        4),
    ("tcgen05_256",  "dsv41-flash",  128,         48,         1,        4),
    ("tcgen05_256",  "dsv41-dspark", 128,         32,         1,        4),
    ("tcgen05_1024", "dsv4-flash",   128,         80,         1,        4),
    ("tcgen05_1024", "dsv4-pro",     128,         160,        1,        4),
    ("tcgen05_1024", "dsv41-flash",  128,         160,        1,        4),
    ("tcgen05_1024", "dsv41-dspark", 128,         48,         2,        4),
    ("tcgen05_4096", "dsv4-flash",   128,         144,        1,        2),
    ("tcgen05_4096", "dsv4-pro",     128,         128,        1,        1),
    ("tcgen05_4096", "dsv41-flash",  128,         128,        1,        1),
    ("tcgen05_4096", "dsv41-dspark", 128,         144,        2,        4),
    ("tcgen05",      "dsv4-flash",   128,         112,        1,        1),
    ("tcgen05",      "dsv4-pro",     128,         160,        1,        1),
    ("tcgen05",      "dsv41-flash",  128,         160,        1,        1),
    ("tcgen05",      "dsv41-dspark", 128,         112,        2,        1),
)

#: Tile: a CTA routes 128 tokens over its part of the experts and the whole hidden dimension.
_TILE = _table(
    "variant       model           CLUSTER_E CLUSTER_T PASSES",
    ("wgmma_wide", "dsv4-flash",   2,        1,        1),
    ("wgmma_wide", "dsv4-pro",     2,        1,        1),
    ("wgmma_wide", "dsv41-flash",  2,        1,        1),
    ("wgmma_wide", "dsv41-dspark", 1,        2,        1),
    ("portable",   "dsv4-flash",   2,        1,        1),
    ("portable",   "dsv4-pro",     4,        1,        1),
    ("portable",   "dsv41-flash",  4,        1,        1),
    ("portable",   "dsv41-dspark", 1,        1,        1),
)

# fmt: on


#: For a model without rows: variant of a dense kernel -> the numbers of tokens by whose predicted
#: time its division is chosen, and the forms to choose from. Larger batches get the same division.
_Classes = Mapping[str, tuple[tuple[int, ...], tuple[Form, ...]]]
_DECODE_CLASSES: _Classes = {
    "portable": ((1, 8, 16, 32, 64), ("decode",)),
    "portable_32": ((1, 8, 16, 32), ("decode",)),
    "tcgen05": ((1, 8, 16, 32, 64), ("split_k",)),
}
_PREFILL_CLASSES: _Classes = {
    "wgmma_128": ((128,), ("swap_ab", "tile")),
    "wgmma_256": ((128, 256), ("swap_ab", "tile")),
    "wgmma_512": ((512,), ("swap_ab", "tile")),
    "wgmma_1024": ((1024,), ("swap_ab", "tile")),
    "wgmma_4096": ((4096,), ("swap_ab", "tile")),
    "wgmma_wide": ((16384,), ("swap_ab", "tile")),
    "portable_256": ((128, 256), ("swap_ab", "tile")),
    "portable_512": ((512,), ("swap_ab", "tile")),
    "portable_1024": ((1024,), ("swap_ab", "tile")),
    "portable_4096": ((4096,), ("swap_ab", "tile")),
    "portable": ((16384,), ("swap_ab", "tile")),
    "tcgen05_256": ((128, 256), ("swap_ab",)),
    "tcgen05_1024": ((512, 1024), ("swap_ab",)),
    "tcgen05_4096": ((4096,), ("swap_ab",)),
    "tcgen05": ((16384,), ("swap_ab",)),
}


def _variants(
    table: Mapping[str, Mapping[str, Constants]],
    *names: str,
    constants: Constants | None = None,
    targets: tuple[str, ...] = (),
    classes: _Classes | None = None,
) -> tuple[Variant, ...]:
    """Return the variants ``names`` of a table, or all of them."""
    return tuple(
        Variant(name, constants or {}, table[name], targets, *(classes or {}).get(name, ()))
        for name in names or table
    )


def _form(form: Form, mma: Mma) -> Constants:
    """Return the constants that name a dense kernel's algorithm and its MMA instruction."""
    return {"FORM": form, "MMA": mma}


def _prefill(
    table: Mapping[str, Mapping[str, Constants]],
    *names: str,
    form: Form,
    mma: Mma,
    targets: tuple[str, ...] = (),
) -> tuple[Variant, ...]:
    """Return the variants ``names`` of a table of dense_router_prefill, or all of them."""
    return _variants(
        table, *names, constants=_form(form, mma), targets=targets, classes=_PREFILL_CLASSES
    )


KERNELS = (
    Kernel(
        name="hash_router",
        language="cuda",
        per_model=False,
        scores=False,
        variants=(Variant("portable", {"THREADS": 128, "TOKENS_PER_BLOCK": 32}),),
    ),
    Kernel(
        name="hash_gate",
        language="cuda",
        per_model=True,
        scores=True,
        variants=_variants(_HASH_GATE),
    ),
    Kernel(
        name="topk_select",
        language="cuda",
        per_model=False,
        scores=False,
        variants=_variants(_TOPK_SELECT),
    ),
    Kernel(
        name="topk_indices",
        language="cuda",
        per_model=False,
        scores=False,
        variants=(*_variants(_TOPK_INDICES), *_variants(_TOPK_INDICES_HELD)),
    ),
    Kernel(
        name="activation_topk",
        language="cuda",
        per_model=False,
        scores=True,
        variants=(
            *_variants(_ACTIVATION_TOPK, constants=scoring_constants(SQRT_SOFTPLUS, 1.0)),
            *_variants(_ACTIVATION_TOPK_SIGMOID, constants=scoring_constants(SIGMOID, 1.0)),
        ),
    ),
    Kernel(
        name="dense_router_decode",
        language="cutedsl",
        per_model=True,
        scores=True,
        variants=(
            *_variants(_DECODE, constants=_form("decode", "mma_sync"), classes=_DECODE_CLASSES),
            *_variants(
                _SPLIT_K,
                "tcgen05",
                constants=_form("split_k", "tcgen05"),
                targets=BLACKWELL,
                classes=_DECODE_CLASSES,
            ),
        ),
    ),
    # In the order of the batches that they are for, by target.
    Kernel(
        name="dense_router_prefill",
        language="cutedsl",
        per_model=True,
        scores=True,
        variants=(
            *_prefill(_SWAP_AB, form="swap_ab", mma="wgmma", targets=HOPPER),
            *_prefill(_TILE, "wgmma_wide", form="tile", mma="wgmma", targets=HOPPER),
            *_prefill(_SWAP_AB_PORTABLE, form="swap_ab", mma="mma_sync"),
            *_prefill(_TILE, "portable", form="tile", mma="mma_sync"),
            *_prefill(_SWAP_AB_TCGEN05, form="swap_ab", mma="tcgen05", targets=BLACKWELL),
        ),
    ),
)
