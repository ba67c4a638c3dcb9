"""Which entry of the manifest serves a request on a device, and why the others do not.

``resolve`` answers for one kernel. ``dispatch`` answers for several that compute the same thing, as
``dense_router_decode`` and ``dense_router_prefill`` do: which of them serves how many tokens.

Pure: no driver, no files, no clock. Everything it weighs is an argument, so every decision can be
replayed in a test, and ``router-runtime doctor`` explains decisions for devices that are not there.

Evidence decides. A ``verified`` entry is preferred to a ``source-verified`` one, and an
``unproven`` one is never chosen here: only a caller who names its variant gets it. Among entries
of equal standing the closest fit wins, in this order: the tightest limits around the requested
quantities, the most specific target (``a``, ``f``, none), a specialised variant before
``portable``, then the name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from router_runtime.errors import ResolutionError
from router_runtime.format.manifest import Entry, Manifest, Target

#: The oldest driver that loads cubins of the CUDA 13 toolchain: 13.0, release 580.
MINIMUM_DRIVER = 13000

PORTABLE = "portable"

#: The kernels that compute the same for a dense router: for few tokens, for many.
DENSE = ("dense_router_decode", "dense_router_prefill")

_BUILD = "make build-cubins"

#: The standing of an entry that cannot serve for another reason: its evidence need not be read.
NOT_ASKED = "not asked"

_STANDING = {"verified": 0, "source-verified": 1}
_SPECIFICITY = {"a": 0, "f": 1, "": 2}


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be served.

    ``constants`` must equal the entry's constants of those names. ``quantities`` must lie within
    the entry's limits, where it states any. ``parameters`` are names of parameters that it must
    have. ``variant`` names the one variant that may serve, proven or not.
    """

    kernel: str
    constants: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    quantities: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    variant: str | None = None

    def __str__(self) -> str:
        facts = [f"{name}={value}" for name, value in sorted(self.constants.items())]
        facts += [f"{name}={value}" for name, value in sorted(self.quantities.items())]
        facts += self.parameters
        facts += [f"variant={self.variant}"] if self.variant is not None else []
        return f"{self.kernel}({', '.join(facts)})"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What resolution knows of a device. ``driver`` is the CUDA version it serves (13000: 13.0)."""

    major: int
    minor: int
    driver: int
    sms: int
    shared_memory_per_block_optin: int

    def __str__(self) -> str:
        return (
            f"compute capability {self.major}.{self.minor}, driver for CUDA "
            f"{self.driver // 1000}.{self.driver % 1000 // 10}, {self.sms} multiprocessors"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry of the requested kernel. It is accepted if ``reasons`` is empty."""

    entry: Entry
    status: str
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Resolution:
    """The choice, or None, and every candidate in the order of preference."""

    request: Request
    device: DeviceFacts
    choice: Entry | None
    candidates: tuple[Candidate, ...]

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
            f"found {found}{_remedy(self)}"
        )


def resolve(
    request: Request,
    device: DeviceFacts,
    manifest: Manifest,
    status: Callable[[Entry], str],
) -> Resolution:
    """Weigh every entry of ``request.kernel``. ``status`` gives an entry's standing in the
    evidence.
    """
    candidates = [
        Candidate(entry, standing, _reasons(entry, standing, request, device))
        for entry in manifest.entries
        if entry.kernel == request.kernel
        for standing in (status(entry),)
    ]
    candidates.sort(key=lambda candidate: _preference(candidate, request))
    choice = candidates[0].entry if candidates and candidates[0].accepted else None
    return Resolution(request, device, choice, tuple(candidates))


def asking(
    requests: Sequence[Request], device: DeviceFacts, status: Callable[[Entry], str]
) -> Callable[[Entry], str]:
    """``status`` for the entries that could serve one of the requests by their target and their
    constants, ``NOT_ASKED`` for the others: evidence takes time to read, and a process serves one
    model on one kind of device.
    """

    def standing(entry: Entry) -> str:
        here = Target.parse(entry.target).runs_on(device.major, device.minor)
        fits = any(
            all(entry.constants.get(name) == value for name, value in request.constants.items())
            for request in requests
        )
        return status(entry) if here and fits else NOT_ASKED

    return standing


@dataclass(frozen=True, slots=True)
class Span:
    """Batches of ``low`` to ``high`` tokens go to ``entry``."""

    low: int
    high: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Who serves how many tokens, in ascending order, and what was weighed for it.

    The spans start at one token and leave no gap, or there are none. More tokens than the last span
    has are for the caller to split: the kernels agree bit for bit, so no result depends on where.
    """

    spans: tuple[Span, ...]
    resolutions: tuple[Resolution, ...]

    def require(self) -> tuple[Span, ...]:
        """The spans. Raises ResolutionError with the trace of every kernel if there are none, or if
        a kernel whose variant was named cannot serve.
        """
        for resolution in self.resolutions:
            if resolution.request.variant is not None:
                resolution.require()
        if not self.spans:
            first, *others = self.resolutions
            traces = "".join(f"{other.request}:\n{other.trace()}\n" for other in others)
            first.require()
            raise ResolutionError(
                f"{first.request} on {first.device}: expected entries that together serve batches "
                f"from 1 token up, found a gap:\n{first.trace()}\n{traces}"
                f"build every variant: {_BUILD}"
            )
        return self.spans


def dispatch(
    requests: Sequence[Request],
    device: DeviceFacts,
    manifest: Manifest,
    status: Callable[[Entry], str],
) -> Dispatch:
    """Divide batches among the entries that serve ``requests``, by their limits of tokens and by
    the latencies that were measured.

    One ``numerics`` tag serves all: an entry with another tag, or with none to compare, would make
    a token's bits depend on the size of its batch, and is refused. The tag is that of an entry of
    the best standing that serves one token; of several, the one whose entries are together the
    fastest, every measured number of tokens weighing alike.
    """
    found = [resolve(request, device, manifest, status) for request in requests]
    alone = _leader(found)
    if alone is None:
        return Dispatch((), tuple(found))
    found = [_agreeing(resolution, alone) for resolution in found]
    starts = {1}
    for entry in _accepted(found):
        low, high = _token_limits(entry)
        starts |= {low, high + 1, *(tokens + 1 for tokens, _ in entry.latency if tokens < high)}
    spans: list[Span] = []
    for low, end in itertools.pairwise(sorted(starts)):
        best = _cheapest(found, low, end - 1)
        if best is None:
            return Dispatch((), tuple(found))
        if spans and spans[-1].entry is best:
            low = spans.pop().low
        spans.append(Span(low, end - 1, best))
    return Dispatch(tuple(spans), tuple(found))


def _token_limits(entry: Entry) -> tuple[int, int]:
    return entry.contract.limits.get("tokens", (1, 2**31 - 1))


def _accepted(resolutions: Sequence[Resolution]) -> Iterator[Entry]:
    for resolution in resolutions:
        yield from (found.entry for found in resolution.candidates if found.accepted)


def _agreeing(resolution: Resolution, first: Entry) -> Resolution:
    """The resolution without the candidates whose bits need not be those of ``first``."""
    candidates = []
    for found in resolution.candidates:
        tag = found.entry.numerics
        if found.entry is not first and (tag is None or tag != first.numerics):
            reason = f"its numerics are {tag}, those of {first.key} are {first.numerics}"
            found = dataclasses.replace(found, reasons=(*found.reasons, reason))
        candidates.append(found)
    choice = next((found.entry for found in candidates if found.accepted), None)
    return dataclasses.replace(resolution, choice=choice, candidates=tuple(candidates))


def _leader(resolutions: Sequence[Resolution]) -> Entry | None:
    """The entry whose ``numerics`` tag all others must have."""
    ranked = _ranked(resolutions, 1, 1)
    if not ranked:
        return None
    best = ranked[0][0]
    leaders: dict[str | None, Entry] = {}
    for standing, entry in ranked:
        if standing == best:
            leaders.setdefault(entry.numerics, entry)
    entries = list(_accepted(resolutions))
    measured = sorted({tokens for entry in entries for tokens, _ in entry.latency})

    def together(leader: Entry) -> float:
        tag = leader.numerics
        own = [e for e in entries if e is leader or (tag is not None and e.numerics == tag)]
        return sum(
            math.log(min(_microseconds(entry, tokens) for entry in own)) for tokens in measured
        )

    # Of equals the first: the one that would serve one token if there were no others.
    return min(leaders.values(), key=together)


def _cheapest(resolutions: Sequence[Resolution], low: int, high: int) -> Entry | None:
    """The first of ``_ranked``, if any."""
    ranked = _ranked(resolutions, low, high)
    return ranked[0][1] if ranked else None


def _ranked(resolutions: Sequence[Resolution], low: int, high: int) -> list[tuple[object, Entry]]:
    """(standing, entry) of those that serve batches of ``low`` to ``high`` tokens, by standing,
    then the latency as measured for ``high``, then the closest fit.
    """
    ranked = []
    for resolution in resolutions:
        for found in resolution.candidates:
            limits = _token_limits(found.entry)
            if found.accepted and limits[0] <= low and high <= limits[1]:
                _, standing, *fit = _preference(found, resolution.request)
                ranked.append((standing, _microseconds(found.entry, high), limits[1], fit, found))
    ranked.sort(key=lambda item: item[:-1])
    return [(item[0], item[-1].entry) for item in ranked]


def _microseconds(entry: Entry, tokens: int) -> float:
    """The figure of the next number of tokens that was measured: a tile costs the same until it is
    full. Beyond the last one, the last one's figure a token.
    """
    for measured, microseconds in entry.latency:
        if tokens <= measured:
            return microseconds
    if not entry.latency:
        return math.inf
    measured, microseconds = entry.latency[-1]
    return microseconds * tokens / measured


def _reasons(entry: Entry, status: str, request: Request, device: DeviceFacts) -> tuple[str, ...]:
    """Why ``entry`` may not serve: every reason, so that one look is enough."""
    reasons: list[str] = []
    if not Target.parse(entry.target).runs_on(device.major, device.minor):
        reasons.append(
            f"built for {entry.target}, the device has compute capability "
            f"{device.major}.{device.minor}"
        )
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
            f"needs {shared} bytes of shared memory a block, "
            f"the device has {device.shared_memory_per_block_optin}"
        )
    present = {parameter.name for parameter in entry.contract.parameters}
    reasons += [f"has no parameter {name}" for name in request.parameters if name not in present]
    if request.variant is not None:
        if entry.variant != request.variant:
            reasons.append(f"the caller asked for variant {request.variant}")
    elif status not in _STANDING and not (status == NOT_ASKED and reasons):
        reasons.append(f"{status}: no evidence that this digest or its source is right on a device")
    return tuple(reasons)


def _preference(candidate: Candidate, request: Request) -> tuple[object, ...]:
    entry = candidate.entry
    limits = entry.contract.limits
    fit = tuple(limits[name][1] if name in limits else 2**63 for name in sorted(request.quantities))
    return (
        not candidate.accepted,
        # Naming a variant vouches for it.
        0 if request.variant is not None else _STANDING.get(candidate.status, len(_STANDING)),
        fit,
        _SPECIFICITY[Target.parse(entry.target).suffix],
        entry.variant == PORTABLE,
        entry.key,
    )


def _remedy(resolution: Resolution) -> str:
    """The next command: it depends on what stands in the way of the nearest candidate."""
    request, device = resolution.request, resolution.device
    if device.driver < MINIMUM_DRIVER:
        return "install an NVIDIA driver of release 580 (CUDA 13.0) or newer"
    if not resolution.candidates:
        return f"run: {_BUILD}"
    relaxed = dataclasses.replace(request, variant=None)
    here = [
        candidate
        for candidate in resolution.candidates
        if Target.parse(candidate.entry.target).runs_on(device.major, device.minor)
    ]
    if not here:
        return (
            f"run: build-kernels build --target sm_{device.major}{device.minor}a --out DIR "
            "if that target is supported, or use device='cpu' (see: router-runtime doctor)"
        )
    bare = dataclasses.replace(relaxed, parameters=())
    if all(_reasons(c.entry, "verified", relaxed, device) for c in here) and not all(
        _reasons(c.entry, "verified", bare, device) for c in here
    ):
        return f"rebuild the artifacts for kernels with {list(request.parameters)}: {_BUILD}"
    if any(not _reasons(c.entry, "verified", relaxed, device) for c in here):
        if request.variant is not None:
            names = sorted({candidate.entry.variant for candidate in here})
            return f"ask for one of the variants {names}"
        return (
            "run on this GPU: router-runtime verify --record, "
            "or name the variant: Router(..., variants={kernel: variant})"
        )
    return "add the model to the catalog: build-kernels build --model-file my.toml --out DIR"
