"""Which entry serves which batch size, for several kernels that compute the same function.

Pure, as ``resolve`` is: this module adds only the division of batch sizes into token ranges.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from router_runtime.device.facts import DeviceFacts
from router_runtime.device.resolve import Request, Resolution, preference, resolve
from router_runtime.errors import ResolutionError
from router_runtime.format.advice import build_artifacts
from router_runtime.format.manifest import Entry, Manifest

#: The kernels that compute the same for a dense router: for few tokens, for many.
DENSE = ("dense_router_decode", "dense_router_prefill")


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Batches of ``low`` to ``high`` tokens go to ``entry``."""

    low: int
    high: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The token ranges in ascending order, and the resolutions that they follow from.

    The ranges start at one token and leave no gap, or there are none. The caller splits a batch
    that is larger than the last one: the kernels agree bit for bit, so no result depends on where.
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
                f"build every variant: {build_artifacts()}"
            )
        return self.token_ranges


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
    the best status that serves one token; of several, the one whose entries are together the
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
    token_ranges: list[TokenRange] = []
    for low, end in itertools.pairwise(sorted(starts)):
        best = _cheapest(found, low, end - 1)
        if best is None:
            return Dispatch((), tuple(found))
        if token_ranges and token_ranges[-1].entry is best:
            low = token_ranges.pop().low
        token_ranges.append(TokenRange(low, end - 1, best))
    return Dispatch(tuple(token_ranges), tuple(found))


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
    for status_rank, entry in ranked:
        if status_rank == best:
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
    """(status rank, entry) of those that serve batches of ``low`` to ``high`` tokens, by status,
    then the latency as measured for ``high``, then the closest fit.
    """
    ranked = []
    for resolution in resolutions:
        for found in resolution.candidates:
            limits = _token_limits(found.entry)
            if found.accepted and limits[0] <= low and high <= limits[1]:
                _, rank, *fit = preference(found, resolution.request)
                ranked.append((rank, _microseconds(found.entry, high), limits[1], fit, found))
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
