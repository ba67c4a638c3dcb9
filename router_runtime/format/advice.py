"""The next command that an error names, for the way in which this package is installed.

Only a checkout of the project can build kernels. An installed wheel has the runtime and the
artifacts of its release, so there the way to other artifacts is another wheel.
"""

from __future__ import annotations

from pathlib import Path

from router_runtime.format.target import BUILDABLE, Target

REINSTALL = "pip install --force-reinstall --no-deps FILE.whl"

_CPU = "build Routers with device='cpu'"


def checkout() -> Path | None:
    """The folder of the checkout that this package is imported from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "Makefile").is_file() and (root / "build_kernels").is_dir() else None


def build_artifacts() -> str:
    """How to get artifacts that belong to this runtime: by building them, or by installing them."""
    root = checkout()
    if root is None:
        return f"install a release wheel of this runtime again: {REINSTALL}"
    return f"run: make {'' if root == Path.cwd() else f'-C {root} '}build-cubins"


def build_for_device(major: int, minor: int) -> str:
    """How to get kernels for compute capability ``major.minor``, if the project can build any."""
    targets = [name for name in BUILDABLE if Target.parse(name).runs_on(major, minor)]
    if not targets:
        return (
            f"no kernels can be built for compute capability {major}.{minor} (the targets are "
            f"{', '.join(BUILDABLE)}): {_CPU}"
        )
    root = checkout()
    if root is None:
        return f"install a release wheel with kernels for {targets[0]}, or {_CPU}"
    return f"{_build(root, f'--target {targets[0]}', f'build/{targets[0]}')}, or {_CPU}"


def build_model() -> str:
    """How to get kernels for a model that the artifacts do not have."""
    root = checkout()
    if root is None:
        return (
            "install a release wheel that has this model, or build it in a checkout of the "
            "project: .venv/bin/python -m build_kernels build --model-file my.toml --out DIR"
        )
    return f"write its shape into my.toml and {_build(root, '--model-file my.toml', 'build/my')}"


def _build(root: Path, options: str, out: str) -> str:
    """The commands that build into a folder of the checkout, and that make the runtime read it."""
    steps = [] if root == Path.cwd() else [f"cd {root}"]
    if not (root / ".venv").exists():
        steps.append("make .venv/.toolchain")
    steps.append(f".venv/bin/python -m build_kernels build {options} --out {out}")
    return f"run: {' && '.join(steps)} && export ROUTER_RUNTIME_ARTIFACTS={root / out}"
