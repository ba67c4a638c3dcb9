"""The next command that an error names, for the way in which this package is installed.

Only a checkout of the project can build kernels. An installed wheel has the runtime and the
artifacts of its release, so there the way to other artifacts is another wheel.

A path that this user may not look at counts as absent: the advice must never fail and so hide the
error that it belongs to. Hence ``os.path.isfile`` and its like, which return False for such a path,
where some ``pathlib`` methods raise PermissionError.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from router_runtime.format.target import BUILDABLE, Target

REINSTALL = "pip install --force-reinstall --no-deps FILE.whl"

#: What loads the cubins: they come from the CUDA 13 toolchain.
DRIVER = "release 580 (CUDA 13.0) or newer"

#: The way out of a machine without a GPU that serves.
USE_CPU = "build Routers with device='cpu'"

#: Names the artifacts folder, in place of the installed one.
ARTIFACTS_VARIABLE = "ROUTER_RUNTIME_ARTIFACTS"


def checkout() -> Path | None:
    """The folder of the checkout that this package is imported from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    marks = os.path.isfile(root / "Makefile") and os.path.isdir(root / "build_kernels")
    return root if marks else None


def archive() -> Path | None:
    """The zip file that this package is imported from; None if it lies in a folder."""
    place = Path(__file__).resolve().parents[2]
    return place if os.path.isfile(place) else None


def artifacts_places() -> tuple[Path, Path]:
    """Return where the artifacts are if no folder is named: in an installed package, else in a
    checkout.
    """
    package = Path(__file__).resolve().parents[1]
    return package / "artifacts", package.parent / "artifacts"


def runtime(arguments: str) -> str:
    """Return the runtime's command with these arguments, as it is typed on this machine.

    Only an installed package has the command ``router-runtime``. In a checkout it is a module,
    which Python finds in the checkout's folder.
    """
    root = checkout()
    if root is None:
        return f"router-runtime {arguments}"
    python = Path(".venv-test/bin/python")
    if not os.access(root / python, os.X_OK):
        python = Path(sys.executable)
    if _is_here(root):
        return f"{python} -m router_runtime {arguments}"
    return f"PYTHONPATH={root} {root / python} -m router_runtime {arguments}"


def record_evidence(artifacts: Path | None = None, options: str = "") -> str:
    """Return the command that runs the oracle suite on a GPU and records what passes.

    Args:
        artifacts: The artifacts folder, which the command names unless it is the one that is used
            where none is named. None: that one.
        options: More options of the command.

    """
    words = ["verify --record", options]
    if artifacts is not None:
        here = artifacts.resolve()
        if os.environ.get(ARTIFACTS_VARIABLE) or here not in artifacts_places():
            words.append(f"--artifacts {here}")
    return runtime(" ".join(filter(None, words)))


def record_emulation() -> str:
    """How to get records of emulation: by running it on a Hopper GPU, or by installing a release
    that has them.
    """
    root = checkout()
    if root is None:
        return f"install a release wheel of this runtime again: {REINSTALL}"
    where = "" if _is_here(root) else f"-C {root} "
    return f"on a Hopper GPU, run: make {where}record-emulation"


def build_artifacts() -> str:
    """How to get artifacts that belong to this runtime: by building them, or by installing them."""
    zipped = archive()
    if zipped is not None:
        return (
            f"this package is imported from the zip file {zipped}, and cubins need a folder: run: "
            f"pip install {zipped}, and take the file off the path (PYTHONPATH)"
        )
    root = checkout()
    if root is None:
        return f"install a release wheel of this runtime again: {REINSTALL}"
    return f"run: make {'' if _is_here(root) else f'-C {root} '}build-cubins"


def restore(folder: Path) -> str:
    """How to make an artifacts folder whole again. One that the user has named is the user's."""
    if folder.resolve() in artifacts_places():
        return build_artifacts()
    root = checkout()
    if root is None:
        return f"copy {folder} again from where it was built"
    where = "" if _is_here(root) else f"cd {root} && "
    return (
        f"run: {where}.venv/bin/python -m build_kernels build --out {folder.resolve()}, with the "
        "options that it was built with"
    )


def name_other(folder: Path, source: str, default: Path | None) -> str:
    """What to do where a folder was named that has no artifacts.

    Args:
        folder: What was named.
        source: The environment variable that named it; empty: a caller did.
        default: The folder that is used where none is named; None: it has no artifacts either.

    """
    if folder.resolve() in artifacts_places():
        return f"{build_artifacts()}, or name the folder that holds it"
    root = checkout()
    without = f"unset {source}" if source else "name none"
    if root is None and default is None:
        return f"{without}, and {build_artifacts()}"
    ways = [] if default is None else [f"{without}, so that {default} is used"]
    if root is not None:
        where = shlex.quote(str(folder.resolve()))
        ways.append(f"build there: {' && '.join(_steps(root, '', where))}")
    return ", or ".join([*ways, "name the folder that holds it"])


def unpack(file: Path) -> str:
    """What to do with a wheel that was named in place of an artifacts folder."""
    return (
        f"cubins need a folder: install the wheel (pip install {file}) and name none, or unpack "
        f"it (python -m zipfile --extract {file} DIR) and name DIR/router_runtime/artifacts"
    )


def build_for_device(major: int, minor: int) -> str:
    """How to get kernels for compute capability ``major.minor``, if the project can build any."""
    targets = [name for name in BUILDABLE if Target.parse(name).runs_on(major, minor)]
    if not targets:
        return (
            f"no kernels can be built for compute capability {major}.{minor} (the targets are "
            f"{', '.join(BUILDABLE)}): {USE_CPU}"
        )
    root = checkout()
    if root is None:
        return f"install a release wheel with kernels for {targets[0]}, or {USE_CPU}"
    return f"{_build(root, f'--target {targets[0]}', f'build/{targets[0]}')}, or {USE_CPU}"


def build_model(keys: Sequence[str] = ()) -> str:
    """How to get kernels for a model that the artifacts do not have. ``keys`` are lines that its
    file has beside those of every model.
    """
    root = checkout()
    if root is None:
        beside = f", with {' and '.join(keys)} in mine.toml" if keys else ""
        return (
            f"install a release wheel that has this model, or build it in a checkout of the "
            f"project{beside}: .venv/bin/python -m build_kernels build --model-file mine.toml "
            "--out DIR"
        )
    beside = f", with {' and '.join(keys)}," if keys else ""
    build = _build(root, "--model-file mine.toml", "build/mine")
    return f"write its shape{beside} into mine.toml and {build}"


def _is_here(root: Path) -> bool:
    """Whether ``root`` is the current folder. No folder is, once the current one was deleted."""
    try:
        return root == Path.cwd()
    except OSError:
        return False


def _build(root: Path, options: str, out: str) -> str:
    """The commands that build into a folder of the checkout, and that make the runtime read it."""
    steps = [*_steps(root, options, out), f"export {ARTIFACTS_VARIABLE}={root / out}"]
    return f"run: {' && '.join(steps)}"


def _steps(root: Path, options: str, out: str) -> list[str]:
    """The commands that build into a folder."""
    steps = [] if _is_here(root) else [f"cd {root}"]
    if not os.access(root / ".venv", os.F_OK):
        steps.append("make .venv/.toolchain")
    build = " ".join(filter(None, ["build", options, "--out", out]))
    return [*steps, f".venv/bin/python -m build_kernels {build}"]
