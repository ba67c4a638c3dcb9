"""``build-kernels tune``: which candidates there are, and the folder that it makes of them."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from build_kernels import divisions, plan, publish, replan
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import COLUMNS, Kernel, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.model_file import read_model
from build_kernels.catalog.models import MODELS, Model
from build_kernels.cli import main
from build_kernels.compile.job import Job
from build_kernels.entries import planned
from build_kernels.errors import BuildError, JobError
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import cost, search
from build_kernels.kernels.dense.geometry.table import geometry_of
from build_kernels.release import rebuild
from build_kernels.tuning import choice, folder, model_text
from build_kernels.tuning.candidates import (
    WITHIN,
    candidates,
    classes,
    division_text,
    parsed,
)
from build_kernels.tuning.record import TUNING_NAME, Figures, Tuning, read_tuning
from router_runtime.format.codec import canonical_json
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry, Manifest, dumps, loads
from tests.builder.conftest import ROOT

FLASH, PRO, _, DSPARK = MODELS
#: A model that compiles quickly.
MINE = Model("mine", 1024, 64, 4, 1.0, 0, 100)
ALL: frozenset[int] = frozenset()

Tuned = Callable[..., tuple[Any, dict[str, Entry]]]


def kernel(name: str) -> Kernel:
    return next(kernel for kernel in catalog.KERNELS if kernel.name == name)


def variant(name: str, of: str = "dense_router_prefill") -> Variant:
    return next(variant for variant in kernel(of).variants if variant.name == name)


def today(name: str, model: Model) -> Constants:
    return variant(name).constants_of(model)


def rows(found: Sequence[Variant], model: Model) -> list[str]:
    return [division_text(each.constants_of(model)) for each in found]


#: What serves 4096 tokens of the model today.
(TODAY,) = rows([variant("wgmma_4096")], FLASH)


# --- divisions by hand ---


def test_a_division_by_hand() -> None:
    found = parsed("4096:128x64:2:1")
    assert (found.model, found.tokens) == (None, 4096)
    assert found.division == {
        "FORM": "swap_ab",
        "TILE_EXPERTS": 128,
        "TILE_TOKENS": 64,
        "CLUSTER_T": 2,
        "SPLIT_K": 1,
    }
    assert division_text(found.division) == "128x64:2:1"
    found = parsed("dsv4-pro/16384:4:2:1")
    assert (found.model, found.tokens) == ("dsv4-pro", 16384)
    assert found.division == {"FORM": "tile", "CLUSTER_E": 4, "CLUSTER_T": 2, "PASSES": 1}
    assert division_text(found.division) == "4:2:1"


@pytest.mark.parametrize("text", ["", "4096", "4096:128:64", "128x64:2:1", "a:1:2:3", "1:2x3:4"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"expected .*; next: --division 4096:128x64:2:1"):
        parsed(text)


# --- classes ---


def test_classes_are_those_with_the_targets_own_mma() -> None:
    prefill = kernel("dense_router_prefill")
    names = [each.name for each in classes(prefill, "sm_90a", ALL)]
    assert names == [
        "wgmma_128",
        "wgmma_256",
        "wgmma_512",
        "wgmma_1024",
        "wgmma_4096",
        "wgmma_wide",
    ]
    names = [each.name for each in classes(prefill, "sm_90a", frozenset({128, 16384}))]
    assert names == ["wgmma_128", "wgmma_256", "wgmma_wide"]
    assert {each.constants["MMA"] for each in classes(prefill, "sm_100f", ALL)} == {"tcgen05"}
    decode = classes(kernel("dense_router_decode"), "sm_90a", ALL)
    assert [each.name for each in decode] == ["portable", "portable_32"]


# --- candidates ---


def test_candidates_are_the_fastest_by_prediction_and_not_all_alike() -> None:
    each = variant("wgmma_4096")
    found, refused = candidates(each, FLASH, today("wgmma_4096", FLASH), 5, [])
    assert refused == {}
    assert [one.name for one in found] == [f"wgmma_4096.{number}" for number in range(1, 6)]
    shape = {**CONSTANTS, **FLASH.constants()}
    times = [
        cost.microseconds(geometry_of({**shape, **one.constants_of(FLASH)}), "wgmma", 4096, gpu)
        for gpu in [divisions.machine("wgmma", each.targets)]
        for one in found
    ]
    best = search.ranked(each.forms, "wgmma", shape, (4096,), cost.H100)
    others = [predicted for predicted, division in best if division_text(division) != TODAY]
    assert min(times) == pytest.approx(others[0])
    assert max(times) <= WITHIN * best[0][0]
    # What serves today is no candidate, and no tile is all that sets the five apart.
    assert TODAY not in rows(found, FLASH)
    kept = ("FORM", "TILE_EXPERTS", "CLUSTER_T", "SPLIT_K")
    families = {tuple(one.constants_of(FLASH).get(name) for name in kept) for one in found}
    assert len(families) >= 3


def test_a_division_by_hand_is_a_candidate_whatever_is_predicted() -> None:
    given = [
        parsed(text) for text in ("4096:128x64:2:1", "dsv4-pro/4096:192x72:2:2", "1024:128x64:2:1")
    ]
    likely, _ = candidates(variant("wgmma_4096"), FLASH, today("wgmma_4096", FLASH), 2, [])
    found, refused = candidates(variant("wgmma_4096"), FLASH, today("wgmma_4096", FLASH), 2, given)
    assert refused == {}
    assert "128x64:2:1" not in rows(likely, FLASH)
    assert rows(found, FLASH) == ["128x64:2:1", *rows(likely, FLASH)]


def test_what_serves_today_and_what_no_form_can_build_are_no_candidates() -> None:
    given = [parsed(f"4096:{TODAY}"), parsed("4096:128x999:1:1"), parsed("4096:0x8:1:1")]
    found, refused = candidates(variant("wgmma_4096"), FLASH, today("wgmma_4096", FLASH), 0, given)
    assert found == []
    assert list(refused) == ["dsv4-flash/4096:128x999:1:1", "dsv4-flash/4096:0x8:1:1"]
    assert "expected a multiple of 64 hidden elements" in refused["dsv4-flash/4096:128x999:1:1"]


# --- the folder ---


def made(job: Job, spills: int = 0) -> tuple[Entry, bytes]:
    """An entry as a compiler would leave it."""
    entry = planned(job, "0" * 64)
    resources = dataclasses.replace(entry.resources, registers=32, spill_loads=spills)
    return dataclasses.replace(entry, symbol="s", size=1, resources=resources), b"0"


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | int]:
    """Stand-ins for the compilers. Key of a job -> its error, or the bytes that it spills."""
    outcome: dict[str, str | int] = {}

    def compile_all(
        jobs: Sequence[Job], *_: object, keep_going: bool
    ) -> tuple[list[Job], list[JobError]]:
        assert keep_going
        bad = [job for job in jobs if isinstance(outcome.get(job.key), str)]
        errors = [JobError(job.key, str(outcome[job.key])) for job in bad]
        return [job for job in jobs if job not in bad], errors

    def examine(jobs: Sequence[Job], _: int) -> tuple[list[tuple[Entry, bytes]], list[JobError]]:
        return [made(job, int(outcome.get(job.key, 0))) for job in jobs], []

    monkeypatch.setattr(folder, "compile_all", compile_all)
    monkeypatch.setattr(folder, "examine", examine)
    monkeypatch.setattr(publish, "publish", lambda *_: None)
    return outcome


def tune(out: Path, *models: Model, tokens: Sequence[int] = (4096,), **changes: Any) -> Any:
    settings: dict[str, Any] = {"count": 2, "given": [], "processes": 2} | changes
    return folder.make(
        models, out, "sm_90a", frozenset(tokens), progress=lambda step: None, **settings
    )


def test_each_class_is_compared_with_what_serves_it_today(
    compilers: dict[str, str | int], tmp_path: Path
) -> None:
    tuning, manifest = tune(tmp_path / "out", FLASH, DSPARK, tokens=(256, 4096))
    assert tuning.models == (FLASH, DSPARK)
    assert {128, 256, 4096} < set(tuning.tokens)
    found = {(trial.model, trial.variant): trial for trial in tuning.trials}
    assert found["dsv4-flash", "wgmma_256"].today == "wgmma_256"
    assert found["dsv4-flash", "wgmma_256"].tokens == (128, 256)
    # No variant of its own: the one that serves these batches.
    assert found["dsv41-dspark", "wgmma_256"].today == "wgmma_512"
    entries = found["dsv41-dspark", "wgmma_256"].entries
    assert entries == ("wgmma_512", "wgmma_256.1", "wgmma_256.2")
    keys = {entry.key for entry in manifest.entries}
    assert keys == {
        f"{trial.kernel}/{trial.model}/sm_90a/{name}"
        for trial in tuning.trials
        for name in trial.entries
    } | {f"dense_router_decode/{model.name}/sm_90a/portable" for model in (FLASH, DSPARK)}


def test_candidates_that_spill_or_do_not_compile_are_left_out_and_named(
    compilers: dict[str, str | int], tmp_path: Path
) -> None:
    prefix = "dense_router_prefill/dsv4-flash/sm_90a/wgmma_4096"
    compilers |= {f"{prefix}.1": 16, f"{prefix}.2": "ptxas gave up"}
    tuning, manifest = tune(tmp_path / "out", FLASH, count=3, given=[parsed("4096:128x9:1:1")])
    (trial,) = tuning.trials
    assert trial.entries == ("wgmma_4096", "wgmma_4096.3")
    assert dict(tuning.dropped) == {
        f"{prefix}.1": "expected no spills, found 16 bytes a thread",
        f"{prefix}.2": "ptxas gave up",
        "dsv4-flash/4096:128x9:1:1": tuning.dropped["dsv4-flash/4096:128x9:1:1"],
    }
    assert f"{prefix}.1" not in {entry.key for entry in manifest.entries}
    constants = {entry.key: entry.constants for entry in manifest.entries}
    said = folder.text(tuning, constants.__getitem__)
    assert f"left out: {prefix}.2: ptxas gave up" in said
    assert f"  wgmma_4096       {TODAY}" in said


def test_what_serves_today_has_to_compile(compilers: dict[str, str | int], tmp_path: Path) -> None:
    compilers["dense_router_prefill/dsv4-flash/sm_90a/wgmma_4096"] = "ptxas gave up"
    with pytest.raises(BuildError, match="ptxas gave up"):
        tune(tmp_path / "out", FLASH)
    assert not (tmp_path / "out").exists()


def test_a_contract_that_refuses_a_candidate_drops_it(
    compilers: dict[str, str | int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def declared(job: Job) -> None:
        raise JobError(job.key, "too wide")

    monkeypatch.setattr(folder, "declared", declared)
    tuning, _ = tune(tmp_path / "out", FLASH)
    assert set(tuning.dropped.values()) == {"too wide"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (4096, 77)}, r"--classes: expected tokens .* found 77; next: name one"),
        ({"given": ["1024:128x64:2:1"]}, r"--division: expected tokens .*\[4096\], found 1024"),
        ({"given": ["dsv4-pr/4096:128x64:2:1"]}, "unknown model of --division 'dsv4-pr'"),
    ],
)
def test_names_and_batches_that_nothing_has(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = [parsed(text) for text in changes.pop("given", [])]
    with pytest.raises(BuildError, match=message):
        tune(tmp_path / "out", FLASH, given=given, **changes)


def test_a_real_folder(tmp_path: Path) -> None:
    """Compiled: today's kernels and candidates of a small model; a second call reuses them."""
    out = tmp_path / "out"
    steps: list[Any] = []
    settings: dict[str, Any] = {"count": 1, "given": [], "processes": 2}
    arguments = ([MINE], out, "sm_90a", frozenset({4096}))
    tuning, manifest = folder.make(*arguments, progress=steps.append, **settings)
    assert read_tuning(out) == tuning
    assert loads((out / "manifest.json").read_bytes()) == manifest
    assert {entry.key.split("/", 1)[1] for entry in manifest.entries} >= {
        "mine/sm_90a/wgmma_4096.1",
        "mine/sm_90a/portable",
    }
    assert all((out / entry.file).is_file() for entry in manifest.entries)
    for entry in manifest.entries:
        # Predicted figures, so that the runtime can choose among them.
        assert entry.latency
    again: list[Any] = []
    folder.make(*arguments, progress=again.append, **settings)
    assert {step.how for step in again} == {"reused"}
    # A build leaves it alone, and it leaves a build alone.
    (out / TUNING_NAME).unlink()
    with pytest.raises(
        BuildError, match="a new folder or one of build-kernels tune, found a build"
    ):
        folder.make(*arguments, progress=steps.append, **settings)


# --- the choice ---

PREFIX = "dense_router_prefill/dsv4-flash/sm_90a"


@pytest.fixture
def compared(compilers: dict[str, str | int], tmp_path: Path) -> tuple[Tuning, Manifest]:
    """dsv4-flash at 4096 tokens: today's and three candidates."""
    found: tuple[Tuning, Manifest] = tune(tmp_path / "out", FLASH, count=3)
    return found


def measured(compared: tuple[Tuning, Manifest], **times: float) -> Figures:
    """Figures by the variant's number, ``today`` for what serves today: of 4096 tokens, and less
    for fewer. Those of today's and of the fastest are complete.
    """
    tuning, manifest = compared
    by_name = {
        "wgmma_4096" if name == "today" else f"wgmma_4096.{name[1:]}": figure
        for name, figure in times.items()
    }
    fastest = min(by_name, key=by_name.__getitem__)
    rows = {
        f"{PREFIX}/{name}": {
            str(tokens): figure * tokens / 4096
            for tokens in tuning.tokens
            if tokens == 4096 or (tokens >= 128 and name in ("wgmma_4096", fastest))
        }
        for name, figure in by_name.items()
    }
    digests = {entry.key: entry.sha256 for entry in manifest.entries}
    return Figures("a GPU", "sm_90a", True, digests, {}, rows, {})


def chosen(compared: tuple[Tuning, Manifest], figures: Figures) -> choice.Choice:
    tuning, manifest = compared
    (found,) = choice.choose(tuning, manifest.entries, figures)
    return found


def test_the_fastest_is_chosen_unless_todays_is_about_as_fast(
    compared: tuple[Tuning, Manifest],
) -> None:
    found = chosen(compared, measured(compared, today=20.0, c1=30.0, c2=19.5, c3=25.0))
    assert (found.entry.variant, found.stays) == ("wgmma_4096.2", False)
    assert [found.microseconds, found.today] == pytest.approx([19.5, 20.0])
    found = chosen(compared, measured(compared, today=20.0, c1=30.0, c2=19.9, c3=25.0))
    assert (found.entry.variant, found.stays) == ("wgmma_4096", True)
    # What serves today was wrong, or left out.
    found = chosen(compared, measured(compared, c1=30.0, c2=31.0))
    assert (found.entry.variant, found.today) == ("wgmma_4096.1", None)


def test_what_is_wrong_is_not_chosen(compared: tuple[Tuning, Manifest]) -> None:
    figures = measured(compared, today=20.0, c1=10.0)
    figures = dataclasses.replace(figures, wrong={f"{PREFIX}/wgmma_4096.1": "other bits"})
    assert chosen(compared, figures).entry.variant == "wgmma_4096"


def test_a_row_has_a_figure_for_every_number_of_tokens(compared: tuple[Tuning, Manifest]) -> None:
    found = chosen(compared, measured(compared, today=20.0, c1=10.0))
    latency = dict(found.latency)
    assert (
        tuple(latency) == compared[0].tokens == (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
    )
    assert latency[4096] == 10.0
    assert {latency[tokens] for tokens in (1, 64, 128)} == {0.3}


def test_figures_that_do_not_suffice(compared: tuple[Tuning, Manifest]) -> None:
    figures = measured(compared, today=20.0, c1=10.0)
    key = f"{PREFIX}/wgmma_4096.1"
    few = {**figures.microseconds, key: {"4096": 10.0}}
    with pytest.raises(BuildError, match=rf"{key}: expected figures .* with more --seconds"):
        chosen(compared, dataclasses.replace(figures, microseconds=few))
    with pytest.raises(BuildError, match=r"found none; next, on a GPU: .* --seconds"):
        chosen(compared, dataclasses.replace(figures, microseconds={}))
    for changed in ({key: "1" * 64}, {"dense_router_prefill/gone": "1" * 64}):
        with pytest.raises(BuildError, match="expected figures of the cubins in the folder"):
            chosen(compared, dataclasses.replace(figures, sha256=changed))


def test_rows_for_the_catalog(compared: tuple[Tuning, Manifest], tmp_path: Path) -> None:
    found = chosen(compared, measured(compared, today=20.0, c1=30.0, c2=19.5))
    said = choice.catalog_rows([found], "sm_90a")
    (row,) = (line for line in said.splitlines() if line.startswith("    ("))
    values = (found.entry.constants[name] for name in COLUMNS["swap_ab"])
    assert ast.literal_eval(row.strip().rstrip(",")) == ("wgmma_4096", "dsv4-flash", *values)
    assert "19.50 us in place of 20.00" in said
    # Both parts can be pasted as they are.
    file = tmp_path / "latency.toml"
    _, _, rows_ = said.partition("# build_kernels/catalog/latency.toml")
    file.write_text(f"tokens = {list(compared[0].tokens)}\n{rows_}")
    latency = Latencies(file).of("dense_router_prefill", "wgmma_4096", "dsv4-flash", "sm_90a")
    assert latency == found.latency
    # What stays has new figures, and no row.
    found = chosen(compared, measured(compared, today=20.0, c1=30.0))
    said = choice.catalog_rows([found], "sm_90a")
    assert f"# wgmma_4096 dsv4-flash: {TODAY} stays, 20.00 us" in said
    assert "    (" not in said
    assert '"dense_router_prefill/wgmma_4096" = [' in said


def test_a_class_without_a_variant_gets_one_only_if_it_is_worth_it(
    compilers: dict[str, str | int], tmp_path: Path
) -> None:
    tuning, manifest = tune(tmp_path / "out", DSPARK, tokens=(256,), count=1)
    prefix = "dense_router_prefill/dsv41-dspark/sm_90a"
    tokens = [str(count) for count in tuning.tokens if count >= 128]

    def said(time: float) -> str:
        rows_ = {
            f"{prefix}/wgmma_512": dict.fromkeys(tokens, 6.0),
            f"{prefix}/wgmma_256.1": dict.fromkeys(tokens, time),
        }
        figures = Figures("a GPU", "sm_90a", True, {}, {}, rows_, {})
        return choice.catalog_rows(choice.choose(tuning, manifest.entries, figures), tuning.target)

    assert '("wgmma_256",    "dsv41-dspark"' in said(5.0)
    assert '"dense_router_prefill/wgmma_256" = [' in said(5.0)
    assert 'wgmma_256"' not in said(6.0)


# --- the file of a model of one's own ---

MINE_TOML = "\n".join(
    ["# My model.", 'name = "mine"', *(f"{name} = {value}" for name, value in MINE.shape().items())]
)
DIVISION = """
[divisions.dense_router_prefill.wgmma_4096.swap_ab]
TILE_EXPERTS = 64
TILE_TOKENS = 64
CLUSTER_T = 2
SPLIT_K = 2
"""
LATENCY = """
[latency.sm_90a.dense_router_prefill.wgmma_4096]
1024 = 9.5
4096 = 12
"""


def model_of(tmp_path: Path, tables: str) -> Model:
    path = tmp_path / "mine.toml"
    path.write_text(f"{MINE_TOML}\n{tables}")
    return read_model(path)


def prefill_jobs(model: Model) -> dict[str, Job]:
    jobs = plan.plan(targets=["sm_90a"], kernels=["dense_router_prefill"], extra_models=[model])
    return {job.variant: job for job in jobs}


def test_what_a_model_file_states_is_built_and_nothing_else_changes(tmp_path: Path) -> None:
    assert model_of(tmp_path, "") == MINE
    plain, stated = prefill_jobs(MINE), prefill_jobs(model_of(tmp_path, DIVISION + LATENCY))
    found = stated["wgmma_4096"]
    assert division_text(found.constants) == "64x64:2:2"
    assert found.constants["MMA"] == "wgmma"
    assert found.latency == ((1024, 9.5), (4096, 12.0))
    assert division_text(plain["wgmma_4096"].constants) != "64x64:2:2"
    assert {name: job for name, job in stated.items() if name != "wgmma_4096"} == {
        name: job for name, job in plain.items() if name != "wgmma_4096"
    }


def test_a_division_gives_the_model_a_variant_that_the_search_leaves_out(tmp_path: Path) -> None:
    assert "wgmma_256" not in prefill_jobs(MINE)
    own = model_of(tmp_path, DIVISION.replace("wgmma_4096", "wgmma_256"))
    found = prefill_jobs(own)["wgmma_256"]
    assert division_text(found.constants) == "64x64:2:2"
    # Without figures of its own it has predicted ones.
    assert len(found.latency) == 11


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dense_router_prefill", "dense_router_prefil", "did you mean 'dense_router_prefill.wgm"),
        (
            "wgmma_4096",
            "wgmma_409",
            "unknown variant in mine.toml 'dense_router_prefill.wgmma_409'",
        ),
        ("swap_ab", "swap", "form of wgmma_4096 'swap': did you mean 'swap_ab'"),
        ("CLUSTER_T = 2", "", "expected the constants TILE_EXPERTS, .*, found SPLIT_K, TILE_EXP"),
        ("CLUSTER_T = 2", "CLUSTER_T = 0", "a positive integer, .* found 0; next: correct it"),
        ("CLUSTER_T = 2", "CLUSTER_T = 1.0", "a positive integer, .* found 1.0"),
        ("sm_90a", "sm_90", "unknown mine.toml: target 'sm_90': did you mean 'sm_90a'"),
        ("1024 = 9.5", "many = 9.5", "expected numbers of tokens, found 'many'"),
        ("1024 = 9.5", "01024 = 9.5", "expected numbers of tokens, found '01024'"),
        ("1024 = 9.5", "0 = 9.5", "expected numbers of tokens, found '0'"),
        ("1024 = 9.5", "1024 = -1", "positive microseconds, found -1"),
        ("1024 = 9.5", "1024 = true", "positive microseconds, found True"),
        ("wgmma_4096.swap_ab]", "wgmma_4096]", "expected divisions.KERNEL.VARIANT.FORM.CONSTANT"),
        (
            "[latency",
            "[divisions.dense_router_prefill.wgmma_4096.tile]\nCLUSTER_E = 1\nCLUSTER_T = 1\n"
            "PASSES = 1\n[latency",
            "expected one form, found several; next: remove all but one",
        ),
    ],
)
def test_wrong_tables_of_a_model_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        model_of(tmp_path, (DIVISION + LATENCY).replace(old, new, 1))


def test_a_stated_division_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    own = model_of(tmp_path, DIVISION.replace("TILE_TOKENS = 64", "TILE_TOKENS = 999"))
    where = "model mine: divisions.dense_router_prefill.wgmma_4096: expected a multiple of"
    with pytest.raises(BuildError, match=rf"{where} .* 999 tokens.*; next: correct the model file"):
        prefill_jobs(own)


def test_what_is_stated_survives_a_second_build_and_a_rebuilt_release(tmp_path: Path) -> None:
    own = model_of(tmp_path, DIVISION + LATENCY)
    jobs = prefill_jobs(own)
    again = replan.jobs_of([planned(job, "0" * 64) for job in jobs.values()])
    assert again == {job.key: job for job in jobs.values()}
    statement: Any = SimpleNamespace(models={"mine": own.shape()})
    (path,) = rebuild.model_files(statement, tmp_path)
    assert read_model(path) == own


@pytest.fixture
def own(
    compilers: dict[str, str | int], tmp_path: Path
) -> tuple[Tuning, Manifest, list[choice.Choice]]:
    """A folder for MINE, and the choice of its first candidate at 4096 tokens."""
    tuning, manifest = tune(tmp_path / "out", MINE, count=1)
    (trial,) = tuning.trials
    tokens = [str(count) for count in tuning.tokens if count >= 128]
    times = zip(trial.entries, (20.0, 10.0), strict=True)
    prefix = "dense_router_prefill/mine/sm_90a"
    rows_ = {f"{prefix}/{name}": dict.fromkeys(tokens, time) for name, time in times}
    digests = {entry.key: entry.sha256 for entry in manifest.entries}
    figures = Figures("a GPU", "sm_90a", True, digests, {}, rows_, {})
    (tmp_path / "figures.json").write_bytes(canonical_json(figures))
    (tmp_path / "out" / TUNING_NAME).write_bytes(canonical_json(tuning))
    (tmp_path / "out" / "manifest.json").write_bytes(dumps(manifest))
    return tuning, manifest, choice.choose(tuning, manifest.entries, figures)


def test_choices_are_written_into_the_model_file(
    own: tuple[Tuning, Manifest, list[choice.Choice]], tmp_path: Path
) -> None:
    _, _, (found,) = own
    path = tmp_path / "mine.toml"
    path.write_text(MINE_TOML)
    for _ in range(2):
        result = command(
            *(str(path), "--out", str(tmp_path / "out")),
            *("--figures", str(tmp_path / "figures.json")),
        )
        assert result.exit_code == 0, result.output
        assert f"next: build-kernels build --model-file {path} --out DIR" in result.output
        assert path.read_text().startswith(f"{MINE_TOML}\n\n{model_text.MARK}\n[divisions.")
        assert path.read_text().count(model_text.MARK) == 1
    job = prefill_jobs(read_model(path))["wgmma_4096"]
    assert division_text(job.constants) == division_text(found.entry.constants)
    assert job.latency == found.latency == tuple((count, 10.0) for count in own[0].tokens)


def test_what_is_said_of_other_classes_stays(
    own: tuple[Tuning, Manifest, list[choice.Choice]], tmp_path: Path
) -> None:
    _, _, choices = own
    other = (DIVISION + LATENCY).replace("wgmma_4096", "wgmma_512")
    before = f"{MINE_TOML}\n{model_text.MARK}\n{DIVISION}{LATENCY}{other}"
    model = model_of(tmp_path, f"{model_text.MARK}\n{DIVISION}{LATENCY}{other}")
    text = model_text.rewritten("mine.toml", before, model, choices, "sm_90a")
    after = model_of(tmp_path, text.partition(MINE_TOML)[2])
    kept = [item for item in model.measured if "/wgmma_512/" in item[0]]
    assert [item for item in after.measured if "/wgmma_512/" in item[0]] == kept
    assert len(kept) == 6
    with pytest.raises(BuildError, match="found divisions, latency without it; next: remove them"):
        model_text.rewritten("mine.toml", MINE_TOML + DIVISION + LATENCY, model, choices, "sm_90a")


def test_a_class_that_another_variant_serves_as_well_gets_no_table(
    own: tuple[Tuning, Manifest, list[choice.Choice]],
) -> None:
    _, _, (found,) = own
    trial = dataclasses.replace(found.trial, variant="wgmma_256", today=found.entry.variant)
    stays = dataclasses.replace(found, trial=trial)
    text = model_text.rewritten("mine.toml", MINE_TOML, MINE, [stays], "sm_90a")
    assert text == f"{MINE_TOML}\n\n{model_text.MARK}\n"


def test_the_file_of_the_folders_model_is_required(
    own: tuple[Tuning, Manifest, list[choice.Choice]], tmp_path: Path
) -> None:
    figures = ("--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures.json"))
    result = command(*figures)
    assert result.exit_code == 1
    expected = "the TOML file of the model 'mine', whose candidates the folder holds, found none"
    assert expected in result.output
    path = tmp_path / "mine.toml"
    path.write_text(MINE_TOML.replace("64", "128"))
    result = command(str(path), *figures)
    assert result.exit_code == 1
    assert "expected the model that the folder was made for" in result.output
    assert f"next: .venv/bin/python -m build_kernels tune {path} --out with a new folder" in (
        result.output
    )
    assert model_text.MARK not in path.read_text()


# --- the command ---


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["tune", *arguments])


def test_the_command(
    compilers: dict[str, str | int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE_TOML)
    result = command(
        *("dsv4-flash", str(file), "--out", str(tmp_path / "out"), "--classes", "4096"),
        *("--candidates", "1", "--division", "dsv4-flash/4096:128x64:2:1", "--quiet"),
    )
    assert result.exit_code == 0, result.output
    assert result.output == ""
    result = command("--out", str(tmp_path / "out"), "--classes", "4096", "--candidates", "0")
    assert result.exit_code == 0, result.output
    # No model named: all of the catalog.
    for model in MODELS:
        assert f"{model.name} dense_router_prefill, 4096 tokens:" in result.output
    assert f"python -m tests.bench.tune --artifacts {tmp_path / 'out'}" in result.output


def test_the_command_prints_the_rows(
    compared: tuple[Tuning, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuning, manifest = compared
    out, file = tmp_path / "out", tmp_path / "figures.json"
    (out / TUNING_NAME).write_bytes(canonical_json(tuning))
    (out / "manifest.json").write_bytes(dumps(manifest))
    file.write_bytes(canonical_json(measured(compared, today=20.0, c1=10.0)))
    result = command("--out", str(out), "--figures", str(file))
    assert result.exit_code == 0, result.output
    assert result.output.count('("wgmma_4096",') == 1
    result = command("--out", str(out), "--figures", str(tmp_path / "none.json"))
    assert result.exit_code == 1
    assert "next: python -m tests.bench.tune --artifacts DIR, on a GPU" in result.output
    result = command("--out", str(tmp_path / "other"), "--figures", str(file))
    assert result.exit_code == 1
    assert f"next: .venv/bin/python -m build_kernels tune MODEL --out {tmp_path / 'other'}" in (
        result.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dsv4-flash", "dsv4-flash"), "expected models with names of their own"),
        (("nothing.toml",), "nothing.toml: expected a readable TOML file"),
        (("--classes", "4096,x"), "--classes: expected numbers of tokens, found '4096,x'; next:"),
        (("--target", "sm_80"), "unknown target 'sm_80'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = command("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_the_checkouts_own_artifacts_are_left_alone() -> None:
    result = command("--out", str(ROOT / "artifacts"))
    assert result.exit_code == 1
    assert "expected a folder of its own, found artifacts/; next: --out build/tune" in result.output
