"""Two builds, entry by entry: what was added, removed and changed, and what about it changed.

Bytes decide whether an entry changed. The facts beside them say why: source, constants, flags,
toolchain, contract, registers, spills, memory, and the machine code down to the first instruction
that differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from build_kernels.compile import instructions, toolchain
from build_kernels.entries import resources
from build_kernels.release.builds import Build
from router_runtime.format import cubin
from router_runtime.format.manifest import Entry, Manifest

#: The number of instruction kinds that are shown for an entry: those whose count changed most.
_SHOWN = 8

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*$")


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two builds.

    Attributes:
        toolchain: What changed for every entry at once.
        added: Key -> entry.
        removed: Key -> entry.
        identical: Keys.
        changed: Key -> what changed.

    """

    toolchain: tuple[str, ...]
    added: Mapping[str, Entry]
    removed: Mapping[str, Entry]
    identical: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.toolchain or self.added or self.removed or self.changed)


def difference(old: Build, new: Build) -> Difference:
    """Return what changed from ``old`` to ``new``. Raises BuildError if a cubin cannot be read."""
    before = {entry.key: entry for entry in old.manifest.entries}
    after = {entry.key: entry for entry in new.manifest.entries}
    changed = {
        key: tuple(_changes(old, before[key], new, after[key]))
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key]
    }
    return Difference(
        toolchain=tuple(_toolchain(old.manifest, new.manifest)),
        added={key: after[key] for key in sorted(after.keys() - before.keys())},
        removed={key: before[key] for key in sorted(before.keys() - after.keys())},
        identical=tuple(sorted(key for key in before.keys() & after.keys() - changed.keys())),
        changed=changed,
    )


def machine_code(old: bytes, new: bytes) -> Iterator[str]:
    """Yield what differs between two cubins, down to the first instruction that does."""
    before, after = (instructions.sass(data, toolchain.nvdisasm()) for data in (old, new))
    facts = [
        resources(cubin.read(data, "cubin"), instructions.census(listing))
        for data, listing in ((old, before), (new, after))
    ]
    yield from _fields(facts[0], facts[1])
    census = _census(before, after)
    if census:
        yield "instructions: " + ", ".join(census)
    for (address, first), (_, second) in itertools.zip_longest(
        _instructions(before), _instructions(after), fillvalue=("end", "none")
    ):
        if first != second:
            yield f"first other instruction, at {address}: {first} -> {second}"
            return
    yield "the instructions are the same; other sections differ"


def _changes(old: Build, before: Entry, new: Build, after: Entry) -> Iterator[str]:
    same = before.sha256 == after.sha256
    yield "bytes: the same" if same else f"bytes: {before.sha256[:16]} -> {after.sha256[:16]}"
    if before.source_sha256 != after.source_sha256:
        yield f"source: {before.source_sha256[:16]} -> {after.source_sha256[:16]}"
    for name in sorted({*before.constants, *after.constants}):
        pair = before.constants.get(name), after.constants.get(name)
        if pair[0] != pair[1]:
            yield f"constant {name}: {pair[0]} -> {pair[1]}"
    if old.manifest.toolchain != new.manifest.toolchain:
        yield "toolchain: another, see above"
    for name in ("size", "symbol", "numerics", "latency"):
        pair = getattr(before, name), getattr(after, name)
        if pair[0] != pair[1]:
            yield f"{name}: {pair[0]} -> {pair[1]}"
    yield from _fields(before.contract, after.contract)
    if same:
        yield from _fields(before.resources, after.resources)
    else:
        yield from machine_code(old.cubin(before), new.cubin(after))


def _fields(before: object, after: object) -> Iterator[str]:
    """The fields in which two records of one dataclass differ."""
    for field in dataclasses.fields(before):  # type: ignore[arg-type]
        pair = getattr(before, field.name), getattr(after, field.name)
        if pair[0] != pair[1]:
            yield f"{field.name.replace('_', ' ')}: {pair[0]} -> {pair[1]}"


def _toolchain(old: Manifest, new: Manifest) -> Iterator[str]:
    before, after = old.toolchain, new.toolchain
    for name in sorted({*before.packages, *after.packages}):
        versions = before.packages.get(name), after.packages.get(name)
        if versions[0] != versions[1]:
            yield f"{name}: {versions[0] or 'none'} -> {versions[1] or 'none'}"
    for language in sorted({*before.flags, *after.flags}):
        flags = before.flags.get(language, ()), after.flags.get(language, ())
        if flags[0] != flags[1]:
            yield f"flags of {language}: {' '.join(flags[0])} -> {' '.join(flags[1])}"


def _census(before: str, after: str) -> list[str]:
    counts = instructions.census(before), instructions.census(after)
    moved = {
        name: (counts[0].get(name, 0), counts[1].get(name, 0)) for name in {*counts[0], *counts[1]}
    }
    ordered = sorted(
        (name for name, (low, high) in moved.items() if low != high),
        key=lambda name: (-abs(moved[name][1] - moved[name][0]), name),
    )
    shown = [f"{name} {moved[name][0]} -> {moved[name][1]}" for name in ordered[:_SHOWN]]
    if len(ordered) > _SHOWN:
        shown.append(f"and {len(ordered) - _SHOWN} more")
    return shown


def _instructions(listing: str) -> list[tuple[str, str]]:
    return [
        (f"0x{match[1]}", match[2])
        for line in listing.splitlines()
        if (match := _LINE.match(line)) is not None
    ]
