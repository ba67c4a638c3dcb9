"""The builder's error, whose message the command line prints before it exits with 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BuildError(Exception):
    """An error that a user can fix: the message has what was expected, what was found and what to
    do next.
    """


def unknown(what: str, found: str, known: Iterable[str], remedy: str) -> BuildError:
    """Return the error for a name that is none of ``known``; it suggests the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names) if len(names) <= 12 else f"one of {len(names)} names"
    return BuildError(f"unknown {what} {found!r}: {hint}expected {shown}; {remedy}")
