"""Whether a record of emulation was made by the emulation model that this checkout contains.

An installed runtime does not contain the model: there an entry is ``emulated`` whichever model was
used. The builder's lists and release notes mark entries that another model emulated.
"""

from __future__ import annotations

import functools

from build_kernels.emulation.identity import model_sha256
from router_runtime.evidence.store import Evidence
from router_runtime.format.manifest import Entry

_todays_model = functools.cache(model_sha256)


def is_of_another_model(entry: Entry, evidence: Evidence) -> bool:
    """Return whether an entry has records of emulation that count, all of them made by a model that
    is not the checkout's.
    """
    models = {
        record.model_sha256
        for record in evidence.emulations
        if record.matches(entry) and record.current
    }
    return bool(models) and _todays_model() not in models


def in_words(entry: Entry, status: str, evidence: Evidence) -> str:
    """Return a status for people: that of an entry which another model emulated is marked."""
    return marked(status, is_of_another_model(entry, evidence))


def marked(status: str, stale_model: bool) -> str:
    """Return a status, with a mark if it is ``emulated`` by another model than the checkout's."""
    if status == "emulated" and stale_model:
        return "emulated (stale: by another model)"
    return status
