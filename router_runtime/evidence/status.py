"""What the evidence says about an entry. Computed when it is needed and stored nowhere."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from router_runtime.evidence.store import Evidence, EvidenceFiles
from router_runtime.format.codec import encode
from router_runtime.format.manifest import Entry, Manifest, Toolchain

Status = Literal["verified", "source-verified", "unproven"]


def toolchain_sha256(toolchain: Toolchain) -> str:
    """Digest of the packages and flags that compiled an entry."""
    text = json.dumps(encode(toolchain), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def status(entry: Entry, manifest: Manifest, evidence: Evidence | EvidenceFiles) -> Status:
    """The standing of an entry, from the records that are current.

    ``verified``: a record of this very cubin. ``source-verified``: a record of a cubin for another
    target with the same source and the same toolchain. Else ``unproven``.
    """
    own = entry.file.removesuffix("cubin")
    if any(record.matches(entry) and record.current for record in evidence.of(own)):
        return "verified"
    found: Status = "unproven"
    for record in evidence.of(f"{entry.kernel}-"):
        if record.matches(entry) and record.current:
            return "verified"  # the same bytes under another model's name
        same_source = (record.source_sha256, record.kernel) == (entry.source_sha256, entry.kernel)
        if (
            same_source
            and record.target != entry.target
            and record.toolchain_sha256 == toolchain_sha256(manifest.toolchain)
            and record.current
        ):
            found = "source-verified"
    return found
