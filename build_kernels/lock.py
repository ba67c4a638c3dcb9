"""``artifacts/artifacts.lock``: the digest of every cubin that a commit builds, in text.

Git tracks it, so a review shows which cubins a change touches, with registers and spills before and
after; ``build-kernels check`` rebuilds and compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_kernels import publish
from build_kernels.errors import BuildError
from router_runtime.format.manifest import Manifest

LOCK_NAME = "artifacts.lock"

_HEADER = "# What this commit builds. Written by: make lock-cubins. Compared by: make check-cubins."
_SOURCE = re.compile(r"source ([0-9a-f]{64})")
_ENTRY = re.compile(r"(\S+) ([0-9a-f]{64}) registers=([0-9]+) spill_bytes=([0-9]+)")


@dataclass(frozen=True, slots=True)
class Line:
    """What is recorded of one cubin. ``spill_bytes``: stored and loaded, per thread."""

    sha256: str
    registers: int
    spill_bytes: int

    def __str__(self) -> str:
        return f"{self.sha256} registers={self.registers} spill_bytes={self.spill_bytes}"


@dataclass(frozen=True, slots=True)
class Lock:
    """What is recorded of a build. ``entries``: key -> line."""

    source_sha256: str
    entries: Mapping[str, Line]


def of(manifest: Manifest) -> Lock:
    """Return the lock of a build."""
    return Lock(
        manifest.source_sha256,
        {
            entry.key: Line(
                entry.sha256,
                entry.resources.registers,
                entry.resources.spill_stores + entry.resources.spill_loads,
            )
            for entry in manifest.entries
        },
    )


def write(path: Path, lock: Lock) -> None:
    """Replace the lock file."""
    lines = [_HEADER, f"source {lock.source_sha256}"]
    lines += [f"{key} {line}" for key, line in sorted(lock.entries.items())]
    publish.write_file(path, ("\n".join(lines) + "\n").encode("ascii"))


def read(path: Path) -> Lock:
    """Return the lock in a file. Raises BuildError if it is missing or not a lock."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error
    source = _SOURCE.fullmatch(lines[1]) if len(lines) > 1 else None
    if source is None or lines[0] != _HEADER:
        raise _unreadable(path, "no header and source line")
    entries = {}
    for text in lines[2:]:
        match = _ENTRY.fullmatch(text)
        if match is None or match[1] in entries:
            raise _unreadable(path, repr(text))
        entries[match[1]] = Line(match[2], int(match[3]), int(match[4]))
    return Lock(source[1], entries)


def differences(recorded: Lock, rebuilt: Lock) -> list[str]:
    """Return one line for each difference between what was recorded and what was rebuilt."""
    found = []
    for key in sorted({*recorded.entries, *rebuilt.entries}):
        old, new = recorded.entries.get(key), rebuilt.entries.get(key)
        if old is None:
            found.append(f"added    {key}: {_shown(new)}")
        elif new is None:
            found.append(f"removed  {key}: {_shown(old)}")
        elif old != new:
            found.append(f"changed  {key}: {_shown(old)} -> {_shown(new)}")
    if recorded.source_sha256 != rebuilt.source_sha256:
        found.append(
            f"changed  source: {recorded.source_sha256[:16]} -> {rebuilt.source_sha256[:16]}"
        )
    return found


def _shown(line: Line | None) -> str:
    assert line is not None
    return f"{line.sha256[:16]} registers {line.registers} spills {line.spill_bytes} B"


def _unreadable(path: Path, found: str) -> BuildError:
    return BuildError(
        f"{path.name}: expected a lock written by this builder, found {found}; "
        "next: make lock-cubins"
    )
