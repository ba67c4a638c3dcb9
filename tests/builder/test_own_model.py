"""A model of one's own, as the README describes it: from its file to evidence and a release."""

from __future__ import annotations

import re
import shlex

import pytest

from build_kernels.catalog.model_file import read_model
from build_kernels.cli import main
from router_runtime.format.manifest import loads
from tests.builder.conftest import EVIDENCE, MODEL, ROOT, Project, snapshot

SECTION = (ROOT / "README.md").read_text().partition("## A model or a kernel of your own")[2]
TOML, COMMANDS, TUNING = re.findall(r"```\w*\n(.*?)```", SECTION, re.DOTALL)[:3]


@pytest.fixture
def proven(project: Project) -> Project:
    """A built project with evidence for the kernel that serves every model."""
    script = EVIDENCE.format(targets=["sm_90a"]).replace(
        "if entry.target in", "if entry.kernel == 'scale' and entry.target in"
    )
    result = project.python(script)
    assert result.returncode == 0, result.stderr
    return project


def test_the_readmes_commands(proven: Project) -> None:
    build, verify, serve, release = (line.partition("#")[0] for line in COMMANDS.splitlines())
    (proven.root.parent / "mine.toml").write_text(TOML)
    assert read_model(proven.root.parent / "mine.toml").name == "mine"
    python, *words = shlex.split(build)
    assert (python, words[:2]) == (".venv/bin/python", ["-m", "build_kernels"])
    said = proven.build(*words[3:])
    assert words[2] == "build"
    assert "evidence: 1 verified, 1 source-verified, 2 unproven" in said
    manifest = loads((proven.root / "build" / "mine" / "manifest.json").read_bytes())
    assert [entry.key for entry in manifest.entries] == [
        *("scale/any/sm_100a/one", "scale/any/sm_90a/one"),
        *("shift/mine/sm_100a/only", "shift/mine/sm_90a/only"),
    ]
    assert shlex.split(verify)[1:] == [
        *("-m", "router_runtime", "verify", "--record", "--artifacts", "build/mine")
    ]
    assert serve.strip() == "export ROUTER_RUNTIME_ARTIFACTS=$PWD/build/mine"
    (options,) = re.findall(r'^make release RELEASE="(.*)"', release)
    main.commands["release"].make_context("release", ["--out", "dist", *shlex.split(options)])


def test_evidence_of_the_same_cubins_counts_in_every_build_folder(proven: Project) -> None:
    said = proven.build("--target", "sm_90a", "--model", "dsv4-pro", "--out", "out")
    assert "evidence: 1 verified, 0 source-verified, 1 unproven" in said
    evidence = proven.root / "out" / "evidence"
    (record,) = evidence.iterdir()
    assert record.read_bytes() == (proven.artifacts / "evidence" / record.name).read_bytes()
    assert record.stat().st_mode & 0o777 == 0o644
    assert evidence.stat().st_mode & 0o777 == 0o755
    # What a user recorded there stays.
    other = record.with_name(record.name.replace("example-gpu", "my-gpu"))
    other.write_text(record.read_text().replace("Example GPU", "My GPU"))
    before = snapshot(evidence)
    proven.build("--target", "sm_90a", "--model", "dsv4-pro", "--out", "out")
    assert snapshot(evidence) == before


def test_no_evidence_is_copied_that_is_about_other_cubins(proven: Project) -> None:
    (proven.root / "mine.toml").write_text(MODEL)
    said = proven.build("--model-file", "mine.toml", "--kernel", "shift", "--out", "out")
    assert "evidence: 0 verified, 0 source-verified, 2 unproven" in said
    assert not (proven.root / "out" / "evidence").exists()


def test_evidence_that_cannot_be_read_is_said_before_anything_is_compiled(proven: Project) -> None:
    (record,) = (proven.artifacts / "evidence").iterdir()
    record.write_text("{}")
    result = proven.run("build", "--kernel", "shift", "--target", "sm_100f", "--out", "out")
    assert result.returncode == 1
    assert f"evidence {record}: expected a valid record" in result.stdout
    assert "compiled" not in result.stdout
    assert not (proven.root / "out").exists()
    # A build of the checkout's own artifacts reads evidence only to count it.
    assert f"evidence: evidence {record}: expected a valid record" in proven.build()


def test_the_readmes_commands_for_tuning() -> None:
    """Those that need no GPU, as far as their options; tests/runtime/test_tune.py has the other."""
    build, _, choose = (shlex.split(line) for line in TUNING.splitlines())
    for words in (build, choose):
        assert words[:4] == [".venv/bin/python", "-m", "build_kernels", "tune"]
        context = main.commands["tune"].make_context("tune", words[4:])
        assert context.params["models"] == ("../mine.toml",)
        assert str(context.params["out"]) == "build/tune"
    assert "--figures" in choose
