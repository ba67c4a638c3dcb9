"""Which entry of the manifest serves one request on a device, and why the others do not.

The choice is pure: no driver, no files, no clock. (Only the advice in errors looks at files.)
Everything that decides is an argument, so a test can replay every decision, and ``router-runtime
doctor`` can explain decisions for devices that are absent.

Evidence decides. A ``verified`` entry is preferred to a ``source-verified`` one. An ``emulated``
one is chosen only if the caller accepts that status, and then counts as much as a
``source-verified`` one; an ``unproven`` one only if the caller names its variant. Among equals the
closest fit wins, in this order: the tightest limits around the requested quantities, the most
specific target (``a``, ``f``, none), a specialised variant before ``portable``, then the name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.errors import ResolutionError
from router_runtime.evidence.choice import Option, closeness
from router_runtime.evidence.ladder import ACCEPTABLE, serves, status_rank
from router_runtime.format.advice import (
    DRIVER,
    build_artifacts,
    build_for_device,
    build_model,
    record_evidence,
)
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants
from router_runtime.format.target import Target

#: The status of an entry that cannot serve for another reason: its evidence is not read.
NOT_READ = "not read"

#: What is missing for a status that does not serve by default.
_NO_EVIDENCE = "no evidence that this digest or its source is right on a device"
_MISSING = {
    "emulated": "its PTX passed with some instructions in software, and no evidence says that this "
    "digest or its source is right on a device"
}


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be served.

    ``constants`` must equal the entry's constants of those names. ``quantities`` must lie within
    the entry's limits, where it states any. ``parameters`` are names of parameters that it must
    have. ``variant`` names the one variant that may serve, proven or not. ``accept`` is a status
    (``ladder.ACCEPTABLE``) that may serve beside those that do by default. Where several requests
    are dispatched together, those with ``leads`` decide whose bits all entries must give.
    """

    kernel: str
    constants: Constants = dataclasses.field(default_factory=dict)
    quantities: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    variant: str | None = None
    accept: str | None = None
    leads: bool = True

    def __str__(self) -> str:
        facts = [f"{name}={value}" for name, value in sorted(self.constants.items())]
        facts += [f"{name}={value}" for name, value in sorted(self.quantities.items())]
        facts += self.parameters
        facts += [f"variant={self.variant}"] if self.variant is not None else []
        facts += [f"accept={self.accept}"] if self.accept is not None else []
        return f"{self.kernel}({', '.join(facts)})"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry of the requested kernel. It is accepted if ``reasons`` is empty."""

    entry: Entry
    status: str
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """Whether the entry may serve the request."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Resolution:
    """The choice, or None, and every candidate in the order of preference. ``artifacts`` is the
    folder of the manifest, for advice; None: the one that is used where none is named.
    """

    request: Request
    device: DeviceFacts
    choice: Entry | None
    candidates: tuple[Candidate, ...]
    artifacts: Path | None = None

    def trace(self) -> str:
        """One line for each candidate."""
        lines = []
        for candidate in self.candidates:
            if candidate.entry is self.choice:
                verdict = "chosen"
            elif candidate.accepted:
                verdict = "would serve, another fits better"
            else:
                verdict = "; ".join(candidate.reasons)
            lines.append(f"  {candidate.entry.key} [{candidate.status}]: {verdict}")
        return "\n".join(lines)

    def require(self) -> Entry:
        """The choice. Raises ResolutionError with the trace if there is none."""
        if self.choice is not None:
            return self.choice
        if self.candidates:
            found = f"none among {len(self.candidates)} candidates:\n{self.trace()}\n"
        else:
            found = "no entry of this kernel in the manifest; "
        raise ResolutionError(
            f"{self.request} on {self.device}: expected an entry that serves it, "
            f"found {found}{next_step(self)}"
        )


def resolve(
    request: Request,
    device: DeviceFacts,
    manifest: Manifest,
    status_of: Callable[[Entry], str],
    artifacts: Path | None = None,
) -> Resolution:
    """Return which entry of ``request.kernel`` serves. ``status_of`` gives an entry's evidence
    status; ``artifacts`` is the folder of the manifest, for advice.
    """
    candidates = [
        Candidate(entry, status, _reasons(entry, status, request, device))
        for entry in manifest.entries
        if entry.kernel == request.kernel
        for status in (status_of(entry),)
    ]
    candidates.sort(key=lambda candidate: _preference(candidate, request))
    choice = candidates[0].entry if candidates and candidates[0].accepted else None
    return Resolution(request, device, choice, tuple(candidates), artifacts)


def status_if_fitting(
    requests: Sequence[Request], device: DeviceFacts, status_of: Callable[[Entry], str]
) -> Callable[[Entry], str]:
    """``status_of`` for the entries whose target and constants fit one of the requests, and
    ``NOT_READ`` for the others: evidence takes time to read, and a process serves one model on
    one kind of device.
    """

    def status(entry: Entry) -> str:
        here = Target.parse(entry.target).runs_on(device.major, device.minor)
        fits = any(
            all(entry.constants.get(name) == value for name, value in request.constants.items())
            for request in requests
        )
        return status_of(entry) if here and fits else NOT_READ

    return status


def option(candidate: Candidate, request: Request) -> Option:
    """Return a candidate as one of the options that batches are divided among."""
    # A variant that the caller names is used without regard to its evidence.
    rank = 0
    if request.variant is None:
        rank = status_rank(candidate.status, request.accept)
    fit = closeness(candidate.entry, request.quantities)
    return Option(candidate.entry, rank, fit, request.leads)


def _preference(candidate: Candidate, request: Request) -> tuple[object, ...]:
    """The key by which candidates are sorted, the preferred one first."""
    found = option(candidate, request)
    return not candidate.accepted, found.rank, found.fit


def _reasons(entry: Entry, status: str, request: Request, device: DeviceFacts) -> tuple[str, ...]:
    """Why ``entry`` may not serve: every reason, so that one look is enough."""
    reasons: list[str] = []
    if not Target.parse(entry.target).runs_on(device.major, device.minor):
        reasons.append(f"built for {entry.target}, the device has {_capability(device)}")
    if device.driver < MINIMUM_DRIVER:
        reasons.append(
            f"needs a driver for CUDA {MINIMUM_DRIVER // 1000}.{MINIMUM_DRIVER % 1000 // 10}, "
            f"found CUDA {device.driver // 1000}.{device.driver % 1000 // 10}"
        )
    for name, wanted in sorted(request.constants.items()):
        found = entry.constants.get(name)
        if found != wanted:
            reasons.append(f"{name} is {'not fixed' if found is None else found}, not {wanted}")
    for name, quantity in sorted(request.quantities.items()):
        low, high = entry.contract.limits.get(name, (quantity, quantity))
        if not low <= quantity <= high:
            reasons.append(f"serves {name} from {low} to {high}, not {quantity}")
    shared = entry.contract.dynamic_shared_memory + entry.resources.static_shared_memory
    if shared > device.shared_memory_per_block_optin:
        reasons.append(
            f"needs {shared} bytes of shared memory per block, "
            f"the device has {device.shared_memory_per_block_optin}"
        )
    present = {parameter.name for parameter in entry.contract.parameters}
    reasons += [f"has no parameter {name}" for name in request.parameters if name not in present]
    if request.variant is not None:
        if entry.variant != request.variant:
            reasons.append(f"the caller requested variant {request.variant}")
    else:
        # Evidence is not read for an entry that is refused for one of the reasons above.
        refused_unread = status == NOT_READ and bool(reasons)
        if not (serves(status, request.accept) or refused_unread):
            reasons.append(f"{status}: {_MISSING.get(status, _NO_EVIDENCE)}")
    return tuple(reasons)


def _capability(device: DeviceFacts) -> str:
    return f"compute capability {device.major}.{device.minor}"


def next_step(resolution: Resolution, *, brief: bool = False) -> str:
    """Return the next command, by what keeps the nearest candidate from serving. ``brief``: the
    same for all kernels that lack evidence, without the names of their variants.
    """
    request, device = resolution.request, resolution.device
    if device.driver < MINIMUM_DRIVER:
        return f"install an NVIDIA driver of {DRIVER}"
    if not resolution.candidates:
        return build_artifacts()
    relaxed = dataclasses.replace(request, variant=None)
    here = [
        candidate
        for candidate in resolution.candidates
        if Target.parse(candidate.entry.target).runs_on(device.major, device.minor)
    ]
    if not here:
        return build_for_device(device.major, device.minor)
    bare = dataclasses.replace(relaxed, parameters=())
    if all(_reasons(c.entry, "verified", relaxed, device) for c in here) and not all(
        _reasons(c.entry, "verified", bare, device) for c in here
    ):
        names = list(request.parameters)
        return f"for kernels with {names}, {build_artifacts()}"
    if any(not _reasons(c.entry, "verified", relaxed, device) for c in here):
        if request.variant is not None:
            names = sorted({candidate.entry.variant for candidate in here})
            return f"request one of the variants {names}"
        where = "this GPU" if device.present else f"a GPU of {_capability(device)}"
        advice = f"run on {where}: {record_evidence(resolution.artifacts)}"
        fitting = [c for c in here if not _reasons(c.entry, "verified", relaxed, device)]
        if any(candidate.entry.model is None for candidate in fitting):
            return advice  # no caller names the variant of a row op, or accepts a status
        for status in ACCEPTABLE:
            if any(candidate.status == status for candidate in fitting):
                advice += f", or accept what is {status}: Router(..., accept={status!r})"
        if brief:
            return advice
        names = sorted({candidate.entry.variant for candidate in fitting})
        return (
            f"{advice}, or name one of the variants {names}: "
            f"Router(..., variants={{{request.kernel!r}: {names[0]!r}}})"
        )
    if all(candidate.entry.model is None for candidate in resolution.candidates):
        return build_artifacts()
    return build_model(_model_keys(request))


def _model_keys(request: Request) -> list[str]:
    """The lines of a model file that make kernels which score as the request says; none for the
    rule that a model file need not state.
    """
    plain = scoring_constants(SQRT_SOFTPLUS, 1.0)
    return [
        f"{name.lower()} = {json.dumps(value)}"
        for name, value in request.constants.items()
        if name in plain and value != plain[name]
    ]
