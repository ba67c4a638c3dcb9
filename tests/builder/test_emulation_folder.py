"""What ``build-kernels emulate`` says of an emulation, as far as records need it, and whether a
record is of today's model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from build_kernels import dispatch, plan
from build_kernels.compile import toolchain
from build_kernels.compile.job import Job
from build_kernels.emulation import emulate as emulation
from build_kernels.emulation import standing
from build_kernels.emulation.identity import model_sha256
from build_kernels.emulation.sources import EMULATED, Source, emulated_jobs, without_target
from build_kernels.errors import BuildError
from build_kernels.out_folder import EMULATION_NAME
from router_runtime.evidence.store import Evidence
from router_runtime.format.manifest import loads
from tests.builder.conftest import ROOT
from tests.runtime.releases import emulation_of


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """One kernel for its targets, and one sibling: nothing else is compiled."""
    wanted = ("dense_router_decode", "dsv4-flash")
    jobs = [job for job in emulated_jobs() if (job.kernel, job.model) == wanted]
    (hopper,) = [
        job for job in plan.plan(targets=["sm_90a"], kernels=[wanted[0]]) if job.model == wanted[1]
    ]
    monkeypatch.setattr(emulation, "emulated_jobs", lambda: jobs)
    monkeypatch.setattr(plan, "plan", lambda **_: [hopper])
    return jobs


def test_the_folder_says_what_a_record_needs(
    one_kernel: list[Job], emulated: tuple[Source, ...], tmp_path: Path
) -> None:
    reuse = [ROOT / "artifacts"] if (ROOT / "artifacts" / "manifest.json").exists() else []
    manifest = emulation.emulate(tmp_path, 2, lambda line: None, reuse=reuse)
    document = json.loads((tmp_path / EMULATION_NAME).read_text())
    locked = toolchain.locked((ROOT / "build_kernels" / "emulation.lock").read_text())
    assert document["ptxas"] == locked["nvidia-cuda-nvcc"]
    assert document["model_sha256"] == model_sha256()
    (key, facts), *others = document["entries"].items()
    assert not others
    assert key in {entry.key for entry in loads((tmp_path / "manifest.json").read_bytes()).entries}
    assert {entry.key for entry in manifest.entries} > {key}
    # One emulated entry stands for the cubins of every target whose PTX is the same.
    (source,) = [source for source in emulated if source.jobs == tuple(one_kernel)]
    assert [each["entry"] for each in facts["of"]] == [job.key for job in source.jobs]
    assert len(facts["of"]) == len(EMULATED)
    assert all(len(each["sha256"]) == 64 for each in facts["of"])
    expected = hashlib.sha256(without_target(source.ptx).encode()).hexdigest()
    assert facts["ptx_sha256"] == expected


def test_the_target_line_alone_is_left_out() -> None:
    ptx = ".version 9.0\n.target {}\n.address_size 64\n// sm_100a\n"
    assert without_target(ptx.format("sm_100a")) == without_target(ptx.format("sm_103a"))
    assert without_target(ptx.format("sm_100a")) == (
        ".version 9.0\n\n.address_size 64\n// sm_100a\n"
    )


# --- the model's digest ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The builder's sources without the kernels, to be changed."""
    folder = tmp_path / "build_kernels"
    shutil.copytree(
        ROOT / "build_kernels", folder, ignore=shutil.ignore_patterns("__pycache__", "kernels")
    )
    return folder


def add_comments(folder: Path) -> None:
    for name, comment in (("model/model.cu", "// why"), ("translate.py", "# why")):
        path = folder / "emulation" / name
        path.write_text(f"{path.read_text()}\n{comment}\n")


def change_another_module(folder: Path) -> None:
    path = folder / "emulation" / "defects.py"
    path.write_text(f"{path.read_text()}\nMORE = 1\n")


def change_the_toolchain_check(folder: Path) -> None:
    path = folder / "compile" / "toolchain.py"
    path.write_text(f"{path.read_text()}\nMORE = 1\n")


@pytest.mark.parametrize(
    "change", [add_comments, change_another_module, change_the_toolchain_check]
)
def test_what_emulates_nothing_is_no_part_of_the_model(
    checkout: Path, change: Callable[[Path], None]
) -> None:
    assert model_sha256(checkout) == model_sha256()
    change(checkout)
    assert model_sha256(checkout) == model_sha256()


@pytest.mark.parametrize(
    "name",
    [
        *("model/model.cu", "model/machine.cuh", "model/multiply.cuh", "translate.py"),
        *("instructions.py", "statements.py", "interface.py", "assembly.py"),
    ],
)
def test_what_emulates_is_part_of_the_model(checkout: Path, name: str) -> None:
    path = checkout / "emulation" / name
    added = "MORE = 1" if name.endswith(".py") else "static const int more = 1;"
    path.write_text(f"{path.read_text()}\n{added}\n")
    assert model_sha256(checkout) != model_sha256()


def test_sources_that_cannot_be_read_are_an_error(checkout: Path) -> None:
    (checkout / "emulation" / "translate.py").write_text("def (")
    with pytest.raises(BuildError, match=r"emulation: .*expected Python"):
        model_sha256(checkout)


# --- whether a record is of today's model ---


def test_a_record_of_another_model_is_marked() -> None:
    entry = dispatch.planned(emulated_jobs(), None).entries[0]
    old, new = emulation_of(entry), emulation_of(entry, "Another GPU", model_sha256=model_sha256())
    evidence = Evidence((), (old,))
    assert standing.is_of_another_model(entry, evidence)
    assert standing.in_words(entry, "emulated", evidence) == "emulated (stale: by another model)"
    assert standing.in_words(entry, "verified", evidence) == "verified"
    assert not standing.is_of_another_model(entry, Evidence((), (old, new)))
    assert standing.in_words(entry, "emulated", Evidence((), (new,))) == "emulated"
    assert not standing.is_of_another_model(entry, Evidence())
    of_another_suite = dataclasses.replace(new, cases_sha256="0" * 64)
    assert standing.is_of_another_model(entry, Evidence((), (old, of_another_suite)))
