"""What a run of the oracle suite found, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CaseBits:
    """The digests of one case's inputs and of every bit of a kernel's weights and ids.

    Two devices that were given the same inputs can be compared by them.
    """

    name: str
    seed: int
    inputs_sha256: str
    bits_sha256: str


@dataclass(frozen=True, slots=True)
class EntryOutcome:
    """One entry: its problems, none if it passed; the bits of the cases that ran to their end; and
    the file of the record that was written, None if none was.
    """

    key: str
    sha256: str
    problems: tuple[str, ...]
    cases: tuple[CaseBits, ...]
    record: Path | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every entry that the device could load; none if the artifacts have none for it."""

    entries: tuple[EntryOutcome, ...]

    @property
    def passed(self) -> bool:
        """Whether there are entries for this device and all of them pass."""
        return bool(self.entries) and not any(entry.problems for entry in self.entries)
