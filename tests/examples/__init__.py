"""Scripts that a reader of README.md can run, and what the tests of them share.

Each runs as ``python tests/examples/NAME.py``, on a GPU if torch finds one, and prints one line.
The lines between ``# README begins`` and ``# README ends`` are quoted in README.md.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

#: The examples, by name, and the optional packages that each needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "cuda_graph": (),
    "torch_compile": (),
    "checkpoint": ("safetensors",),
    "transformers_model": ("transformers",),
}


def quoted(name: str) -> str:
    """The lines of an example that README.md quotes, without their common indentation."""
    _, _, rest = (FOLDER / f"{name}.py").read_text().partition("# README begins\n")
    part, mark, _ = rest.partition("# README ends\n")
    if not mark:
        raise ValueError(f"{name}.py: expected '# README begins' and '# README ends'")
    lines = part.splitlines(keepends=True)
    lines[-1] = lines[-1].rstrip(" ")  # the indentation of the second mark
    return textwrap.dedent("".join(lines))


def missing(name: str) -> list[str]:
    """The packages that an example needs and this environment lacks."""
    return [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]


def run(name: str, **environment: str) -> str:
    """What an example prints, run in an interpreter of its own; AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
