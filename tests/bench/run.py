"""A run from settings to files: start-up, host times while the process is fresh, then latencies.

Results are written after every row, so a run that is cut short leaves what it had.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from build_kernels.catalog.models import Model
from router_runtime.device.artifact_store import find_artifacts, read_manifest
from router_runtime.device.kernels import kernels_on
from tests.bench import engines, plot, report, startup, topk_report
from tests.bench import peers as peers_
from tests.bench.artifacts import edition, entries_here, variants_of
from tests.bench.contenders import (
    Contender,
    Mode,
    Settings,
    alone,
    family,
    field,
    triton_version,
)
from tests.bench.host import HostCell, measure
from tests.bench.latency import Cell, Latencies
from tests.bench.machine import Broken, Machine
from tests.bench.topk import KERNEL, Topk, TopkCell

#: Host time hardly depends on the tokens: one each for decode, its largest batch, and prefill.
HOST_TOKENS = (1, 64, 256)

#: Routers of a chain at least, for a model of which peers.json has no figures.
LEAST_ROUTERS = 2

Echo = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Options:
    models: Sequence[Model]
    tokens: Sequence[int]
    contenders: Sequence[str]
    modes: Sequence[Mode]
    replays: int
    parts: Sequence[str]
    artifacts: Path | None
    variants: Mapping[str, Sequence[str]]
    alone: bool
    out: Path


class Run:
    """One run: what it measured so far, and where that goes."""

    def __init__(self, options: Options, machine: Machine, scratch: Path, echo: Echo) -> None:
        self._options, self._machine, self._scratch, self._echo = options, machine, scratch, echo
        self._peers = peers_.load()
        self._cells: list[Cell] = []
        self._host: list[HostCell] = []
        self._plugins: list[engines.PluginCell] = []
        self._startup: list[startup.StartupCell] = []
        self._topk: list[TopkCell] = []
        self._routers: dict[str, int] = {}
        self._made: dict[str, dict[Mode, Path]] = {}
        self._folder: Path | None = None
        if machine.device.type == "cuda":
            self._folder = find_artifacts(options.artifacts).resolve()
        facts = machine.facts()
        self._capability: tuple[int, int] = tuple(facts["compute_capability"])
        self._here = entries_here(self._folder, self._capability) if self._folder else []
        self._facts = {
            "device": facts,
            "software": {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": triton_version(),
                "cuda-bindings": importlib.metadata.version("cuda-bindings"),
                "python": platform.python_version(),
            },
            "artifacts": self._artifacts(),
        }

    def _artifacts(self) -> dict[str, Any]:
        if self._folder is None:
            return {"source_sha256": None, "entries": {}}
        return {
            "source_sha256": read_manifest(self._folder).source_sha256,
            "entries": {entry.key: entry.sha256 for entry in self._here},
        }

    def run(self) -> bool:
        """True if the run was not stopped and no result was wrong or failed; contenders that are
        not installed here are skipped and do not count.
        """
        options, device = self._options, self._machine.device
        complete = True
        options.out.mkdir(parents=True, exist_ok=True)
        self._echo(f"{self._facts['device']}")
        self._echo(f"{self._facts['software']}, {len(self._here)} entries that run here")
        try:
            if "startup" in options.parts:
                self._measure_startup()
            if "host" in options.parts:
                self._measure_host()
            if "latency" in options.parts:
                self._measure_latency()
            if "topk" in options.parts:
                self._measure_topk()
        except Broken as error:
            complete = False
            self._echo(f"stopped: {device}: {error}; next: run again without that contender")
        document = self._write()
        comparisons = report.compare(self._cells, self._peers)
        for model in options.models:
            self._say(report.comparison_table(comparisons, model))
        self._say(report.compact_table(self._cells, options.models, self._peers))
        self._say(report.stated_table(report.against_stated(self._cells, self._here)))
        host = report.compare_host(self._host, self._peers.host_bar)
        self._say(report.summary(comparisons, host))
        self._say(topk_report.summary(self._topk))
        if options.alone and self._cells:
            target = min((entry.target for entry in self._here), default="any")
            lines = report.latency_rows(self._cells, target, options.tokens)
            (options.out / "latency.toml").write_text("\n".join(lines) + "\n")
            self._say(["for build_kernels/catalog/latency.toml:", *lines])
        found = report.problems(self._cells, self._host) + topk_report.problems(self._topk)
        self._say(found)
        self._draw(document)
        return complete and all(": skipped: " in problem for problem in found)

    def _say(self, lines: Sequence[str]) -> None:
        for line in ([""] if lines else []) + list(lines):
            self._echo(line)

    def _contenders(self, model: Model) -> list[Contender]:
        options = self._options
        folders = self._editions("product", None)
        contenders = field(options.contenders, folders, options.variants)
        if not options.alone:
            return contenders
        # In place of the product: each of the kernels that it could choose from for this model.
        others = [contender for contender in contenders if family(contender.name) is None]
        wanted = options.variants
        by_itself = [
            alone(self._editions(f"{kernel}-{variant}", (kernel, variant)), kernel, variant)
            for ours in dict.fromkeys(filter(None, map(family, options.contenders)))
            for kernel, variant in variants_of(ours, model, self._here)
            if kernel not in wanted or variant in wanted[kernel]
        ]
        return by_itself + others

    def _editions(self, name: str, only: tuple[str, str] | None) -> dict[Mode, Path]:
        """The folder of each mode; made when first used, and for every model."""
        folder = self._folder
        if folder is None:
            return {}
        if name in self._made:
            return self._made[name]
        folders: dict[Mode, Path] = {}
        for mode in self._options.modes:
            if mode == "pdl" and only is None:
                folders[mode] = folder
                continue
            into = self._scratch / f"{name}-{mode}"
            folders[mode] = edition(folder, into, dependent=mode == "pdl", only=only)
        self._made[name] = folders
        return folders

    def _measure_startup(self) -> None:
        """Needs artifacts, and no GPU: a dry run has neither."""
        if self._folder is None:
            return
        for model in self._options.models:
            try:
                self._startup += startup.measure(model.name, self._folder, self._capability)
            except subprocess.CalledProcessError as error:  # which has said why
                self._echo(f"{model.name}: no start-up to measure: {error}")
        rows = startup.table(self._startup)
        self._say(["milliseconds of a fresh process for every check", *report.aligned(rows)])
        self._write()

    def _measure_host(self) -> None:
        options = self._options
        variants = {kernel: names[0] for kernel, names in options.variants.items()}
        settings = Settings({} if self._folder is None else {"pdl": self._folder}, variants)
        batches = max(options.replays * 2 // 3, 1)
        for model in options.models:
            for tokens in HOST_TOKENS:
                self._host += measure(self._machine, model, tokens, settings, batches)
        self._say(report.host_table(self._host, self._peers.host_bar))
        self._plugins = engines.measure(batches)
        self._say(report.plugin_table(self._plugins, engines.BAR_US))
        self._write()

    def _measure_latency(self) -> None:
        options = self._options
        for model in options.models:
            contenders = self._contenders(model)
            figures = self._peers.models.get(model.name)
            least = figures.routers if figures else LEAST_ROUTERS
            latencies = Latencies(
                self._machine, model, contenders, options.modes, options.replays, least
            )
            self._routers[model.name] = latencies.routers
            for tokens in options.tokens:
                try:
                    for cell in latencies.cells(tokens):
                        self._cells.append(cell)
                finally:
                    self._write()
                self._progress(model, tokens)
            latencies.close()
            self._say(report.latency_table(self._cells, model, self._peers))

    def _measure_topk(self) -> None:
        """Time topk_indices with the entry that the op would choose if evidence did not matter."""
        options, device = self._options, self._machine.device
        wanted = options.variants.get(KERNEL)
        entries = [
            entry
            for entry in self._here
            if entry.kernel == KERNEL and (wanted is None or entry.variant in wanted)
        ]
        kernels = None if self._folder is None else kernels_on(device.index, self._folder)
        part = Topk(self._machine, kernels, entries, options.alone, options.replays)
        try:
            self._topk += part.cells()
        finally:
            self._write()
        self._say(topk_report.table(self._topk))
        self._say(topk_report.hostile_table(self._topk))

    def _progress(self, model: Model, tokens: int) -> None:
        here = [
            f"{cell.contender} {'-' if cell.median_us is None else format(cell.median_us, '.2f')}"
            for cell in self._cells
            if (cell.model, cell.tokens, cell.mode) == (model.name, tokens, self._options.modes[0])
        ]
        self._echo(f"{model.name} {tokens}: {', '.join(here)}")

    def _write(self) -> dict[str, Any]:
        options = self._options
        method = {
            "replays": options.replays,
            "routers": dict(self._routers),
            "modes": list(options.modes),
            "variants": {name: list(found) for name, found in options.variants.items()},
        }
        started = [dataclasses.asdict(cell) for cell in self._startup]
        selected = [dataclasses.asdict(cell) for cell in self._topk]
        facts = {**self._facts, "method": method, "startup": started, "topk": selected}
        document = report.document(
            facts, self._cells, self._host, self._plugins, self._peers, self._here
        )
        path = options.out / "bench.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        os.replace(partial, path)
        return document

    def _draw(self, document: Mapping[str, Any]) -> None:
        out = self._options.out
        written = [out / "bench.json"]
        if self._cells or self._topk:
            try:
                if self._cells:
                    written += plot.draw(document, self._options.models, self._peers, out)
                if self._topk:
                    written += topk_report.draw(document, out)
            except ImportError as error:
                self._echo(f"no plot: {error}; next: pip install matplotlib")
        self._echo(f"wrote {', '.join(map(str, written))}")


def run(options: Options, machine: Machine, echo: Echo) -> bool:
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        return Run(options, machine, Path(scratch), echo).run()
