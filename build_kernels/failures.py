"""The errors of many jobs as one text: each distinct error once.

A mistake in a source that many kernels share is found by every job that compiles it.
"""

from __future__ import annotations

from collections.abc import Sequence

from build_kernels.compile.diagnostics import diagnostics
from build_kernels.errors import JobError


def report(failures: Sequence[JobError]) -> str:
    """Return each distinct error, with the first job that has it and how many others do."""
    groups: dict[str, list[JobError]] = {}
    for failure in sorted(failures, key=lambda failure: failure.key):
        kernel = failure.key.partition("/")[0]
        for text in diagnostics(kernel, failure.text):
            groups.setdefault(text, []).append(failure)
    return "\n\n".join(_one(text, group) for text, group in groups.items())


def _one(text: str, group: Sequence[JobError]) -> str:
    first, others = group[0], len(group) - 1
    where = f"  in {first.key}" + (f" and {others} other{'s' * (others > 1)}" if others else "")
    return "\n".join(filter(None, (text, first.trace, where)))
