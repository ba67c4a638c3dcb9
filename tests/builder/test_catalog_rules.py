"""A row of the catalog gets every check that a model file gets, before anything is built."""

from __future__ import annotations

import dataclasses
import re

import pytest

from build_kernels import plan
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog import models, targets
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.models import Model
from build_kernels.catalog.rules import check_catalog
from build_kernels.errors import BuildError
from tests.builder.conftest import MODEL, Project

FLASH = models.MODELS[0]


def test_the_catalog_keeps_its_own_rules() -> None:
    check_catalog()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1000}, "hidden: expected a positive multiple of 64, found 1000"),
        ({"hidden": "4096"}, "hidden: expected int, found '4096'"),
        ({"top_k": True}, "top_k: expected int, found True"),
        ({"top_k": 8, "experts": 4}, "top_k: expected 1 to 32, at most experts, found 8"),
        ({"experts": 1025}, "experts: expected 1 to 1024, found 1025"),
        ({"name": "mi/ne"}, "name: expected letters, digits and ._-"),
        ({"name": "any"}, "name: expected a name other than 'any'"),
        ({"name": 7}, "name: expected str, found 7"),
        ({"scale": float("nan")}, "scale: expected 0 to 1e18, found nan"),
        ({"vocab": 0}, "vocab: expected 1 to 2^31 - 1, found 0"),
    ],
)
def test_a_wrong_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    row = dataclasses.replace(FLASH, **{"name": "mine", **change})  # type: ignore[arg-type]
    monkeypatch.setattr(models, "MODELS", (FLASH, row))
    with pytest.raises(BuildError, match=re.escape(message)) as failure:
        check_catalog()
    assert str(failure.value).startswith("build_kernels/catalog/models.py: model ")
    assert "; next: " in str(failure.value)


def _kernel(**change: object) -> Kernel:
    known = Kernel("scale", "cuda", False, False, (Variant("one", {"FACTOR": 2.0}),))
    return dataclasses.replace(known, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([_kernel(), _kernel()], "kernels with names of their own, found more than one called"),
        ([_kernel(name="a/b")], "name: expected letters"),
        (
            [_kernel(language="cud")],
            "language of kernel 'scale' 'cud': did you mean 'cuda'",
        ),
        ([_kernel(variants=(Variant("a"), Variant("a")))], "variants of kernel 'scale' with names"),
        ([_kernel(variants=(Variant("a b"),))], "name: expected letters"),
        ([_kernel(variants=(Variant("a", targets=("sm_90",)),))], "'sm_90': did you mean 'sm_90a'"),
        (
            [_kernel(variants=(Variant("a", {}, {"dsv4-flsh": {}}),))],
            "'dsv4-flsh': did you mean 'dsv4-flash'",
        ),
        ([_kernel(variants=(Variant("a", {"N": float("inf")}),))], "constant N: expected a finite"),
        ([_kernel(variants=(Variant("a", {"N": "a b"}),))], "constant N: expected a finite"),
        ([_kernel(variants=(Variant("a", {}, {"any": {"N": None}}),))], "constant N: expected a"),  # type: ignore[dict-item]
    ],
)
def test_a_wrong_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch, rows: list[Kernel], message: str
) -> None:
    monkeypatch.setattr(catalog, "KERNELS", tuple(rows))
    with pytest.raises(BuildError, match=re.escape(message)) as failure:
        check_catalog()
    assert "next: correct" in str(failure.value)


def test_a_wrong_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", ("sm_90a", "sm90"))
    with pytest.raises(BuildError, match=r"targets\.py: expected a target such as"):
        check_catalog()


@pytest.mark.parametrize(
    "row",
    [
        'Model("dsv4-flash", 2048, 128, 4, 1.0, 0, 10)',
        'Model("mine", 4096, 4, 8, 1.0, 0, 10)',
        'Model("mi/ne", 4096, 128, 8, 1.0, 0, 10)',
    ],
)
def test_a_build_says_which_row_is_wrong_and_compiles_nothing(project: Project, row: str) -> None:
    project.append("catalog/models.py", f"MODELS = (*MODELS, {row})\n")
    for arguments in (("build", "--out", "out"), ("list",), ("release", "--out", "out")):
        result = project.run(*arguments)
        assert result.returncode == 1
        assert result.stdout.startswith("Error: ")
        assert "next: correct" in result.stdout
        assert "Traceback" not in result.stdout
        assert not (project.root / "out").exists()


def test_two_model_files_of_one_name_are_refused(project: Project) -> None:
    for name, hidden in (("one", "4096"), ("two", "5120")):
        (project.root / f"{name}.toml").write_text(MODEL.replace("4096", hidden))
    files = ("--model-file", "one.toml", "--model-file", "two.toml")
    result = project.run("build", *files, "--out", "out")
    assert result.returncode == 1
    assert "found more than one called 'pruned'; next: give each model" in result.stdout


def test_a_plan_checks_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", (FLASH, Model("mine", 1000, 4, 8, 1.0, 0, 1)))
    with pytest.raises(BuildError, match="hidden"):
        plan.plan(kernels=["hash_router"])
