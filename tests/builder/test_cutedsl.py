"""cutedsl.py compiles only in a process that was started for its target."""

from __future__ import annotations

import pytest

from build_kernels.compile import cutedsl
from build_kernels.compile.job import Job
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.entries import identify
from build_kernels.errors import BuildError
from tests.builder.conftest import Compile, Project


@pytest.mark.parametrize("found", ["sm_90a", None])
def test_a_process_for_another_target_is_refused(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    if found:
        monkeypatch.setenv("CUTE_DSL_ARCH", found)
    with pytest.raises(BuildError, match=f"CUTE_DSL_ARCH=sm_100a, found {found!r}"):
        cutedsl.compile_cubin("no.such.module", {}, "sm_100a")


def test_a_worker_answers_an_unknown_program_with_the_error() -> None:
    worker = WorkerProcess("sm_90a")
    try:
        job = Job("missing", "cutedsl", None, "sm_90a", "a", {}, "0" * 64, "0" * 64)
        with pytest.raises(BuildError, match=r"(?s)missing/any/sm_90a/a: .*No module named"):
            worker.compile(job)
        with pytest.raises(BuildError, match="expected a process with CUTE_DSL_ARCH=sm_100a"):
            worker.compile(Job("missing", "cutedsl", None, "sm_100a", "a", {}, "0" * 64, "0" * 64))
    finally:
        worker.close()


def test_a_cubin_for_another_target_is_refused(compile_cuda: Compile) -> None:
    """The ELF flags are the same for sm_100a and sm_100f; the builder finds the difference."""
    data = compile_cuda('extern "C" __global__ void f() {}', "sm_100f")
    job = Job("f", "cuda", None, "sm_100a", "a", {}, "0" * 64, "0" * 64)
    with pytest.raises(
        BuildError, match="f/any/sm_100a/a: expected a cubin for sm_100a, found sm_100f"
    ):
        identify(job, data)


def test_family_targets_differ_from_specific_ones(project: Project) -> None:
    project.build("--kernel", "shift", "--target", "sm_100f", "--target", "sm_100a", "--out", "out")
    arguments = ("--artifacts", "out")
    for target in ("sm_100f", "sm_100a"):
        said = project.run("inspect", f"shift/dsv4-pro/{target}/only", *arguments).stdout
        assert f"entry:            shift/dsv4-pro/{target}/only" in said
