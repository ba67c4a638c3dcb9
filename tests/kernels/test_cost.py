"""Predicted latencies against every figure of the catalog that was measured."""

from __future__ import annotations

import itertools
import math

import pytest

from build_kernels import plan
from build_kernels.catalog.models import MODELS
from build_kernels.compile.job import Job
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import cost, search
from build_kernels.kernels.dense.geometry.common import Geometry
from build_kernels.kernels.dense.geometry.swap_ab import SwapAbGeometry
from build_kernels.kernels.dense.geometry.table import geometry_of

#: Models whose figures for sm_90a were measured: all of the catalog.
MEASURED = tuple(model.name for model in MODELS)

#: A prediction is at most this times the measurement, and at least its inverse.
FACTOR = 1.25

#: What the search chooses takes at most this times the best division that was measured.
CHOICE = 1.1

#: Divisions of swap_ab that were tried and are not in the catalog: model, experts and tokens of a
#: tile, CLUSTER_T, SPLIT_K; microseconds of 128, 256, 512, 1024 and 4096 tokens on an H200.
TRIED_TOKENS = (128, 256, 512, 1024, 4096)
TRIED = (
    ("dsv4-flash", (128, 80, 2, 4), (8.54, 8.50, 8.61, 9.26, 37.51)),
    ("dsv4-flash", (128, 144, 1, 2), (20.45, 20.44, 20.52, 20.90, 23.68)),
    ("dsv4-flash", (128, 40, 1, 4), (6.57, 6.75, 7.17, 14.48, 51.46)),
    ("dsv4-flash", (128, 32, 1, 4), (6.03, 6.22, 12.53, 19.42, 60.7)),
    ("dsv4-flash", (128, 72, 2, 1), (18.62, 18.55, 18.61, 18.94, 21.80)),
    ("dsv4-pro", (192, 72, 1, 4), (13.19, 13.64, 14.49, 15.59, 65.65)),
    ("dsv4-pro", (192, 32, 1, 4), (10.24, 10.55, 21.44, 32.46, 112.97)),
    ("dsv4-pro", (192, 40, 1, 4), (11.07, 11.32, 12.03, 24.46, 94.65)),
    ("dsv41-flash", (192, 80, 2, 4), (11.96, 12.05, 12.36, 12.85, 51.97)),
    ("dsv41-flash", (192, 32, 1, 4), (8.57, 9.04, 17.67, 27.05, 91.51)),
    ("dsv41-flash", (192, 40, 1, 4), (9.34, 9.56, 10.21, 20.71, 78.27)),
)


#: Of other models, on an H200: hidden elements, experts, k; experts and tokens of a tile,
#: CLUSTER_T, SPLIT_K; tokens, microseconds. Many candidates, a last part with few experts, unequal
#: slices, a short last chunk.
OTHERS = (
    ((7168, 896, 16), (128, 80, 1, 2), 512, 22.4),
    ((7168, 896, 16), (128, 72, 1, 1), 1024, 37.0),
    ((7168, 896, 16), (128, 96, 1, 1), 4096, 126.4),
    ((4096, 288, 8), (128, 40, 1, 4), 256, 8.55),
    ((4096, 288, 8), (192, 40, 2, 4), 512, 8.97),
    ((4096, 288, 8), (192, 72, 2, 1), 4096, 26.7),
    ((2048, 512, 10), (128, 40, 1, 4), 256, 7.58),
    ((2048, 512, 10), (128, 72, 1, 1), 4096, 32.2),
    ((2048, 256, 8), (128, 64, 1, 1), 4096, 14.1),
    ((2688, 160, 6), (128, 32, 1, 4), 256, 5.46),
    ((2688, 160, 6), (192, 72, 2, 2), 4096, 14.5),
    ((2880, 128, 4), (128, 40, 2, 4), 1024, 5.82),
    ((2880, 128, 4), (128, 72, 2, 2), 4096, 12.4),
)

JOBS = [job for job in plan.plan(targets=["sm_90a"], models=MEASURED) if "FORM" in job.constants]


def predicted(job: Job, tokens: int) -> float:
    return cost.microseconds(
        geometry_of(job.constants), str(job.constants["MMA"]), tokens, cost.H100
    )


def swap_ab(model: str, **division: int) -> SwapAbGeometry:
    """A division of a model of the catalog."""
    (row,) = (row for row in MODELS if row.name == model)
    return SwapAbGeometry.of({**CONSTANTS, **row.constants(), **division})


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.key)
def test_predictions_are_near_what_was_measured(job: Job) -> None:
    for tokens, measured in job.latency:
        assert measured / FACTOR <= predicted(job, tokens) <= measured * FACTOR, tokens


def test_on_the_whole_predictions_are_neither_high_nor_low() -> None:
    logarithms = [
        math.log(predicted(job, tokens) / measured)
        for job in JOBS
        for tokens, measured in job.latency
    ]
    assert len(logarithms) > 100
    assert abs(sum(logarithms)) / len(logarithms) < math.log(1.05)


@pytest.mark.parametrize(("model", "division", "figures"), TRIED)
def test_predictions_are_near_what_was_tried(
    model: str, division: tuple[int, ...], figures: tuple[float, ...]
) -> None:
    names = ("TILE_EXPERTS", "TILE_TOKENS", "CLUSTER_T", "SPLIT_K")
    g = swap_ab(model, **dict(zip(names, division, strict=True)))
    for tokens, found in zip(TRIED_TOKENS, figures, strict=True):
        prediction = cost.microseconds(g, "wgmma", tokens, cost.H100)
        assert found / FACTOR <= prediction <= found * FACTOR, tokens


@pytest.mark.parametrize(("shape", "division", "tokens", "found"), OTHERS)
def test_predictions_are_near_what_other_models_take(
    shape: tuple[int, int, int], division: tuple[int, int, int, int], tokens: int, found: float
) -> None:
    g = SwapAbGeometry(*shape, 256, *division)
    g.check()
    prediction = cost.microseconds(g, "wgmma", tokens, cost.H100)
    assert found / FACTOR <= prediction <= found * FACTOR


@pytest.mark.parametrize("model", MEASURED)
@pytest.mark.parametrize("kernel", ["dense_router_decode", "dense_router_prefill"])
def test_of_the_measured_divisions_it_prefers_one_of_the_best(model: str, kernel: str) -> None:
    """For each number of tokens, the division with the least prediction was measured to take at
    most ``CHOICE`` times the best one."""
    jobs = [job for job in JOBS if (job.model, job.kernel) == (model, kernel)]
    for tokens in sorted({tokens for job in jobs for tokens, _ in job.latency}):
        able = [
            (predicted(job, tokens), dict(job.latency)[tokens])
            for job in jobs
            if tokens in dict(job.latency)
        ]
        best = min(found for _, found in able)
        assert min(able)[1] <= CHOICE * best, tokens


@pytest.mark.parametrize("model", MEASURED)
@pytest.mark.parametrize("tokens", [256, 512, 1024, 4096])
def test_the_search_finds_a_division_as_good_as_the_best_measured_one(
    model: str, tokens: int
) -> None:
    """By prediction it is the best of all; by measurement, if it is one that was measured."""
    jobs = [
        job
        for job in JOBS
        if job.model == model
        and (job.constants["FORM"], job.constants["MMA"]) == ("swap_ab", "wgmma")
    ]
    shape = {**jobs[0].constants}
    found = search.best(["swap_ab", "tile"], "wgmma", shape, [tokens], cost.H100)
    assert found is not None
    known = [
        (job.constants, dict(job.latency)[tokens]) for job in jobs if tokens in dict(job.latency)
    ]
    names = ("TILE_EXPERTS", "TILE_TOKENS", "CLUSTER_T", "SPLIT_K")
    known += [
        (dict(zip(names, division, strict=True)), figures[TRIED_TOKENS.index(tokens)])
        for other, division, figures in TRIED
        if other == model
    ]
    best = min(figure for _, figure in known)
    same = [
        figure
        for constants, figure in known
        if all(constants.get(name) == found.get(name) for name in names)
    ]
    if same:
        assert min(same) <= CHOICE * best
    else:
        prediction = cost.microseconds(geometry_of({**shape, **found}), "wgmma", tokens, cost.H100)
        assert prediction <= CHOICE * best


def test_a_wave_more_takes_its_whole_time() -> None:
    g = swap_ab("dsv4-pro", TILE_EXPERTS=192, TILE_TOKENS=40, CLUSTER_T=4, SPLIT_K=2)
    full = cost.H100.clusters(g.cluster) * g.tile_tokens * g.cluster_t
    one, two = (cost.microseconds(g, "wgmma", tokens, cost.H100) for tokens in (full, full + 1))
    assert two > 1.9 * one
    assert cost.microseconds(g, "wgmma", 1, cost.H100) <= one


def test_half_the_clock_takes_twice_the_time() -> None:
    slow = cost.Machine(cost.H100.clock / 2, cost.H100.resident)
    for tokens in (1, 64):
        g = geometry_of(JOBS[0].constants)
        once, twice = (cost.microseconds(g, "mma_sync", tokens, m) for m in (cost.H100, slow))
        assert twice == pytest.approx(2 * once)


def test_sizes_of_clusters_between_the_measured_ones() -> None:
    sizes = range(1, 17)
    counts = [cost.H100.clusters(size) for size in sizes]
    assert counts == sorted(counts, reverse=True)
    assert all(size * count <= 132 for size, count in zip(sizes, counts, strict=True))
    assert [cost.H100.clusters(size) for size in (2, 4, 8, 12, 16)] == [66, 30, 15, 7, 7]


def test_only_geometries_of_dense_forms_have_a_cost() -> None:
    with pytest.raises(TypeError, match="expected the geometry of a dense form"):
        cost.microseconds(Geometry(64, 8, 1, 256), "wgmma", 1, cost.H100)


def test_predictions_grow_with_the_tokens() -> None:
    for job in JOBS:
        figures = [predicted(job, tokens) for tokens, _ in job.latency]
        for before, after in itertools.pairwise(figures):
            assert after >= 0.97 * before, job.key
