"""Latency against tokens, log-log, one panel a model, with the floors and the scaled peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_kernels.catalog.models import Model
from tests.bench.contenders import family
from tests.bench.peers import Peers


def draw(
    document: Mapping[str, Any], models: Sequence[Model], peers: Peers, folder: Path
) -> list[Path]:
    """Write ``bench.svg`` and ``bench.png``. Raises ImportError if matplotlib is absent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [
        cell
        for cell in document["cells"]
        if cell["mode"] == "pdl" and cell["median_us"] and cell["median_us"] > 0
    ]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 5), squeeze=False, sharey=True
    )
    for panel, model in zip(panels[0], models, strict=True):
        own = [cell for cell in cells if cell["model"] == model.name]
        for name in dict.fromkeys(cell["contender"] for cell in own):
            points = sorted(
                (cell["tokens"], cell["median_us"]) for cell in own if cell["contender"] == name
            )
            width = 2.5 if family(name) else 1.0
            panel.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
        scaled = [
            (found["tokens"], found["scaled_peer_us"])
            for found in document["comparisons"]
            if found["model"] == model.name
        ]
        if scaled:
            points = sorted(set(scaled))
            panel.plot(*zip(*points, strict=True), "k--", linewidth=1.0, label="best peer, scaled")
        ticks = sorted({cell["tokens"] for cell in own})
        if ticks:
            steps = [2**power for power in range(ticks[-1].bit_length())]
            floors = [(tokens, peers.floor.of(model, tokens)) for tokens in (*steps, ticks[-1])]
            panel.plot(*zip(*sorted(set(floors)), strict=True), "k:", linewidth=1.0, label="floor")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
        panel.set_xlabel("tokens")
        panel.set_title(f"{model.name}: H {model.hidden}, E {model.experts}, k {model.top_k}")
        panel.grid(True, which="both", alpha=0.25)
    panels[0][0].set_ylabel("microseconds a router, in a dependent chain")
    panels[0][0].legend(fontsize="small")
    figure.suptitle(document["device"]["name"])
    figure.tight_layout()
    paths = [folder / "bench.svg", folder / "bench.png"]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths
