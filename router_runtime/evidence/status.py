"""What the evidence says about an entry. Computed when it is needed and stored nowhere."""

from __future__ import annotations

import hashlib
import json

from router_runtime.evidence.ladder import Status
from router_runtime.evidence.record import Record
from router_runtime.evidence.store import Evidence, EvidenceFiles
from router_runtime.format.codec import encode
from router_runtime.format.manifest import Entry, Manifest, Toolchain


def toolchain_sha256(toolchain: Toolchain) -> str:
    """Digest of the packages and flags that compiled an entry."""
    text = json.dumps(encode(toolchain), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def status(
    entry: Entry,
    manifest: Manifest,
    evidence: Evidence | EvidenceFiles,
    capability: tuple[int, int] | None,
) -> Status:
    """Return the status of an entry on devices of one kind, from the records that are current.

    Args:
        entry: Of ``manifest``.
        manifest: Names the toolchain that compiled the entry.
        evidence: The records. Of files, only those are read that can decide.
        capability: Compute capability of the devices, as (major, minor). None: of all devices that
            the entry's target runs on, the one where the status is best.

    Returns:
        The best that holds. ``verified``: a record names the digest of this very cubin, and a
        device of this compute capability ran it. ``source-verified``: a device of another compute
        capability ran this cubin, or a record is about a cubin for another target, of the same
        sources and the same toolchain. ``emulated``: a record of emulation names the digest of this
        very cubin. Else ``unproven``.

    Raises:
        ArtifactError: A record that is read is not valid.
        TrustError: A signature policy does not cover it.

    """

    def verifies(record: Record) -> bool:
        here = capability in (None, record.compute_capability)
        return here and record.matches(entry) and record.current

    own = entry.file.removesuffix("cubin")
    if any(verifies(record) for record in evidence.of(own)):
        return "verified"
    elsewhere = False
    for record in evidence.of(f"{entry.kernel}-"):
        if verifies(record):
            return "verified"  # the same bytes under another model's name
        compiled_alike = (
            record.same_sources(entry)
            and record.target != entry.target
            and record.toolchain_sha256 == toolchain_sha256(manifest.toolchain)
        )
        elsewhere = elsewhere or (record.current and (compiled_alike or record.matches(entry)))
    if elsewhere:
        return "source-verified"
    emulations = evidence.emulations_of(entry.sha256)
    if any(record.matches(entry) and record.current for record in emulations):
        return "emulated"
    return "unproven"
