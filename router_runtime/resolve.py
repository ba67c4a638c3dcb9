"""Which entry of the manifest serves a request on a device, and why the others do not.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router_runtime.errors import ResolutionError
from router_runtime.manifest import Entry, Manifest, Target

#: The oldest driver that loads cubins of the CUDA 13 toolchain: 13.0, release 580.
MINIMUM_DRIVER = 13000

PORTABLE = "portable"

_STANDING = {"verified": 0, "source-verified": 1}
_SPECIFICITY = {"a": 0, "f": 1, "": 2}


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be served.

    ``constants`` must equal the entry's constants of those names. ``quantities`` must lie within
    the entry's limits, where it states any. ``variant`` names the one variant that may serve,
    proven or not. ``numerics``, if given, is the tag that the entry must carry: two dense kernels
    serve one Router only if their tags agree, because the tag is what makes their bits agree.
    """

    kernel: str
    constants: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    quantities: Mapping[str, int] = dataclasses.field(default_factory=dict)
    variant: str | None = None
    numerics: str | None = None

    def __str__(self) -> str:
        facts = [f"{name}={value}" for name, value in sorted(self.constants.items())]
        facts += [f"{name}={value}" for name, value in sorted(self.quantities.items())]
        facts += [f"variant={self.variant}"] if self.variant is not None else []
        facts += [f"numerics={self.numerics}"] if self.numerics is not None else []
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
    if request.numerics is not None and entry.numerics != request.numerics:
        reasons.append(f"its numerics are {entry.numerics}, not {request.numerics}")
    if request.variant is not None:
        if entry.variant != request.variant:
            reasons.append(f"the caller asked for variant {request.variant}")
    elif status not in _STANDING:
        reasons.append(f"{status}: no evidence that this digest or its source is right on a device")
    return tuple(reasons)


def _preference(candidate: Candidate, request: Request) -> tuple[object, ...]:
    entry = candidate.entry
    limits = entry.contract.limits
    fit = tuple(limits[name][1] if name in limits else 2**63 for name in sorted(request.quantities))
    return (
        not candidate.accepted,
        _STANDING.get(candidate.status, len(_STANDING)),
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
        return "run: make build-cubins"
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
    if any(not _reasons(c.entry, "verified", relaxed, device) for c in here):
        if request.variant is not None:
            names = sorted({candidate.entry.variant for candidate in here})
            return f"ask for one of the variants {names}"
        return (
            "run on this GPU: router-runtime verify --record, "
            "or name the variant: Router(..., variants={kernel: variant})"
        )
    return "add the model to the catalog: build-kernels build --model-file my.toml --out DIR"
