"""How long the dense Routers of an artifacts folder take on this GPU, beside ``torch.mm`` alone.

A chain is one call after the other, each with weights of its own, captured into one CUDA graph.
There are so many calls that their weights are three times as large as the L2 cache: none is found
there when its turn comes again. The hidden states of a large batch change in the same way. A figure
is the median over the replays, divided by the number of calls. Launches that allow it overlap with
the one before (programmatic dependent launch), as they do in a model.

The figures are a first look at a new GPU, in seconds. ``make bench`` of a checkout also puts a
dependent kernel between the calls, checks the results and measures more.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from router_runtime.device.artifact_store import read_manifest
from router_runtime.evidence.choice import DENSE, TokenRange, microseconds
from router_runtime.format.manifest import Entry
from router_runtime.format.scoring import CONSTANTS
from router_runtime.format.target import Target
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router, register_router, unregister_router

#: The batches that are timed.
TOKENS = (1, 16, 64, 256, 1024, 4096)

#: How many times the size of the L2 cache the weights of a chain have, and the hidden states.
CACHES = 3

#: Replays of a chain, of which the median counts, and the seconds of replays before: a GPU that has
#: waited for the host needs them to be back at its clocks.
REPLAYS = 15
WARM_SECONDS = 0.03

_BF16_BYTES = 2
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Timing:
    """One model and number of tokens.

    Attributes:
        model: The model's name.
        tokens: The rows of the batch.
        entries: The keys of the entries that serve the batch, in the order of its rows.
        launches: How many launches the batch takes.
        router_us: Microseconds of a call of a Router. None: see ``error``.
        torch_mm_us: Microseconds of ``torch.mm`` alone, bf16 in and FP32 out. None: see ``error``.
        stated_us: What the manifest states for the same launches, by which the entries were chosen:
            measured on another GPU, or predicted. None: it has no figure.
        error: Why the figures are missing, or None.

    """

    model: str
    tokens: int
    entries: tuple[str, ...] = ()
    launches: int = 0
    router_us: float | None = None
    torch_mm_us: float | None = None
    stated_us: float | None = None
    error: str | None = None


class Machine(Protocol):
    """Where chains are timed.

    Attributes:
        device: The device of all tensors.
        capability: Its compute capability.
        l2_bytes: The size of its L2 cache.

    """

    device: torch.device
    capability: tuple[int, int]
    l2_bytes: int

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the logits, FP32 ``[rows, experts]``, as ``torch.mm`` computes them."""

    def microseconds(self, chain: Callable[[], object]) -> float:
        """Return the microseconds of a chain, the median of several runs."""


class Gpu:
    """torch's current GPU, timed by events around the replays of a CUDA graph."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self.l2_bytes: int = properties.L2_cache_size

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See ``Machine``."""
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)

    def microseconds(self, chain: Callable[[], object]) -> float:
        """See ``Machine``."""
        stream = self._stream
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(stream):
            chain()  # what is loaded and allocated once must not be, during a capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            chain()
        with torch.cuda.stream(stream):
            warm_until = time.perf_counter() + WARM_SECONDS
            while time.perf_counter() < warm_until:
                graph.replay()
                stream.synchronize()
            return statistics.median(_replayed(graph, stream) for _ in range(REPLAYS))

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        """One for all chains: cuBLAS keeps a workspace for each stream that it has seen."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


def _replayed(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    """The microseconds of one replay."""
    start, end = _event(), _event()
    start.record(stream)
    graph.replay()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def time_models(
    artifacts: Path, machine: Machine, tokens: Sequence[int] = TOKENS
) -> Iterator[Timing]:
    """Yield the timings of every model that the artifacts have a dense kernel of this device for.

    What cannot be timed (nothing serves the model, the device fails) is a timing with an error, and
    the others follow. Raises ArtifactError for a manifest that cannot be read.
    """
    for model, entry in _models(artifacts, machine.capability).items():
        yield from _time_model(model, entry, artifacts, machine, tokens)


def _models(artifacts: Path, capability: tuple[int, int]) -> dict[str, Entry]:
    """Model -> a dense entry of it that loads on devices of that compute capability."""
    return {
        entry.model: entry
        for entry in read_manifest(artifacts).entries
        if entry.kernel in DENSE
        and entry.model is not None
        and Target.parse(entry.target).runs_on(*capability)
    }


def _time_model(
    model: str, entry: Entry, artifacts: Path, machine: Machine, tokens: Sequence[int]
) -> Iterator[Timing]:
    try:
        layers = _Layers(entry, artifacts, machine)
    except RuntimeError as error:
        for count in tokens:
            yield Timing(model, count, error=str(error))
        return
    try:
        for count in tokens:
            yield layers.timing(model, count)
    finally:
        layers.release()


class _Layers:
    """Routers of one model with weights of their own, enough of them for a chain."""

    def __init__(self, entry: Entry, artifacts: Path, machine: Machine) -> None:
        hidden, experts, top_k = (
            int(entry.constants[name]) for name in ("HIDDEN", "EXPERTS", "TOP_K")
        )
        scoring, temperature = (entry.constants[name] for name in CONSTANTS)
        self._machine, self._hidden = machine, hidden
        self._random = torch.Generator(machine.device).manual_seed(1)
        config = RouterConfig(
            hidden,
            experts,
            top_k,
            1.0,
            scoring=cast(Any, scoring),
            gate_temperature=float(temperature),
        )
        bias = torch.zeros(experts, device=machine.device)
        self._weights = [
            self._normal(experts, hidden) * _WEIGHT_SCALE
            for _ in range(self._distinct(experts * hidden))
        ]
        self._routers = [
            Router(config, weight=weight, bias=bias, device=machine.device, artifacts=artifacts)
            for weight in self._weights
        ]

    def timing(self, model: str, tokens: int) -> Timing:
        """Time the Routers and ``torch.mm`` on batches of ``tokens`` rows."""
        parts = _parts(self._routers[0].token_ranges, tokens)
        known: dict[str, Any] = {
            "entries": tuple(dict.fromkeys(entry.key for entry, _ in parts)),
            "launches": len(parts),
            "stated_us": _stated(parts),
        }
        try:
            count = min(len(self._routers), self._distinct(tokens * self._hidden))
            inputs = self._normal(count, tokens, self._hidden)
            return Timing(
                model,
                tokens,
                **known,
                router_us=self._of_a_call(self._routers, inputs, lambda call, x: call(x)),
                torch_mm_us=self._of_a_call(
                    self._weights, inputs, lambda weight, x: self._machine.multiply(x, weight)
                ),
            )
        except RuntimeError as error:
            return Timing(model, tokens, **known, error=str(error))

    def release(self) -> None:
        """Let the memory go: a Router that a graph has captured stays registered otherwise."""
        for router in self._routers:
            unregister_router(register_router(router), force=True)

    def _of_a_call(
        self, layers: Sequence[Any], inputs: Tensor, call: Callable[[Any, Tensor], object]
    ) -> float:
        """Return the microseconds of one call in a chain over ``layers``, the inputs in turn."""

        def chain() -> None:
            for index, layer in enumerate(layers):
                call(layer, inputs[index % len(inputs)])

        return self._machine.microseconds(chain) / len(layers)

    def _distinct(self, elements: int) -> int:
        """Return how many bf16 tensors of that many elements exceed the L2 cache."""
        return math.ceil(CACHES * self._machine.l2_bytes / (elements * _BF16_BYTES))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self._random, device=self._machine.device, dtype=torch.bfloat16
        )


def _parts(ranges: Sequence[TokenRange], tokens: int) -> list[tuple[Entry, int]]:
    """The launches of a batch: each its entry and its number of tokens."""
    if not ranges:
        return []
    most = ranges[-1].high
    counts = [min(most, tokens - start) for start in range(0, tokens, most)]
    return [(next(each.entry for each in ranges if n <= each.high), n) for n in counts]


def _stated(parts: Sequence[tuple[Entry, int]]) -> float | None:
    """The sum of what the manifest states for the launches, None if it has no figure for one."""
    found = sum(microseconds(entry, tokens) for entry, tokens in parts)
    return found if parts and math.isfinite(found) else None
