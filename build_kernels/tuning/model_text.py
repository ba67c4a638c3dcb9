"""A model file with the divisions and latencies that were chosen."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence

from build_kernels.catalog import measured
from build_kernels.catalog.models import Model
from build_kernels.errors import BuildError
from build_kernels.tuning.candidates import division_of
from build_kernels.tuning.choice import Choice

#: Everything of a model file from this line on is written again.
MARK = "# Measured; build-kernels tune replaces everything from here on."


def rewritten(where: str, text: str, model: Model, choices: Sequence[Choice], target: str) -> str:
    """Return the text of a model file with the choices of its classes in place of what it said of
    them. What it says of other classes and targets stays.

    Args:
        where: The file's name.
        text: What it holds.
        model: The model that it describes.
        choices: Those of this model.
        target: Of the choices.

    Raises:
        BuildError: The file has such tables that this function did not write.

    """
    head, mark, _ = text.partition(MARK)
    by_hand = [name for name in measured.TABLES if name in tomllib.loads(head)]
    if by_hand:
        raise BuildError(
            f"{where}: expected the tables {', '.join(measured.TABLES)} after the line {MARK!r}, "
            f"found {', '.join(by_hand)} {'before it' if mark else 'without it'}; next: remove them"
        )
    paths = dict(model.measured)
    for choice in choices:
        name = f"{choice.trial.kernel}/{choice.trial.variant}"
        division, latency = f"divisions/{name}/", f"latency/{target}/{name}/"
        paths = {k: v for k, v in paths.items() if not k.startswith((division, latency))}
        if choice.serves_the_class:
            constants = choice.entry.constants
            for constant, value in division_of(constants).items():
                paths[f"{division}{constants['FORM']}/{constant}"] = int(value)
            paths |= {f"{latency}{tokens}": figure for tokens, figure in choice.latency}
    return f"{head.rstrip()}\n\n{MARK}\n{_tables(paths)}"


def _tables(paths: Mapping[str, int | float]) -> str:
    """Numbers by their paths as TOML, a table for all but the last part."""
    tables: dict[str, list[str]] = {}
    for path, value in paths.items():
        table, _, name = path.rpartition("/")
        tables.setdefault(table.replace("/", "."), []).append(f"{name} = {value!r}")
    return "\n".join(
        "\n".join((f"[{table}]", *lines, "")) for table, lines in sorted(tables.items())
    )
