"""The candidates of ``build-kernels tune`` on a GPU: their bits, then their times.

``python -m tests.bench.tune --artifacts DIR --out FILE``. A candidate's weights, ids and logits
have to be those of today's kernel for few tokens, bit for bit, on fresh random data; one that
differs is named and not timed. Times are taken in the chain of ``make bench``, beside ``torch.mm``,
of the batches of a candidate's class; then, of the batches of the other classes, for the fastest of
a class and for what serves it today. The file is written after each step.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from build_kernels.catalog.models import Model
from build_kernels.errors import BuildError
from build_kernels.tuning.candidates import division_text
from build_kernels.tuning.record import FEW, REFERENCE, Figures, Trial, Tuning, read_tuning
from router_runtime.device.artifact_store import read_manifest
from router_runtime.errors import RouterRuntimeError
from router_runtime.format.codec import canonical_json
from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target
from router_runtime.verification.kernel_run import stores_logits
from tests.bench.artifacts import edition
from tests.bench.chain import ALLOWED_ROWS, Chain, Layers, Route, make_chain, make_layers, plan
from tests.bench.contenders import CONTENDERS, MM, DenseRouters, Settings, alone
from tests.bench.machine import Broken, Cpu, Gpu, Machine, attempt

#: Batches whose bits are compared, besides those of the class: parts of tiles.
CHECKED = (1, 67, 130)

#: Seconds after the time is up until the process is ended if it still runs, as when a kernel hangs.
_GRACE = 45
_STDERR = 2


class Measurement:
    """What a folder's candidates take on one machine.

    Args:
        folder: Of ``build-kernels tune``.
        machine: Where they are timed.
        dry: Whether to let the oracle stand in for the kernels, on few rows: every step is done,
            and the figures mean nothing.
        replays: Of each graph.
        skip: Keys of entries to leave out.
        scratch: A folder for copies of the artifacts.

    """

    def __init__(
        self,
        folder: Path,
        machine: Machine,
        dry: bool,
        replays: int,
        skip: Sequence[str],
        scratch: Path,
    ) -> None:
        self._tuning: Tuning = read_tuning(folder)
        self._folder, self._machine, self._scratch = folder, machine, scratch
        self._dry = dry
        self._replays = replays
        self._entries: dict[str, Entry] = {
            entry.key: entry for entry in read_manifest(folder).entries
        }
        self._seed = random.SystemRandom().randrange(2**31)
        self._layers: dict[str, Layers] = {}
        self._editions: dict[tuple[str, str], Path] = {}
        self._skip = frozenset(skip)
        self.wrong: dict[str, str] = {}
        self._times: dict[tuple[str, int], list[float]] = {}
        self._mm: dict[tuple[str, int], list[float]] = {}

    @property
    def trials(self) -> list[Trial]:
        """What is compared, the models in turn."""
        return in_turn(self._tuning.trials)

    def figures(self, complete: bool) -> Figures:
        """Everything that has been measured."""
        return Figures(
            device=str(self._machine.facts()["name"]),
            target=self._tuning.target,
            complete=complete,
            sha256={key: entry.sha256 for key, entry in self._entries.items()},
            wrong=self.wrong,
            microseconds=_by_name(self._times),
            torch_mm=_by_name(self._mm),
        )

    def compare(self, trial: Trial) -> list[str]:
        """Check and time the entries of a trial, and return a table of its figures."""
        routes = self._right(trial)
        # Twice, the second time in the other order: clocks drift.
        turns = [*routes, *reversed(list(routes))]
        for tokens in trial.tokens:
            self._time(trial, tokens, routes, turns)
        self._release(routes)
        return self._table(trial)

    def fill(self, trial: Trial) -> None:
        """Time the fastest entry of a trial, and today's, for the batches of the other classes."""
        timed = self._timed(trial)
        chosen = list(dict.fromkeys([*timed[:1], *(name for name in timed if name == trial.today)]))
        layers = self._of(trial.model)
        routes = {name: self.routers(trial.kernel, name, layers) for name in chosen}
        least = 1 if trial.kernel == REFERENCE else FEW
        for tokens in self._tuning.tokens:
            if tokens not in trial.tokens and tokens >= least:
                self._time(trial, tokens, routes, chosen)
        self._release(routes)

    def _release(self, routes: Mapping[str, DenseRouters]) -> None:
        for route in routes.values():
            route.release()

    # --- one entry ---

    def _key(self, trial: Trial, name: str) -> str:
        return f"{trial.kernel}/{trial.model}/{self._tuning.target}/{name}"

    def _of(self, name: str) -> Layers:
        """The weights of a model's routers, made when first used; no tables are needed."""
        if name not in self._layers:
            (model,) = (model for model in self._tuning.models if model.name == name)
            model = dataclasses.replace(model, vocab=1)
            routers = plan(model, 1, self._machine.l2_bytes, 2).routers
            self._layers[name] = make_layers(model, routers, self._machine.device)
        return self._layers[name]

    def routers(self, kernel: str, variant: str, layers: Layers) -> DenseRouters:
        """Routers of these layers with that kernel alone."""
        only = (kernel, variant)
        if not self._dry and only not in self._editions:
            into = self._scratch / f"{kernel}-{variant}"
            self._editions[only] = edition(self._folder, into, only=only)
        folders = {"pdl": self._editions[only]} if only in self._editions else {}
        contender = alone(folders, kernel, variant)  # type: ignore[arg-type]
        return DenseRouters(layers, "pdl", contender.settings)

    # --- bits ---

    def _right(self, trial: Trial) -> dict[str, DenseRouters]:
        """Name -> routers of the entries of a trial that are right. The others are named."""
        layers = self._of(trial.model)
        reference, name = self._reference(trial)
        one = dataclasses.replace(
            layers, weights=layers.weights[:1], biases=layers.biases[:1], tables=layers.tables[:1]
        )
        expected = self.routers(reference, name, one)
        batches = sorted({*CHECKED, *trial.tokens, trial.tokens[-1] - trial.tokens[-1] // 3})
        inputs = [self._fresh(layers.model, self._rows(tokens)) for tokens in batches]
        results = [expected.with_logits(0, x) for x in inputs]
        found = {}
        for entry in trial.entries:
            key = self._key(trial, entry)
            if key in self._skip:
                continue
            click.echo(f"{key} ", nl=False)

            def checked(entry: str = entry) -> DenseRouters:
                route = self.routers(trial.kernel, entry, layers)
                logits = self.has_logits(trial, entry)
                for x, result in zip(inputs, results, strict=True):
                    _require_same(route, x, result, logits)
                return route

            route = attempt(checked, self._machine)
            if isinstance(route, str):
                self.wrong[key] = route
                click.echo(f"WRONG: {route}; it is not timed")
            else:
                click.echo("right")
                found[entry] = route
        expected.release()
        return found

    def _reference(self, trial: Trial) -> tuple[str, str]:
        """The kernel and the variant whose bits are expected: today's for the most tokens."""
        able = [
            (entry.contract.limits["tokens"][1], entry.variant)
            for entry in self._entries.values()
            if (entry.kernel, entry.model) == (REFERENCE, trial.model) and "." not in entry.variant
        ]
        return (REFERENCE, max(able)[1]) if able else (trial.kernel, trial.entries[0])

    def has_logits(self, trial: Trial, name: str) -> bool:
        """Whether a kernel can store the logits that it routes by."""
        return stores_logits(self._entries[self._key(trial, name)])

    def _fresh(self, model: Model, rows: int) -> Tensor:
        device = self._machine.device
        self._seed += 1
        generator = torch.Generator(device).manual_seed(self._seed)
        x = torch.randn(rows, model.hidden, generator=generator, device=device)
        return x.bfloat16()

    def _rows(self, tokens: int) -> int:
        """A dry run has few rows, whatever is stated."""
        return min(tokens, 3) if self._dry else tokens

    # --- times ---

    def _time(
        self,
        trial: Trial,
        tokens: int,
        routes: Mapping[str, DenseRouters],
        turns: Sequence[str],
    ) -> None:
        """Time entries for one number of tokens. ``turns``: their names, in order."""
        layers, machine = self._of(trial.model), self._machine
        rows = self._rows(tokens)
        turns = [name for name in turns if not routes[name].declines(rows)]
        if not turns:
            return
        inputs = plan(layers.model, rows, machine.l2_bytes, 2).inputs
        chain = make_chain(machine, layers, rows, inputs)
        links, _ = machine.timed(functools.partial(chain.links, True), self._replays)
        link = statistics.median(links)
        product = CONTENDERS[MM].make(layers, "pdl", Settings({}, {}))
        if (trial.model, tokens) not in self._mm:
            self._mm[trial.model, tokens] = self._replayed(chain, product, link)
        for name in turns:
            key = self._key(trial, name)
            if key in self.wrong:
                continue
            run = functools.partial(self._replayed, chain, routes[name], link)
            found = attempt(run, machine)
            if isinstance(found, str):
                self.wrong[key] = found
                click.echo(f"{key} WRONG: {found}")
            else:
                self._times.setdefault((key, tokens), []).extend(found)

    def _replayed(self, chain: Chain, route: Route, link: float) -> list[float]:
        """Microseconds a router of every replay. Raises ValueError for a wrong result."""
        count = len(chain.layers.weights)
        times, output = self._machine.timed(
            functools.partial(chain.routed, route, True), self._replays
        )
        wrong = chain.wrong_rows(output)
        if wrong > ALLOWED_ROWS:
            raise ValueError(f"{wrong} of the rows checked differ from the oracle")
        return [(each - link) / count for each in times]

    def _timed(self, trial: Trial) -> list[str]:
        """The entries of a trial with figures for all of its batches, the fastest first."""
        figures = {}
        for name in trial.entries:
            found = [self._times.get((self._key(trial, name), n)) for n in trial.tokens]
            if self._key(trial, name) not in self.wrong and all(found):
                figures[name] = statistics.geometric_mean(
                    max(statistics.median(times), 1e-3) for times in found if times
                )
        return sorted(figures, key=figures.__getitem__)

    def _table(self, trial: Trial) -> list[str]:
        lines = [f"{trial.model} {trial.kernel}, microseconds for {trial.tokens} tokens"]
        products = [statistics.median(self._mm[trial.model, n]) for n in trial.tokens]
        lines.append(f"  {MM:16}" + "".join(f"{us:9.2f}" for us in products))
        for name in self._timed(trial):
            key = self._key(trial, name)
            medians = [statistics.median(self._times[key, n]) for n in trial.tokens]
            lines.append(
                f"  {name:16}"
                + "".join(f"{us:9.2f}" for us in medians)
                + f"  {medians[-1] / products[-1]:5.2f} of {MM}"
                + f"  {division_text(self._entries[key].constants)}"
                + ("  (today's)" if name == trial.today else "")
            )
        return lines


def _require_same(
    route: DenseRouters, x: Tensor, expected: tuple[Tensor, Tensor, Tensor], logits: bool
) -> None:
    """Raise ValueError unless a call gives these weights, ids and logits, bit for bit."""
    plain = route(0, x)
    found = [plain.values, plain.ids]
    if logits:
        found += [*route.with_logits(0, x)]
    names = ("weights", "ids", "weights beside logits", "ids beside logits", "logits")
    for name, result, right in zip(names, found, (*expected[:2], *expected), strict=False):
        assert result is not None
        different = result.view(torch.int32) != right.view(torch.int32)
        if bool(different.any()):
            rows = different.any(dim=1)
            raise ValueError(
                f"{int(rows.sum())} of {len(rows)} rows have other {name} than the kernel for few "
                f"tokens, row {int(rows.nonzero()[0, 0])} first"
            )


def in_turn(trials: Sequence[Trial]) -> list[Trial]:
    """The first trial of each model, then the second of each, and so on."""
    places: Counter[str] = Counter()
    order = []
    for trial in trials:
        order.append((places[trial.model], trial))
        places[trial.model] += 1
    return [trial for _, trial in sorted(order, key=lambda item: item[0])]


def _by_name(times: Mapping[tuple[str, int], Sequence[float]]) -> dict[str, dict[str, float]]:
    """Medians by name, then by tokens in decimal."""
    found: dict[str, dict[str, float]] = {}
    for (name, tokens), each in sorted(times.items()):
        found.setdefault(name, {})[str(tokens)] = round(statistics.median(each), 3)
    return found


def measure(measurement: Measurement, seconds: float, out: Path) -> bool:
    """Measure as much as the time allows and write it. Returns whether that is everything, and
    right.
    """
    end = time.monotonic() + seconds
    steps = [(True, trial) for trial in measurement.trials]
    steps += [(False, trial) for trial in measurement.trials]
    left = len(steps)
    try:
        for first, trial in steps:
            if time.monotonic() > end:
                click.echo(f"INCOMPLETE: out of time, {left} of {len(steps)} steps are left")
                break
            if first:
                click.echo("\n".join(measurement.compare(trial)))
            else:
                measurement.fill(trial)
            left -= 1
            out.write_bytes(canonical_json(measurement.figures(left == 0)))
    except Broken as error:
        click.echo(f"INCOMPLETE: {error}; next: run again with --skip and the entry named last")
    out.write_bytes(canonical_json(measurement.figures(left == 0)))
    return left == 0 and not measurement.wrong


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--artifacts",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of build-kernels tune.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("figures.json"),
    show_default=True,
    help="The file for the figures.",
)
@click.option("--seconds", type=float, default=150.0, show_default=True, help="At most.")
@click.option("--replays", type=click.IntRange(1), default=25, show_default=True)
@click.option("--skip", multiple=True, help="Leave this entry out; repeatable.")
@click.option("--dry-run", is_flag=True, help="On the CPU, few rows: every step, no figures.")
def main(
    artifacts: Path, out: Path, seconds: float, replays: int, skip: tuple[str, ...], dry_run: bool
) -> None:
    try:
        machine: Machine = Cpu() if dry_run else Gpu()
        target = read_tuning(artifacts).target
        capability = machine.facts()["compute_capability"]
        if not dry_run and not Target.parse(target).runs_on(*capability):
            raise BuildError(
                f"expected a GPU of {target}, found compute capability {capability}; next: "
                "build-kernels tune with another --target"
            )
        # A kernel that hangs cannot be stopped; what was measured before it is in the file.
        later = max(seconds, 0) + _GRACE
        faulthandler.dump_traceback_later(later, exit=True, file=_STDERR)
        with torch.no_grad(), tempfile.TemporaryDirectory(prefix="tune-") as scratch:
            measurement = Measurement(artifacts, machine, dry_run, replays, skip, Path(scratch))
            right = measure(measurement, seconds, out)
    except (BuildError, RouterRuntimeError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    click.echo(f"wrote {out}")
    for key, why in measurement.wrong.items():
        click.echo(f"WRONG {key}: {why}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
