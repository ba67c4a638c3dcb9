"""What a build consists of, and what its entries' source digests cover."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from build_kernels import contracts, digests, plan, publish
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.model_file import read_model
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.targets import BLACKWELL
from build_kernels.compile.languages import LANGUAGES
from build_kernels.errors import BuildError
from build_kernels.kernels.common.numerics import CONSTANTS
from router_runtime.format.manifest import loads
from tests.builder.conftest import FILES, MODEL, Project

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalog of the small project, over a kernels folder of its own."""
    for name, text in FILES.items():
        path = tmp_path / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in (
        "kernels/common/numerics.py",
        "compile/nvrtc.py",
        "compile/cutedsl.py",
        "compile/worker.py",
        "compile/environment.py",
        "compile/worker_process.py",
        "catalog/kernels.py",
        "catalog/latency.py",
        "catalog/models.py",
        "catalog/targets.py",
        "plan.py",
        "toolchain.lock",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((plan.PACKAGE / name).read_bytes())
    (tmp_path / "catalog" / "latency.toml").write_text("tokens = [1]\n")
    rows = (
        Kernel("scale", "cuda", False, False, (Variant("one", {"FACTOR": 2.0}),)),
        Kernel("shift", "cutedsl", True, True, (Variant("a"), Variant("b", {"TILE": 1}))),
    )
    monkeypatch.setattr(catalog, "KERNELS", rows)
    monkeypatch.setattr(plan, "PACKAGE", tmp_path)
    monkeypatch.setattr(contracts, "module", lambda kernel: object())
    return tmp_path


def test_the_full_plan(kernels: Path) -> None:
    keys = [job.key for job in plan.plan()]
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys)) == 2 + 2 * len(MODELS) * 2
    assert "scale/any/sm_100f/one" in keys
    assert "shift/dsv41-flash/sm_90a/b" in keys
    assert "shift/dsv41-dspark/sm_90a/b" in keys
    assert {key.split("/")[2] for key in keys} == {"sm_90a", "sm_100f"}


def test_one_target_serves_the_family_by_default(kernels: Path) -> None:
    """Those for one of its members are built on request."""
    by_default = {job.target for job in plan.plan()}
    for target in BLACKWELL:
        assert {job.target for job in plan.plan(targets=[target])} == {target}
        assert (target in by_default) == (target == "sm_100f")


def test_selections_narrow_the_plan(kernels: Path) -> None:
    def keys(**selection: tuple[str, ...]) -> list[str]:
        return [job.key for job in plan.plan(**selection)]

    assert keys(targets=("sm_100f",), kernels=("scale",)) == ["scale/any/sm_100f/one"]
    assert keys(targets=("sm_90a", "sm_90a"), kernels=("scale",)) == ["scale/any/sm_90a/one"]
    # A folder for one model keeps the kernels that every model needs.
    assert keys(targets=("sm_90a",), models=("dsv4-pro",)) == [
        "scale/any/sm_90a/one",
        "shift/dsv4-pro/sm_90a/a",
        "shift/dsv4-pro/sm_90a/b",
    ]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"targets": ("sm_90",)}, "unknown target 'sm_90': did you mean 'sm_90a'"),
        ({"models": ("dsv4-flsh",)}, "unknown model 'dsv4-flsh': did you mean 'dsv4-flash'"),
        ({"kernels": ("scales",)}, "unknown kernel 'scales': did you mean 'scale'"),
        ({"kernels": ("qqq",)}, "unknown kernel 'qqq': expected scale, shift"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(
    kernels: Path, selection: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        plan.plan(**selection)


def test_constants_come_from_numerics_variant_and_model(kernels: Path) -> None:
    jobs = {job.key: job for job in plan.plan()}
    assert jobs["scale/any/sm_90a/one"].constants == {"FACTOR": 2.0}
    shape: dict[str, object] = {"HIDDEN": 7168, "EXPERTS": 384, "TOP_K": 6}
    shape |= {"SCORING": "sqrtsoftplus", "GATE_TEMPERATURE": 1.0}
    assert jobs["shift/dsv4-pro/sm_90a/b"].constants == {**CONSTANTS, **shape, "TILE": 1}


def test_a_models_own_row_replaces_the_one_for_any(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"any": {"TILE": 1}, "dsv4-pro": {"TILE": 7}}
    variant = Variant("a", {"STAGES": 2}, rows)
    monkeypatch.setattr(catalog, "KERNELS", (Kernel("shift", "cutedsl", True, False, (variant,)),))
    found = {job.model: (job.constants["TILE"], job.constants["STAGES"]) for job in plan.plan()}
    assert found == {model.name: (1, 2) for model in MODELS} | {"dsv4-pro": (7, 2)}


def test_a_variant_may_exist_on_some_targets_only(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = (Variant("a"), Variant("b", targets=("sm_90a",)))
    monkeypatch.setattr(catalog, "KERNELS", (Kernel("scale", "cuda", False, False, variants),))
    assert [job.key for job in plan.plan()] == [
        *("scale/any/sm_100f/a", "scale/any/sm_90a/a"),
        "scale/any/sm_90a/b",
    ]
    assert [job.key for job in plan.plan(targets=("sm_103a",))] == ["scale/any/sm_103a/a"]


LATENCY = """
tokens = [1, 64]
[sm_90a.dsv4-pro]
"shift/a" = [1.5, 2]
[sm_90a.any]
"shift/a" = [3.5]
[any.any]
"shift/b" = [4.5, 5.5]
"""


def test_measured_latencies_reach_their_jobs_and_no_digest(kernels: Path) -> None:
    before = {job.key: job for job in plan.plan()}
    tree = plan.tree_digest()
    assert all(job.latency == () for job in before.values())
    (kernels / "catalog" / "latency.toml").write_text(LATENCY)
    jobs = {job.key: job for job in plan.plan()}
    assert {key: job.latency for key, job in jobs.items() if "dsv4-pro" in key} == {
        "shift/dsv4-pro/sm_100f/a": (),
        "shift/dsv4-pro/sm_100f/b": ((1, 4.5), (64, 5.5)),
        "shift/dsv4-pro/sm_90a/a": ((1, 1.5), (64, 2.0)),
        "shift/dsv4-pro/sm_90a/b": ((1, 4.5), (64, 5.5)),
    }
    assert jobs["shift/dsv4-flash/sm_90a/a"].latency == ((1, 3.5),)
    assert jobs["scale/any/sm_90a/one"].latency == ()
    # Measuring again recompiles nothing and makes no evidence stale.
    assert all(jobs[key].source_sha256 == job.source_sha256 for key, job in before.items())
    assert plan.tree_digest() != tree


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 64]", "[64, 1]", "tokens: expected ascending token counts, found [64, 1]"),
        ("tokens", "#", "tokens: expected ascending token counts, found None"),
        ("sm_90a.any", "sm_91a.any", "unknown target in latency.toml 'sm_91a': did you mean"),
        ("dsv4-pro", "dsv4-pr", "unknown model in latency.toml 'dsv4-pr': did you mean"),
        ("shift/b", "shift/c", "unknown variant in latency.toml 'shift/c': did you mean"),
        ("[3.5]", "[3.5, 1, 2]", "expected 1 to 2 positive microseconds, found [3.5, 1, 2]"),
        ("[3.5]", "[0.0]", "sm_90a.any.shift/a: expected 1 to 2 positive microseconds"),
        ("[3.5]", "3.5", "expected 1 to 2 positive microseconds, found 3.5"),
        ("=", "==", "latency.toml: expected TOML"),
    ],
)
def test_wrong_latencies_are_refused(kernels: Path, old: str, new: str, message: str) -> None:
    path = kernels / "catalog" / "latency.toml"
    path.write_text(LATENCY.replace(old, new, 1))
    with pytest.raises(BuildError, match=re.escape(message)):
        plan.plan()


def test_a_contract_derives_what_nobody_stated(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contract:
        @staticmethod
        def derive(constants: dict[str, int]) -> dict[str, int]:
            if constants.get("HIDDEN") == 7168:
                raise ValueError("expected something smaller")
            return {"TILE": 5, "GROUPS": 6}

    monkeypatch.setattr(contracts, "module", lambda kernel: Contract)
    jobs = {job.key: job for job in plan.plan(models=("dsv4-flash",))}
    constants = jobs["shift/dsv4-flash/sm_90a/b"].constants
    assert (constants["TILE"], constants["GROUPS"]) == (1, 6)
    with pytest.raises(
        BuildError, match="kernel shift, model dsv4-pro: expected something smaller"
    ):
        plan.plan(models=("dsv4-pro",))


def test_a_contract_may_have_no_form_for_a_model(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contract:
        @staticmethod
        def derive(constants: dict[str, int]) -> dict[str, int] | None:
            return None if "TILE" in constants and constants["HIDDEN"] == 7168 else {}

    monkeypatch.setattr(contracts, "module", lambda kernel: Contract)
    keys = [job.key for job in plan.plan(targets=("sm_90a",), kernels=("shift",))]
    assert "shift/dsv4-pro/sm_90a/a" in keys
    assert "shift/dsv4-pro/sm_90a/b" not in keys
    assert "shift/dsv4-flash/sm_90a/b" in keys


def test_a_kernel_may_import_the_sources_of_another(kernels: Path) -> None:
    other = kernels / "kernels" / "other"
    other.mkdir()
    (other / "form.py").write_text("WIDTH = 1\n")
    with (kernels / "kernels" / "shift" / "shift.py").open("a") as file:
        file.write("from build_kernels.kernels.other import form\n")

    def digests() -> dict[str, str]:
        return {job.kernel: job.source_sha256 for job in plan.plan(models=("dsv4-pro",))}

    before = digests()
    (other / "form.py").write_text("WIDTH = 2\n")
    after = digests()
    assert before["scale"] == after["scale"]
    assert before["shift"] != after["shift"]


def test_targets_of_one_source_share_its_digest(kernels: Path) -> None:
    digests: dict[tuple[str, str | None, str], set[str]] = {}
    for job in plan.plan():
        digests.setdefault((job.kernel, job.model, job.variant), set()).add(job.source_sha256)
    assert all(len(found) == 1 for found in digests.values())
    assert len(set.union(*digests.values())) == len(digests)


@pytest.mark.parametrize(
    ("file", "affected"),
    [
        ("kernels/scale/scale.cu", {"scale"}),
        ("kernels/scale/own.cuh", {"scale"}),
        ("kernels/scale/contract.py", {"scale"}),
        ("kernels/common/factor.cuh", {"scale"}),
        ("kernels/shift/shift.py", {"shift"}),
        ("kernels/common/new.py", {"shift"}),
        ("kernels/common/parameters.py", {"scale", "shift"}),
        ("kernels/common/limits.py", {"scale", "shift"}),
        ("kernels/common/unused.py", set()),
    ],
)
def test_source_digests_cover_what_goes_into_a_cubin(
    kernels: Path, file: str, affected: set[str]
) -> None:
    common = kernels / "kernels" / "common"
    (common / "limits.py").write_text("MOST = 1\n")
    (common / "parameters.py").write_text("from build_kernels.kernels.common import limits\n")
    (common / "new.py").write_text("")
    for name in ("scale/contract.py", "shift/contract.py", "shift/shift.py"):
        module = "new" if name == "shift/shift.py" else "parameters"
        with (kernels / "kernels" / name).open("a") as opened:
            opened.write(f"from build_kernels.kernels.common import {module}\n")
    before = {job.key: job.source_sha256 for job in plan.plan()}
    tree = plan.tree_digest()
    for written in ("\n", "ADDED = 1\n" if file.endswith(".py") else "constexpr int ADDED = 1;\n"):
        assert {job.key: job.source_sha256 for job in plan.plan()} == before
        assert plan.tree_digest() == tree
        with (kernels / file).open("a") as opened:
            opened.write(written)
    changed = {job.kernel for job in plan.plan() if job.source_sha256 != before[job.key]}
    assert changed == affected
    assert (plan.tree_digest() != tree) == bool(affected)


@pytest.mark.parametrize(("language", "affected"), [("cuda", {"scale"}), ("cutedsl", {"shift"})])
def test_source_digests_cover_the_recipe(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, language: str, affected: set[str]
) -> None:
    before = {job.key: job.source_sha256 for job in plan.plan()}
    facts = dataclasses.replace(LANGUAGES[language], recipe=99)
    monkeypatch.setattr(digests, "LANGUAGES", {**LANGUAGES, language: facts})
    changed = {job.kernel for job in plan.plan() if job.source_sha256 != before[job.key]}
    assert changed == affected


@pytest.mark.parametrize(
    ("file", "affected"),
    [
        ("compile/nvrtc.py", {"scale"}),
        ("compile/cutedsl.py", {"shift"}),
        ("compile/worker.py", {"scale", "shift"}),
        ("compile/environment.py", {"scale", "shift"}),
        ("compile/worker_process.py", {"scale", "shift"}),
        ("kernels/scale/own.cuh", {"scale"}),
        ("kernels/shift/shift.py", {"shift"}),
        ("kernels/shift/contract.py", set()),
    ],
)
def test_input_digests_cover_every_byte_that_a_compiler_reads(
    kernels: Path, file: str, affected: set[str]
) -> None:
    before = {job.key: job for job in plan.plan()}
    files = plan.files_digest()
    with (kernels / file).open("a") as opened:
        opened.write("\n")
    after = plan.plan()
    changed = {job.kernel for job in after if job.inputs_sha256 != before[job.key].inputs_sha256}
    assert changed == affected
    assert all(job.source_sha256 == before[job.key].source_sha256 for job in after)
    assert plan.files_digest() != files


def test_input_digests_differ_between_targets_constants_and_flags(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs() -> set[str]:
        return {job.inputs_sha256 for job in plan.plan()}

    before = inputs()
    assert len(before) == len(plan.plan())
    others = {name: dataclasses.replace(facts, flags=()) for name, facts in LANGUAGES.items()}
    monkeypatch.setattr(plan, "LANGUAGES", others)
    assert not before & inputs()


def test_a_kernel_without_a_plan_leaves_the_others(kernels: Path) -> None:
    tree = plan.tree_digest()
    (kernels / "kernels" / "shift" / "shift.py").write_text("this is no Python\n")
    assert plan.plan(kernels=("scale",))
    assert plan.tree_digest() != tree
    with pytest.raises(BuildError, match=r"kernel shift: .*shift\.py:1: expected Python, found"):
        plan.plan()


def test_source_digests_cover_the_flags(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {job.key: job.source_sha256 for job in plan.plan()}
    cuda = dataclasses.replace(LANGUAGES["cuda"], flags=("--other",))
    monkeypatch.setattr(plan, "LANGUAGES", {**LANGUAGES, "cuda": cuda})
    changed = {job.kernel for job in plan.plan() if job.source_sha256 != before[job.key]}
    assert changed == {"scale"}


@pytest.mark.parametrize("file", ["scale.cu", "contract.py"])
def test_a_row_without_its_files_is_an_error(kernels: Path, file: str) -> None:
    (kernels / "kernels" / "scale" / file).unlink()
    with pytest.raises(BuildError, match=rf"kernel scale: expected the file .*{file}, found none"):
        plan.plan()


def test_a_model_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MODEL)
    assert read_model(path) == Model("pruned", 4096, 144, 6, 1.5, 3, 129280)
    path.write_text(MODEL.replace("1.5", "2"))
    assert read_model(path).scale == 2.0


def test_a_model_file_says_how_its_model_scores(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MODEL + 'scoring = "sigmoid"\ngate_temperature = 2\n')
    plain = Model("pruned", 4096, 144, 6, 1.5, 3, 129280)
    sigmoid = dataclasses.replace(plain, scoring="sigmoid", gate_temperature=2.0)
    assert read_model(path) == sigmoid
    said = {"scoring": "sigmoid", "gate_temperature": 2.0}
    assert sigmoid.shape() == {**plain.shape(), **said}
    # The statement of a release, which has the shape, stays as it was for the others.
    assert not plain.shape().keys() & said.keys()
    assert Model("pruned", **sigmoid.shape()) == sigmoid  # type: ignore[arg-type]


def test_a_sigmoid_has_entries_of_every_form() -> None:
    """The example: every entry of its model says how it scores, and in its numerics tag."""
    model = read_model(EXAMPLES / "kimi_k2.toml")
    plain = dataclasses.replace(model, name="plain", scoring="sqrtsoftplus")
    jobs = plan.plan(targets=("sm_90a", "sm_100f"), extra_models=[model, plain])
    tags: dict[str, set[str | None]] = {}
    for job in jobs:
        if job.model is not None:
            tag = contracts.declared(job)[1]
            tags.setdefault(job.model, set()).add(tag)
            found = job.constants["SCORING"], job.constants["GATE_TEMPERATURE"]
            assert found == ("sigmoid" if job.model == model.name else "sqrtsoftplus", 1.0)
    assert not tags[model.name] & tags["plain"]
    forms = {
        (job.constants.get("FORM"), job.constants.get("MMA"))
        for job in jobs
        if job.model == model.name
    }
    assert {("decode", "mma_sync"), ("split_k", "tcgen05"), ("swap_ab", "tcgen05")} <= forms
    assert {form for form, mma in forms if mma == "wgmma"} <= {"swap_ab", "tile"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vocab", 'scoring = "softmax"\nvocab', r"scoring: expected one of \['sqrtsoftplus', 's"),
        ("vocab", "scoring = 1\nvocab", "scoring: expected str, found 1"),
        ("vocab", "gate_temperature = 0.0\nvocab", "gate_temperature: expected 9.53674e-07 to"),
        ("vocab", "gate_temperature = nan\nvocab", "gate_temperature: expected 9.53674e-07 to"),
        ("experts", "expert", "unknown key in mine.toml 'expert': did you mean 'experts'"),
        ("hidden = 4096", "", r"missing \['hidden'\]"),
        ("4096", '"4096"', "hidden: expected int, found '4096'"),
        ("4096", "true", "hidden: expected int, found True"),
        ("1.5", "true", "scale: expected float, found True"),
        ("4096", "4000", "hidden: expected a positive multiple of 64, found 4000"),
        ("144", "1025", "experts: expected 1 to 1024, found 1025"),
        ("top_k = 6", "top_k = 33", "top_k: expected 1 to 32"),
        ("experts = 144", "experts = 5", "top_k: expected 1 to 32, at most experts, found 6"),
        ("1.5", "inf", "scale: expected 0 to 1e18, found inf"),
        ("1.5", "-1.0", "scale: expected 0 to 1e18"),
        ("hash_layers = 3", "hash_layers = -1", "hash_layers: expected 0 or more"),
        ("129280", "0", "vocab: expected 1 to"),
        ("pruned", "dsv4-pro", "name: expected a name other than"),
        ("pruned", "any", "name: expected a name other than"),
        ("pruned", "../up", "name: expected letters"),
        ("=", "==", "expected a readable TOML file"),
    ],
)
def test_a_wrong_model_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MODEL.replace(old, new, 1))
    with pytest.raises(BuildError, match=message):
        read_model(path)


def test_a_missing_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"none\.toml: expected a readable TOML file"):
        read_model(tmp_path / "none.toml")


def test_a_model_file_narrows_the_plan_to_its_model(kernels: Path) -> None:
    extra = [Model("pruned", 4096, 144, 6, 1.5, 3, 129280)]

    def keys(*models: str) -> list[str]:
        jobs = plan.plan(targets=["sm_90a"], models=models, extra_models=extra)
        return [job.key for job in jobs if not job.key.endswith("/b")]

    assert keys() == ["scale/any/sm_90a/one", "shift/pruned/sm_90a/a"]
    assert keys("pruned") == keys()
    assert keys("dsv4-pro") == [
        "scale/any/sm_90a/one",
        "shift/dsv4-pro/sm_90a/a",
        "shift/pruned/sm_90a/a",
    ]


def test_a_model_of_ones_own_builds_without_touching_code(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MODEL)
    before = (project.artifacts / "manifest.json").read_bytes()
    arguments = ("--model-file", tmp_path / "mine.toml", "--target", "sm_90a")
    result = project.run("build", *arguments)
    assert result.returncode == 1
    assert "next: add --out DIR" in result.stdout
    said = project.build(*arguments, "--out", tmp_path / "out")
    assert "shift/pruned/sm_90a/only  compiled" in said
    # What every model needs comes from artifacts/.
    assert "scale/any/sm_90a/one  reused" in said
    assert "2 cubins" in said
    assert (project.artifacts / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("change", ["", "digest", "toolchain", "source"])
def test_artifacts_are_reused_only_where_everything_is_the_same(
    project: Project, tmp_path: Path, change: str
) -> None:
    """A model of the same shape under another name gets the same cubins."""
    (tmp_path / "mine.toml").write_text(MODEL.replace("144", "256"))
    manifest = project.artifacts / "manifest.json"
    if change == "digest":
        for path in project.artifacts.glob("shift-*.cubin"):
            path.write_bytes(path.read_bytes() + b"\0")
    elif change == "toolchain":
        manifest.write_text(manifest.read_text().replace("OptLevel(3)", "OptLevel(2)"))
    elif change == "source":
        with project.kernel_file("shift/shift.py").open("a") as file:
            file.write("OTHER = 1\n")
    out = tmp_path / "out"
    said = project.build(
        *("--model-file", tmp_path / "mine.toml", "--kernel", "shift", "--target", "sm_90a"),
        *("--out", out),
    )
    how = "compiled" if change else "reused"
    assert f"shift/pruned/sm_90a/only  {how}" in said
    (entry,) = loads((out / "manifest.json").read_bytes()).entries
    assert publish.bytes_with_digest(out, entry.file, entry.sha256)
