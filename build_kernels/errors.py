"""The builder's errors, whose messages the command line prints before it exits with 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BuildError(Exception):
    """An error that a user can fix: the message has what was expected, what was found and what to
    do next.
    """


class JobError(BuildError):
    """An error of one of several jobs.

    Args:
        key: The name of the job.
        text: What went wrong, without the key.
        trace: The lines of our sources through which the error was reached, in text; may be empty.

    """

    def __init__(self, key: str, text: str, trace: str = "") -> None:
        super().__init__(f"{key}: {text}" + (f"\n{trace}" if trace else ""))
        self.key = key
        self.text = text
        self.trace = trace


def unknown(what: str, found: str, known: Iterable[str], remedy: str) -> BuildError:
    """Return the error for a name that is none of ``known``; it suggests the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names) if len(names) <= 12 else f"one of {len(names)} names"
    return BuildError(f"unknown {what} {found!r}: {hint}expected {shown}; {remedy}")
