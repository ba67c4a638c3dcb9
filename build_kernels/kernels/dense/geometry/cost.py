"""Predicts how long one launch of a kernel takes, from the sizes of its tiles and clusters.

A prediction adds up what a CTA waits for: bytes into its multiprocessor, partial sums from its
cluster, MMA clocks, screening and ranking; then waves of clusters, and device memory. The constants
are those of the NOTES.md of both dense kernels, fitted to measurements on an H100.
``tests/kernels/test_cost.py`` states how far predictions are from what was measured.

No contract and no device code imports this file: a better prediction changes no digest of sources,
and so no evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from build_kernels.kernels.dense.geometry.common import (
    K_BLOCK,
    LANES,
    MMA_K,
    Geometry,
    GroupedGeometry,
    ceil_div,
)
from build_kernels.kernels.dense.geometry.decode import MMA_SYNC_N, DecodeGeometry
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.tile import TileGeometry

#: Bytes a clock that ``ldmatrix`` reads from shared memory.
SHARED_READ = 128


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU as a prediction sees it.

    Attributes:
        clock: Clocks per microsecond.
        resident: Size of a cluster -> how many of them are active at a time. A size between two has
            the figure of the larger one.
        inlet: Bytes a clock that reach a multiprocessor from L2, multicast or not.
        gpc: Bytes a clock that reach a group of multiprocessors (GPC) from L2; multicast ones count
            once. A cluster is inside one.
        gpcs: How many GPCs are large enough for a cluster of 16.
        peers: Bytes a clock that reach a multiprocessor from the other CTAs of its CTA's cluster,
            besides those of ``inlet``.
        products: Multiply-adds a clock of a multiprocessor's tensor cores.
        cached: Bytes of hidden states that L2 still holds from the kernel before.
        memory: Bytes per microsecond of the hidden states that L2 does not hold; their time is
            added to everything else.

    """

    clock: float
    resident: Mapping[int, int]
    inlet: float = 72
    peers: float = 22
    gpc: float = 950
    gpcs: int = 7
    products: int = 2048
    cached: int = 8 << 20
    memory: float = 7.7e6

    def clusters(self, size: int) -> int:
        """Return how many clusters of ``size`` CTAs are active at a time."""
        return self.resident[min(listed for listed in self.resident if listed >= size)]


H100 = Machine(clock=1755, resident={1: 132, 2: 66, 3: 39, 4: 30, 6: 18, 8: 15, 16: 7})

#: Predicted: an inlet a little slower, and as many clusters of 4 and more as on an H100.
B200 = Machine(
    clock=1850,
    resident={1: 148, 2: 74, 3: 36, 4: 30, 6: 18, 8: 15, 16: 7},
    inlet=64,
    products=4096,
    memory=18e6,
)


def microseconds(g: Geometry, mma: str, tokens: int, machine: Machine) -> float:
    """Return the predicted microseconds of one launch.

    In a chain with programmatic dependent launch, each launch with weights of its own.

    Args:
        g: The division.
        mma: The MMA, as in an entry's constants.
        tokens: Rows of the batch.
        machine: The GPU.

    """
    if isinstance(g, DecodeGeometry):
        return _decode(g, tokens, machine) / machine.clock
    if isinstance(g, SplitKGeometry):
        return _split_k(g, tokens, machine) / machine.clock
    if isinstance(g, SwapAbGeometry):
        clusters = ceil_div(tokens, g.tile_tokens * g.cluster_t)
        clocks = _swap_ab(g, mma, clusters, machine)
    elif isinstance(g, TileGeometry):
        clusters = ceil_div(tokens, g.tokens_tile * g.cluster_t)
        clocks = _tile(g, mma, clusters, machine)
    else:
        raise TypeError(f"expected the geometry of a dense form, found {type(g).__name__}")
    waves = ceil_div(clusters, machine.clusters(g.cluster))
    read = max(0, 2 * g.hidden * tokens - machine.cached)
    return waves * clocks / machine.clock + read / machine.memory


# --- decode and split_k: latencies, and what each token adds ---

#: Clocks from the end of a router to the first instruction after the next one's wait.
LINK = 900

#: Clocks of one round of selection, and of selecting besides its rounds.
SELECT_ROUND = 133
SELECT = 140

#: Clocks of merging the candidates of several groups: two round trips to L2, then the ranking by
#: counting. More candidates than lanes are ranked in rounds.
MERGE = 1700

#: Clocks for one token in the decode form: until the hidden states have arrived, from the last MMA
#: until the sums are at the CTA that adds, adding and scoring, sending keys, storing the result.
COPY = 560
SEND = 190
SCORE = 440
SEND_KEYS = 270
STORE = 200


def _decode(g: DecodeGeometry, tokens: int, machine: Machine) -> float:
    """Clocks: copy, multiply, add and score, select, merge, store."""
    tiles = ceil_div(tokens, g.tokens_tile)
    more = ceil_div(tokens, tiles) - 1
    clusters = tiles * g.groups
    held = ceil_div(ceil_div(more + 1, g.cluster_k), g.cluster_e)
    steps = g.cta_hidden // MMA_K
    # A chain of k16 steps takes 35 clocks each; in bulk mma.sync reaches 60% of the tensor cores.
    n_tiles = ceil_div(more + 1, MMA_SYNC_N)
    products = 16 * MMA_SYNC_N * MMA_K * g.m_tiles * n_tiles * steps
    multiply = max(35 * g.slab_steps, products / 0.6 / machine.products)
    # Every warp reads the columns of its slab.
    multiply += g.warps * n_tiles * g.slab_steps * MMA_SYNC_N * MMA_K * 2 / SHARED_READ
    sums = g.cta_slabs * g.slab_chunks * g.cta_experts * 4 * (g.cluster_k - 1) / g.cluster_k
    # Stores to peers leave at 8 bytes a clock.
    per_token = 0.85 * (sums / 8 + 2 * g.cta_hidden / machine.inlet)
    select = (SELECT + SELECT_ROUND * g.top_k) * ceil_div(held, g.warps)
    clocks = LINK + COPY + multiply + SEND + SCORE + SEND_KEYS + select + STORE
    clocks += more * per_token
    clocks += _merge(g)
    weights = 2 * g.cta_experts * g.cta_hidden / machine.inlet
    return clocks + _not_resident(clusters, g.cluster, weights, clocks, machine)


def _merge(g: GroupedGeometry) -> int:
    """Clocks of merging the groups' candidates."""
    if g.groups == 1:
        return 0
    return MERGE + (SELECT_ROUND * g.top_k if g.groups * g.top_k > LANES else 0)


def _not_resident(
    clusters: int, size: int, weights: float, clocks: float, machine: Machine
) -> float:
    """More clocks where two launches are not resident side by side.

    The next launch then fetches its weights in its own time; beyond one wave, clusters take turns.
    """
    active = machine.clusters(size)
    if clusters > active:
        return (ceil_div(clusters, active) - 1) * (clocks - LINK + weights) + weights
    return weights / 2 if 2 * clusters > active else 0


def _split_k(g: SplitKGeometry, tokens: int, machine: Machine) -> float:
    """Clocks: operands and MMAs, sums to the CTA that adds them, scores, selection, merge."""
    tiles = ceil_div(tokens, g.tokens_tile)
    here = min(tokens, g.tokens_tile)
    # MMAs, staging and the bulk copies' start have the size of the tile whatever it holds.
    per_slot = 32 * g.warpgroups / 4 + 30 * g.sums_bytes / 1024
    per_token = 2 * g.k_blocks * K_BLOCK / machine.inlet + 64 * g.sums_bytes / 1024
    held = ceil_div(ceil_div(here, g.cluster_k), g.warps)
    clocks = LINK + 4300 + per_slot * g.tokens_tile + per_token * here
    clocks += (SELECT + SELECT_ROUND * g.top_k) * held
    clocks += _merge(g)
    weights = g.weight_bytes / machine.inlet
    return clocks + _not_resident(tiles * g.groups, g.cluster_k, weights, clocks, machine)


# --- swap_ab and tile: bytes and MMA clocks, then an epilogue that overlaps with nothing ---

#: Clocks of a launch before its first stage arrives, and more for each CTA of a cluster, since they
#: fetch for each other.
START = 900
MEET = 60

#: Clocks of a stage's wgmma in one warpgroup alone.
WGMMA_ALONE = 440

#: Clocks from the request of a stage to its arrival: a short ring waits for it.
LATENCY = 1650

#: A token's clocks below include this many candidates; each further one costs RANK_MORE clocks for
#: every token that a thread ranks.
FEW_CANDIDATES = 20
RANK_MORE = 130

#: Clocks of the tile form's epilogue: 128 tokens by two warpgroups, up to this k. A larger k takes
#: longer in proportion, since candidates are inserted in a list of k.
EPILOGUE = 12500
EPILOGUE_TOP_K = 8


def _swap_ab(g: SwapAbGeometry, mma: str, clusters: int, machine: Machine) -> float:
    """Clocks of one wave: the ring of stages, the sums of the other k ranks, the epilogue."""
    if mma == "mma_sync":
        multiply = g.consumer_warps * (16 + g.tile_tokens) * K_BLOCK * 2 / SHARED_READ
    else:
        products = g.tile_experts * g.tile_tokens * K_BLOCK
        multiply = products / machine.products
        if mma == "wgmma":
            multiply = max(multiply, WGMMA_ALONE / g.warpgroups)
    fetched = g.cluster // g.cluster_t * g.weight_stage_bytes
    fetched += g.split_k * g.cluster_t * g.hidden_stage_bytes
    stage = max(
        g.stage_bytes / machine.inlet,
        _in_gpc(clusters, g.cluster, machine) * fetched / machine.gpc,
        multiply,
    )
    sums = g.cta_slices * g.exchange_bytes / machine.peers
    # Storing, screening, the cluster barrier, ranking, stores.
    epilogue: float = 3600 + 85 * g.held_tokens
    epilogue += RANK_MORE * max(0.0, g.candidates - FEW_CANDIDATES) * g.rank_passes
    return START + MEET * g.cluster + g.k_blocks * stage + sums + epilogue


def _tile(g: TileGeometry, mma: str, clusters: int, machine: Machine) -> float:
    """Clocks of one wave: the two rings, then the epilogue of 128 tokens."""
    if mma == "mma_sync":
        warps = g.consumer_warps
        multiply = warps * (16 + g.mma_n) * K_BLOCK * 2 / SHARED_READ * g.passes
    else:
        multiply = g.cta_experts * g.tokens_tile * K_BLOCK / machine.products
    # One stage is being multiplied while the others of the ring are on their way.
    waits = g.passes * LATENCY / (g.weight_stages - 1)
    stage_bytes = g.hidden_stage_bytes + g.passes * g.weight_stage_bytes
    fetched = g.cluster_e * g.passes * g.weight_stage_bytes + g.cluster_t * g.hidden_stage_bytes
    stage = max(
        stage_bytes / machine.inlet,
        _in_gpc(clusters, g.cluster, machine) * fetched / machine.gpc,
        multiply,
        waits,
    )
    epilogue = EPILOGUE * max(1.0, g.top_k / EPILOGUE_TOP_K)
    return START + g.k_blocks * stage + epilogue


def _in_gpc(clusters: int, size: int, machine: Machine) -> int:
    """Clusters that share the inlet of a GPC."""
    return min(max(1, 16 // size), ceil_div(clusters, machine.gpcs))
