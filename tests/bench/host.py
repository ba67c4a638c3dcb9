"""Host time: how long the caller's thread is busy with one eager call, and how the first call
compares with the hundredth.

What torch itself does at a first use of the sizes that a call returns is measured by itself, and
first: ``torch.empty`` of a call's outputs. Of ours the first call is taken twice, of a router that
has just been built and of one that has been warmed up too, as ``warmup_router_compilation`` does.

Calls are submitted in batches that the GPU's queue holds with room to spare, after the previous
batch has drained, so no call ever waits for the GPU. Contenders take turns batch by batch: what
disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from build_kernels.catalog.models import Model
from router_runtime import (
    Router,
    dense_router,
    register_router,
    unregister_router,
    warmup_router_compilation,
)
from tests.bench.chain import make_inputs, make_layers
from tests.bench.contenders import CONTENDERS, Settings, make_router
from tests.bench.machine import Machine, attempt

#: A queue holds about a thousand launches; no contender here makes more than a few a call.
CALLS_PER_BATCH = 100

Call = Callable[[], object]

ROUTER, OP, PEER = "Router(x)", "torch.ops.dsv4.dense_router", "mm+triton"
OUTPUTS = "torch.empty"
OURS = (ROUTER, OP)


class Latency(NamedTuple):
    """Microseconds from the call to its result on the device, for the first and hundredth call, for
    a later one after the same pause that the first had, and for the first one after a warm-up.
    """

    first_us: float
    hundredth_us: float
    rested_us: float
    warmed_us: float | None = None


class Subject(NamedTuple):
    """What is called, and the router behind it if it is ours."""

    call: Call
    router: Router | None = None


@dataclass(frozen=True, slots=True)
class HostCell:
    """Microseconds of the host for one eager call, over batches. ``first_us`` and ``hundredth_us``
    are whole calls, waited for: the first of a router that has just been built, or of a function in
    a process that has not called it yet. ``rested_us`` is a later one, after a pause such as the
    first had; ``warmed_us`` is the first of another router after its warm-up.
    """

    model: str
    tokens: int
    contender: str
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    first_us: float | None = None
    hundredth_us: float | None = None
    rested_us: float | None = None
    warmed_us: float | None = None
    error: str | None = None


def submit_times(
    calls: Mapping[str, Call], synchronize: Call, batches: int, calls_per_batch: int
) -> dict[str, list[float]]:
    """Microseconds a call, one figure for each batch."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(batches):
            for name, call in calls.items():
                synchronize()
                start = time.perf_counter()
                for _ in range(calls_per_batch):
                    call()
                elapsed = time.perf_counter() - start
                times[name].append(elapsed / calls_per_batch * 1e6)
    finally:
        if collecting:
            gc.enable()
        synchronize()
    return times


def timed(call: Call, synchronize: Call) -> float:
    """Microseconds from the call to its result on the device."""
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e6


def after_a_pause(call: Call, synchronize: Call) -> float:
    """``timed``, without what was built before. The pause leaves caches cold and a GPU idle, so a
    first call is to be compared with a later one after a pause.
    """
    gc.collect()
    synchronize()
    return timed(call, synchronize)


def first_and_later(call: Call, synchronize: Call) -> Latency:
    first = after_a_pause(call, synchronize)
    *_, hundredth = [timed(call, synchronize) for _ in range(99)]
    return Latency(first, hundredth, after_a_pause(call, synchronize))


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value that this fraction of ``values`` does not exceed."""
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]


def measure(
    machine: Machine, model: Model, tokens: int, settings: Settings, batches: int
) -> list[HostCell]:
    """Every way to call the router, on the same weights and input."""
    layers = make_layers(model, 1, machine.device)
    weight, bias = layers.weights[0], layers.biases[0]
    (x,) = make_inputs(model, tokens, 1, machine.device)

    def outputs() -> Subject:
        shape, device = (tokens, model.top_k), machine.device
        return Subject(
            lambda: (
                torch.empty(shape, dtype=torch.float32, device=device),
                torch.empty(shape, dtype=torch.int32, device=device),
            )
        )

    def direct() -> Subject:
        router = make_router(model, weight, bias, "pdl", settings)
        return Subject(lambda: router(x), router)

    def through_torch() -> Subject:
        router = make_router(model, weight, bias, "pdl", settings)
        number, experts, k = register_router(router), model.experts, model.top_k
        registered.append(number)
        return Subject(lambda: dense_router(x, number, experts, k), router)

    def peer() -> Subject:
        route = CONTENDERS[PEER].make(layers, "pdl", settings)
        return Subject(lambda: route(0, x))

    registered: list[int] = []
    calls: dict[str, Call] = {}
    latencies: dict[str, Latency] = {}
    failed: list[HostCell] = []
    try:
        makers = {OUTPUTS: outputs, ROUTER: direct, OP: through_torch, PEER: peer}
        for name, make in makers.items():

            def begin(make: Callable[[], Subject] = make) -> tuple[Call, Latency]:
                call, router = make()
                latency = first_and_later(call, machine.synchronize)
                if router is not None:
                    other = make()
                    assert other.router is not None
                    warmup_router_compilation(other.router)
                    warmed = after_a_pause(other.call, machine.synchronize)
                    latency = latency._replace(warmed_us=warmed)
                return call, latency

            found = attempt(begin, machine)
            if isinstance(found, str):
                failed.append(HostCell(model.name, tokens, name, error=found))
            else:
                calls[name], latencies[name] = found
        # Once unrecorded: every contender has had its turn and the clocks are up.
        submit_times(calls, machine.synchronize, 1, CALLS_PER_BATCH)
        times = submit_times(calls, machine.synchronize, batches, CALLS_PER_BATCH)
    finally:
        for number in registered:
            unregister_router(number)
    cells = [
        HostCell(
            model.name,
            tokens,
            name,
            statistics.median(figures),
            percentile(figures, 0.1),
            percentile(figures, 0.9),
            *latencies[name],
        )
        for name, figures in times.items()
    ]
    return cells + failed
