"""Folders of evidence: one file for each cubin and device, written by ``verify --record`` only.

Records are shipped beside the manifest, in the folder ``evidence`` of the artifacts. A user can add
records in the folder that the environment variable ``ROUTER_RUNTIME_EVIDENCE`` names, because an
installed package is often read-only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from router_runtime.errors import ArtifactError, FormatError, TrustError, explain
from router_runtime.evidence.record import RECORD_AGAIN, Record, dumps, loads
from router_runtime.format.files import read_file
from router_runtime.trust import policy as trust

#: The folder of shipped records, inside an artifacts folder.
EVIDENCE_NAME = "evidence"
#: Names a user's own folder of evidence.
ENVIRONMENT_VARIABLE = "ROUTER_RUNTIME_EVIDENCE"

#: Called with a file's path and the bytes that were read; raises if they may not be used.
Admit = Callable[[Path, bytes], None]

#: Far above what any record needs, far below what hurts.
MAX_RECORD_BYTES = 4 * 2**20


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
        data = read_file(path, MAX_RECORD_BYTES, "record", RECORD_AGAIN)
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
