"""``build-kernels diff``: what a pull request shows about the cubins that it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from router_runtime.format.manifest import loads
from tests.builder.conftest import RELEASED_KEYS, Project, Released


@pytest.fixture(scope="module")
def changed(prebuilt: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small project with another kernel source, constant, model and toolchain flag."""
    root = tmp_path_factory.mktemp("changed") / "project"
    project = Project(Path(shutil.copytree(prebuilt, root)))
    source = project.kernel_file("scale/scale.cu")
    source.write_text(source.read_text().replace("* factor()", "* factor() * __sinf(x[i])"))
    project.append(
        "catalog/models.py", "MODELS = (*MODELS[:1], Model('new', 4096, 8, 2, 1.0, 0, 9))\n"
    )
    project.append(
        "catalog/kernels.py",
        "KERNELS = (Kernel('scale', 'cuda', False, False, "
        "(Variant('one', {'FACTOR': 3.0, 'MORE': 1.0}),)), KERNELS[1])\n",
    )
    project.build()
    return project


def test_a_diff_of_two_checkouts(prebuilt: Path, changed: Project) -> None:
    result = changed.run("diff", prebuilt, changed.root)
    assert result.returncode == 0
    blocks = result.stdout.split("changed   ")
    head, *rest = blocks
    for target in ("sm_90a", "sm_100a"):
        assert f"added     shift/new/{target}/only: " in head
        assert f"removed   shift/dsv4-pro/{target}/only: " in head
    block = next(block for block in rest if block.startswith("scale/any/sm_90a/one\n"))
    old, new = (
        next(
            entry
            for entry in loads((root / "artifacts" / "manifest.json").read_bytes()).entries
            if entry.key == "scale/any/sm_90a/one"
        )
        for root in (prebuilt, changed.root)
    )
    lines = [line.strip() for line in block.splitlines()]
    for expected in (
        f"bytes: {old.sha256[:16]} -> {new.sha256[:16]}",
        f"source: {old.source_sha256[:16]} -> {new.source_sha256[:16]}",
        "constant FACTOR: 2.0 -> 3.0",
        "constant MORE: None -> 1.0",
        f"registers: {old.resources.registers} -> {new.resources.registers}",
    ):
        assert expected in lines
    assert any(line.startswith("instructions: ") and "MUFU.SIN 0 -> 1" in line for line in lines)
    assert any(line.startswith("first other instruction, at 0x") for line in lines)
    assert result.stdout.endswith("2 added, 2 removed, 2 changed, 2 identical\n")


def test_a_diff_for_a_pull_request(prebuilt: Path, changed: Project) -> None:
    said = changed.run("diff", prebuilt, changed.root, "--markdown").stdout
    lines = said.splitlines()
    assert lines[0] == "**2 added, 2 removed, 2 changed, 2 identical**"
    table = [line for line in lines if line.startswith("| ")]
    assert table[:2] == ["| | entry | what |", "| --- | --- | --- |"]
    assert len(table) == 2 + 6
    row = next(line for line in table if "`scale/any/sm_90a/one`" in line)
    assert row.count(" | ") == 2  # a disassembly must not break the table
    assert "<br>constant FACTOR: 2.0 -> 3.0<br>" in row


def test_a_diff_with_itself(released: Released) -> None:
    project = released.project
    (path,) = released.folder.glob("*.whl")
    for one in (project.root, project.artifacts, released.folder, path):
        said = project.run("diff", one, released.folder)
        assert said.stdout == f"0 added, 0 removed, 0 changed, {len(RELEASED_KEYS)} identical\n"


def test_the_toolchain_is_named_once(project: Project, prebuilt: Path) -> None:
    path = project.artifacts / "manifest.json"
    document = json.loads(path.read_text())
    document["toolchain"]["packages"]["nvidia-cuda-nvrtc"] = "13.0.0"
    document["toolchain"]["flags"]["cuda"].append("--other")
    path.write_text(json.dumps(document))
    said = project.run("diff", prebuilt, project.root).stdout
    nvrtc = loads((prebuilt / "artifacts" / "manifest.json").read_bytes()).toolchain
    assert f"toolchain nvidia-cuda-nvrtc: {nvrtc.packages['nvidia-cuda-nvrtc']} -> 13.0.0" in said
    flags = " ".join(nvrtc.flags["cuda"])
    assert f"toolchain flags of cuda: {flags} -> {flags} --other" in said


def test_facts_that_change_without_the_bytes(project: Project, prebuilt: Path) -> None:
    source = project.kernel_file("scale/scale.cu")
    source.write_text(source.read_text() + "#define UNUSED 1\n")
    project.build()
    said = project.run("diff", prebuilt, project.root).stdout
    assert said.count("bytes: the same") == 2
    assert said.count("source: ") == 2
    assert "first other instruction" not in said
    assert said.endswith("0 added, 0 removed, 2 changed, 4 identical\n")


@pytest.mark.parametrize("damage", ["absent", "altered", "unbuilt", "version"])
def test_what_cannot_be_compared(
    project: Project, changed: Project, tmp_path: Path, damage: str
) -> None:
    if damage == "unbuilt":
        (project.artifacts / "manifest.json").unlink()
        message = "expected a wheel, a release's folder, an artifacts folder or a built checkout"
    elif damage == "version":
        (project.artifacts / "manifest.json").write_text('{"format_version": 99}')
        message = "expected manifest format version 1, found 99"
    else:
        (path,) = project.artifacts.glob("scale-any-sm_90a-*.cubin")
        path.write_bytes(path.read_bytes() + b"x")
        message = "expected the cubin that the manifest names, found it altered"
        if damage == "absent":
            path.unlink()
            message = f"expected the cubin {path.name}, found none"
    result = project.run("diff", project.root, changed.root)
    assert result.returncode == 1
    assert message in result.stdout
    assert "Traceback" not in result.stdout


def test_a_diff_as_json(prebuilt: Path, changed: Project) -> None:
    document = json.loads(changed.run("diff", prebuilt, changed.root, "--json").stdout)
    assert sorted(document) == ["added", "changed", "identical", "removed", "toolchain"]
    assert sorted(document["added"]) == ["shift/new/sm_100a/only", "shift/new/sm_90a/only"]
    assert "constant FACTOR: 2.0 -> 3.0" in document["changed"]["scale/any/sm_90a/one"]
