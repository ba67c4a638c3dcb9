"""Writes the records of emulation: one for each cubin whose PTX passed everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from build_kernels.emulation.identity import model_sha256
from build_kernels.emulation.interface import MODES
from router_runtime.device import driver
from router_runtime.device.artifact_store import read_manifest
from router_runtime.errors import ArtifactError, explain
from router_runtime.evidence import store
from router_runtime.evidence.emulation_record import EmulationRecord
from router_runtime.format.advice import build_artifacts
from router_runtime.format.manifest import Entry
from router_runtime.verification.recording import examined, keep
from tests.emulation.suite import WHOLE, Outcome

Echo = Callable[[str], object]

_AGAIN = "run: make emulation"


class Recorder:
    """Writes records about the cubins of an artifacts folder.

    Args:
        document: What ``build-kernels emulate`` wrote beside the manifest of the emulated entries.
        artifacts: The artifacts folder with the cubins whose PTX it emulates.
        folder: Of evidence.
        echo: Called with a line for each record.

    """

    def __init__(
        self, document: Mapping[str, Any], artifacts: Path, folder: Path, echo: Echo
    ) -> None:
        self._document, self._artifacts = document, artifacts
        self._folder, self._echo = folder, echo
        self._manifest = read_manifest(artifacts)
        self._entries = {entry.key: entry for entry in self._manifest.entries}

    def check(self, keys: Iterable[str]) -> None:
        """Raise ArtifactError if no record could be written about these emulated entries.

        Called before the suite runs, so that no GPU time is spent on records that are lost: they
        must be emulated by the sources of this checkout, from the cubins of the artifacts, and the
        folder of evidence must be writable.
        """
        expected = model_sha256()
        found = str(self._document.get("model_sha256", "none"))[:16]
        if "ptxas" not in self._document:
            found = "one without the assembler's version"
        if found != expected[:16]:
            raise ArtifactError(
                explain(
                    "emulation",
                    expected=f"one made by the sources here, of model {expected[:16]}",
                    found=found,
                    remedy=_AGAIN,
                )
            )
        for key in keys:
            self.originals(key)
        store.require_writable(self._folder, self._artifacts)

    def originals(self, key: str) -> list[Entry]:
        """Return the entries of the artifacts whose PTX the emulated entry ``key`` is. Raises
        ArtifactError for one that the artifacts do not have, or have another cubin of.
        """
        found = []
        for original in self._document["entries"][key]["of"]:
            name, sha256 = original["entry"], original["sha256"]
            entry = self._entries.get(name)
            if entry is None or entry.sha256 != sha256:
                has = "none" if entry is None else entry.sha256[:16]
                raise ArtifactError(
                    explain(
                        f"{name} in {self._artifacts}",
                        expected=f"the cubin {sha256[:16]}, whose PTX is emulated",
                        found=has,
                        remedy=f"{build_artifacts()}, then {_AGAIN}",
                    )
                )
            found.append(entry)
        return found

    def finished(self, ran: Entry, outcomes: Sequence[Outcome]) -> None:
        """Record an emulated entry that passed in every mode; remove the record of one that failed.

        Args:
            ran: The emulated entry.
            outcomes: One for each mode that it ran in.

        """
        failed = [outcome.mode for outcome in outcomes if outcome.wrong]
        absent = [mode for mode in MODES if mode not in {outcome.mode for outcome in outcomes}]
        if failed or absent:
            why = [f"failed in {', '.join(failed)}"] if failed else []
            why += [f"did not run in {', '.join(absent)}"] if absent else []
            self._echo(f"      not recorded: {'; '.join(why)}")
            if not failed:
                return
        cases = next((outcome.cases for outcome in outcomes if outcome.mode == WHOLE), ())
        for entry in self.originals(ran.key):
            record = EmulationRecord(
                **examined(
                    entry, self._manifest, driver.device_name(0), driver.device_facts(0), cases
                ),
                ptx_sha256=self._document["entries"][ran.key]["ptx_sha256"],
                model_sha256=self._document["model_sha256"],
                ptxas=self._document["ptxas"],
                ran_target=ran.target,
                ran_sha256=ran.sha256,
                modes=tuple(outcome.mode for outcome in outcomes),
            )
            keep(record, not failed, self._folder, self._echo)
