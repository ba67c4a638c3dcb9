"""What evidence says about a release: the check before it and the notes beside it.

An entry's status is computed from the records by the runtime's own function: the status on the
device of its target where it is best. The notes are the only place where it is written down, and no
program reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from build_kernels.emulation.standing import in_words
from build_kernels.errors import BuildError, unknown
from router_runtime.evidence.ladder import STATUSES, Status
from router_runtime.evidence.status import status
from router_runtime.evidence.store import Evidence
from router_runtime.format.advice import record_evidence
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.provenance import Marker


def counting(manifest: Manifest, evidence: Evidence) -> Evidence:
    """Return the records that give an entry of the manifest a status: those that are shipped."""

    def counts(alone: Evidence) -> bool:
        return any(_status(entry, manifest, alone) != "unproven" for entry in manifest.entries)

    return Evidence(
        tuple(record for record in evidence.records if counts(Evidence((record,)))),
        tuple(each for each in evidence.emulations if counts(Evidence((), (each,)))),
    )


def require_verified(target: str, manifest: Manifest, evidence: Evidence) -> None:
    """Raise BuildError naming every entry of a target that no current record verifies: for a family
    target, a record of one of its members is enough.
    """
    entries = [entry for entry in manifest.entries if entry.target == target]
    if not entries:
        targets = {entry.target for entry in manifest.entries}
        raise unknown("target in this release", target, targets, "next: --target to add it")
    wrong = [
        f"{entry.key}: {reason}"
        for entry in entries
        if (reason := _unverified(entry, manifest, evidence))
    ]
    if wrong:
        raise BuildError(
            f"expected every digest of {target} to be verified, found {len(wrong)} of "
            f"{len(entries)} that are not:\n  " + "\n  ".join(wrong) + "\nnext: on a GPU that "
            f"runs {target}: make verify-gpu, and commit artifacts/evidence"
        )


def text(marker: Marker, manifest: Manifest, evidence: Evidence, guide: str) -> str:
    """Return the release notes, in Markdown. ``guide``: the part for those who install it."""
    statuses = {entry.key: _status(entry, manifest, evidence) for entry in manifest.entries}
    sums = Counter((entry.target, statuses[entry.key]) for entry in manifest.entries)
    tree = "" if marker.clean else ", **with uncommitted changes: it cannot be rebuilt**"
    lines = [
        f"# {marker.distribution} {marker.version}",
        "",
        f"Source commit `{marker.commit}`{tree}.",
        f"Source digest `{manifest.source_sha256}`, manifest `{marker.manifest_sha256}`.",
        "A `.dsse.json` file beside the wheel holds the signature; a release without one is "
        "unsigned.",
        "",
        *guide.splitlines(),
        "",
        "## Status of the kernels",
        "",
        "Computed from the evidence in this release. `verified`: this digest passed the oracle "
        "suite on the named device. `source-verified`: a cubin of the same source and toolchain "
        "did, on another target. `emulated`: this entry's PTX did, on the named device, with the "
        "instructions that the device lacks in software; the entry never ran on a device of its "
        'target, and the runtime uses it only for `Router(..., accept="emulated")` or when it is '
        "named. `unproven`: none of these; the runtime uses it only when it is named. The digest "
        "of a family target such as sm_100f is `verified` on devices with the compute capability "
        "of a named one, and `source-verified` on the other members of the family.",
        "",
        f"| target | {' | '.join(STATUSES)} |",
        f"| --- | {' | '.join('---' for _ in STATUSES)} |",
    ]
    for target in marker.targets:
        counts = (sums[target, kind] for kind in STATUSES)
        lines.append(f"| {target} | " + " | ".join(map(str, counts)) + " |")
    lines += [
        "",
        "| entry | status | on | registers | spills | bytes | sha256 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in manifest.entries:
        used = entry.resources
        cells = (
            entry.key,
            in_words(entry, statuses[entry.key], evidence),
            ", ".join(_devices(entry, manifest, evidence)) or "-",
            used.registers,
            used.spill_stores + used.spill_loads,
            entry.size,
            f"`{entry.sha256[:16]}`",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Toolchain", "", "| package | version |", "| --- | --- |"]
    for name, version in sorted(manifest.toolchain.packages.items()):
        lines.append(f"| {name} | {version} |")
    return "\n".join(lines) + "\n"


def _unverified(entry: Entry, manifest: Manifest, evidence: Evidence) -> str | None:
    found = _status(entry, manifest, evidence)
    if found == "verified":
        return None
    stale = [record.device for record in evidence.records if record.matches(entry)]
    if stale:
        return (
            f"{found}; the evidence of {', '.join(stale)} is of another suite; "
            f"run on such a GPU: {record_evidence()}"
        )
    if found == "emulated":
        return f"{found}; no device of its target has run {entry.sha256[:16]}"
    return f"{found}; no evidence for {entry.sha256[:16]}"


def _devices(entry: Entry, manifest: Manifest, evidence: Evidence) -> Sequence[str]:
    """The devices whose records give the entry its status, with their compute capability."""
    wanted = _status(entry, manifest, evidence)
    if wanted == "unproven":
        return []
    alone = [
        *(
            (record.device, record.compute_capability, Evidence((record,)))
            for record in evidence.records
        ),
        *(
            (each.device, each.compute_capability, Evidence((), (each,)))
            for each in evidence.emulations
        ),
    ]
    return sorted(
        {
            f"{device} ({major}.{minor})"
            for device, (major, minor), one in alone
            if _status(entry, manifest, one) == wanted
        }
    )


def _status(entry: Entry, manifest: Manifest, evidence: Evidence) -> Status:
    return status(entry, manifest, evidence, None)
