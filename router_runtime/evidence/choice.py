"""Which of several entries serves which batch: by evidence, then latency, then the closest fit.

Pure: everything that decides is an argument. The runtime chooses by these rules, and the builder
prints them (``build-kernels list --dispatch``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target

_PORTABLE = "portable"

#: The kernels that compute the same for a dense router: for few tokens, for many.
DENSE = ("dense_router_decode", "dense_router_prefill")

_SPECIFICITY = {"a": 0, "f": 1, "": 2}


@dataclass(frozen=True, slots=True)
class Option:
    """An entry that may serve.

    Attributes:
        entry: The entry.
        rank: The smaller, the better its evidence (``ladder.status_rank``).
        fit: What ``closeness`` returned: the smaller, the closer it fits the request.
        leads: Whether its ``numerics`` tag may be that of all that serve.

    """

    entry: Entry
    rank: int
    fit: tuple[object, ...]
    leads: bool = True


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Batches of ``low`` to ``high`` tokens go to ``entry``."""

    low: int
    high: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Division:
    """How batches are divided among entries.

    Attributes:
        leader: The entry whose ``numerics`` tag all others must have; None: no option serves a
            batch of one token.
        token_ranges: In ascending order, from one token and without a gap; empty: there is a gap.

    """

    leader: Entry | None
    token_ranges: tuple[TokenRange, ...]


def closeness(entry: Entry, quantities: Collection[str]) -> tuple[object, ...]:
    """Return how closely an entry fits a request, as a key for sorting: the closest comes first.

    In this order: the tightest limits of the requested ``quantities``, the most specific target
    (``a``, ``f``, none), a specialised variant before ``portable``, then the key.
    """
    limits = entry.contract.limits
    return (
        tuple(limits[name][1] if name in limits else 2**63 for name in sorted(quantities)),
        _SPECIFICITY[Target.parse(entry.target).suffix],
        entry.variant == _PORTABLE,
        entry.key,
    )


def agrees(entry: Entry, leader: Entry) -> bool:
    """Return whether an entry gives the bits of ``leader``: it is the same, or has its tag."""
    return entry is leader or (entry.numerics is not None and entry.numerics == leader.numerics)


def divide(options: Sequence[Option]) -> Division:
    """Divide batches among the options by their limits of tokens and the manifest's latencies.

    One ``numerics`` tag serves all: an entry with another tag, or with none to compare, would make
    a token's bits depend on the size of its batch, and is left out. The tag is that of an entry of
    the best rank that serves one token, among those that may lead; of several, the one whose
    entries are together the fastest, with the same weight for every number of tokens that has a
    figure.
    """
    leader = _leader(options)
    if leader is None:
        return Division(None, ())
    own = [option for option in options if agrees(option.entry, leader)]
    starts = {1}
    for option in own:
        low, high = _token_limits(option.entry)
        measured = (tokens for tokens, _ in option.entry.latency)
        starts |= {low, high + 1, *(tokens + 1 for tokens in measured if tokens < high)}
    ranges: list[TokenRange] = []
    for low, end in itertools.pairwise(sorted(starts)):
        ranked = _ranked(own, low, end - 1)
        if not ranked:
            return Division(leader, ())
        best = ranked[0].entry
        if ranges and ranges[-1].entry is best:
            low = ranges.pop().low
        ranges.append(TokenRange(low, end - 1, best))
    return Division(leader, tuple(ranges))


def _token_limits(entry: Entry) -> tuple[int, int]:
    return entry.contract.limits.get("tokens", (1, 2**31 - 1))


def _leader(options: Sequence[Option]) -> Entry | None:
    ranked = _ranked([option for option in options if option.leads], 1, 1)
    if not ranked:
        return None
    leaders: dict[str | None, Entry] = {}
    for option in ranked:
        if option.rank == ranked[0].rank:
            leaders.setdefault(option.entry.numerics, option.entry)
    entries = [option.entry for option in options]
    measured = sorted({tokens for entry in entries for tokens, _ in entry.latency})

    def together(leader: Entry) -> float:
        own = [entry for entry in entries if agrees(entry, leader)]
        return sum(
            math.log(min(microseconds(entry, tokens) for entry in own)) for tokens in measured
        )

    # Of equals the first: the one that would serve one token if there were no others.
    return min(leaders.values(), key=together)


def _ranked(options: Sequence[Option], low: int, high: int) -> list[Option]:
    """The options that serve every batch of ``low`` to ``high`` tokens, the preferred one first.

    They are sorted by rank, then by the expected latency for ``high`` tokens, then by their limit
    of tokens (the smallest first), then by how close they fit the request.
    """
    ranked = []
    for option in options:
        limits = _token_limits(option.entry)
        if limits[0] <= low and high <= limits[1]:
            key = (option.rank, microseconds(option.entry, high), limits[1], option.fit)
            ranked.append((key, option))
    ranked.sort(key=lambda item: item[0])
    return [option for _, option in ranked]


def microseconds(entry: Entry, tokens: int) -> float:
    """Return the expected latency of one call, infinite if the entry has no figures.

    It is the figure of the next larger number of tokens that has one, because a tile costs the same
    until it is full; beyond the last figure, it grows in proportion to the tokens.
    """
    for measured, figure in entry.latency:
        if tokens <= measured:
            return figure
    if not entry.latency:
        return math.inf
    measured, figure = entry.latency[-1]
    return figure * tokens / measured
