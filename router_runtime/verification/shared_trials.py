"""Trials that are made once for all entries that compute the same for the same model."""

from __future__ import annotations

import dataclasses

from router_runtime.evidence import cases as suite
from router_runtime.evidence.cases import Case
from router_runtime.format.manifest import Entry
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.trial import Trial

#: Memory for the trials that are kept, host and device together, in bytes. The largest model here
#: needs seven tenths of it.
SHARED_BYTES = 2 * 2**30


class SharedTrials:
    """The trials of the entries that compute the same for the same model, made once for all of
    them: drawing the inputs and computing the reference takes longer than the launches.

    Call ``turn_to`` with each entry; entries that share trials must follow each other
    (``sharing_key``).
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._key: tuple[str, str] | None = None
        self._kept: dict[object, tuple[Trial, int]] = {}

    def turn_to(self, entry: Entry) -> None:
        """Drop the trials that this entry does not share."""
        if self._key != sharing_key(entry):
            self._key = sharing_key(entry)
            self._kept.clear()

    def trial(self, case: Case) -> Trial:
        """The kept trial of a case, or a new one."""
        if found := self._kept.get(_identity(case)):
            return found[0]
        return Trial(case, make_inputs(case), self._device)

    def keep(self, trial: Trial) -> None:
        """Keep a trial for later entries if there is room."""
        key, size = _identity(trial.case), trial.nbytes()
        if size + sum(other for _, other in self._kept.values()) <= SHARED_BYTES:
            self._kept.setdefault(key, (trial, size))

    def drop(self) -> None:
        """Drop all trials: a faulty kernel may have written anywhere, even into their inputs."""
        self._kept.clear()


def sharing_key(entry: Entry) -> tuple[str, str]:
    """A key that is equal for entries that share cases."""
    return entry.model or "", suite.family(entry.kernel)


def _identity(case: Case) -> object:
    """A key that is equal for cases with the same inputs and the same launches."""
    fields = dataclasses.asdict(case) | {"kernel": suite.family(case.kernel)}
    return tuple(sorted(fields.pop("sizes").items())), tuple(fields.items())
