"""The tables and the plot of the part ``topk``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.report import aligned
from tests.bench.topk import KERNEL, PEER, TopkCell
from tests.bench.topk_rows import RANDOM

#: The most that a call may take: this fraction of torch.topk's time; and, for rows that are hard to
#: select from, this multiple of the time for random rows.
PEER_BAR, HOSTILE_BAR = 1 / 3, 2.0
#: The columns from which a call is compared with the peer.
_COMPARED = 8192


def table(cells: Sequence[TopkCell]) -> list[str]:
    """Microseconds by shape and contender, for random rows, with what was to be reached."""
    cells = [cell for cell in cells if cell.pattern == RANDOM]
    if not cells:
        return []
    names = list(dict.fromkeys(cell.contender for cell in cells))
    shapes = dict.fromkeys((cell.rows, cell.columns, cell.top_k) for cell in cells)
    by_key = {(cell.rows, cell.columns, cell.top_k, cell.contender): cell for cell in cells}
    rows = [["columns x rows, k", *names, "floor", "bar", "met", f"of {PEER}", "served by"]]
    for shape in shapes:
        found = [by_key.get((*shape, name)) for name in names]
        ours, peer = by_key.get((*shape, KERNEL)), by_key.get((*shape, PEER))
        first = next(cell for cell in found if cell is not None)
        rows.append(
            [
                _named(first),
                *map(_shown, found),
                f"{first.floor_us:.2f}",
                "-" if first.bar_us is None else f"{first.bar_us:.2f}",
                {True: "yes", False: "NO", None: "-"}[_met(ours, first.bar_us)],
                _ratio(ours, peer),
                "-" if ours is None or ours.served_by is None else ours.served_by.split("/")[-1],
            ]
        )
    head = "topk: microseconds a call, scores in memory; bars and floor are an H200's"
    return [head, *aligned(rows)]


def hostile_table(cells: Sequence[TopkCell]) -> list[str]:
    """Microseconds by pattern and shape; in brackets, as a multiple of those of random rows."""
    own = [cell for cell in cells if cell.contender == KERNEL]
    patterns = list(dict.fromkeys(cell.pattern for cell in own))
    if len(patterns) < 2:
        return []
    hostile = [cell for cell in own if cell.pattern != RANDOM]
    shapes = dict.fromkeys((cell.rows, cell.columns, cell.top_k) for cell in hostile)
    by_key = {(cell.rows, cell.columns, cell.top_k, cell.pattern): cell for cell in own}
    rows = [["pattern", *(f"{columns} x {count}, {k}" for count, columns, k in shapes)]]
    for pattern in patterns:
        row = [pattern]
        for shape in shapes:
            cell, plain = by_key.get((*shape, pattern)), by_key.get((*shape, RANDOM))
            row.append(f"{_shown(cell)} ({_ratio(cell, plain)})")
        rows.append(row)
    return [
        f"topk: rows that are hard to select from; bar: {HOSTILE_BAR} of random",
        *aligned(rows),
    ]


def summary(cells: Sequence[TopkCell]) -> list[str]:
    """How many bars were met."""
    own = [cell for cell in cells if cell.contender == KERNEL and cell.median_us is not None]
    plain = {_shape(cell): cell for cell in own if cell.pattern == RANDOM}
    peers = {_shape(cell): cell for cell in cells if cell.contender == PEER}
    bars: list[bool] = []
    relative: list[bool] = []
    hostile: list[bool] = []
    for cell in own:
        if cell.pattern != RANDOM:
            _judge(hostile, cell, plain.get(_shape(cell)), HOSTILE_BAR)
            continue
        met = _met(cell, cell.bar_us)
        if met is not None:
            bars.append(met)
        if cell.columns >= _COMPARED:
            _judge(relative, cell, peers.get(_shape(cell)), PEER_BAR)
    judged = {
        "bars in microseconds": bars,
        "relative to torch.topk": relative,
        "for rows that are hard to select from": hostile,
    }
    counts = [f"{sum(each)} of {len(each)} {name}" for name, each in judged.items() if each]
    return [f"{KERNEL}: met {', '.join(counts)}"] if counts else []


def problems(cells: Iterable[TopkCell]) -> list[str]:
    """One line for each cell with an error."""
    return [
        f"{cell.contender}: {cell.error} ({cell.pattern}, {_named(cell)})"
        for cell in cells
        if cell.error is not None
    ]


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``topk.svg`` and ``topk.png``: microseconds against the bytes of the scores. Raises
    ImportError if matplotlib is absent.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [cell for cell in document["topk"] if cell["pattern"] == RANDOM and cell["median_us"]]
    figure, panel = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(cell["contender"] for cell in cells):
        points = sorted(
            (cell["rows"] * cell["columns"] * 4, cell["median_us"])
            for cell in cells
            if cell["contender"] == name
        )
        width = 2.5 if name == KERNEL else 1.0
        panel.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
    floors = sorted({(cell["rows"] * cell["columns"] * 4, cell["floor_us"]) for cell in cells})
    panel.plot(*zip(*floors, strict=True), "k:", linewidth=1.0, label="floor of an H200")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("bytes of scores")
    panel.set_ylabel("microseconds a call")
    panel.set_title(document["device"]["name"])
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize="small")
    figure.tight_layout()
    paths = [folder / "topk.svg", folder / "topk.png"]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


def _shape(cell: TopkCell) -> tuple[int, int, int]:
    return cell.rows, cell.columns, cell.top_k


def _named(cell: TopkCell) -> str:
    return f"{cell.columns} x {cell.rows}, {cell.top_k}"


def _shown(cell: TopkCell | None) -> str:
    if cell is None or cell.median_us is None:
        return "-" if cell is None or cell.error is None else "-!"
    return f"{cell.median_us:.2f}" + ("" if cell.error is None else "!")


def _met(cell: TopkCell | None, bar: float | None) -> bool | None:
    if cell is None or cell.median_us is None or bar is None:
        return None
    return cell.error is None and cell.median_us <= bar


def _ratio(cell: TopkCell | None, other: TopkCell | None) -> str:
    if cell is None or other is None or cell.median_us is None or other.median_us is None:
        return "-"
    return f"{cell.median_us / other.median_us:.3f}"


def _judge(found: list[bool], cell: TopkCell, other: TopkCell | None, most: float) -> None:
    if other is not None and other.median_us is not None:
        found.append(bool(_met(cell, most * other.median_us)))
