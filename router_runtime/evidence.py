"""Evidence: which device has run the oracle suite on which cubin, and what follows for an entry.

One file per cubin and device, written by ``router-runtime verify --record`` and never by hand. A
record says what was run (cubin, source and toolchain digests, suite digest), where (device, driver,
torch), and for every case the seed, the digests of inputs and ids and the worst errors. Inputs and
ids can be recomputed without a GPU, and ``make test`` does so for a sample.

A record counts only while it is *current*: made with the suite as it is now, for every case of it.
A record of an older suite is stale: it stays readable and proves nothing. An entry's status is
computed here when it is asked for and stored nowhere. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router_runtime import manifest as format_
from router_runtime import suite
from router_runtime.errors import ArtifactError, explain
from router_runtime.manifest import Entry, Manifest, ManifestError, Target, Toolchain

FORMAT_VERSION = 1
RECORD_AGAIN = "delete it and run on such a GPU: router-runtime verify --record"

Status = Literal["verified", "source-verified", "unproven"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """What one case of the suite gave.

    ``clear`` counts the rows whose ids are fully determined by the mathematics; ``ids_sha256`` is
    over those. ``reordered`` counts rows in which near-ties were ranked in another allowed order
    than the oracle's. ``worst`` holds the worst errors, see ``judge.Verdict``.
    """

    name: str
    seed: int
    inputs_sha256: str
    rows: int
    clear: int
    reordered: int
    ids_sha256: str
    worst: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Record:
    """One cubin on one device. ``entry`` is ``Entry.key``, for readers; digests identify."""

    entry: str
    kernel: str
    constants: Mapping[str, int | float]
    limits: Mapping[str, tuple[int, int]]
    target: str
    file: str
    sha256: str
    source_sha256: str
    toolchain_sha256: str
    suite_sha256: str
    device: str
    compute_capability: tuple[int, int]
    driver: int
    torch: str
    cases: tuple[CaseRecord, ...]
    format_version: int = FORMAT_VERSION

    @property
    def current(self) -> bool:
        """True if it was made with the suite as it is now."""
        return self.suite_sha256 == suite.suite_sha256()

    @property
    def file_name(self) -> str:
        """The name under which the record is stored: the cubin's, then the device's."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{self.file.removesuffix('.cubin')}.{device}.json"

    def matches(self, entry: Entry) -> bool:
        """True if the record is about this very cubin, run over the limits that it has now."""
        return (
            self.sha256 == entry.sha256
            and self.kernel == entry.kernel
            and dict(self.constants) == dict(entry.constants)
            and dict(self.limits) == dict(entry.contract.limits)
        )


@dataclass(frozen=True, slots=True)
class Evidence:
    """Every record of a folder, stale ones included."""

    records: tuple[Record, ...] = ()


def toolchain_sha256(toolchain: Toolchain) -> str:
    """Digest of the packages and flags that compiled an entry."""
    text = json.dumps(format_.encode(toolchain), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def status(entry: Entry, manifest: Manifest, evidence: Evidence) -> Status:
    """The standing of an entry, from the records that are current.

    ``verified``: a record of this very cubin. ``source-verified``: a record of a cubin for another
    target with the same source and the same toolchain. Else ``unproven``.
    """
    current = [record for record in evidence.records if record.current]
    if any(record.matches(entry) for record in current):
        return "verified"
    toolchain = toolchain_sha256(manifest.toolchain)
    for record in current:
        same_code = (record.source_sha256, record.toolchain_sha256, record.kernel) == (
            entry.source_sha256,
            toolchain,
            entry.kernel,
        )
        if same_code and record.target != entry.target:
            return "source-verified"
    return "unproven"


def dumps(record: Record) -> bytes:
    """The canonical bytes of a record."""
    validate(record)
    text = json.dumps(format_.encode(record), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def loads(data: bytes) -> Record:
    """Parse a record. Raises ManifestError for whatever the schema does not allow."""
    try:
        document = json.loads(data, object_pairs_hook=format_.refuse_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"expected JSON evidence, found {error}; {RECORD_AGAIN}") from error
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise ManifestError(
            f"expected evidence of format version {FORMAT_VERSION}, found {found!r}; {RECORD_AGAIN}"
        )
    record: Record = format_.decode(Record, document, "evidence")
    validate(record)
    return record


def validate(record: Record) -> None:
    """Check what the types alone do not express, the list of cases included."""
    digests = [record.sha256, record.source_sha256, record.toolchain_sha256, record.suite_sha256]
    for case in record.cases:
        digests += [case.inputs_sha256, case.ids_sha256]
    for digest in digests:
        if _SHA256.fullmatch(digest) is None:
            raise ManifestError(f"evidence: expected 64 lower-case hex digits, found {digest!r}")
    if not Target.parse(record.target).runs_on(*record.compute_capability):
        raise ManifestError(
            f"evidence: expected a device that runs {record.target}, found compute capability "
            f"{record.compute_capability}"
        )
    for case in record.cases:
        if not 0 <= case.clear <= case.rows or not 0 <= case.reordered <= case.rows:
            raise ManifestError(
                f"evidence of case {case.name}: expected clear and reordered rows within its "
                f"{case.rows} rows, found {case.clear} and {case.reordered}"
            )
    if record.current:
        listed = suite.cases(record.kernel, record.constants, record.limits)
        expected = [(case.name, case.seed) for case in listed]
        found = [(case.name, case.seed) for case in record.cases]
        if found != expected:
            missing = sorted({name for name, _ in expected} - {name for name, _ in found})
            raise ManifestError(
                f"evidence: expected every case of the suite, in its order and with its seeds, "
                f"found {len(found)} of {len(expected)} (missing {missing[:5]}); {RECORD_AGAIN}"
            )


def load_evidence(folder: Path) -> Evidence:
    """Every record of a folder; none if the folder does not exist. Raises ArtifactError for a file
    that is not a record or does not bear its record's name.
    """
    records = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = loads(path.read_bytes())
        except (OSError, ManifestError) as error:
            raise ArtifactError(
                explain(
                    f"evidence {path}", expected="a valid record", found=error, remedy=RECORD_AGAIN
                )
            ) from error
        if path.name != record.file_name:
            raise ArtifactError(
                explain(
                    f"evidence {path}",
                    expected=f"the name {record.file_name}",
                    found=path.name,
                    remedy="rename it back, or " + RECORD_AGAIN,
                )
            )
        records.append(record)
    return Evidence(tuple(records))


def write_record(record: Record, folder: Path) -> Path:
    """Write a record and drop those that it supersedes: same entry, same device, other cubin."""
    data = dumps(record)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for other in load_evidence(folder).records:
        if (other.entry, other.device) == (record.entry, record.device) and (
            other.file_name != record.file_name
        ):
            (folder / other.file_name).unlink()
    return path
