"""Evidence: which device has run the oracle suite on which cubin, and what follows for an entry.

One file per cubin and device, written by ``router-runtime verify --record`` and never by hand. A
record says what was run (cubin, source and toolchain digests, suite digest), where (device, driver,
torch), and for every case the seed, the digests of inputs and ids and the worst errors. Inputs and
ids can be recomputed without a GPU, and ``make test`` does so for a sample.

A record counts only while it is *current*: made with the suite as it is now, for every case of it.
A record of an older suite is stale: it stays readable and proves nothing. An entry's status is
computed here when it is asked for and stored nowhere. This module imports no torch.

Records are shipped beside the manifest, and a user can add their own in the folder that the
environment variable ``ROUTER_RUNTIME_EVIDENCE`` names: an installed package is often read-only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router_runtime.device.artifact_store import EVIDENCE_NAME
from router_runtime.errors import ArtifactError, FormatError, TrustError, explain
from router_runtime.evidence import cases as suite
from router_runtime.format.codec import decode, encode, parse_json
from router_runtime.format.contract import Constants
from router_runtime.format.files import read_file
from router_runtime.format.manifest import Entry, Manifest, Toolchain, artifact_name
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust

FORMAT_VERSION = 1
#: Names a user's own folder of evidence.
ENVIRONMENT_VARIABLE = "ROUTER_RUNTIME_EVIDENCE"
RECORD_AGAIN = "delete it and run on such a GPU: router-runtime verify --record"

#: Is given a file's path and the bytes that were read, and raises if they may not be used.
Admit = Callable[[Path, bytes], None]

Status = Literal["verified", "source-verified", "unproven"]

#: Far above what any record needs, far below what hurts.
_MAX_RECORD = 4 * 2**20

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXT = re.compile(r"[ -~]*[!-~][ -~]*")


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
    constants: Constants
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

    def of(self, prefix: str) -> Iterator[Record]:
        """The records of the cubins whose file names start like this."""
        return (record for record in self.records if record.file.startswith(prefix))


class EvidenceFiles:
    """The records of folders, each read and checked when it is first asked for: a record bears the
    name of its cubin, and a process needs those of a few.
    """

    def __init__(self, files: Iterable[tuple[Path, Admit | None]]) -> None:
        self._files = tuple(files)
        self._read: dict[Path, Record] = {}

    @property
    def records(self) -> tuple[Record, ...]:
        """Every record, in the order of the files."""
        return tuple(self.of(""))

    def of(self, prefix: str) -> Iterator[Record]:
        """The records of the cubins whose file names start like this. Raises ArtifactError or
        TrustError for the first that is not valid.
        """
        for path, admit in self._files:
            if path.name.startswith(prefix):
                if path not in self._read:
                    self._read[path] = _read_record(path, admit)
                yield self._read[path]


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


def dumps(record: Record) -> bytes:
    """The canonical bytes of a record."""
    validate(record)
    text = json.dumps(encode(record), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def loads(data: bytes) -> Record:
    """Parse a record. Raises FormatError for whatever the schema does not allow."""
    try:
        document = parse_json(data, "evidence")
    except FormatError as error:
        raise FormatError(f"{error}; {RECORD_AGAIN}") from error
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise FormatError(
            f"expected evidence of format version {FORMAT_VERSION}, found {found!r}; {RECORD_AGAIN}"
        )
    record: Record = decode(Record, document, "evidence")
    validate(record)
    return record


def validate(record: Record) -> None:
    """Check what the types alone do not express, the list of cases included."""
    digests = [record.sha256, record.source_sha256, record.toolchain_sha256, record.suite_sha256]
    for case in record.cases:
        digests += [case.inputs_sha256, case.ids_sha256]
    is_digest = _SHA256.fullmatch
    for digest in digests:
        if is_digest(digest) is None:
            raise FormatError(f"evidence: expected 64 lower-case hex digits, found {digest!r}")
    _validate_entry(record)
    _validate_device(record)
    for case in record.cases:
        if not 0 <= case.clear <= case.rows or not 0 <= case.reordered <= case.rows:
            raise FormatError(
                f"evidence of case {case.name}: expected clear and reordered rows within its "
                f"{case.rows} rows, found {case.clear} and {case.reordered}"
            )
        if (
            not 0
            <= min(case.worst.values(), default=0)
            <= max(case.worst.values(), default=0)
            < math.inf
        ):
            raise FormatError(
                f"evidence of case {case.name}: expected errors of at least 0, found "
                f"{dict(case.worst)}"
            )
    if record.current:
        found = tuple((case.name, case.seed) for case in record.cases)
        expected = _suite_cases(
            record.kernel, tuple(record.constants.items()), tuple(record.limits.items())
        )
        if found != expected:
            missing = sorted({name for name, _ in expected} - {name for name, _ in found})
            raise FormatError(
                f"evidence: expected every case of the suite, in its order and with its seeds, "
                f"found {len(found)} of {len(expected)} (missing {missing[:5]}); {RECORD_AGAIN}"
            )


@functools.lru_cache(maxsize=256)
def _suite_cases(
    kernel: str,
    constants: tuple[tuple[str, int | float | str], ...],
    limits: tuple[tuple[str, tuple[int, int]], ...],
) -> tuple[tuple[str, int], ...]:
    """Name and seed of every case, listed once for all records of variants that serve alike."""
    try:
        listed = suite.cases(kernel, dict(constants), dict(limits))
    except (KeyError, ValueError) as error:
        raise FormatError(f"evidence: expected a kernel of the suite, found {error}") from error
    return tuple((case.name, case.seed) for case in listed)


def _validate_entry(record: Record) -> None:
    """The record's copies of what its entry says agree with each other."""
    parts = record.entry.split("/")
    if len(parts) != 4 or (parts[0], parts[2]) != (record.kernel, record.target):
        raise FormatError(
            f"evidence: expected the entry {record.kernel}/<model>/{record.target}/<variant>, "
            f"found {record.entry!r}"
        )
    _, model, _, variant = parts
    file = artifact_name(record.kernel, model, record.target, variant, record.sha256)
    if record.file != file:
        raise FormatError(f"evidence: expected the file {file}, found {record.file!r}")


def _validate_device(record: Record) -> None:
    if not Target.parse(record.target).runs_on(*record.compute_capability):
        raise FormatError(
            f"evidence: expected a device that runs {record.target}, found compute capability "
            f"{record.compute_capability}"
        )
    for name, text in (("device", record.device), ("torch", record.torch)):
        if _TEXT.fullmatch(text) is None or len(text) > 200:
            raise FormatError(f"evidence: expected the name of its {name}, found {text!r}")
    # The driver's CUDA version as it reports it: 13000 for 13.0.
    if not 1000 <= record.driver < 1000000:
        raise FormatError(
            f"evidence: expected a driver's CUDA version such as 13000, found {record.driver}"
        )


def own_folder(explicit: str | os.PathLike[str] | None = None) -> Path | None:
    """The user's own folder of evidence: the argument, or ``ROUTER_RUNTIME_EVIDENCE``, or None."""
    named = explicit if explicit is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else None


def folders(artifacts: Path) -> tuple[Path, ...]:
    """Where evidence for an artifacts folder is read: beside its manifest, and the user's own."""
    shipped, own = artifacts / EVIDENCE_NAME, own_folder()
    return (shipped,) if own is None or own.resolve() == shipped.resolve() else (shipped, own)


def read_evidence(artifacts: Path) -> EvidenceFiles:
    """The records that count for an artifacts folder: the shipped ones and the user's own.

    Under a signature policy the shipped ones must be signed, and the user's own be declared
    trusted. Raises ArtifactError or TrustError, here or when a record is asked for.
    """
    shipped, *own = folders(artifacts)

    def admit(path: Path, data: bytes) -> None:
        name = f"{EVIDENCE_NAME}/{path.name}"
        trust.admit(name, hashlib.sha256(data).hexdigest(), path)

    files: list[tuple[Path, Admit | None]] = [(path, admit) for path in _paths(shipped)]
    for folder in own:
        if not folder.is_dir():
            raise ArtifactError(
                explain(
                    f"evidence folder named by {ENVIRONMENT_VARIABLE}",
                    expected=f"the folder {folder}",
                    found="none",
                    remedy="fill it on the GPU to serve with: router-runtime verify --record",
                )
            )
        trust.admit_local_evidence(folder)
        files += [(path, None) for path in _paths(folder)]
    return EvidenceFiles(files)


def load_evidence(folder: Path) -> Evidence:
    """Every record of a folder; none if the folder does not exist. Raises ArtifactError for a file
    that is not a record or does not bear its record's name.
    """
    return Evidence(tuple(_read_record(path) for path in _paths(folder)))


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _read_record(path: Path, admit: Admit | None = None) -> Record:
    """The record in a file. ``admit`` is given its path and bytes before they are parsed."""
    try:
        data = read_file(path, _MAX_RECORD, "record", RECORD_AGAIN)
        if admit is not None:
            admit(path, data)
        record = loads(data)
    except TrustError:
        raise
    except (ArtifactError, FormatError) as error:
        raise ArtifactError(
            explain(f"evidence {path}", expected="a valid record", found=error, remedy=RECORD_AGAIN)
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
    return record


def require_writable(folder: Path) -> None:
    """Make the folder and a file in it, and remove the file. Raises ArtifactError if either fails:
    better before an hour of GPU time than after.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(
            explain(
                "evidence folder",
                expected=f"a folder that can be written, {folder}",
                found=error,
                remedy="name one of your own: router-runtime verify --record --evidence DIR, or "
                f"{ENVIRONMENT_VARIABLE}",
            )
        ) from error


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
