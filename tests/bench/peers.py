"""The figures to beat: the peers' times, the bars and the floors, read from ``peers.json``.

GPUs of one kind differ in clocks and memory, so a peer's figure is scaled by this run's
``torch.mm`` over the ``torch.mm`` measured beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.catalog.models import Model

PATH = Path(__file__).with_name("peers.json")

_BF16 = 2


@dataclass(frozen=True, slots=True)
class ModelPeers:
    """One model's figures by number of tokens, and the chain they were measured with."""

    routers: int
    best_peer: Mapping[int, float]
    torch_mm: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """From ``first`` to ``last`` tokens, ours takes at most ``ratio`` of the peer's time."""

    first: int
    last: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Floor:
    """What no kernel goes below: an empty graph node, memory bandwidth, tensor-core rate."""

    node_us: float
    bytes_per_us: float
    flops_per_us: float

    def of(self, model: Model, tokens: int) -> float:
        """Microseconds: weights and inputs are read once, every product is computed once."""
        moved = _BF16 * model.hidden * (model.experts + tokens)
        flops = 2 * model.hidden * model.experts * tokens
        return max(self.node_us, moved / self.bytes_per_us, flops / self.flops_per_us)


@dataclass(frozen=True, slots=True)
class Peers:
    """``gpu``: the device that all of ``models`` were measured on; ``source``: how."""

    gpu: str
    source: str
    tokens: tuple[int, ...]
    models: Mapping[str, ModelPeers]
    bars: Mapping[str, tuple[Bar, ...]]
    host_bar: float
    floor: Floor

    def bar(self, family: str, tokens: int) -> float | None:
        """The ratio for a router of ours to reach at that many tokens; None outside the ranges that
        have one.
        """
        bars = self.bars.get(family, ())
        return next((bar.ratio for bar in bars if bar.first <= tokens <= bar.last), None)

    def scaled(self, model: str, tokens: int, torch_mm: float | None) -> float | None:
        """The best peer's time on the device of a run in which ``torch.mm`` took ``torch_mm``."""
        figures = self.models.get(model)
        if figures is None or torch_mm is None or tokens not in figures.best_peer:
            return None
        return figures.best_peer[tokens] * torch_mm / figures.torch_mm[tokens]


def parse(document: Mapping[str, Any]) -> Peers:
    """The figures of a document such as ``peers.json``."""
    tokens = tuple(document["tokens"])

    def by_tokens(values: list[float]) -> dict[int, float]:
        return dict(zip(tokens, map(float, values), strict=True))

    models = {
        name: ModelPeers(
            figures["routers"], by_tokens(figures["best_peer"]), by_tokens(figures["torch_mm"])
        )
        for name, figures in document["models"].items()
    }
    bars = {
        family: tuple(Bar(**bar) for bar in listed) for family, listed in document["bars"].items()
    }
    floor = Floor(**document["floor"])
    return Peers(
        document["gpu"], document["source"], tokens, models, bars, document["host_bar"], floor
    )


def load() -> Peers:
    return parse(json.loads(PATH.read_text()))
