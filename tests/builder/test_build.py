"""Builds as a user runs them: same bytes anywhere, no reuse of what changed, no half builds."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from build_kernels import build, entries, publish
from build_kernels.compile import pool
from build_kernels.compile.job import Job
from build_kernels.errors import BuildError, JobError
from build_kernels.reuse import Reuse
from router_runtime.format.manifest import Manifest, loads
from tests.builder.conftest import KEYS, MODEL, ROOT, Project, snapshot


def _manifest(folder: Path) -> Manifest:
    return loads((folder / "manifest.json").read_bytes())


def _assert_usable(folder: Path) -> Manifest:
    """Every entry of the manifest has its cubin, with the digest it names."""
    manifest = _manifest(folder)
    for entry in manifest.entries:
        assert publish.bytes_with_digest(folder, entry.file, entry.sha256), entry.file
    return manifest


def _compiled(said: str) -> list[str]:
    return sorted(line.split()[-4] for line in said.splitlines() if "  compiled  " in line)


def test_a_full_build(project: Project) -> None:
    manifest = _assert_usable(project.artifacts)
    assert tuple(entry.key for entry in manifest.entries) == KEYS
    files = {path.name for path in project.artifacts.iterdir()}
    notes = {"manifest.json", "artifacts.lock", "inputs.json", "sources.json"}
    assert files == {*notes, *(e.file for e in manifest.entries)}
    for path in project.artifacts.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    for entry in manifest.entries:
        assert entry.size == (project.artifacts / entry.file).stat().st_size
        assert entry.resources.registers > 0
    symbols = {entry.kernel: entry.symbol for entry in manifest.entries}
    assert symbols["scale"] == "scale"
    assert "shift" in symbols["shift"]


def test_code_that_cannot_be_read_is_named_beside_other_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One target's disassembly fails: each entry reports it, beside its earlier failure."""
    jobs = [SimpleNamespace(key=key) for key in ("one", "two")]
    facts = SimpleNamespace(target="sm_90a")
    compiled = [build.Compiled(job, b"", facts) for job in jobs]
    failed = JobError("three", "no such constant")
    monkeypatch.setattr(build, "compile_all", lambda *_: (compiled, [failed]))

    def broken(*_: object) -> None:
        raise BuildError("expected nvdisasm to read the cubin, found: nothing")

    monkeypatch.setattr(build.instructions, "censuses", broken)
    with pytest.raises(BuildError) as failure:
        build.make([*jobs, *jobs], Reuse((tmp_path,), None), 1, print, keep_going=True)
    said = str(failure.value)
    assert "expected nvdisasm to read the cubin, found: nothing\n  in one and 1 other\n" in said
    assert "no such constant\n  in three\n" in said
    assert "3 of 4 failed, 1 were not tried" in said
    assert "nothing was published" in said


def test_wgmma_that_cannot_overlap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "declared", lambda job: (None, None))
    monkeypatch.setattr(entries, "check_contract", lambda *_: None)
    counts = {"HGMMA.64": 4, "WARPGROUP.ARRIVE": 4}
    with pytest.raises(BuildError, match="one: expected wgmma instructions that overlap"):
        entries.inspect(SimpleNamespace(key="one"), b"", SimpleNamespace(), counts)


def test_what_a_build_says(fresh: Project) -> None:
    said = fresh.build()
    assert _compiled(said) == list(KEYS)
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("kernel "))
    names = ["kernel", "model", "target", "variant", "regs", "spills", "shared", "bytes", "digest"]
    assert lines[head].split() == names
    first = _manifest(fresh.artifacts).entries[0]
    assert lines[head + 1].split() == [
        *first.key.split("/"),
        str(first.resources.registers),
        "0",
        "0",
        str(first.size),
        first.sha256[:16],
    ]
    assert lines[-1].startswith("6 cubins, ")


@pytest.mark.usefixtures("compilers")
def test_the_same_bytes_in_another_folder_and_another_environment(
    prebuilt: Path, fresh: Project, tmp_path: Path
) -> None:
    elsewhere = Project(fresh.root.rename(tmp_path / "A longer path, and spaces"))
    hostile = {
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "Pacific/Chatham",
        "PYTHONHASHSEED": "4711",
        "PYTHONOPTIMIZE": "2",
        "CUTE_DSL_ARCH": "sm_80",
        "CUTE_DSL_LINEINFO": "1",
        "CUTE_DSL_KEEP": "all",
        "CUTE_DSL_DUMP_DIR": str(tmp_path / "dump"),
        "CUDA_HOME": "/nonexistent",
        "CPATH": "/nonexistent",
        "NVCC_APPEND_FLAGS": "-O0",
    }
    elsewhere.build("--update-lock", "--jobs", "1", env=hostile, umask=0o077)
    assert snapshot(elsewhere.artifacts) == snapshot(prebuilt / "artifacts")
    assert stat.S_IMODE(elsewhere.artifacts.stat().st_mode) == 0o755
    assert not (tmp_path / "dump").exists()


def test_nothing_names_where_or_when_it_was_built(prebuilt: Path) -> None:
    for path in (prebuilt / "artifacts").iterdir():
        data = path.read_bytes()
        for word in (str(prebuilt), str(Path.home()), os.uname().nodename, "/tmp", "site-packages"):
            assert word.encode() not in data, (path.name, word)


def test_what_is_the_same_is_reused(project: Project) -> None:
    before = snapshot(project.artifacts)
    said = project.build()
    assert _compiled(said) == []
    assert said.count("  reused  ") == len(KEYS)
    assert snapshot(project.artifacts) == before


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_cubin_is_compiled_again(project: Project, damage: str) -> None:
    before = snapshot(project.artifacts)
    entry = _manifest(project.artifacts).entries[1]
    path = project.artifacts / entry.file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert _compiled(project.build()) == [entry.key]
    assert snapshot(project.artifacts) == before


def test_only_what_changed_is_compiled_again(project: Project) -> None:
    source = project.kernel_file("scale/scale.cu")
    source.write_text(source.read_text().replace("x[i] *", "x[i] + x[i] *"))
    old = {entry.key: entry.file for entry in _manifest(project.artifacts).entries}
    assert _compiled(project.build()) == ["scale/any/sm_100a/one", "scale/any/sm_90a/one"]
    for entry in _assert_usable(project.artifacts).entries:
        assert (entry.file != old[entry.key]) == (entry.kernel == "scale")
        assert (project.artifacts / old[entry.key]).exists() == (entry.kernel != "scale")


@pytest.mark.parametrize("field", ["packages", "flags"])
def test_another_toolchains_cubins_are_not_reused(project: Project, field: str) -> None:
    path = project.artifacts / "manifest.json"
    document = json.loads(path.read_text())
    if field == "packages":
        document["toolchain"]["packages"]["nvidia-cuda-nvrtc"] = "13.0.0"
    else:
        document["toolchain"]["flags"]["cuda"].append("--other")
    path.write_text(json.dumps(document))
    assert _compiled(project.build()) == list(KEYS)


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 99}'])
def test_an_unreadable_manifest_is_none(tmp_path: Path, text: str) -> None:
    assert publish.current(tmp_path) is None
    (tmp_path / "manifest.json").write_text(text)
    assert publish.current(tmp_path) is None


def test_an_unreadable_manifest_is_replaced(project: Project, prebuilt: Path) -> None:
    (project.artifacts / "manifest.json").write_text('{"format_version": 99}')
    assert _compiled(project.build()) == list(KEYS)
    assert snapshot(project.artifacts) == snapshot(prebuilt / "artifacts")


def test_a_failing_kernel_leaves_the_previous_build(project: Project) -> None:
    before = snapshot(project.artifacts)
    project.kernel_file("scale/scale.cu").write_text("this is no C++\n")
    project.kernel_file("shift/shift.py").write_text("import nothing_of_this_name\n")
    result = project.run("build", "--keep-going")
    assert result.returncode == 1
    assert "build_kernels/kernels/scale/scale.cu:1: error" in result.stdout
    assert "No module named 'nothing_of_this_name'" in result.stdout
    assert "6 of 6 failed; nothing was published" in result.stdout
    assert snapshot(project.artifacts) == before


def test_a_compiler_that_dies_is_an_error(project: Project) -> None:
    before = snapshot(project.artifacts)
    shift = project.kernel_file("shift/shift.py")
    shift.write_text("import os, sys\nprint('last words', file=sys.stderr)\nos._exit(7)\n")
    result = project.run("build")
    assert result.returncode == 1
    assert "its process ended with status 7:\nlast words" in result.stdout
    assert snapshot(project.artifacts) == before


def test_what_a_compiler_prints_is_not_taken_for_an_answer(project: Project) -> None:
    shift = project.kernel_file("shift/shift.py")
    shift.write_text("print('x' * 200_000)\n" + shift.read_text())
    project.build()


# The driver lets a build run until its n-th rename (cubins first, the manifest last), or until it
# has compiled something or is about to inspect it, and then kills it with SIGKILL.
KILLED = """
import itertools, os, signal
from build_kernels import build, publish
from build_kernels.cli import main

# Counted at once: a second signal of another thread would interrupt the cleaning up, too.
steps = itertools.count()
def kill(*arguments):
    if next(steps) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

original = {target}
{target} = kill
main(["build"])
"""


@pytest.mark.parametrize(
    ("target", "step"),
    [
        ("build.identify", 0),
        ("build.identify", 3),
        ("build.inspect", 0),
        # None of the two changed cubins, one, both; then all that did not change, too.
        *(("os.replace", step) for step in (0, 1, 2, 6)),
        ("publish._prune", 1),
    ],
)
def test_a_killed_build_leaves_a_usable_folder(project: Project, target: str, step: int) -> None:
    old = _manifest(project.artifacts)
    factor = project.kernel_file("common/factor.cuh")
    factor.write_text("__device__ inline float factor() { return FACTOR + 1.0f; }\n")
    result = project.python(KILLED.format(target=target, step=step))
    assert result.returncode == -signal.SIGKILL, result.stderr
    found = _assert_usable(project.artifacts)
    assert (found == old) == (target != "publish._prune")
    # The next build finishes the work and leaves nothing of the killed one behind.
    project.build()
    manifest = _assert_usable(project.artifacts)
    assert manifest != old
    files = {path.name for path in project.artifacts.iterdir()}
    notes = {"manifest.json", "artifacts.lock", "inputs.json", "sources.json"}
    assert files == {*notes, *(e.file for e in manifest.entries)}


@pytest.mark.usefixtures("compilers")
def test_workers_end_with_a_killed_build(fresh: Project, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # When its second kernel was compiled, no worker is about to start.
    script = KILLED.format(target="build.identify", step=1)
    script = f"import tempfile; tempfile.tempdir = {str(temporary)!r}\n" + script
    assert fresh.python(script).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(temporary.iterdir())  # each worker removes its folder when it ends


@pytest.mark.usefixtures("compilers")
def test_an_interrupted_build_cleans_up(fresh: Project, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = KILLED.format(target="build.identify", step=1).replace("SIGKILL", "SIGINT")
    script = f"import tempfile; tempfile.tempdir = {str(temporary)!r}\n" + script
    # A shell starts background jobs with SIGINT ignored.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + script
    result = fresh.python(script)
    assert result.returncode == 1
    assert "Aborted!" in result.stderr
    assert not any(temporary.iterdir())
    assert not fresh.artifacts.exists()


def test_a_worker_started_by_hand_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    result = subprocess.run(
        [sys.executable, "-m", "build_kernels.compile.worker"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "expected to be started by a build" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_workers_begin_with_the_targets_that_none_is_at() -> None:
    jobs = [
        *(Job("a", "cuda", None, "sm_90a", str(i), {}, "", "") for i in range(5)),
        *(Job("b", "cutedsl", None, "sm_90a", str(i), {}, "", "") for i in range(3)),
        *(Job("b", "cutedsl", None, "sm_100a", str(i), {}, "", "") for i in range(2)),
    ]
    queue = pool.Queue(jobs)
    begun = [queue.take(None) for _ in range(4)]
    assert begun == [jobs[5], jobs[8], jobs[0], jobs[1]]
    # A worker takes jobs of its kind while there are any, then of the kind with most jobs left.
    assert [queue.take("sm_100a") for _ in range(2)] == [jobs[9], jobs[2]]
    assert [queue.take("sm_90a") for _ in range(3)] == [jobs[6], jobs[7], jobs[3]]
    assert [queue.take("cuda") for _ in range(2)] == [jobs[4], None]


def test_an_ended_pool_starts_no_other_worker() -> None:
    worker = pool.Worker()
    worker.end()
    with pytest.raises(BuildError, match="interrupted"):
        worker.compile(Job("b", "cutedsl", None, "sm_90a", "a", {}, "", ""))


def test_one_build_at_a_time_in_a_folder(project: Project, tmp_path: Path) -> None:
    before = snapshot(project.artifacts)
    descriptor = os.open(project.artifacts, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        result = project.run("build")
        assert result.returncode == 1
        assert "expected to be the only build in" in result.stdout
        assert snapshot(project.artifacts) == before
        project.build("--kernel", "scale", "--out", tmp_path / "out")
    finally:
        os.close(descriptor)
    project.build()


@pytest.mark.parametrize(
    "selection",
    [
        ("--target", "sm_90a"),
        ("--model", "dsv4-pro"),
        ("--kernel", "scale"),
        ("--model-file", "mine.toml"),
    ],
)
def test_a_partial_build_needs_a_folder_of_its_own(
    project: Project, selection: tuple[str, str]
) -> None:
    before = snapshot(project.artifacts)
    (project.root / "mine.toml").write_text(MODEL)
    for out in ((), ("--out", "artifacts"), ("--out", project.artifacts)):
        result = project.run("build", *selection, *out)
        assert result.returncode == 1
        assert "artifacts/ always holds the full plan; next: add --out DIR" in result.stdout
    assert snapshot(project.artifacts) == before


def test_a_partial_build(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    project.build("--target", "sm_100f", "--model", "dsv4-pro", "--out", out, umask=0o077)
    found = [entry.key for entry in _assert_usable(out).entries]
    assert found == ["scale/any/sm_100f/one", "shift/dsv4-pro/sm_100f/only"]
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o755


def test_other_files_in_the_folder_stay(project: Project) -> None:
    entry = _manifest(project.artifacts).entries[0]
    mine = ("notes.txt", "mine.cubin", "evidence/h100.json")
    for name in mine:
        (project.artifacts / name).parent.mkdir(exist_ok=True)
        (project.artifacts / name).write_text("mine")
    orphan = project.artifacts / entry.file.replace(entry.sha256[:16], "0" * 16)
    orphan.write_text("left by a build that was killed")
    project.build()
    assert not orphan.exists()
    assert all((project.artifacts / name).read_text() == "mine" for name in mine)


def test_out_must_be_a_folder(project: Project) -> None:
    (project.root / "file").write_text("mine")
    for out in ("file", "file/below"):
        result = project.run("build", "--out", out)
        assert result.returncode == 1
        assert "to be a folder, found a file" in result.stdout
    assert (project.root / "file").read_text() == "mine"


def test_sources_that_change_during_a_build_publish_nothing(project: Project) -> None:
    before = snapshot(project.artifacts)
    script = KILLED.format(target="build.inspect", step=0).replace(
        "os.kill(os.getpid(), signal.SIGKILL)",
        "open('build_kernels/kernels/common/factor.cuh', 'a').write('//')",
    )
    result = project.python(script)
    assert result.returncode == 1
    assert "expected the sources to stay as they were during the build" in result.stderr
    assert snapshot(project.artifacts) == before


def test_an_empty_plan_is_an_error(fresh: Project) -> None:
    fresh.append("catalog/kernels.py", "KERNELS = ()\n")
    result = fresh.run("build")
    assert result.returncode == 1
    assert "found an empty plan" in result.stdout
    assert not fresh.artifacts.exists()


def test_an_installed_package_builds_only_with_an_output_folder(fresh: Project) -> None:
    (fresh.root / "pyproject.toml").unlink()
    result = fresh.run("build")
    assert result.returncode == 1
    assert "next: add --out DIR" in result.stdout
    fresh.build("--kernel", "scale", "--target", "sm_90a", "--out", "out")


def test_the_builder_never_imports_torch(fresh: Project) -> None:
    """Torch is not among the locked packages: a build must do without it."""
    fresh.build()
    result = fresh.python("import sys, build_kernels.cli; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr
    assert "No module named 'torch'" in fresh.python("import torch").stderr


@pytest.mark.usefixtures("compilers")
def test_the_builder_works_without_a_compiler_on_the_path(fresh: Project) -> None:
    assert shutil.which("sh")
    fresh.build("--target", "sm_90a", "--out", "out", env={"PATH": "/nonexistent"})


def _helper_of_shift(project: Project) -> None:
    """Give the CuTe DSL kernel a module beside it, and a build with a lock."""
    source = project.kernel_file("shift/shift.py")
    project.kernel_file("shift/own.py").write_text('"""Ours."""\n\n\ndef added(k):\n    return k\n')
    text = source.read_text().replace("cutlass.Float32(self.top_k)", "added(self.top_k)")
    text = text.replace("own.added", "added").replace("added(", "cutlass.Float32(own.added(")
    text = text.replace("own.added(self.top_k)", "own.added(self.top_k))")
    source.write_text("from build_kernels.kernels.shift import own\n" + text)
    project.build("--update-lock")


def _comments(project: Project) -> None:
    for name, comment in (
        ("scale/scale.cu", "// What it does.\n"),
        ("common/factor.cuh", "/* The factor. */\n"),
        ("shift/shift.py", '"""What it does."""\n\n# Why.\n\n'),
        ("shift/own.py", "# Ours.\n"),
        ("shift/contract.py", "# How it is launched.\n"),
    ):
        path = project.kernel_file(name)
        path.write_text(comment + path.read_text())


def _other_names(project: Project) -> None:
    project.kernel_file("common/factor.cuh").rename(project.kernel_file("common/multiplier.cuh"))
    project.kernel_file("shift/own.py").rename(project.kernel_file("shift/zz_mine.py"))
    for name, old, new in (
        ("scale/scale.cu", "common/factor.cuh", "common/multiplier.cuh"),
        ("shift/shift.py", "own", "zz_mine"),
    ):
        path = project.kernel_file(name)
        path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("change", [_comments, _other_names])
def test_words_and_names_change_no_byte_that_is_published(
    project: Project, change: Callable[[Project], None]
) -> None:
    """And nothing is reused by a digest that does not cover them."""
    _helper_of_shift(project)
    notes = project.artifacts / "inputs.json"
    before = snapshot(project.artifacts)
    change(project)
    assert _compiled(project.build()) == list(KEYS)
    after = snapshot(project.artifacts)
    assert after.pop(notes.name) != before.pop(notes.name)
    if change is _other_names:
        assert after.pop("sources.json") != before.pop("sources.json")
    assert after == before
    said = project.run("check")
    assert said.returncode == 0, said.stdout
    assert project.build().count("  reused  ") == len(KEYS)


def test_a_contract_is_no_input_of_the_compiler(project: Project) -> None:
    path = project.kernel_file("scale/contract.py")
    path.write_text(path.read_text().replace('argument="tokens"', 'value=2, argument="tokens"'))
    before = {entry.key: entry for entry in _manifest(project.artifacts).entries}
    assert _compiled(project.build()) == []
    for entry in _manifest(project.artifacts).entries:
        same = entry.source_sha256 == before[entry.key].source_sha256
        assert same == (entry.kernel != "scale")
        assert entry.sha256 == before[entry.key].sha256


@pytest.mark.parametrize("text", [None, "", "[]", '{"a": 1}', "{"])
def test_without_its_notes_a_build_compiles_everything(project: Project, text: str | None) -> None:
    before = snapshot(project.artifacts)
    notes = project.artifacts / "inputs.json"
    notes.unlink()
    if text is not None:
        notes.write_text(text)
    assert _compiled(project.build()) == list(KEYS)
    assert snapshot(project.artifacts) == before


def test_mixed_up_notes_give_no_job_the_cubin_of_another_target(project: Project) -> None:
    before = snapshot(project.artifacts)
    notes = project.artifacts / "inputs.json"
    inputs = json.loads(notes.read_text())
    targets = {entry.sha256: entry.target for entry in _manifest(project.artifacts).entries}
    swapped = {
        digest: next(other for other, target in targets.items() if target != targets[cubin])
        for digest, cubin in inputs.items()
    }
    notes.write_text(json.dumps(swapped))
    assert _compiled(project.build()) == list(KEYS)
    assert snapshot(project.artifacts) == before
