"""The commands that only show things, and how errors reach a user."""

from __future__ import annotations

import pytest

from router_runtime.format.manifest import loads
from tests.builder.conftest import KEYS, Project


def test_the_version_is_the_runtimes(fresh: Project) -> None:
    (fresh.root / "router_runtime" / "version.py").write_text('__version__ = "7.8.9"\n')
    result = fresh.run("--version")
    assert result.stdout == "build-kernels 7.8.9\n"


def test_list(fresh: Project) -> None:
    result = fresh.run("list")
    assert result.returncode == 0
    for key in KEYS:
        assert f"  {key}\n" in result.stdout
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
