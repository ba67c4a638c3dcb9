"""Records of evidence about cubins that a build folder shares with the checkout's artifacts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from build_kernels import publish
from build_kernels.errors import BuildError
from build_kernels.release.notes import counting
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.kinds import dumps
from router_runtime.evidence.status import status
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence, load_evidence
from router_runtime.format.manifest import Manifest


def read_records(folder: Path | None) -> Evidence:
    """Return the records in a folder of evidence. Raises BuildError for one that is not valid."""
    if folder is None:
        return Evidence()
    try:
        return load_evidence(folder)
    except RouterRuntimeError as error:
        raise BuildError(str(error)) from error


def write_records(out: Path, manifest: Manifest, evidence: Evidence) -> None:
    """Write the records that give an entry of a build its status into the build's folder."""
    records = counting(manifest, evidence).of_both_kinds
    if records:
        (out / EVIDENCE_NAME).mkdir(mode=0o755, exist_ok=True)
    for record in records:
        publish.write_file(out / EVIDENCE_NAME / record.file_name, dumps(record))


def summary(folder: Path, manifest: Manifest) -> tuple[dict[str, str], str]:
    """Return the status of each entry by the evidence beside its manifest, and in words how many
    have each. Without statuses, the words say why the evidence cannot be read.
    """
    try:
        evidence = read_records(folder / EVIDENCE_NAME)
    except BuildError as error:
        return {}, str(error)
    found: dict[str, str] = {
        entry.key: status(entry, manifest, evidence, None) for entry in manifest.entries
    }
    counts = Counter(found.values())
    names = dict.fromkeys(("verified", "source-verified", *sorted(counts), "unproven"))
    return found, ", ".join(f"{counts[name]} {name}" for name in names)
