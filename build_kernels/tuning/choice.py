"""The fastest entry of each class by what a GPU measured, as rows of the catalog."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from build_kernels.catalog.latency import Latency
from build_kernels.errors import BuildError
from build_kernels.tuning.candidates import division_of, division_text
from build_kernels.tuning.record import FEW, REFERENCE, Figures, Trial, Tuning
from router_runtime.format.manifest import Entry

#: What serves today stays unless another entry takes less than this times its time.
MARGIN = 0.99


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to serve the batches of a class.

    Attributes:
        trial: The class, and what was compared.
        entry: The fastest, or what serves today.
        microseconds: Of the batches of the class, the geometric mean.
        today: The same of what serves today; None: nothing does, or it has no figures.
        latency: The figures of ``entry`` for every number of tokens of a row.

    """

    trial: Trial
    entry: Entry
    microseconds: float
    today: float | None
    latency: Latency

    @property
    def stays(self) -> bool:
        """Whether it is what serves today."""
        return self.entry.variant == self.trial.today

    @property
    def serves_the_class(self) -> bool:
        """Whether the model is to have the variant of the class: not where another one, which
        serves its batches today, stays."""
        return not self.stays or self.trial.today == self.trial.variant


def choose(tuning: Tuning, entries: Iterable[Entry], figures: Figures) -> list[Choice]:
    """Return the choice of every class with figures.

    Raises BuildError for figures of other cubins, and where some are missing.
    """
    known = {entry.key: entry for entry in entries}
    for key, measured in figures.sha256.items():
        found = known[key].sha256 if key in known else "no such entry"
        if found != measured:
            raise BuildError(
                f"expected figures of the cubins in the folder, found some of others: {key} has "
                f"{found} here, {measured} was measured; next, on a GPU: "
                "python -m tests.bench.tune --artifacts with this folder"
            )
    choices = []
    for trial in tuning.trials:
        prefix = f"{trial.kernel}/{trial.model}/{tuning.target}"
        times = dict(_times(trial, prefix, figures))
        if not times:
            continue
        today = None if trial.today is None else times.get(trial.today)
        best = min(times, key=times.__getitem__)
        if trial.today is not None and today is not None and times[best] > MARGIN * today:
            best = trial.today
        entry = known[f"{prefix}/{best}"]
        latency = _row(entry, tuning.tokens, figures.microseconds[entry.key])
        choices.append(Choice(trial, entry, times[best], today, latency))
    if not choices:
        raise BuildError(
            "expected figures for the batches of a class, found none; next, on a GPU: "
            "python -m tests.bench.tune --artifacts with this folder, and with more --seconds"
        )
    return choices


def _times(trial: Trial, prefix: str, figures: Figures) -> Iterator[tuple[str, float]]:
    """The geometric mean of the batches of the class, of each entry that has all of them."""
    for name in trial.entries:
        row = figures.microseconds.get(f"{prefix}/{name}", {})
        found = [row.get(str(tokens)) for tokens in trial.tokens]
        if f"{prefix}/{name}" not in figures.wrong and None not in found:
            yield name, statistics.geometric_mean(each for each in found if each is not None)


def _row(entry: Entry, tokens: Sequence[int], row: Mapping[str, float]) -> Latency:
    """The figures for each of ``tokens`` that one launch serves. A kernel for many tokens takes as
    long for fewer tokens than ``FEW`` as for ``FEW``, and is not measured there.
    """
    most = entry.contract.limits["tokens"][1]
    least = 1 if entry.kernel == REFERENCE else FEW
    latency = []
    for count in tokens:
        if count > most:
            break
        figure = row.get(str(max(count, least)))
        if figure is None:
            raise BuildError(
                f"{entry.key}: expected figures for {list(tokens)} tokens, found those for "
                f"{sorted(map(int, row))}; next, on a GPU: python -m tests.bench.tune --artifacts "
                "with this folder, and with more --seconds"
            )
        latency.append((count, round(figure, 1)))
    return tuple(latency)


def catalog_rows(choices: Sequence[Choice], target: str) -> str:
    """Return the rows of ``catalog/kernels.py`` that change, and those of ``latency.toml``."""
    lines = ["# build_kernels/catalog/kernels.py"]
    for choice in choices:
        trial = choice.trial
        before = "" if choice.today is None else f" in place of {choice.today:.2f}"
        if choice.stays:
            now = division_text(choice.entry.constants)
            lines.append(
                f"# {trial.variant} {trial.model}: {now} stays, {choice.microseconds:.2f} us"
            )
            continue
        division = division_of(choice.entry.constants)
        cells = [f'"{trial.variant}",'.ljust(15), f'"{trial.model}",'.ljust(15)]
        cells += [f"{value},".ljust(len(name)) for name, value in division.items()]
        lines += [
            f"# form {choice.entry.constants['FORM']}: {' '.join(division)}; "
            f"{choice.microseconds:.2f} us{before}",
            f"    ({' '.join(cells).rstrip().rstrip(',')}),",
        ]
    lines.append("# build_kernels/catalog/latency.toml")
    for model in dict.fromkeys(choice.trial.model for choice in choices):
        lines.append(f"[{target}.{model}]")
        for choice in choices:
            if choice.trial.model == model and choice.serves_the_class:
                figures = ", ".join(str(figure) for _, figure in choice.latency)
                lines.append(f'"{choice.trial.kernel}/{choice.trial.variant}" = [{figures}]')
    return "\n".join(lines)
