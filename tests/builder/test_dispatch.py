"""Which entry serves which batch: the table of the command line and of kernels/README.md."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from build_kernels import dispatch
from build_kernels.catalog.targets import TARGETS
from build_kernels.emulation.identity import model_sha256
from build_kernels.emulation.sources import EMULATED
from build_kernels.errors import BuildError
from build_kernels.plan import plan
from router_runtime.evidence.store import Evidence
from router_runtime.format.manifest import Entry
from tests.builder.conftest import ROOT, Project, Released
from tests.runtime.releases import emulation_of

#: A target with kernels that are emulated.
TARGET = EMULATED[0]
README = ROOT / "build_kernels" / "kernels" / "README.md"


def _statuses(monkeypatch: pytest.MonkeyPatch, of: Callable[[Entry], str]) -> None:
    monkeypatch.setattr(dispatch, "recorded_status", lambda manifest, artifacts: of)


def _by_default(target: str, model: str, router: str = "dense") -> dict[str, tuple[str, str]]:
    """(status, by default) of each range of batches."""
    return {
        row.tokens: (row.status, row.by_default)
        for row in dispatch.rows(target, ROOT / "artifacts")
        if (row.model, row.router) == (model, router)
    }


def test_everything_serves_where_everything_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    _statuses(monkeypatch, lambda entry: "verified")
    found = dispatch.rows("sm_90a", ROOT / "artifacts")
    assert {row.by_default for row in found} == {"yes"}
    assert {row.status for row in found} == {"verified"}
    forms = {row.cells()[4:] for row in found if row.router == "dense"}
    assert forms == {
        ("decode", "mma_sync"),
        ("swap_ab", "wgmma"),
        ("tile", "wgmma"),
    }


def test_an_entry_without_evidence_does_not_serve_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the dense kernels only the one for few tokens has evidence here."""
    proven = {"dense_router_decode/portable", "hash_gate/portable"}
    _statuses(
        monkeypatch,
        lambda e: "source-verified" if f"{e.kernel}/{e.variant}" in proven else "unproven",
    )
    dense = _by_default("sm_100f", "dsv4-pro")
    more = {tokens: found for tokens, found in dense.items() if int(tokens.split()[0]) > 64}
    assert more
    assert set(more.values()) == {("unproven", "no: portable in pieces of 64")}
    assert _by_default("sm_100f", "dsv4-pro", "hash_gate") == {
        "1 to 256": ("source-verified", "yes"),
        "257 and more": ("unproven", "no: portable"),
    }


def test_an_emulated_entry_does_not_serve_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"portable": "source-verified", "tcgen05": "emulated"}
    _statuses(monkeypatch, lambda entry: known.get(entry.variant, "unproven"))
    rows = [row for row in dispatch.rows(TARGET, None) if row.entry.variant == "tcgen05"]
    assert {row.status for row in rows} == {"emulated"}
    assert "yes" not in {row.by_default for row in rows}
    assert " emulated " in dispatch.text(rows)


def test_an_emulation_by_another_model_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dispatch.planned(plan(targets=[TARGET]), None).entries
    evidence = Evidence(
        (),
        tuple(
            emulation_of(entry, model_sha256=model_sha256() if "256" in entry.variant else "7" * 64)
            for entry in entries
            if "tcgen05" in entry.variant
        ),
    )
    monkeypatch.setattr(dispatch, "recorded", lambda artifacts: evidence)
    found = {
        row.entry.variant: dispatch.text([row]).splitlines()[1]
        for row in dispatch.rows(TARGET, None)
        if "tcgen05" in row.entry.variant
    }
    assert found
    for variant, line in found.items():
        stale = "256" not in variant
        assert ("emulated (stale: by another model)" in line) == stale
        assert " emulated" in line


def test_nothing_serves_by_default_without_evidence() -> None:
    found = dispatch.rows("sm_90a", None)
    assert {(row.status, row.by_default) for row in found} == {("unproven", "nothing")}


def test_statuses_are_those_of_the_evidence(released: Released) -> None:
    script = """
from pathlib import Path
from build_kernels import dispatch
from build_kernels.emulation.identity import model_sha256
from build_kernels.plan import plan

folder = Path("artifacts")
manifest = dispatch.planned(plan(), folder)
status = dispatch.recorded_status(manifest, folder)
print(*sorted({f"{entry.target} {status(entry)}" for entry in manifest.entries}), sep=", ")
"""
    result = released.project.python(script)
    assert result.stdout == "sm_100a source-verified, sm_90a verified\n", result.stderr


def test_a_plan_has_the_entries_of_its_build(project: Project) -> None:
    """With the digests of the lock, without what can only be read from a cubin."""
    script = """
import dataclasses
from pathlib import Path
from build_kernels import dispatch, publish
from build_kernels.plan import plan

built = publish.current(Path("artifacts"))
found = dispatch.planned(plan(), Path("artifacts"))
assert found.toolchain == built.toolchain
for entry, real in zip(found.entries, built.entries, strict=True):
    unknown = {"size": real.size, "symbol": real.symbol, "resources": real.resources}
    assert dataclasses.replace(entry, **unknown) == real, (entry, real)
"""
    result = project.python(script)
    assert result.returncode == 0, result.stderr


def test_an_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(BuildError, match="unknown target 'sm_90': did you mean 'sm_90a'"):
        dispatch.rows("sm_90", None)


def test_the_command(fresh: Project) -> None:
    result = fresh.run("list", "--markdown")
    assert result.returncode == 1
    assert (
        "next: .venv/bin/python -m build_kernels list --dispatch sm_90a --markdown" in result.stdout
    )
    # The small project has no router.
    (fresh.root / "artifacts").mkdir()
    (fresh.root / "artifacts" / "artifacts.lock").write_bytes(
        (ROOT / "artifacts" / "artifacts.lock").read_bytes()
    )
    result = fresh.run("list", "--dispatch", "sm_90a")
    assert result.stdout.split() == [
        *("model", "router", "tokens", "entry", "form", "MMA", "status", "by", "default")
    ]
    result = fresh.run("list", "--dispatch", "sm_90a", "--markdown")
    assert result.stdout.splitlines()[0] == "| model | router | tokens | entry | form | MMA |"


@pytest.mark.parametrize("target", TARGETS)
def test_the_page_shows_the_table(target: str) -> None:
    blocks = re.findall(
        r"<!-- dispatch ([^>]*) -->\n\n(.*?)\n\n<!-- end -->", README.read_text(), re.DOTALL
    )
    (table,) = [table for targets, table in blocks if target in targets.split()]
    expected = dispatch.markdown(dispatch.rows(target, None))
    assert table == expected, (
        "expected the table of the catalog; next: put the output of "
        f"build-kernels list --dispatch {target} --markdown between the markers"
    )
