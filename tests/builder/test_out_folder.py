"""What a build does with the folder that it is told to write into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from build_kernels import cli, out_folder, publish
from build_kernels.errors import BuildError
from router_runtime.format.manifest import loads
from tests.builder.conftest import MODEL, Project, snapshot

SCALE = ("--kernel", "scale", "--target", "sm_90a", "--out", "out")
SHIFT = ("--kernel", "shift", "--target", "sm_90a", "--out", "out")


def _keys(folder: Path) -> list[str]:
    manifest = loads((folder / "manifest.json").read_bytes())
    assert all(publish.bytes_with_digest(folder, e.file, e.sha256) for e in manifest.entries)
    return [entry.key for entry in manifest.entries]


def test_a_second_selection_is_added_as_one_build_of_both_would_have_it(project: Project) -> None:
    (project.root / "mine.toml").write_text(MODEL)
    model = ("--model-file", "mine.toml", "--target", "sm_90a", "--out", "out")
    project.build(*model)
    project.build(*SHIFT)
    project.build("--kernel", "shift", "--target", "sm_100f", "--model", "dsv4-pro", "--out", "out")
    assert _keys(project.root / "out") == [
        "scale/any/sm_90a/one",
        "shift/dsv4-flash/sm_90a/only",
        "shift/dsv4-pro/sm_100f/only",
        "shift/dsv4-pro/sm_90a/only",
        "shift/pruned/sm_90a/only",
    ]
    before = snapshot(project.root / "out")
    project.build(*model, "--model", "dsv4-flash", "--model", "dsv4-pro")
    assert snapshot(project.root / "out") == before
    project.build(*SCALE[:2], "--target", "sm_90a", "--out", "both")
    project.build(*SHIFT[:2], "--target", "sm_90a", "--out", "both")
    project.build("--target", "sm_90a", "--out", "one")
    assert snapshot(project.root / "both") == snapshot(project.root / "one")


def test_the_same_selection_replaces_what_it_built(project: Project) -> None:
    project.build(*SCALE)
    (old,) = (project.root / "out").glob("*.cubin")
    (project.root / "out" / "notes.txt").write_text("mine")
    project.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )
    project.build(*SCALE)
    assert _keys(project.root / "out") == ["scale/any/sm_90a/one"]
    assert not old.exists()
    assert (project.root / "out" / "notes.txt").read_text() == "mine"


def _source(project: Project) -> None:
    project.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )


def _broken(project: Project) -> None:
    project.kernel_file("scale/contract.py").write_text("this is no Python\n")


def _row(project: Project) -> None:
    project.append("catalog/kernels.py", "KERNELS = KERNELS[1:]\n")


def _toolchain(project: Project) -> None:
    path = project.root / "out" / "manifest.json"
    path.write_text(path.read_text().replace("OptLevel(3)", "OptLevel(2)"))


@pytest.mark.parametrize("change", [_source, _broken, _row, _toolchain])
def test_entries_of_other_sources_are_not_mixed_with_new_ones(
    project: Project, change: Callable[[Project], None]
) -> None:
    project.build(*SCALE)
    change(project)
    before = snapshot(project.root / "out")
    result = project.run("build", *SHIFT)
    assert result.returncode == 1
    kind = "another toolchain" if change is _toolchain else "other sources"
    assert f"found entries of {kind}: scale/any/sm_90a/one; next: --out with" in result.stdout
    assert "compiled" not in result.stdout
    assert snapshot(project.root / "out") == before
    # The command that the error names.
    assert "rm -r out" in result.stdout
    shutil.rmtree(project.root / "out")
    project.build(*SHIFT)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"manifest.json": '{"mine": 1}'}, "a manifest.json that this version did not write"),
        ({"manifest.json": ""}, "a manifest.json that this version did not write"),
        ({"notes.txt": "mine"}, "notes.txt and no manifest.json"),
        ({"inputs.json": "{}", "a": "", "b": "", "c": ""}, "a, b, c and 1 more and no manifest"),
    ],
)
@pytest.mark.parametrize("out", ["foreign", "."])
def test_a_folder_that_is_not_ours_is_never_touched(
    project: Project, tmp_path: Path, files: dict[str, str], message: str, out: str
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = snapshot(folder)
    where = Project(folder) if out == "." else project
    path = Path(".") if out == "." else folder
    result = where.run(
        "build", "--kernel", "scale", "--out", path, env={"PYTHONPATH": str(project.root)}
    )
    assert result.returncode == 1
    assert f"found {message}" in result.stdout
    assert f"nothing was changed there; next: --out {path / 'cubins'}" in result.stdout
    assert snapshot(folder) == before


def test_the_folder_of_an_installed_release_or_an_emulation_is_not_a_builds(
    project: Project, tmp_path: Path
) -> None:
    for name in ("dsv4_router_runtime-0.1.0.release.json", out_folder.EMULATION_NAME):
        folder = Path(shutil.copytree(project.artifacts, tmp_path / name))
        (folder / name).write_text("{}")
        with pytest.raises(BuildError, match=f"found {name}: the folder of a release or of"):
            out_folder.require_ours(folder, out_folder.EMULATION_NAME)
        (folder / name).unlink()
        assert out_folder.require_ours(folder, out_folder.EMULATION_NAME) is not None


def test_what_a_killed_build_left_is_ours(project: Project) -> None:
    out = project.root / "out"
    project.build(*SCALE)
    # Written after the cubins, the manifest first.
    for name in ("manifest.json", "inputs.json", "sources.json"):
        (out / name).unlink()
    (out / ".publish-1.tmp").write_text("half")
    project.build(*SCALE)
    assert _keys(out) == ["scale/any/sm_90a/one"]


# The modules patch what a build asks the operating system; nothing may be compiled then.
ASKED = """
import errno, os, shutil, tempfile
from types import SimpleNamespace
from build_kernels.compile import pool
from build_kernels.cli import main

def compiled(*arguments):
    raise SystemExit("compiled")

def full(path):
    return SimpleNamespace(free={free} if str(path) == {full!r} else 1 << 40)

def unwritable(*arguments, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

pool.run = compiled
shutil.disk_usage = full
if {unwritable}:
    tempfile.TemporaryFile = unwritable
main({arguments!r})
"""


@pytest.mark.parametrize("command", ["build", "release"])
@pytest.mark.parametrize("fault", ["full", "temporary", "read-only", "none"])
def test_room_is_looked_for_before_anything_is_compiled(
    committed: Project, tmp_path: Path, command: str, fault: str
) -> None:
    out = tmp_path / "out"
    temporary = str(Path("/tmp") if fault == "temporary" else out)
    arguments = [command, "--out", str(out), "--target", "sm_90a", "--jobs", "1"]
    script = ASKED.format(
        free=2**20 if fault in ("full", "temporary") else 2**40,
        full=temporary,
        unwritable=fault == "read-only",
        arguments=arguments,
    )
    result = committed.python("import os; os.environ['TMPDIR'] = '/tmp'\n" + script)
    assert result.returncode == 1
    expected = {
        "full": f"MiB free in {out}, an estimate for",
        "temporary": "MiB free in /tmp, an estimate for",
        "read-only": f"expected to write in {out}, found: a read-only file system",
        "none": "compiled",
    }
    assert expected[fault] in result.stderr
    assert "Traceback" not in result.stderr
    assert ("next: make room" in result.stderr) == (fault != "none")
    assert not out.exists()


def test_outside_of_a_checkout_a_folder_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ARTIFACTS", None)
    result = CliRunner().invoke(cli.main, ["build"])
    assert result.exit_code == 1
    assert "expected --out outside of a checkout, found none; next: add --out DIR" in result.output
