"""What the builder raises on purpose; the command line prints the message and exits with 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BuildError(Exception):
    """The message says what was expected, what was found, and what to do next."""


def unknown(what: str, found: str, known: Iterable[str], remedy: str) -> BuildError:
    """The error for a name that is none of ``known``, with the nearest one as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names) if len(names) <= 12 else f"one of {len(names)} names"
    return BuildError(f"unknown {what} {found!r}: {hint}expected {shown}; {remedy}")
