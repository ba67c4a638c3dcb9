"""Whether a release's commit gives the same bytes again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from build_kernels.errors import BuildError
from build_kernels.release import builds, checkout, compare, compare_text
from router_runtime.evidence.release import Release, verify
from router_runtime.evidence.release_checks import sha256
from router_runtime.format.provenance import ENVELOPE_SUFFIX, Statement
from router_runtime.format.wheel import FETCH_AGAIN

#: Runs the builder of a clone, not the one that is running.
_RUN = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from build_kernels.cli import main; main(prog_name='build-kernels')"
)


def rebuild(found: Release, repository: Path, processes: int) -> None:
    """Build the release again from its commit, in a new clone of ``repository``, with this
    environment's toolchain. Raises BuildError naming everything that differs.
    """
    statement = found.statement
    if not statement.clean:
        raise BuildError(
            "expected a release of a clean commit, found one with uncommitted changes "
            f"({', '.join(statement.changes)}): it cannot be rebuilt; next: ask for a clean one"
        )
    with tempfile.TemporaryDirectory(prefix="build-kernels-rebuild-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        checkout.clone(repository, statement.commit, source)
        options = [word for target in statement.targets for word in ("--target", target)]
        for path in model_files(statement, Path(folder)):
            options += ["--model-file", str(path)]
        result = subprocess.run(
            [
                *(sys.executable, "-P", "-s", "-c", _RUN, str(source)),
                *("release", "--out", str(out), "--jobs", str(processes), *options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode:
            raise BuildError(
                f"expected the commit {statement.commit} to build again, found:\n{result.stdout}"
                "\nnext: rebuild in the environment of that commit: make clean-venv && make release"
            )
        (place,) = out.iterdir()
        again = verify([place], None)
    wrong = list(_differences(found, again))
    if wrong:
        raise BuildError(
            f"expected the commit {statement.commit} to give the same bytes again, found:\n  "
            + "\n  ".join(wrong)
            + f"\nnext: {FETCH_AGAIN}"
        )


def model_files(statement: Statement, folder: Path) -> Iterator[Path]:
    """Write a model file for each model that the statement describes, and yield their paths."""
    for number, (name, shape) in enumerate(sorted(statement.models.items())):
        path = folder / f"model{number}.toml"
        lines = [f"name = {json.dumps(name)}"]
        # A path of tables is a dotted key.
        lines += [f"{key.replace('/', '.')} = {json.dumps(value)}" for key, value in shape.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield path


def _differences(found: Release, again: Release) -> Iterator[str]:
    """What a rebuild gave otherwise: the files that were given, and the wheel's own."""
    for name, data in found.files.items():
        if not name.endswith(ENVELOPE_SUFFIX) and again.files.get(name) != data:
            yield f"{name}: {sha256(data)} -> {sha256(again.files.get(name, b''))}"
    old, new = found.entries, again.entries
    for name in sorted({*old, *new}):
        if name.endswith(".cubin"):
            continue
        if name not in old or name not in new:
            yield f"the wheel's {name}: only {'the rebuild' if name in new else 'this one'} has it"
        elif old[name] != new[name]:
            yield f"the wheel's {name}: {sha256(old[name])} -> {sha256(new[name])}"
    before, after = (builds.of_wheel(entries, "the wheel") for entries in (old, new))
    changes = compare.difference(before, after)
    if changes:
        yield from compare_text.text(changes).splitlines()
