"""artifacts.lock: what it records, and what ``check`` says when a build differs from it."""

from __future__ import annotations

import stat

import pytest

from build_kernels import lock
from build_kernels.errors import BuildError
from build_kernels.lock import Line, Lock
from router_runtime.format.manifest import loads
from tests.builder.conftest import KEYS, Project, snapshot

A, B = "a" * 64, "b" * 64


def test_the_lock_records_every_entry(project: Project) -> None:
    path = project.artifacts / "artifacts.lock"
    recorded = lock.read(path)
    manifest = loads((project.artifacts / "manifest.json").read_bytes())
    assert tuple(recorded.entries) == KEYS
    assert recorded.source_sha256 == manifest.source_sha256
    for entry in manifest.entries:
        assert recorded.entries[entry.key] == Line(entry.sha256, entry.resources.registers, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_plain_build_leaves_the_lock_alone(project: Project) -> None:
    before = (project.artifacts / "artifacts.lock").read_bytes()
    project.kernel_file("common/factor.cuh").write_text("inline float factor() { return 3.0f; }\n")
    project.build()
    assert (project.artifacts / "artifacts.lock").read_bytes() == before


@pytest.mark.usefixtures("compilers")
def test_check_passes_on_what_was_recorded(project: Project) -> None:
    before = snapshot(project.artifacts)
    result = project.run("check")
    assert result.returncode == 0
    assert result.stdout.count("  compiled  ") == len(KEYS)  # check reuses nothing
    assert "6 cubins are what artifacts.lock records" in result.stdout
    assert snapshot(project.artifacts) == before


def test_check_names_what_changed(project: Project) -> None:
    path = project.artifacts / "artifacts.lock"
    recorded = lock.read(path)
    source = project.kernel_file("scale/scale.cu")
    source.write_text(source.read_text().replace("* factor()", "* factor() / x[i + 1]"))
    project.append(
        "catalog/models.py", "MODELS = (*MODELS[:1], Model('new', 4096, 8, 2, 1.0, 0, 9))\n"
    )
    before = snapshot(project.artifacts)
    result = project.run("check")
    assert result.returncode == 1
    for target in ("sm_90a", "sm_100a"):
        key = f"scale/any/{target}/one"
        old = recorded.entries[key]
        line = next(line for line in result.stdout.splitlines() if f"changed  {key}: " in line)
        assert f"{old.sha256[:16]} registers {old.registers} spills 0 B -> " in line
        assert not line.endswith(f"registers {old.registers} spills 0 B")
        assert f"added    shift/new/{target}/only: " in result.stdout
        assert f"removed  shift/dsv4-pro/{target}/only: " in result.stdout
    assert "changed  source: " in result.stdout
    assert "shift/dsv4-flash/sm_90a/only: " not in result.stdout
    assert "next: if the change is meant, make lock-cubins" in result.stdout
    assert snapshot(project.artifacts) == before


def test_one_other_digit_fails_the_check(project: Project) -> None:
    path = project.artifacts / "artifacts.lock"
    text = path.read_text()
    digest = lock.read(path).entries[KEYS[0]].sha256
    path.write_text(text.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    result = project.run("check")
    assert result.returncode == 1
    assert f"changed  {KEYS[0]}" in result.stdout


def test_check_without_a_lock(fresh: Project) -> None:
    result = fresh.run("check")
    assert result.returncode == 1
    assert "artifacts.lock: expected a lock" in result.stdout
    assert "next: make lock-cubins" in result.stdout


def test_a_partial_build_cannot_update_the_lock(project: Project) -> None:
    before = snapshot(project.artifacts)
    result = project.run("build", "--update-lock", "--target", "sm_90a", "--out", "out")
    assert result.returncode == 1
    assert "expected --update-lock with a full build" in result.stdout
    assert not (project.root / "out").exists()
    assert snapshot(project.artifacts) == before


def test_differences() -> None:
    old = Lock(A, {"same": Line(A, 8, 0), "gone": Line(A, 8, 0), "other": Line(A, 8, 0)})
    new = Lock(A, {"same": Line(A, 8, 0), "here": Line(B, 9, 4), "other": Line(B, 10, 16)})
    assert lock.differences(old, old) == []
    assert lock.differences(old, new) == [
        f"removed  gone: {A[:16]} registers 8 spills 0 B",
        f"added    here: {B[:16]} registers 9 spills 4 B",
        f"changed  other: {A[:16]} registers 8 spills 0 B -> {B[:16]} registers 10 spills 16 B",
    ]
    assert lock.differences(old, Lock(B, old.entries)) == [f"changed  source: {A[:16]} -> {B[:16]}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text.replace("source ", "sources "),
        lambda text: text.replace("# What", "# Which"),
        lambda text: text.replace("registers=", "registers:"),
        lambda text: text + text.splitlines()[-1] + "\n",
        lambda text: text + "<<<<<<< ours\n",
    ],
)
def test_a_damaged_lock_is_refused(project: Project, change: object) -> None:
    path = project.artifacts / "artifacts.lock"
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(BuildError, match=r"artifacts\.lock: expected a lock .* next: make lock"):
        lock.read(path)
