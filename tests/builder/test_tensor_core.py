"""The cubins that use the tensor core of the family 10.x: what their machine code shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from build_kernels import plan
from build_kernels.catalog.models import MODELS
from build_kernels.catalog.targets import BLACKWELL, TARGETS
from build_kernels.compile import instructions, toolchain
from build_kernels.compile.job import Job
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.entries import identify, inspect
from build_kernels.kernels.dense.geometry.common import K_BLOCK, MMA_K
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.geometry.tcgen05 import SwapAbTcgen05Geometry
from router_runtime.format import elf

STEPS = K_BLOCK // MMA_K
JOBS = {job.key: job for job in plan.plan(targets=TARGETS) if job.constants.get("MMA") == "tcgen05"}


@pytest.fixture(scope="module", params=["sm_100f", "sm_103a"])
def worker(request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    found = WorkerProcess(request.param)
    yield found
    found.close()


def found_in(
    worker: WorkerProcess, kernel: str, model: str, variant: str
) -> tuple[Job, instructions.TensorCore]:
    """Compile an entry. Return its job and its tensor-core instructions, counted.

    ``inspect`` checks the contract. This checks that nothing spills, and that the symbol does not
    depend on what the process compiled before.
    """
    job = JOBS[f"{kernel}/{model}/{worker.target}/{variant}"]
    data = worker.compile(job)
    counts = instructions.census(instructions.sass(data, toolchain.nvdisasm()))
    facts = identify(job, data)
    assert facts.symbol == f"dense_router_{job.constants['FORM']}_tcgen05_cutlass_0"
    used = inspect(job, data, facts, counts).resources
    assert (used.spill_stores, used.spill_loads, used.local_memory) == (0, 0, 0)
    return job, instructions.tensor_core(counts)


def test_the_split_form_issues_every_step_once(worker: WorkerProcess) -> None:
    job, found = found_in(worker, "dense_router_decode", "dsv4-flash", "tcgen05")
    g = SplitKGeometry.of(job.constants)
    assert found.multiplications == g.k_blocks * g.pairs * STEPS
    assert found.commits == g.cta_chunks
    assert found.loads == 1
    assert (found.allocations > 0, found.releases) == (True, 1)


def test_the_form_for_many_tokens_issues_every_step_of_a_chunk_once(worker: WorkerProcess) -> None:
    job, found = found_in(worker, "dense_router_prefill", "dsv4-flash", "tcgen05")
    g = SwapAbTcgen05Geometry.of(job.constants)
    assert g.split_k == 1
    assert found.multiplications == g.chunk_k_blocks * g.row_tiles * STEPS
    # Hidden states and weights of every stage, and the accumulator.
    assert found.commits == 2 * g.chunk_k_blocks + 1
    assert found.loads == -(-g.tile_tokens // 32)
    assert (found.allocations > 0, found.releases) == (True, 1)


#: Sections that name the target and hold nothing that a device executes.
NAMES = {".note.nv.tkinfo", ".nv.compat"}


@pytest.mark.parametrize(
    ("kernel", "model", "variant"),
    [("dense_router_decode", "dsv4-flash", "tcgen05"), ("topk_select", "any", "row256")],
)
def test_the_family_target_has_the_code_of_its_first_member(
    kernel: str, model: str, variant: str
) -> None:
    """So sm_100a needs no cubins of its own. kernels/README.md has all entries."""
    found = []
    for target in ("sm_100f", "sm_100a"):
        keys = {job.key: job for job in plan.plan(targets=[target], kernels=[kernel])}
        worker = WorkerProcess(target)
        try:
            data = worker.compile(keys[f"{kernel}/{model}/{target}/{variant}"])
        finally:
            worker.close()
        found.append({section.name: section for section in elf.sections(data, target)})
    family, first = found
    assert family.keys() == first.keys()
    assert {name for name in family if family[name] != first[name]} == NAMES


def test_every_model_has_them_on_every_target_of_the_family() -> None:
    for model in (model.name for model in MODELS):
        for target in BLACKWELL:
            assert f"dense_router_decode/{model}/{target}/tcgen05" in JOBS
            for variant in ("tcgen05_256", "tcgen05_1024", "tcgen05_4096", "tcgen05"):
                assert f"dense_router_prefill/{model}/{target}/{variant}" in JOBS
    assert not any("sm_90a" in key for key in JOBS)
