"""Which kernels exist, for which models and which targets. Data only.

To add a kernel: add its folder under ``kernels/`` and a row to ``KERNELS``. To add a model: add a
row to ``MODELS``, or pass ``--model-file`` and touch no code at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Language = Literal["cuda", "cutedsl"]


@dataclass(frozen=True, slots=True)
class Model:
    """A router's shape. ``scale`` is the routed scaling factor, a launch argument of kernels."""

    name: str
    hidden: int
    experts: int
    top_k: int
    scale: float
    hash_layers: int
    vocab: int

    def constants(self) -> dict[str, int | float]:
        """What a kernel compiled for this model gets as compile-time constants."""
        return {"HIDDEN": self.hidden, "EXPERTS": self.experts, "TOP_K": self.top_k}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel. ``constants`` suit every model; ``tuned`` replaces some of them
    for the models it names, and with ``tuned_only`` no other model has the variant. ``targets`` are
    those that its instructions exist on; empty means all. ``shares`` are kernels whose folders hold
    sources of this variant too.
    """

    name: str
    constants: Mapping[str, int | float] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    tuned_only: bool = False
    shares: tuple[str, ...] = ()

    def suits(self, model: Model | None) -> bool:
        return not self.tuned_only or (model is not None and model.name in self.tuned)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A folder of ``kernels/``. ``scores`` kernels get the constants of ``numerics.py``;
    ``per_model`` kernels are compiled once a model, with the model's own constants.
    """

    name: str
    language: Language
    per_model: bool
    scores: bool
    variants: tuple[Variant, ...]


MODELS = (
    Model("dsv4-flash", 4096, 256, 6, 1.5, 3, 129280),
    Model("dsv4-pro", 7168, 384, 6, 2.5, 3, 129280),
    Model("dsv41-flash", 5120, 384, 6, 1.5, 0, 129280),
)

#: What a build makes unless ``--target`` says otherwise.
DEFAULT_TARGETS = ("sm_90a", "sm_100a", "sm_103a")

#: Everything ``--target`` takes. ``sm_100f`` runs on 10.0, 10.3 and later 10.x.
TARGETS = (*DEFAULT_TARGETS, "sm_100f")

#: Rows of one length class each: the longest row that a warp, a block or a cluster holds.
_TOPK_SELECT = (
    Variant(
        "row256",
        {"VALUES_PER_LANE": 8, "WARPS_PER_ROW": 1, "BLOCKS_PER_ROW": 1, "THREADS": 128},
    ),
    Variant(
        "row1024",
        {"VALUES_PER_LANE": 32, "WARPS_PER_ROW": 1, "BLOCKS_PER_ROW": 1, "THREADS": 128},
    ),
    Variant(
        "row8192",
        {"VALUES_PER_LANE": 32, "WARPS_PER_ROW": 8, "BLOCKS_PER_ROW": 1, "THREADS": 256},
    ),
    Variant(
        "row65536",
        {"VALUES_PER_LANE": 32, "WARPS_PER_ROW": 8, "BLOCKS_PER_ROW": 8, "THREADS": 256},
    ),
)

_ACTIVATION_TOPK = tuple(
    Variant(f"experts{capacity}", {"EXPERTS_CAPACITY": capacity, "TOKENS_PER_BLOCK": 4})
    for capacity in (256, 384, 1024)
)

#: How the decode kernel divides the models' weights.
_FLASH_DECODE = {"GROUPS": 1, "CLUSTER_E": 4, "CLUSTER_K": 4, "WARP_M": 2}
_PRO_DECODE = {"GROUPS": 3, "CLUSTER_E": 1, "CLUSTER_K": 14, "WARP_M": 2}
_PRO_DECODE_32 = {"GROUPS": 3, "CLUSTER_E": 2, "CLUSTER_K": 7, "WARP_M": 2}
_FLASH41_DECODE = {"GROUPS": 3, "CLUSTER_E": 4, "CLUSTER_K": 4, "WARP_M": 2}

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
        variants=(
            # Few tokens: a warp for every chunk of the hidden dimension. The more tokens, the fewer
            # warps for each, so that more tokens are under way on a multiprocessor.
            Variant(
                "portable",
                {"IMAGES": 0},
                tuned={
                    "dsv4-flash": {"WARPS": 16},
                    "dsv4-pro": {"WARPS": 28},
                    "dsv41-flash": {"WARPS": 20},
                },
            ),
            Variant(
                "more_tokens",
                {"IMAGES": 0},
                tuned={
                    "dsv4-flash": {"WARPS": 8},
                    "dsv4-pro": {"WARPS": 14},
                    "dsv41-flash": {"WARPS": 10},
                },
                tuned_only=True,
            ),
            Variant("many_tokens", {"IMAGES": 0, "WARPS": 4}),
            # Image tokens are selected by their scores for all experts.
            Variant("images", {"IMAGES": 1}),
        ),
    ),
    Kernel("topk_select", "cuda", per_model=False, scores=False, variants=_TOPK_SELECT),
    Kernel("activation_topk", "cuda", per_model=False, scores=True, variants=_ACTIVATION_TOPK),
    Kernel(
        name="dense_router_decode",
        language="cutedsl",
        per_model=True,
        scores=True,
        variants=(
            Variant(
                "portable",
                {"MAX_TOKENS": 64, "TOKENS_TILE": 32},
                tuned={
                    "dsv4-flash": {"TOKENS_TILE": 13, **_FLASH_DECODE},
                    "dsv4-pro": _PRO_DECODE,
                    "dsv41-flash": _FLASH41_DECODE,
                },
            ),
            # Smaller tiles are faster, as long as the clusters of two launches fit the GPU
            # together: the next one's weights arrive while this one runs.
            Variant(
                "portable_32",
                {"MAX_TOKENS": 32, "TOKENS_TILE": 16},
                tuned={"dsv4-pro": _PRO_DECODE_32, "dsv41-flash": _FLASH41_DECODE},
                tuned_only=True,
            ),
            # The split form of dense_router_prefill.
            Variant(
                "tcgen05",
                {"MAX_TOKENS": 64, "TCGEN05": 1},
                tuned={
                    "dsv4-flash": {"GROUPS": 1, "CLUSTER_K": 16, "TOKENS_TILE": 16},
                    "dsv4-pro": {"GROUPS": 3, "CLUSTER_K": 14, "TOKENS_TILE": 32},
                    "dsv41-flash": {"GROUPS": 3, "CLUSTER_K": 10, "TOKENS_TILE": 32},
                },
                targets=("sm_100a", "sm_103a"),
                shares=("dense_router_prefill",),
            ),
        ),
    ),
    Kernel(
        name="dense_router_prefill",
        language="cutedsl",
        per_model=True,
        scores=True,
        variants=(
            # Small batches: the hidden dimension is split over the blocks of a cluster.
            Variant(
                "wgmma_128",
                tuned={
                    "dsv4-flash": {
                        "TOKENS_TILE": 32,
                        "GROUPS": 1,
                        "CLUSTER_K": 16,
                        "MAX_TOKENS": 128,
                    },
                    "dsv4-pro": {
                        "TOKENS_TILE": 64,
                        "GROUPS": 3,
                        "CLUSTER_K": 14,
                        "MAX_TOKENS": 128,
                    },
                    "dsv41-flash": {
                        "TOKENS_TILE": 48,
                        "GROUPS": 6,
                        "CLUSTER_K": 5,
                        "MAX_TOKENS": 128,
                    },
                },
                targets=("sm_90a",),
                tuned_only=True,
            ),
            # From here on experts are the rows of the MMA, in one wave of tiles of as many tokens
            # as it takes. 256 experts begin with the next variant.
            Variant(
                "wgmma_256",
                tuned={
                    "dsv4-pro": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 1,
                        "SPLIT_K": 4,
                    },
                    "dsv41-flash": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 1,
                        "SPLIT_K": 5,
                    },
                },
                targets=("sm_90a",),
                tuned_only=True,
            ),
            Variant(
                "wgmma_512",
                tuned={
                    "dsv4-flash": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 2,
                        "SPLIT_K": 4,
                    },
                    "dsv4-pro": {
                        "TILE_EXPERTS": 192,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 2,
                        "SPLIT_K": 4,
                    },
                    "dsv41-flash": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 80,
                        "CLUSTER_T": 1,
                        "SPLIT_K": 5,
                    },
                },
                targets=("sm_90a",),
                tuned_only=True,
            ),
            Variant(
                "wgmma_1024",
                tuned={
                    "dsv4-flash": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 4,
                        "SPLIT_K": 2,
                    },
                    "dsv4-pro": {
                        "TILE_EXPERTS": 192,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 4,
                        "SPLIT_K": 2,
                    },
                    "dsv41-flash": {
                        "TILE_EXPERTS": 192,
                        "TILE_TOKENS": 40,
                        "CLUSTER_T": 4,
                        "SPLIT_K": 2,
                    },
                },
                targets=("sm_90a",),
                tuned_only=True,
            ),
            Variant(
                "wgmma_4096",
                tuned={
                    "dsv4-flash": {
                        "TILE_EXPERTS": 128,
                        "TILE_TOKENS": 72,
                        "CLUSTER_T": 2,
                        "SPLIT_K": 1,
                    },
                    "dsv4-pro": {
                        "TILE_EXPERTS": 192,
                        "TILE_TOKENS": 72,
                        "CLUSTER_T": 2,
                        "SPLIT_K": 1,
                    },
                    "dsv41-flash": {
                        "TILE_EXPERTS": 192,
                        "TILE_TOKENS": 72,
                        "CLUSTER_T": 2,
                        "SPLIT_K": 1,
                    },
                },
                targets=("sm_90a",),
                tuned_only=True,
            ),
            # Large batches: tiles of 128 tokens.
            Variant(
                "wgmma_wide",
                tuned={
                    "dsv4-flash": {"CLUSTER_E": 1, "CLUSTER_T": 2, "PASSES": 2},
                    "dsv4-pro": {"CLUSTER_E": 2, "CLUSTER_T": 1, "PASSES": 1},
                    "dsv41-flash": {"CLUSTER_E": 2, "CLUSTER_T": 1, "PASSES": 1},
                },
                targets=("sm_90a",),
            ),
            # The same forms on the tensor core with its own memory: first the split one.
            Variant(
                "tcgen05_256",
                {"MAX_TOKENS": 256, "TCGEN05": 1},
                tuned={
                    "dsv4-flash": {"TOKENS_TILE": 32, "GROUPS": 1, "CLUSTER_K": 16},
                    "dsv4-pro": {"TOKENS_TILE": 128, "GROUPS": 3, "CLUSTER_K": 14},
                    "dsv41-flash": {"TOKENS_TILE": 128, "GROUPS": 3, "CLUSTER_K": 10},
                },
                targets=("sm_100a", "sm_103a"),
                tuned_only=True,
            ),
            Variant(
                "tcgen05",
                {"TCGEN05": 1},
                tuned={
                    "dsv4-flash": {"CLUSTER_E": 1, "CLUSTER_T": 2, "PASSES": 1},
                    "dsv4-pro": {"CLUSTER_E": 2, "CLUSTER_T": 1, "PASSES": 1},
                    "dsv41-flash": {"CLUSTER_E": 2, "CLUSTER_T": 1, "PASSES": 1},
                },
                targets=("sm_100a", "sm_103a"),
            ),
        ),
    ),
)
