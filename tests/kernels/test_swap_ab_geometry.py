"""The geometry of the swap-A/B form: budgets, and what its CTAs agree on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from build_kernels.catalog.kernels import KERNELS
from build_kernels.catalog.models import MODELS
from build_kernels.kernels.common.numerics import CONSTANTS, SLICES
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.geometry.common import (
    K_BLOCK,
    MAX_SHARED_BYTES,
    screening_groups,
)
from build_kernels.kernels.dense.geometry.swap_ab import (
    N_TILE,
    SwapAbGeometry,
)
from router_runtime.format.contract import GridAxis, validate_contract
from tests.kernels.summation import tree_slices


def rows_variants() -> Iterator[tuple[str, dict[str, int | float | str]]]:
    for kernel in KERNELS:
        for variant in kernel.variants:
            for model in MODELS:
                constants = {**CONSTANTS, **variant.constants_of(model)}
                if variant.has(model) and constants.get("FORM") == "swap_ab":
                    yield f"{variant.name}-{model.name}", constants


VARIANTS = dict(rows_variants())


def constants(**changes: int) -> dict[str, int | float | str]:
    return {**next(iter(VARIANTS.values())), **changes}


@pytest.fixture(params=VARIANTS)
def g(request: pytest.FixtureRequest) -> SwapAbGeometry:
    return SwapAbGeometry.of(VARIANTS[request.param])


def test_catalog_has_the_form() -> None:
    assert len(VARIANTS) >= 3


def test_budgets(g: SwapAbGeometry) -> None:
    assert g.shared_bytes <= MAX_SHARED_BYTES
    assert g.epilogue_bytes <= g.ring_bytes
    assert g.ring_bytes % 1024 == 0
    assert g.stage_bytes % 1024 == 0
    registers = g.consumer_threads * g.consumer_registers + 128 * g.producer_registers
    assert registers <= 65536
    # Partial sums, totals, the sums of its own columns; and some 40 for everything else.
    kept = 4 * g.held_n_tiles * (1 + (g.buffers if g.split_k > 1 else 0))
    assert 4 * g.n_tiles + kept + 40 <= g.consumer_registers


def test_a_cta_requests_no_more_registers_than_it_was_launched_with() -> None:
    """``setmaxnreg`` would wait forever for more than the CTA was launched with."""
    g = SwapAbGeometry.of(constants(TILE_EXPERTS=256))
    launched = 65536 // g.threads // 8 * 8 * g.threads
    assert g.consumer_threads * g.consumer_registers + 128 * g.producer_registers <= launched


def test_contract(g: SwapAbGeometry) -> None:
    found = contract(next(c for c in VARIANTS.values() if SwapAbGeometry.of(c) == g))
    validate_contract(found, "dense_router_prefill")
    assert found.parameters[0].type == "tensormap"
    tile = g.tile_tokens * g.cluster_t
    assert found.grid[1] == GridAxis("ceil", g.cluster_t, "tokens", tile)
    assert found.cluster_size == g.cluster <= 16


def test_k_ranks_divide_the_n_tiles(g: SwapAbGeometry) -> None:
    n_tiles = [
        n_tile
        for k_rank in range(g.split_k)
        for n_tile in range(g.first_n_tile(k_rank), g.first_n_tile(k_rank + 1))
    ]
    assert n_tiles == list(range(g.n_tiles))
    counts = [g.n_tile_count(k_rank) for k_rank in range(g.split_k)]
    assert max(counts) == g.held_n_tiles
    assert min(counts) > 0


def test_k_ranks_divide_the_slices(g: SwapAbGeometry) -> None:
    assert g.cta_slices * g.split_k == SLICES
    assert g.even
    assert g.share_k_blocks == [g.hidden // K_BLOCK // g.split_k] * g.split_k


@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("hidden", range(1024, 8192 + 64, 64))
def test_k_ranks_divide_the_slices_of_any_hidden_size(hidden: int, split_k: int) -> None:
    g = SwapAbGeometry.of(constants(HIDDEN=hidden, TILE_TOKENS=32, SPLIT_K=split_k))
    ends = [len(own) for own in tree_slices(hidden, g.k_chunk)]
    assert [len(own) * K_BLOCK for own in g.slices] == ends
    for turn in range(g.cta_slices):
        # The next slices: the exchange adds them in ascending order.
        taken = [g.shares[k_rank][turn] for k_rank in g.ascending(turn)]
        assert taken == g.slices[turn * split_k : (turn + 1) * split_k]
    # Under the first chunk of a slice, a CTA of a share adds what its peers have sent.
    assert split_k == 1 or min(len(own) for own in g.slices) >= g.chunk_k_blocks
    # Only the last chunk is short, and is the last one of its CTA.
    short = [len(own) % g.chunk_k_blocks for share in g.shares for own in share[:-1]]
    assert not any(short)
    assert g.k_blocks == max(g.share_k_blocks)
    assert sum(g.share_k_blocks) * K_BLOCK == hidden


@pytest.mark.parametrize(
    ("hidden", "blocks"),
    [
        (2560, [20, 20]),
        (3584, [28, 28]),
        (1536, [12, 12]),
        (2688, [20, 22]),
        (2880, [24, 21]),
    ],
)
def test_shares_are_as_even_as_slices_allow(hidden: int, blocks: list[int]) -> None:
    """Where slices of n and n + 1 chunks take turns, a k rank gets one of each."""
    assert SwapAbGeometry.of(constants(HIDDEN=hidden, SPLIT_K=2)).share_k_blocks == blocks


@pytest.mark.parametrize("hidden", range(256, 1024, 64))
def test_fewer_chunks_than_slices_are_not_divided(hidden: int) -> None:
    g = SwapAbGeometry.of(constants(HIDDEN=hidden, SPLIT_K=1, TILE_TOKENS=16))
    assert len(g.slices) == min(SLICES, -(-hidden // g.k_chunk))
    with pytest.raises(ValueError, match="at least 1024"):
        SwapAbGeometry.of(constants(HIDDEN=hidden, SPLIT_K=2, TILE_TOKENS=16))


@pytest.mark.parametrize("peers", ["cluster_e", "cluster_t"])
def test_ctas_take_turns_in_filling(g: SwapAbGeometry, peers: str) -> None:
    """The CTA that fills a stage again gets the release of its last content, once."""
    count = getattr(g, peers)
    released: dict[tuple[int, int], int] = {}
    waits: dict[tuple[int, int], int] = {}
    for number in range(g.k_blocks):
        stage, filler = number % g.stages, number % count
        if number >= g.stages:
            waits[filler, stage] = waits.get((filler, stage), 0) + 1
            # The release of the content before has gone to this CTA, and to no other.
            assert released[filler, stage] == waits[filler, stage]
        following = number + g.stages
        if following < g.k_blocks:
            key = following % count, stage
            released[key] = released.get(key, 0) + 1
    assert released == waits


def test_screening_reads_without_bank_conflicts(g: SwapAbGeometry) -> None:
    quads = g.thread_experts // 4
    assert quads * 4 == g.thread_experts
    assert g.token_threads * g.thread_experts == g.tile_experts
    if quads & (quads - 1):
        return
    for quad in range(quads):
        for first in range(0, 32, 8):
            banks = []
            for lane in range(first, first + 8):
                token, member = divmod(lane, g.token_threads)
                flip = member * max(1, 8 // g.token_threads) // max(1, g.token_threads // 4)
                word = token * g.logit_row_bytes // 4 + member * g.thread_experts
                banks.append((word + ((flip & (quads - 1)) ^ quad) * 4) % 32)
            assert len(set(banks)) == 8


def test_every_token_has_an_owner_and_threads(g: SwapAbGeometry) -> None:
    assert g.owned_tokens * g.cluster_e >= g.held_tokens == g.held_n_tiles * N_TILE
    assert g.rank_passes * g.consumer_threads >= g.owned_tokens * g.rank_threads
    assert g.rank_max % g.rank_round == g.rank_round % g.rank_threads == 0
    assert g.top_k <= g.rank_max
    assert g.top_k <= g.list_max
    # A threshold is the k-th largest of the bounds of this number of groups.
    assert screening_groups(g.top_k) >= 2 * g.top_k


@pytest.mark.parametrize(
    "changes",
    [
        {"TILE_TOKENS": 44},
        {"TILE_EXPERTS": 96},
        {"SPLIT_K": 3},
        {"HIDDEN": 4064},
        {"HIDDEN": 0},
        {"TILE_TOKENS": 512},
        {"CLUSTER_T": 32},
        {"SPLIT_K": 4, "TILE_TOKENS": 16},
        # Many stages, whose barriers do not fit beside them.
        {"HIDDEN": 7168, "EXPERTS": 384, "TILE_TOKENS": 24, "SPLIT_K": 2},
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SwapAbGeometry.of(constants(**changes))


#: Hidden elements, experts, k; experts and tokens of a tile, CLUSTER_T, SPLIT_K: many e ranks, a
#: last part with few experts, and dsv4-pro, which has few candidates.
CANDIDATE_CASES = [
    ((7168, 896, 16), (128, 40, 1, 2)),
    ((7168, 896, 16), (256, 40, 1, 4)),
    ((4096, 288, 8), (128, 40, 1, 4)),
    ((2048, 512, 10), (128, 32, 1, 4)),
    ((7168, 384, 6), (128, 40, 1, 4)),
]


@pytest.mark.parametrize(("shape", "division"), CANDIDATE_CASES)
def test_the_candidates_of_random_tokens_fit_their_lists(
    shape: tuple[int, int, int], division: tuple[int, int, int, int]
) -> None:
    """A token with more candidates than places is ranked from all its logits, which is slow."""
    g = SwapAbGeometry(*shape, 256, *division)
    g.check()
    counts = candidates_of_random_tokens(g, 2000)
    assert abs(counts.sum(axis=1).mean() / g.candidates - 1) < 0.15
    too_many = (counts.sum(axis=1) > g.rank_max) | (counts.max(axis=1) > g.list_max)
    assert too_many.mean() < 0.01


def candidates_of_random_tokens(g: SwapAbGeometry, tokens: int) -> npt.NDArray[np.int64]:
    """Candidates of each token among the experts of each e rank: keys at or above the ``top_k``-th
    largest maximum of the groups, which are those of the threads that screen the token."""
    numbers = np.random.default_rng(3)
    keys = np.full((tokens, g.padded_experts), -np.inf)
    keys[:, : g.experts] = numbers.standard_normal((tokens, g.experts))
    own = max(1, screening_groups(g.top_k) // g.token_threads)
    counts = []
    for part in np.split(keys, g.cluster_e, axis=1):
        threads = part.reshape(tokens, g.token_threads, g.thread_experts)
        maxima = [threads[:, :, group::own].max(axis=2) for group in range(own)]
        ordered = np.sort(np.concatenate(maxima, axis=1), axis=1)
        counts.append((part >= ordered[:, -g.top_k, None]).sum(axis=1))
    return np.stack(counts, axis=1)
