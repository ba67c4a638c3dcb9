"""From measured cells to the comparison with the peers, the tables and the JSON document. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from build_kernels.catalog.models import Model
from router_runtime.evidence.choice import microseconds
from router_runtime.format.manifest import Entry
from tests.bench.contenders import MM, MM_TRITON, OURS, family
from tests.bench.engines import PluginCell
from tests.bench.host import OURS as HOST_OURS
from tests.bench.host import PEER as HOST_PEER
from tests.bench.host import HostCell
from tests.bench.latency import Cell
from tests.bench.peers import Peers

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against the best peer, at one model and number of tokens, with dependent launch.

    ``scaled_peer_us`` is the peer's figure on this device; ``ratio`` is ours over that.
    """

    model: str
    tokens: int
    contender: str
    ours_us: float
    torch_mm_us: float
    best_peer_us: float
    scaled_peer_us: float
    ratio: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class HostComparison:
    """Host time of an eager call of ours over the peer's in the same run."""

    model: str
    tokens: int
    contender: str
    ratio: float
    bar: float
    met: bool


@dataclass(frozen=True, slots=True)
class Stated:
    """A measured cell, and what the manifest states for the entry that served it: the figure by
    which the runtime chose it. It was measured on another device, or is a prediction.
    """

    model: str
    tokens: int
    contender: str
    entry: str
    measured_us: float
    stated_us: float
    ratio: float


def compare(cells: Iterable[Cell], peers: Peers) -> list[Comparison]:
    """Every cell of ours for which this run has a ``torch.mm`` and the peers have a figure."""
    cells = [cell for cell in cells if cell.mode == "pdl"]
    mm = {(cell.model, cell.tokens): cell.median_us for cell in cells if cell.contender == MM}
    found = []
    for cell in cells:
        run = mm.get((cell.model, cell.tokens))
        scaled = peers.scaled(cell.model, cell.tokens, run)
        ours = family(cell.contender)
        if (
            ours is None
            or cell.error is not None
            or cell.median_us is None
            or run is None
            or scaled is None
            or scaled <= 0
        ):
            continue
        ratio, bar = cell.median_us / scaled, peers.bar(ours, cell.tokens)
        found.append(
            Comparison(
                cell.model,
                cell.tokens,
                cell.contender,
                cell.median_us,
                run,
                peers.models[cell.model].best_peer[cell.tokens],
                scaled,
                ratio,
                bar,
                None if bar is None else ratio <= bar,
            )
        )
    return found


def best_peer(cells: Iterable[Cell], peers: Peers, model: str, tokens: int) -> float | None:
    """The time of the faster of two peers at that many tokens: that of ``peers``, scaled to this
    device, and torch.mm with a Triton top-k in this run. None without either.
    """
    here = {
        cell.contender: cell.median_us
        for cell in cells
        if (cell.model, cell.tokens, cell.mode) == (model, tokens, "pdl") and cell.error is None
    }
    found = (peers.scaled(model, tokens, here.get(MM)), here.get(MM_TRITON))
    return min((figure for figure in found if figure is not None), default=None)


def against_stated(cells: Iterable[Cell], entries: Iterable[Entry]) -> list[Stated]:
    """Every cell of ours with dependent launch whose entry has a figure for that many tokens."""
    by_key = {entry.key: entry for entry in entries}
    found = []
    for cell in cells:
        entry = by_key.get(cell.served_by or "")
        if entry is None or cell.mode != "pdl" or cell.median_us is None or cell.error is not None:
            continue
        stated = microseconds(entry, cell.tokens)
        if math.isfinite(stated):
            ratio = cell.median_us / stated
            found.append(
                Stated(
                    *(cell.model, cell.tokens, cell.contender, entry.key),
                    *(cell.median_us, stated, ratio),
                )
            )
    return found


def compare_host(cells: Iterable[HostCell], bar: float) -> list[HostComparison]:
    cells = list(cells)
    peer = {(c.model, c.tokens): c.median_us for c in cells if c.contender == HOST_PEER}
    found = []
    for cell in cells:
        other = peer.get((cell.model, cell.tokens))
        if cell.contender in HOST_OURS and cell.median_us is not None and other is not None:
            ratio = cell.median_us / other
            found.append(
                HostComparison(cell.model, cell.tokens, cell.contender, ratio, bar, ratio <= bar)
            )
    return found


def document(
    facts: Mapping[str, Any],
    cells: Sequence[Cell],
    host: Sequence[HostCell],
    plugins: Sequence[PluginCell],
    peers: Peers,
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """The whole result of a run, as JSON. ``facts``: device, software, artifacts,
    method. ``entries``: those that run on the device.
    """
    return {
        "format_version": FORMAT_VERSION,
        **facts,
        "peers": f"{peers.gpu}: {peers.source}",
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "comparisons": [dataclasses.asdict(found) for found in compare(cells, peers)],
        "stated": [dataclasses.asdict(found) for found in against_stated(cells, entries)],
        "host": [dataclasses.asdict(cell) for cell in host],
        "host_comparisons": [
            dataclasses.asdict(found) for found in compare_host(host, peers.host_bar)
        ],
        "plugins": [{**dataclasses.asdict(cell), "added_us": cell.added_us} for cell in plugins],
    }


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of right-aligned columns; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def latency_table(cells: Sequence[Cell], model: Model, peers: Peers) -> list[str]:
    """Microseconds by tokens and contender: with dependent launch / without."""
    cells = [cell for cell in cells if cell.model == model.name]
    names = list(dict.fromkeys(cell.contender for cell in cells))
    by_key = {(cell.tokens, cell.contender, cell.mode): cell for cell in cells}
    modes = sorted({cell.mode for cell in cells})  # "pdl" before "plain"
    rows = [["tokens", "link", *names, "floor"]]
    for tokens in sorted({cell.tokens for cell in cells}):

        def both(name: str, field: str, tokens: int = tokens) -> str:
            found = [by_key.get((tokens, name, mode)) for mode in modes]
            bad = any(cell is not None and cell.error is not None for cell in found)
            text = "/".join("-" if c is None else _us(getattr(c, field)) for c in found)
            return text + ("!" if bad else "")

        link = "/".join(
            _us(next((c.link_us for c in cells if (c.tokens, c.mode) == (tokens, mode)), None))
            for mode in modes
        )
        columns = [both(name, "median_us") for name in names]
        rows.append([str(tokens), link, *columns, _us(peers.floor.of(model, tokens))])
    head = f"{model.name}: microseconds a router, links taken off; {' / '.join(modes)}"
    return [head, *aligned(rows)]


def compact_table(cells: Sequence[Cell], models: Sequence[Model], peers: Peers) -> list[str]:
    """ours / torch.mm / best peer, by tokens and model, with dependent launch."""
    cells = [cell for cell in cells if cell.mode == "pdl" and cell.error is None]
    by_key = {(cell.model, cell.tokens, cell.contender): cell.median_us for cell in cells}
    names = [model.name for model in models]
    rows = [["tokens", *names]]
    for tokens in sorted({cell.tokens for cell in cells}):
        row = [str(tokens)]
        for name in names:
            ours, mm = (by_key.get((name, tokens, contender)) for contender in (OURS, MM))
            row.append(f"{_us(ours)} / {_us(mm)} / {_us(best_peer(cells, peers, name, tokens))}")
        rows.append(row)
    if len(rows) == 1:
        return []
    head = (
        f"microseconds a router: {OURS} / {MM} alone / best peer: the faster of {MM_TRITON} here "
        f"and the one measured on one {peers.gpu}, scaled by {MM}"
    )
    return [head, *aligned(rows)]


def comparison_table(comparisons: Sequence[Comparison], model: Model) -> list[str]:
    comparisons = [found for found in comparisons if found.model == model.name]
    if not comparisons:
        return []
    rows = [["tokens", "contender", "ours", "best peer", "scaled", "ratio", "bar", "met"]]
    for found in comparisons:
        rows.append(
            [
                str(found.tokens),
                found.contender,
                _us(found.ours_us),
                _us(found.best_peer_us),
                _us(found.scaled_peer_us),
                f"{found.ratio:.3f}",
                "-" if found.bar is None else f"{found.bar:.2f}",
                {True: "yes", False: "NO", None: "-"}[found.met],
            ]
        )
    return [f"{model.name}: against the best peer, scaled by this run's {MM}", *aligned(rows)]


def stated_table(stated: Sequence[Stated]) -> list[str]:
    if not stated:
        return []
    rows = [["entry", "tokens", "measured", "stated", "ratio"]]
    for found in stated:
        rows.append(
            [
                found.entry,
                str(found.tokens),
                _us(found.measured_us),
                _us(found.stated_us),
                f"{found.ratio:.3f}",
            ]
        )
    return [
        "against the figures in the manifest by which entries are chosen: of another device, or "
        "predicted",
        *aligned(rows),
    ]


def host_table(cells: Sequence[HostCell], bar: float) -> list[str]:
    if not cells:
        return []
    ratios = {(c.model, c.tokens, c.contender): c for c in compare_host(cells, bar)}
    rows = [["host", "tokens", "model", "median", "p10", "p90", "first"]]
    rows[0] += ["warmed", "rested", "100th", "ratio", "met"]
    for cell in cells:
        found = ratios.get((cell.model, cell.tokens, cell.contender))
        rows.append(
            [
                cell.contender,
                str(cell.tokens),
                cell.model,
                _us(cell.median_us),
                _us(cell.low_us),
                _us(cell.high_us),
                _us(cell.first_us),
                _us(cell.warmed_us),
                _us(cell.rested_us),
                _us(cell.hundredth_us),
                "-" if found is None else f"{found.ratio:.3f}",
                "-" if found is None else "yes" if found.met else "NO",
            ]
        )
    return [
        f"microseconds of the host for an eager call; bar: {bar} of {HOST_PEER}",
        "one whole call, waited for: first, warmed (the first after a warm-up), rested (a later",
        "one, after a pause such as the first had), 100th",
        *aligned(rows),
    ]


def plugin_table(cells: Sequence[PluginCell], bar: float) -> list[str]:
    rows = [["plug-in", "call", "router", "added", "met"]]
    for cell in cells:
        rows.append(
            [
                cell.engine,
                _us(cell.call_us),
                _us(cell.router_us),
                _us(cell.added_us),
                "yes" if cell.added_us <= bar else "NO",
            ]
        )
    return [
        "microseconds of the host that a plug-in adds to the eager op of a layer: minimum over",
        f"batches, with a stand-in for the router whose results are ready; bar: {bar}",
        *aligned(rows),
    ]


def problems(cells: Sequence[Cell], host: Sequence[HostCell]) -> list[str]:
    """One line for each distinct error, with where it first happened and how often."""
    counted: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.error is not None:
            where = f"{cell.model} {cell.tokens} {cell.mode}"
            counted.setdefault((cell.contender, cell.error), []).append(where)
    for other in host:
        if other.error is not None:
            where = f"{other.model} {other.tokens} host"
            counted.setdefault((other.contender, other.error), []).append(where)
    return [
        f"{contender}: {error} ({places[0]}"
        + (f" and {len(places) - 1} more)" if len(places) > 1 else ")")
        for (contender, error), places in counted.items()
    ]


def summary(comparisons: Sequence[Comparison], host: Sequence[HostComparison]) -> list[str]:
    """How many bars were met, and the farthest from its bar."""
    lines = []
    judged = [found for found in comparisons if found.bar is not None]
    for name in dict.fromkeys(found.contender for found in judged):
        own = [found for found in judged if found.contender == name]
        worst = max(own, key=lambda found: found.ratio / (found.bar or math.inf))
        lines.append(
            f"{name}: {sum(bool(found.met) for found in own)} of {len(own)} bars met; farthest: "
            f"{worst.model} at {worst.tokens} tokens, ratio {worst.ratio:.3f}, bar {worst.bar}"
        )
    if host:
        farthest = max(host, key=lambda found: found.ratio)
        lines.append(
            f"host time: {sum(found.met for found in host)} of {len(host)} bars met; farthest: "
            f"{farthest.contender} at {farthest.tokens} tokens, ratio {farthest.ratio:.3f}, "
            f"bar {farthest.bar}"
        )
    return lines


def latency_rows(cells: Sequence[Cell], target: str, tokens: Sequence[int]) -> list[str]:
    """The rows of ``latency.toml`` for dense kernels timed alone: each as far as it was timed."""
    cells = [
        cell
        for cell in cells
        if cell.mode == "pdl" and "/" in cell.contender and cell.median_us is not None
    ]
    lines = [f"tokens = {list(tokens)}"]
    for model in dict.fromkeys(cell.model for cell in cells):
        lines += ["", f"[{target}.{model}]"]
        for name in dict.fromkeys(cell.contender for cell in cells if cell.model == model):
            by_tokens = {
                cell.tokens: cell.median_us
                for cell in cells
                if (cell.model, cell.contender) == (model, name)
            }
            figures = []
            for count in tokens:
                found = by_tokens.get(count)
                if found is None:
                    break
                figures.append(f"{found:.2f}")
            lines.append(f'"{name}" = [{", ".join(figures)}]')
    return lines
