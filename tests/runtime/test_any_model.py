"""The divisions that a model gets which the catalog does not name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from build_kernels import divisions, entries, plan
from build_kernels.catalog.kernels import KERNELS
from build_kernels.catalog.models import MODELS, Model
from build_kernels.compile.job import Job
from build_kernels.contracts import declared
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import cost, search
from build_kernels.kernels.dense.geometry.common import MAX_CLUSTER, MAX_SHARED_BYTES
from build_kernels.kernels.dense.geometry.table import geometry_of
from router_runtime.evidence.choice import DENSE, Option, closeness, divide
from router_runtime.format.contract import validate_contract

pytestmark = pytest.mark.one_torch

TARGETS = ("sm_90a", "sm_100f")

TOKENS = (1, 64, 128, 256, 1024, 16384)

#: Shapes unlike those of the catalog: hidden, experts, k.
EXAMPLES = ((5120, 128, 3), (4096, 288, 8), (7168, 896, 16), (2048, 256, 8), (2688, 160, 6))


def jobs_of(hidden: int, experts: int, top_k: int) -> list[Job]:
    model = Model("mine", hidden, experts, top_k, 1.0, 0, 100)
    return plan.plan(targets=TARGETS, kernels=DENSE, extra_models=[model])


def searched_jobs(hidden: int, experts: int, top_k: int) -> Iterator[Job]:
    """The same without digests of sources, which take most of a plan's time."""
    model = Model("mine", hidden, experts, top_k, 1.0, 0, 100)
    for kernel in KERNELS:
        if kernel.name in DENSE:
            for name, division in divisions.searched(kernel, model).items():
                (variant,) = (variant for variant in kernel.variants if variant.name == name)
                constants = {**CONSTANTS, **model.constants(), **division}
                for target in variant.targets or TARGETS:
                    yield Job(
                        kernel=kernel.name,
                        language=kernel.language,
                        model=model.name,
                        target=target,
                        variant=name,
                        constants=constants,
                        source_sha256="0" * 64,
                        inputs_sha256="0" * 64,
                        latency=divisions.predicted(constants, target, TOKENS),
                    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    experts = draw(st.integers(1, 1024))
    return 64 * draw(st.integers(1, 256)), experts, draw(st.integers(1, min(32, experts)))


@settings(max_examples=25, deadline=None)
@example((64, 1, 1))
@example((16384, 1024, 32))
@example((2688, 160, 6))
@given(shapes())
def test_any_model_has_variants_for_every_batch(shape: tuple[int, int, int]) -> None:
    """Each entry's contract is whole, and for each target the verified and the portable entries
    serve every batch with one numerics tag."""
    jobs = list(searched_jobs(*shape))
    for job in jobs:
        contract, _ = declared(job)
        validate_contract(contract, job.key)
        g = geometry_of(job.constants)
        g.check()
        assert search.fits(g, str(job.constants["MMA"]))
        assert contract.dynamic_shared_memory <= MAX_SHARED_BYTES
        assert contract.cluster[0] * contract.cluster[1] <= MAX_CLUSTER
        assert contract.block[0] <= 1024
        assert all(figure > 0 for _, figure in job.latency)
    for target in TARGETS:
        for only in ("", "portable"):
            found = [
                entries.planned(job, "0" * 64)
                for job in jobs
                if job.target == target and job.variant.startswith(only)
            ]
            ranges = divide([Option(e, 0, closeness(e, ())) for e in found]).token_ranges
            assert ranges[0].low == 1
            assert ranges[-1].high >= 1 << 20
            assert all(a.high + 1 == b.low for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("shape", EXAMPLES, ids=str)
def test_large_batches_are_not_left_to_one_slow_form(shape: tuple[int, int, int]) -> None:
    """Beyond decode, several divisions take turns: 256 tokens are predicted to take far less than
    in the division for the largest batches."""
    jobs = jobs_of(*shape)
    for mma in ("wgmma", "mma_sync"):
        own = [
            job
            for job in jobs
            if job.kernel == "dense_router_prefill"
            and job.constants["MMA"] == mma
            and job.target == "sm_90a"
        ]
        assert len(own) >= 2
        best = {
            tokens: min(dict(job.latency).get(tokens, math.inf) for job in own)
            for tokens in (256, 16384)
        }
        (largest,) = (job for job in own if job.variant in ("wgmma_wide", "portable"))
        assert dict(largest.latency)[16384] == best[16384]
        # Without a short last chunk, experts can be the rows of the MMA.
        bar = 0.65 if shape[0] % 256 == 0 else 0.9
        assert best[256] <= bar * dict(largest.latency)[256]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_of_the_catalog_keeps_its_rows(model: Model) -> None:
    for kernel in KERNELS:
        if kernel.name in DENSE:
            assert kernel.names(model)
    jobs = plan.plan(targets=TARGETS, models=[model.name], kernels=DENSE)
    stated = {
        (kernel.name, variant.name)
        for kernel in KERNELS
        for variant in kernel.variants
        if kernel.name in DENSE and variant.has(model)
    }
    assert {(job.kernel, job.variant) for job in jobs} == stated


def test_both_targets_get_one_division_of_mma_sync() -> None:
    """So evidence of one target counts for the other."""
    sources: dict[tuple[str, str], set[str]] = {}
    for job in jobs_of(4096, 288, 8):
        if job.constants["MMA"] == "mma_sync":
            sources.setdefault((job.kernel, job.variant), set()).add(job.source_sha256)
    assert len(sources) >= 4
    assert all(len(digests) == 1 for digests in sources.values())


def test_the_plan_has_what_the_search_finds() -> None:
    jobs = {job.key: job for job in jobs_of(4096, 288, 8)}
    found = [job for job in searched_jobs(4096, 288, 8) if job.target in TARGETS]
    assert jobs.keys() == {job.key for job in found}
    for job in found:
        assert jobs[job.key].constants == job.constants
        assert dict(jobs[job.key].latency).items() >= dict(job.latency).items()


def test_a_variant_that_another_one_replaces_is_left_out() -> None:
    """Two classes of batches with one division are one variant."""
    jobs = [job for job in jobs_of(2688, 160, 6) if job.target == "sm_90a"]
    divided = [
        (job.constants["MMA"], *(job.constants[name] for name in ("CLUSTER_E", "CLUSTER_T")))
        for job in jobs
        if job.constants["FORM"] == "tile"
    ]
    assert len(divided) == len(set(divided))


def test_a_form_that_cannot_divide_a_router_is_left_out() -> None:
    """swap_ab has no ring of one stage."""
    shape = {**CONSTANTS, "HIDDEN": 64, "EXPERTS": 160, "TOP_K": 6}
    assert search.best(["split_k", "swap_ab"], "wgmma", shape, [128], cost.H100) is None
    found = search.best(["split_k", "swap_ab", "tile"], "wgmma", shape, [128], cost.H100)
    assert found is not None
    assert found["FORM"] == "tile"


@pytest.mark.parametrize("hidden", [1536, 1792, 2560, 2688, 2880, 3584])
@pytest.mark.parametrize("tokens", [128, 1024])
def test_a_few_hundred_tokens_get_shares_of_any_hidden_size(hidden: int, tokens: int) -> None:
    shape = {**CONSTANTS, "HIDDEN": hidden, "EXPERTS": 160, "TOP_K": 6}
    found = search.best(["swap_ab", "tile"], "wgmma", shape, [tokens], cost.H100)
    assert found is not None
    assert found["FORM"] == "swap_ab"
    assert int(found["SPLIT_K"]) > 1


def test_more_tokens_get_larger_tiles() -> None:
    shape = {**CONSTANTS, "HIDDEN": 4096, "EXPERTS": 256, "TOP_K": 6}
    tiles = []
    for tokens in (512, 4096):
        found = search.best(["swap_ab"], "wgmma", shape, [tokens], cost.H100)
        assert found is not None
        tiles.append((found["SPLIT_K"], found["TILE_TOKENS"]))
    # What was measured to be the best: 40 tokens with 4 k ranks, 72 with one.
    assert tiles[0] == (4, 40)
    assert tiles[1][0] == 1
    assert 64 <= int(tiles[1][1]) <= 80
