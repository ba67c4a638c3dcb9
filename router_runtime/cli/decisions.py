"""Which kernel serves what on a device, as data. Pure: everything that decides is an argument.

The decisions are those that a Router and the row ops make: the same requests go to the same
functions of ``router_runtime.device``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from router_runtime.device.dispatch import Dispatch, dispatch, gate_requests
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.device.resolve import Request, Resolution, next_step, resolve
from router_runtime.evidence.choice import DENSE
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.scoring import CONSTANTS

#: What the two dense kernels are called together.
DENSE_ROUTER = "dense_router"

#: The constants that a Router's requests state, where the kernel has a constant of that name.
_SHAPE = ("HIDDEN", "EXPERTS", "TOP_K", *CONSTANTS, "IMAGES")

#: The opt-in shared memory per block, in bytes, of every device that the targets name.
_SHARED_MEMORY_PER_BLOCK = 227 * 1024

#: The evidence status of an entry.
StatusOf = Callable[[Entry], str]


@dataclass(frozen=True, slots=True)
class ServedRange:
    """Batches of ``low`` to ``high`` tokens are served by the entry of that key."""

    low: int
    high: int
    entry: str
    kernel: str
    variant: str
    status: str


@dataclass(frozen=True, slots=True)
class RouterDecision:
    """Which kernels serve the routers of one shape. ``ranges`` is empty if none does; ``next`` is
    then what to do about it. ``models`` are the models of the manifest that have the shape.
    """

    kernel: str
    models: tuple[str, ...]
    constants: Constants
    ranges: tuple[ServedRange, ...]
    next: str | None

    @property
    def name(self) -> str:
        """The router in the syntax of ``--why``."""
        return f"{self.kernel}/{'+'.join(self.models)}" + (
            " (images)" if self.constants.get("IMAGES") else ""
        )


@dataclass(frozen=True, slots=True)
class RowOpDecision:
    """Which entries of a kernel without a model serve. ``limits`` has, for each quantity that the
    kernel limits, the most that is served; it is empty, and so is ``entries``, if nothing serves.
    """

    kernel: str
    limits: Mapping[str, int]
    entries: tuple[str, ...]
    statuses: tuple[str, ...]
    next: str | None


def imagined_device(major: int, minor: int) -> DeviceFacts:
    """A device of a compute capability, with the oldest driver that serves."""
    return DeviceFacts(
        major,
        minor,
        MINIMUM_DRIVER,
        1,
        _SHARED_MEMORY_PER_BLOCK,
        present=False,
    )


def router_decisions(
    manifest: Manifest,
    device: DeviceFacts,
    status_of: StatusOf,
    artifacts: Path | None = None,
    accept: str | None = None,
) -> tuple[RouterDecision, ...]:
    """The decision for each kernel and each shape that the manifest has, dense routers first.

    ``accept`` is that of the Router.
    """
    return tuple(
        _router_decision(
            kernel, models, requests, dispatch(requests, device, manifest, status_of, artifacts)
        )
        for kernel, models, requests in _routers(manifest, accept)
    )


def _router_decision(
    kernel: str, models: tuple[str, ...], requests: tuple[Request, ...], found: Dispatch
) -> RouterDecision:
    statuses = {
        candidate.entry.key: candidate.status
        for resolution in found.resolutions
        for candidate in resolution.candidates
    }
    ranges = tuple(
        ServedRange(
            each.low,
            each.high,
            each.entry.key,
            each.entry.kernel,
            each.entry.variant,
            statuses[each.entry.key],
        )
        for each in found.token_ranges
    )
    advice = None if ranges else found.next_step(brief=True)
    return RouterDecision(kernel, models, requests[0].constants, ranges, advice)


def _routers(
    manifest: Manifest, accept: str | None
) -> Iterator[tuple[str, tuple[str, ...], tuple[Request, ...]]]:
    """(kernel, models, requests) of every router that the manifest has a kernel for."""
    found: dict[tuple[str, tuple[tuple[str, int | float | str], ...]], list[str]] = {}
    for entry in manifest.entries:
        if entry.model is not None:
            kernel = DENSE_ROUTER if entry.kernel in DENSE else entry.kernel
            models = found.setdefault((kernel, tuple(shape_of(entry).items())), [])
            if entry.model not in models:
                models.append(entry.model)
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != DENSE_ROUTER, item[0]))
    for (kernel, shape), models in ordered:
        yield kernel, tuple(sorted(models)), router_requests(kernel, dict(shape), accept)


def router_requests(
    kernel: str, shape: Constants, accept: str | None = None
) -> tuple[Request, ...]:
    """The requests that a Router makes for ``kernel``, ``dense_router`` included."""
    names = DENSE if kernel == DENSE_ROUTER else (kernel,)
    requests = tuple(Request(name, constants=shape, accept=accept) for name in names)
    return gate_requests(*requests) if shape.get("IMAGES") == 0 else requests


def shape_of(entry: Entry) -> Constants:
    """The constants of an entry that a Router's request states."""
    return {name: entry.constants[name] for name in _SHAPE if name in entry.constants}


def row_op_decisions(
    manifest: Manifest, device: DeviceFacts, status_of: StatusOf, artifacts: Path | None = None
) -> tuple[RowOpDecision, ...]:
    """The decision for each kernel that is compiled for every model at once."""
    kernels = sorted({entry.kernel for entry in manifest.entries if entry.model is None})
    resolutions = (
        resolve(Request(kernel), device, manifest, status_of, artifacts) for kernel in kernels
    )
    return tuple(_row_op_decision(each) for each in resolutions)


def _row_op_decision(resolution: Resolution) -> RowOpDecision:
    accepted = [candidate for candidate in resolution.candidates if candidate.accepted]
    limits: dict[str, int] = {}
    for candidate in accepted:
        for name, (_, high) in candidate.entry.contract.limits.items():
            limits[name] = max(limits.get(name, 0), high)
    return RowOpDecision(
        resolution.request.kernel,
        limits,
        tuple(candidate.entry.key for candidate in accepted),
        tuple(sorted({candidate.status for candidate in accepted})),
        None if accepted else next_step(resolution, brief=True),
    )
