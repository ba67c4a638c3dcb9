"""Environment variables that look like this package's, and that nothing reads: misspelled ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from router_runtime.cli.report import Problem
from router_runtime.evidence.store import ENVIRONMENT_VARIABLE
from router_runtime.format.advice import ARTIFACTS_VARIABLE
from router_runtime.integrations.engines.variables import ACCEPT_VARIABLE, DISABLE_VARIABLE
from router_runtime.trust.policy import (
    ENVELOPE_VARIABLE,
    LOCAL_EVIDENCE_VARIABLE,
    PUBLIC_KEY_VARIABLE,
)

#: Every variable that this package reads.
KNOWN = (
    *(ARTIFACTS_VARIABLE, ENVIRONMENT_VARIABLE),
    *(PUBLIC_KEY_VARIABLE, ENVELOPE_VARIABLE, LOCAL_EVIDENCE_VARIABLE),
    *(DISABLE_VARIABLE, ACCEPT_VARIABLE),
)

_PREFIXES = ("ROUTER_RUNTIME_", "DSV4_ROUTER_")


def misspelled(names: Iterable[str]) -> Iterator[Problem]:
    """A note for each of these variables that has a prefix of this package and is not known."""
    for name in sorted(names):
        if name.startswith(_PREFIXES) and name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.85)
            known = f"those that are read: {', '.join(KNOWN)}"
            meant = f"did you mean {near[0]}?" if near else known
            yield Problem(
                "note",
                f"the environment variable {name} is set, and nothing reads it",
                f"run: unset {name} ({meant})",
            )
