"""The commands that only show things, and how errors reach a user."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest

from build_kernels.cli import main
from router_runtime.format.manifest import loads
from tests.builder.conftest import KEYS, MODEL, Project, snapshot


def test_the_version_is_the_runtimes(fresh: Project) -> None:
    (fresh.root / "router_runtime" / "version.py").write_text('__version__ = "7.8.9"\n')
    result = fresh.run("--version")
    assert result.stdout == "build-kernels 7.8.9\n"


def test_list(fresh: Project) -> None:
    result = fresh.run("list")
    assert result.returncode == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    for key in KEYS:
        assert [key, "unproven"] in rows
    assert "dsv4-flash: hidden 4096, experts 256, top_k 6, scale 1.5" in result.stdout
    assert "sm_100f (only on request)" in result.stdout


def test_inspect(project: Project) -> None:
    entry = loads((project.artifacts / "manifest.json").read_bytes()).entries[1]
    result = project.run("inspect", entry.key)
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    for expected in (
        ["sha256:", entry.sha256],
        ["symbol:", "scale"],
        ["registers:", str(entry.resources.registers)],
        ["grid:", "ceil(tokens", "/", "128)", "*", "1,", "1,", "1"],
        ["16", "4", "i32", "tokens"],
        ["1", "FADD"],  # 2 x is x + x to the compiler
    ):
        assert expected in lines
    assert "/*0000*/" not in result.stdout
    with_listing = project.run("inspect", entry.key, "--sass").stdout
    assert with_listing.startswith(result.stdout)
    assert "/*0000*/" in with_listing


def test_inspect_another_folder(project: Project) -> None:
    project.build("--kernel", "scale", "--target", "sm_100f", "--out", "out")
    arguments = ("inspect", "scale/any/sm_100f/one")
    assert project.run(*arguments).returncode == 1
    assert project.run(*arguments, "--artifacts", "out").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "scale/any/sm_90a/on"), "did you mean 'scale/any/sm_90a/one'"),
        (("build", "--target", "sm_90", "--out", "o"), "unknown target 'sm_90': did you mean"),
        (("build", "--model", "dsv4", "--out", "o"), "unknown model 'dsv4': did you mean"),
        (
            ("build", "--kernel", "shif", "--out", "o"),
            "unknown kernel 'shif': did you mean 'shift'",
        ),
        (("build", "--model-file", "none", "--out", "o"), "none: expected a readable TOML file"),
    ],
)
def test_unknown_names(project: Project, arguments: tuple[str, ...], message: str) -> None:
    result = project.run(*arguments)
    assert result.returncode == 1
    assert message in result.stdout
    assert "Traceback" not in result.stdout
    assert not (project.root / "o").exists()


def test_inspect_before_a_build(fresh: Project) -> None:
    result = fresh.run("inspect", KEYS[0])
    assert result.returncode == 1
    assert "next: make build-cubins" in result.stdout


@pytest.mark.parametrize("missing", [True, False])
def test_inspect_a_damaged_cubin(project: Project, missing: bool) -> None:
    entry = loads((project.artifacts / "manifest.json").read_bytes()).entries[0]
    path = project.artifacts / entry.file
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\0")
    result = project.run("inspect", entry.key)
    assert result.returncode == 1
    assert "found it altered or missing; next: make build-cubins" in result.stdout


@pytest.mark.parametrize("command", ["", *sorted(main.commands)])
def test_help_has_two_names(fresh: Project, command: str) -> None:
    words = [command] if command else []
    short, long = (fresh.run(*words, option) for option in ("-h", "--help"))
    assert short.returncode == 0
    assert short.stdout == long.stdout
    assert short.stdout.startswith("Usage: build-kernels")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--target", "sm_90"), "unknown target 'sm_90': did you mean 'sm_90a'"),
        (("build", "--model", "dsv4", "--update-lock"), "unknown model 'dsv4': did you mean"),
        (("build", "--kernel", "shif", "--out", "/proc/x"), "unknown kernel 'shif': did you mean"),
        (("build", "--model-file", "none"), "none: expected a readable TOML file"),
        (("release", "--out", "o", "--target", "sm_90"), "unknown target 'sm_90': did you mean"),
        (
            ("release", "--out", "o", "--key", "none", "--require-verified", "sm_90"),
            "unknown target 'sm_90': did you mean 'sm_90a'",
        ),
        (
            ("release", "--out", "o", "--target", "sm_90a", "--require-verified", "sm_100a"),
            "found sm_100a; next: --target sm_90a --target sm_100a",
        ),
        (("inspect", "scale/any/sm_90/one"), "did you mean 'scale/any/sm_90a/one'"),
        (("inspect", "scal/any/sm_90a/one"), "did you mean 'scale/any/sm_90a/one'"),
        (("list", "--dispatch", "sm_90"), "unknown target 'sm_90': did you mean 'sm_90a'"),
    ],
)
def test_names_are_checked_before_anything_else(
    fresh: Project, arguments: tuple[str, ...], message: str
) -> None:
    """There are no artifacts, no commit and no --out: none of that is said first."""
    result = fresh.run(*arguments)
    assert result.returncode == 1
    assert message in result.stdout
    assert not (fresh.root / "o").exists()


def test_quiet_commands_print_nothing_but_errors(fresh: Project) -> None:
    for option in ("-q", "--quiet"):
        assert fresh.build(option, "--kernel", "scale", "--out", "out") == ""
    project = fresh
    project.build("--quiet", "--update-lock")
    assert project.run("check", "-q").stdout == ""
    project.kernel_file("scale/scale.cu").write_text("this is no C++\n")
    result = project.run("build", "--quiet")
    assert result.returncode == 1
    assert result.stdout.startswith("Error: build_kernels/kernels/scale/scale.cu:1: error: ")


def _json(project: Project, *arguments: str) -> tuple[object, str]:
    """What a command prints as JSON, and what it prints beside it."""
    result = subprocess.run(
        [sys.executable, "-m", "build_kernels", *arguments, "--json"],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout), result.stderr


def test_results_as_json(project: Project) -> None:
    document, said = _json(project, "build", "--kernel", "scale", "--out", "out")
    assert said.count("  reused  ") == 2
    entries = loads((project.root / "out" / "manifest.json").read_bytes()).entries
    assert document == {
        "folder": "out",
        "entries": [
            {
                "key": entry.key,
                "file": entry.file,
                "sha256": entry.sha256,
                "bytes": entry.size,
                "registers": entry.resources.registers,
                "spill_bytes": 0,
                "status": "unproven",
            }
            for entry in entries
        ],
        "differs_from_lock": [],
    }
    assert _json(project, "build", "--quiet", "--kernel", "scale", "--out", "out")[1] == ""

    document, _ = _json(project, "list")
    assert isinstance(document, dict)
    state = {"artifacts": "built", "status": "unproven", "stale_model": False}
    assert document["entries"] == [{"key": key, **state} for key in KEYS]
    assert document["models"][0]["name"] == "dsv4-flash"
    assert {"name": "sm_100f", "default": False} in document["targets"]
    rows, _ = _json(project, "list", "--dispatch", "sm_90a")
    assert rows == []  # the small project has none of the routers' kernels

    document, _ = _json(project, "inspect", KEYS[0], "--sass")
    assert isinstance(document, dict)
    assert document["entry"]["sha256"] == entries[0].sha256
    assert document["differs"] is None
    assert document["instructions"]["FADD"] == 1
    assert "/*0000*/" in document["sass"]


def _on_a_terminal(project: Project, *arguments: str) -> str:
    """Run a command whose output is a terminal, and return what it shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "build_kernels", *arguments],
        cwd=project.root,
        env=project.environment({"COLUMNS": "120", "TERM": "xterm"}),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 4096):
            parts.append(part)
    except OSError:  # how Linux reports that the other side is closed
        pass
    os.close(ours)
    said = b"".join(parts).decode()
    assert process.wait() == 0, said
    return said


def test_a_terminal_gets_one_line_that_changes(project: Project) -> None:
    said = _on_a_terminal(project, "build")
    assert f"6/{len(KEYS)}" in said
    assert "\r" in said.replace("\r\n", "")
    lines = said.replace("\r\n", "\n").splitlines()
    assert said.count("\n") <= 3
    assert lines[-1].startswith("6 cubins, ")
    assert _on_a_terminal(project, "build", "--quiet") == ""


def _factor(project: Project) -> None:
    project.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR + 1.0f; }\n"
    )


def _latency(project: Project) -> None:
    path = project.root / "build_kernels" / "catalog" / "latency.toml"
    path.write_text('tokens = [1]\n[any.any]\n"scale/one" = [2.0]\n')


def _toolchain(project: Project) -> None:
    path = project.artifacts / "manifest.json"
    path.write_text(path.read_text().replace("OptLevel(3)", "OptLevel(2)"))


@pytest.mark.parametrize(
    ("change", "reason", "changed"),
    [
        (_factor, "other sources or constants", 2),
        (_latency, "other latencies", 2),
        (_toolchain, "another toolchain", 6),
        (None, None, 0),
    ],
)
def test_artifacts_that_differ_from_the_sources_are_said_to(
    project: Project, change: Callable[[Project], None] | None, reason: str | None, changed: int
) -> None:
    if change is not None:
        change(project)
    differs = "artifacts differ from the sources: "
    listed = project.run("list").stdout
    assert listed.count(f"  ({reason})\n") == changed
    summary = f"{differs}{changed} of 6 entries, and 0 are not built; next: make build-cubins\n"
    assert (summary in listed) == bool(changed)
    shown = project.run("inspect", "scale/any/sm_90a/one").stdout
    assert (f"{differs}{reason}; next: build again\n" in shown) == bool(changed)
    document, _ = _json(project, "inspect", "scale/any/sm_90a/one")
    assert isinstance(document, dict)
    assert document["differs"] == reason
    other = project.run("inspect", "shift/dsv4-pro/sm_90a/only").stdout
    assert (differs in other) == (change is _toolchain)


def test_entries_that_are_not_built_or_no_longer_planned_are_said_to_be(project: Project) -> None:
    project.append("catalog/kernels.py", "KERNELS = KERNELS[:1]\n")
    said = project.run("list").stdout
    gone = "the sources do not build it"
    assert f" shift/dsv4-pro/sm_90a/only - ({gone}) " in " ".join(said.split())
    document, _ = _json(project, "list")
    assert isinstance(document, dict)
    state = {"artifacts": gone, "status": None, "stale_model": False}
    assert {"key": "shift/dsv4-pro/sm_90a/only", **state} in document["entries"]
    assert "differ from the sources: 4 of 6 entries, and 0 are not built" in said
    project.append(
        "catalog/kernels.py",
        'KERNELS = (*KERNELS, Kernel("more", "cuda", False, False, (Variant("one"),)))\n',
    )
    for name, source in (("more.cu", "scale.cu"), ("contract.py", "contract.py")):
        path = project.kernel_file(f"more/{name}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(project.kernel_file(f"scale/{source}").read_text().replace("own", "x"))
    said = project.run("list").stdout
    assert "and 2 are not built; next: make build-cubins" in said


def test_nothing_is_said_of_artifacts_that_are_not_there(fresh: Project) -> None:
    assert "differ" not in fresh.run("list").stdout


def test_a_build_says_in_what_it_differs_from_the_lock(project: Project) -> None:
    assert "differs from artifacts.lock" not in project.build()
    _factor(project)
    partial = project.build("--kernel", "scale", "--target", "sm_90a", "--out", "out")
    said = project.build()
    document, _ = _json(project, "build")
    assert isinstance(document, dict)
    for text in (partial, said, "\n".join(document["differs_from_lock"])):
        assert "changed  scale/any/sm_90a/one: " in text
        assert "shift" not in text.partition("differs from")[2]
    assert "differs from artifacts.lock:\n  changed  scale/any/sm_100a/one: " in said
    assert "changed  source: " in said
    assert "changed  source: " not in partial
    assert "make lock-cubins" in said
    assert "differs" not in project.build("--update-lock")


def test_a_folder_of_a_model_file_can_be_inspected(project: Project) -> None:
    (project.root / "mine.toml").write_text(MODEL)
    project.build("--model-file", "mine.toml", "--target", "sm_90a", "--out", "out")
    inspect = ("inspect", "shift/pruned/sm_90a/only", "--artifacts", "out")
    assert "differ" not in project.run(*inspect).stdout
    source = project.kernel_file("shift/shift.py")
    source.write_text(source.read_text().replace("* 128", "* 64 * 2"))
    before = snapshot(project.root / "out")
    assert "artifacts differ from the sources: other sources" in project.run(*inspect).stdout
    assert snapshot(project.root / "out") == before
