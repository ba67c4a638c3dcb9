"""The tables of dense forms and MMAs, and the symbols that their kernels get."""

from __future__ import annotations

import pytest

from build_kernels import plan
from build_kernels.catalog.kernels import KERNELS
from build_kernels.compile.job import Job
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.kernels.dense.contract import contract
from build_kernels.kernels.dense.geometry.table import GEOMETRIES
from build_kernels.kernels.dense.program import PROGRAMS, program, symbol
from router_runtime.format import cubin

DENSE = [kernel for kernel in KERNELS if kernel.language == "cutedsl"]


def pair_of(job: Job) -> tuple[str, str]:
    return str(job.constants["FORM"]), str(job.constants["MMA"])


def test_every_pair_has_a_geometry_and_a_program() -> None:
    assert set(GEOMETRIES) == set(PROGRAMS)
    named = {
        (variant.constants["FORM"], variant.constants["MMA"])
        for kernel in DENSE
        for variant in kernel.variants
    }
    assert named == set(PROGRAMS)


@pytest.mark.parametrize("function", [contract, program])
@pytest.mark.parametrize(
    ("constants", "found"),
    [
        ({"FORM": "decode", "MMA": "wgmma"}, "decode with wgmma"),
        ({"FORM": "swap_ba", "MMA": "wgmma"}, "swap_ba with wgmma"),
        ({"MMA": "wgmma", "TILE_TOKENS": 40}, "None with wgmma"),
    ],
)
def test_an_unknown_pair_is_refused(
    function: object, constants: dict[str, str | int], found: str
) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=rf"expected .*swap_ab with wgmma.*, found {found}"):
        function(constants)


def test_the_symbol_is_form_and_mma_alone() -> None:
    """One process compiles all, so no symbol or counter of one entry may change another.

    tests/builder/test_tensor_core.py checks the symbols of tcgen05 entries.
    """
    target = "sm_90a"
    jobs = plan.plan(targets=[target], kernels=[kernel.name for kernel in DENSE])
    first = {pair_of(job): job for job in reversed(jobs)}
    assert len(first) >= 5
    worker = WorkerProcess(target)
    try:
        for (form, mma), job in first.items():
            found = cubin.read(worker.compile(job), job.key).symbol
            assert found == f"{symbol(form, mma)}_0"
            assert found == f"dense_router_{form}_{mma}_cutlass_0"
    finally:
        worker.close()
