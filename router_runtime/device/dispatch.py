"""Which entry serves which batch size, for several kernels that compute the same function.

Pure, as ``resolve`` is. How batches are divided among the entries that may serve is decided in
``evidence.choice``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_runtime.device.facts import DeviceFacts
from router_runtime.device.resolve import Request, Resolution, next_step, option, resolve
from router_runtime.errors import ResolutionError
from router_runtime.evidence.choice import DENSE, TokenRange, agrees, divide
from router_runtime.format.advice import build_artifacts
from router_runtime.format.manifest import Entry, Manifest


def gate_requests(gate: Request) -> tuple[Request, ...]:
    """Return the requests of a router that looks experts up and weighs them: ``gate``, for the
    kernel hash_gate without image tokens, and one for the dense kernel for many tokens. An entry of
    the latter serves if it takes the lookup table and has the ``numerics`` tag of the former.
    """
    shape = {name: value for name, value in gate.constants.items() if name != "IMAGES"}
    dense = Request(DENSE[-1], shape, parameters=("table",), accept=gate.accept, leads=False)
    return gate, dense


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The token ranges in ascending order, and the resolutions that they follow from.

    The first range starts at one token, and each of the others where the one before it ends; or
    there are no ranges. The caller splits a batch that is larger than the last range into several
    launches. All kernels give the same bits, so results do not depend on where it is split.
    """

    token_ranges: tuple[TokenRange, ...]
    resolutions: tuple[Resolution, ...]

    def require(self) -> tuple[TokenRange, ...]:
        """The token ranges. Raises ResolutionError with every kernel's trace if there are none, or
        if a kernel whose variant was named cannot serve.
        """
        for resolution in self.resolutions:
            if resolution.request.variant is not None:
                resolution.require()
        if not self.token_ranges:
            first, *others = self.resolutions
            traces = "".join(f"{other.request}:\n{other.trace()}\n" for other in others)
            first.require()
            raise ResolutionError(
                f"{first.request} on {first.device}: expected entries that together serve batches "
                f"from 1 token up, found a gap:\n{first.trace()}\n{traces}"
                f"{self.next_step()}"
            )
        return self.token_ranges

    def next_step(self, *, brief: bool = False) -> str:
        """What to do if there are no token ranges. ``brief`` as for ``resolve.next_step``."""
        if any(found.accepted for each in self.resolutions for found in each.candidates):
            return f"for entries that serve every batch, {build_artifacts()}"
        known = [each for each in self.resolutions if each.candidates]
        return next_step((known or self.resolutions)[0], brief=brief)


def dispatch(
    requests: Sequence[Request],
    device: DeviceFacts,
    manifest: Manifest,
    status: Callable[[Entry], str],
    artifacts: Path | None = None,
) -> Dispatch:
    """Divide batches among the entries that serve ``requests`` (``evidence.choice.divide``).

    An entry whose ``numerics`` tag is not the one that serves is refused. ``artifacts`` is the
    folder of the manifest, for advice.
    """
    found = [resolve(request, device, manifest, status, artifacts) for request in requests]
    division = divide(
        [
            option(candidate, resolution.request)
            for resolution in found
            for candidate in resolution.candidates
            if candidate.accepted
        ]
    )
    if division.leader is None:
        return Dispatch((), tuple(found))
    agreeing = tuple(_agreeing(resolution, division.leader) for resolution in found)
    return Dispatch(division.token_ranges, agreeing)


def _agreeing(resolution: Resolution, leader: Entry) -> Resolution:
    """The resolution without the candidates whose bits need not be those of ``leader``."""
    candidates = []
    for found in resolution.candidates:
        if not agrees(found.entry, leader):
            reason = (
                f"its numerics are {found.entry.numerics}, those of {leader.key} are "
                f"{leader.numerics}"
            )
            found = dataclasses.replace(found, reasons=(*found.reasons, reason))
        candidates.append(found)
    choice = next((found.entry for found in candidates if found.accepted), None)
    return dataclasses.replace(resolution, choice=choice, candidates=tuple(candidates))
