"""Two builds, entry by entry: what was added, removed and changed, and what about it changed.

A build is read from an artifacts folder, a checkout, a wheel or a release's folder. Bytes decide
whether an entry changed; the facts beside them say why: source, constants, flags, toolchain,
contract, registers, spills, memory, and the machine code down to the first other instruction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_kernels.compile import cubin, instructions, toolchain
from build_kernels.entries import resources
from build_kernels.errors import BuildError
from build_kernels.release import wheel
from router_runtime.errors import FormatError
from router_runtime.format.manifest import MANIFEST_NAME, Entry, Manifest, loads

#: As many kinds of instruction are shown for an entry, those whose number changed most.
_SHOWN = 8

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*$")


@dataclass(frozen=True, slots=True)
class Build:
    """A manifest and how to get the bytes of its cubins."""

    manifest: Manifest
    read: Callable[[str], bytes]

    def cubin(self, entry: Entry) -> bytes:
        try:
            data = self.read(entry.file)
        except (OSError, KeyError) as error:
            raise BuildError(
                f"expected the cubin {entry.file}, found none; next: make build-cubins"
            ) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BuildError(
                f"{entry.file}: expected the cubin that the manifest names, found it altered; "
                "next: make build-cubins, or fetch the release again"
            )
        return data


@dataclass(frozen=True, slots=True)
class Difference:
    """``changed``: key -> what changed. ``toolchain``: what changed for every entry at once."""

    toolchain: tuple[str, ...]
    added: Mapping[str, Entry]
    removed: Mapping[str, Entry]
    identical: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.toolchain or self.added or self.removed or self.changed)


def open_build(path: Path) -> Build:
    """The build in a wheel, a release's folder, an artifacts folder or a checkout."""
    wheels = [path] if path.is_file() else sorted(path.glob("*.whl"))
    if len(wheels) == 1:
        entries = wheel.read(wheels[0].read_bytes(), wheels[0].name)
        return of_wheel(entries, wheels[0].name)
    for folder in (path, path / "artifacts"):
        if (folder / MANIFEST_NAME).is_file():
            text = (folder / MANIFEST_NAME).read_bytes()
            return Build(_manifest(text, folder), _reader(folder))
    raise BuildError(
        f"expected a wheel, a release's folder, an artifacts folder or a built checkout, found "
        f"none in {path}; next: make build-cubins there"
    )


def of_wheel(entries: Mapping[str, bytes], where: str) -> Build:
    """The build that a wheel's entries hold."""
    name = wheel.ARTIFACTS + MANIFEST_NAME
    if name not in entries:
        raise BuildError(
            f"{where}: expected a wheel with {name}, found none; next: name a release's wheel"
        )
    return Build(_manifest(entries[name], where), lambda file: entries[wheel.ARTIFACTS + file])


def difference(old: Build, new: Build) -> Difference:
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


def text(found: Difference) -> str:
    """A difference in lines, one thing a line."""
    lines = [f"toolchain {line}" for line in found.toolchain]
    lines += [f"added     {key}: {_facts(entry)}" for key, entry in found.added.items()]
    lines += [f"removed   {key}: {_facts(entry)}" for key, entry in found.removed.items()]
    for key, changes in found.changed.items():
        lines += [f"changed   {key}", *(f"            {change}" for change in changes)]
    return "\n".join([*lines, _sum(found)])


def markdown(found: Difference) -> str:
    """A difference for a pull request."""
    lines = [f"**{_sum(found)}**", ""]
    if found.toolchain:
        lines += ["Toolchain:", "", *(f"- {line}" for line in found.toolchain), ""]
    if found.added or found.removed or found.changed:
        lines += ["| | entry | what |", "| --- | --- | --- |"]
        lines += [f"| added | `{k}` | {_facts(entry)} |" for k, entry in found.added.items()]
        lines += [f"| removed | `{k}` | {_facts(entry)} |" for k, entry in found.removed.items()]
        lines += [
            f"| changed | `{key}` | {'<br>'.join(_escaped(change) for change in changes)} |"
            for key, changes in found.changed.items()
        ]
    return "\n".join(lines).rstrip()


def machine_code(old: bytes, new: bytes) -> Iterator[str]:
    """What differs between two cubins, down to the first instruction that does."""
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


def _facts(entry: Entry) -> str:
    used = entry.resources
    return (
        f"{entry.sha256[:16]}, {entry.size} bytes, {used.registers} registers, "
        f"{used.spill_stores + used.spill_loads} B spills, "
        f"{used.static_shared_memory + entry.contract.dynamic_shared_memory} B shared"
    )


def _sum(found: Difference) -> str:
    return (
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, "
        f"{len(found.identical)} identical"
    )


def _escaped(change: str) -> str:
    return change.replace("|", "\\|").replace("<", "&lt;")


def _reader(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


def _manifest(data: bytes, where: object) -> Manifest:
    try:
        return loads(data)
    except FormatError as error:
        raise BuildError(f"{where}: {error}") from error
