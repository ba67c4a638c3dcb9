"""What is recorded of a run of the oracle suite: the fields that records of both kinds have, and
the rule that a record is written for an entry that passed and removed for one that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from router_runtime.device.facts import DeviceFacts
from router_runtime.evidence import cases as suite
from router_runtime.evidence import store
from router_runtime.evidence.kinds import AnyRecord
from router_runtime.evidence.record import CaseRecord
from router_runtime.evidence.status import toolchain_sha256
from router_runtime.evidence.suite import cases_sha256
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.verification.judge import Verdict
from router_runtime.verification.trial import Trial

Echo = Callable[[str], object]


def case_record(trial: Trial, verdict: Verdict) -> CaseRecord:
    """Return what is recorded of a case that ran to its end."""
    return CaseRecord(
        name=trial.case.name,
        seed=trial.case.seed,
        inputs_sha256=trial.inputs_sha256,
        rows=verdict.rows,
        clear=verdict.clear,
        reordered=verdict.reordered,
        ids_sha256=verdict.ids_sha256,
        worst=verdict.worst,
    )


def examined(
    entry: Entry,
    manifest: Manifest,
    device: str,
    facts: DeviceFacts,
    cases: Sequence[CaseRecord],
) -> dict[str, Any]:
    """Return the fields of ``record.Examined``.

    Args:
        entry: What the record is about.
        manifest: Of the entry.
        device: Name of the GPU that ran the suite, as the driver gives it.
        facts: Of that GPU.
        cases: The results.

    """
    return {
        "entry": entry.key,
        "kernel": entry.kernel,
        "constants": entry.constants,
        "limits": entry.contract.limits,
        "target": entry.target,
        "file": entry.file,
        "sha256": entry.sha256,
        "source_sha256": entry.source_sha256,
        "toolchain_sha256": toolchain_sha256(manifest.toolchain),
        "suite_version": suite.SUITE_VERSION,
        "cases_sha256": cases_sha256(entry.kernel),
        "device": device,
        "compute_capability": (facts.major, facts.minor),
        "driver": facts.driver,
        "torch": str(torch.__version__),
        "cases": tuple(cases),
    }


def keep(record: AnyRecord, passed: bool, folder: Path, echo: Echo) -> Path | None:
    """Write the record of an entry that passed, and return its path; remove that of one that
    failed.
    """
    if passed:
        path = store.write_record(record, folder)
        echo(f"      recorded {path.name}")
        return path
    if (old := folder / record.file_name).exists():
        old.unlink()
        echo(f"      removed {old.name}: it no longer holds")
    return None
