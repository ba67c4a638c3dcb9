"""Folders of evidence: one file for each cubin and device. ``verify --record`` writes the records
of cubins that ran, the emulation's runner those of cubins whose PTX was emulated; nothing else
does.

Records are shipped beside the manifest, in the folder ``evidence`` of the artifacts. A user can add
records in the folder that the environment variable ``ROUTER_RUNTIME_EVIDENCE`` names, because an
installed package is often read-only.

A folder or a record that others may write is refused (``format/permissions.py``), unless a
signature over the record is checked. A file whose name is not a record's is not read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from router_runtime.errors import ArtifactError, FormatError, explain
from router_runtime.evidence import emulation_record
from router_runtime.evidence import record as verification_record
from router_runtime.evidence.emulation_record import EmulationRecord
from router_runtime.evidence.kinds import AnyRecord, dumps, is_emulation
from router_runtime.evidence.record import Record
from router_runtime.format import system_errors
from router_runtime.format.advice import (
    artifacts_places,
    build_artifacts,
    record_emulation,
    record_evidence,
)
from router_runtime.format.files import exists, list_folder, read_file
from router_runtime.format.manifest import digest_in_name
from router_runtime.trust import policy as trust

#: The folder of shipped records, inside an artifacts folder.
EVIDENCE_NAME = "evidence"
#: Names a user's own folder of evidence.
ENVIRONMENT_VARIABLE = "ROUTER_RUNTIME_EVIDENCE"

#: What the ``file_name`` of a record of either kind looks like: the start of a digest ends the
#: cubin's name.
_RECORD_NAME = re.compile(r".+-[0-9a-f]{16}\..+\.json")

#: Called with a file's path and the bytes that were read; raises if they may not be used.
Admit = Callable[[Path, bytes], None]

_Kind = TypeVar("_Kind", bound=AnyRecord)

#: Nobody but the owner may write to a folder that is created, whatever the umask is.
_FOLDER_MODE = 0o755

#: Far above what any record needs, far below what hurts.
MAX_RECORD_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Evidence:
    """Records that have been read, stale ones included; those of emulation apart."""

    records: tuple[Record, ...] = ()
    emulations: tuple[EmulationRecord, ...] = ()

    @property
    def of_both_kinds(self) -> tuple[AnyRecord, ...]:
        """Return every record."""
        return (*self.records, *self.emulations)

    def of(self, prefix: str) -> Iterator[Record]:
        """Return the records of the cubins whose file names start with ``prefix``."""
        return (record for record in self.records if record.file.startswith(prefix))

    def emulations_of(self, sha256: str) -> Iterator[EmulationRecord]:
        """Return the records of emulation that are about the cubin of this digest."""
        return (record for record in self.emulations if record.sha256 == sha256)


class EvidenceFiles:
    """The records in files, each read and checked when it is first needed.

    A record's file name starts with its cubin's, and a process needs those of a few cubins.

    Args:
        files: Path of a record -> what to call before it is parsed, or None.
        artifacts: The artifacts folder that they are about, for advice.

    """

    def __init__(self, files: Iterable[tuple[Path, Admit | None]], artifacts: Path | None) -> None:
        listed = tuple(files)
        others = [(path, admit) for path, admit in listed if not is_emulation(path.name)]
        emulations = [(path, admit) for path, admit in listed if is_emulation(path.name)]
        self._records: _Files[Record] = _Files(
            others, functools.partial(_read_record, artifacts=artifacts)
        )
        self._emulations: _Files[EmulationRecord] = _Files(emulations, _read_emulation)

    @property
    def records(self) -> tuple[Record, ...]:
        """Return every record of a cubin that ran, in the order of the files."""
        return tuple(self.of(""))

    @property
    def emulations(self) -> tuple[EmulationRecord, ...]:
        """Return every record of emulation, in the order of the files."""
        return tuple(self._emulations.named(lambda name: True))

    def of(self, prefix: str) -> Iterator[Record]:
        """Yield the records of the cubins whose file names start with ``prefix``. Raises
        ArtifactError or TrustError for the first that is not valid.
        """
        return self._records.named(lambda name: name.startswith(prefix))

    def emulations_of(self, sha256: str) -> Iterator[EmulationRecord]:
        """Yield the records of emulation that are about the cubin of this digest. Raises as ``of``
        does.
        """
        about = self._emulations.named(lambda name: f"-{digest_in_name(sha256)}." in name)
        return (record for record in about if record.sha256 == sha256)


class _Files(Generic[_Kind]):
    """Files with records of one kind. ``read`` is called once for each, when it is needed."""

    def __init__(
        self,
        files: Sequence[tuple[Path, Admit | None]],
        read: Callable[[Path, Admit | None], _Kind],
    ) -> None:
        self._files = files
        self._read = read
        self._known: dict[Path, _Kind] = {}

    def named(self, wanted: Callable[[str], bool]) -> Iterator[_Kind]:
        """Yield the records in files of these names."""
        for path, admit in self._files:
            if wanted(path.name):
                if path not in self._known:
                    self._known[path] = self._read(path, admit)
                yield self._known[path]


def own_folder(explicit: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the user's own folder of evidence: ``explicit`` if it is not None, else the folder
    that ``ROUTER_RUNTIME_EVIDENCE`` names, else None.
    """
    named = explicit if explicit is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else None


def folders(artifacts: Path) -> tuple[Path, ...]:
    """Return the folders from which evidence for an artifacts folder is read: the one beside its
    manifest, and the user's own.
    """
    shipped, own = artifacts / EVIDENCE_NAME, own_folder()
    return (shipped,) if own is None or own.resolve() == shipped.resolve() else (shipped, own)


def read_evidence(artifacts: Path) -> EvidenceFiles:
    """Return the records that count for an artifacts folder: the shipped ones and the user's own.

    Under a signature policy the shipped records must be signed, and the user's own folder must have
    been declared trusted.

    Raises:
        ArtifactError: The user's own folder does not exist, or a folder cannot be read or may be
            written by others. Reading a record later raises it for one that is not valid.
        TrustError: The policy does not cover the user's own folder. Reading a record later raises
            it for one that is not signed.

    """
    shipped, *own = folders(artifacts)

    def admit(path: Path, data: bytes) -> None:
        name = f"{EVIDENCE_NAME}/{path.name}"
        trust.admit(name, hashlib.sha256(data).hexdigest(), path)

    files: list[tuple[Path, Admit | None]] = [
        (path, admit) for path in _listed(shipped, signed=trust.in_force())[0]
    ]
    for folder in own:
        if not exists(folder):
            raise ArtifactError(
                explain(
                    f"evidence folder named by {ENVIRONMENT_VARIABLE}",
                    expected=f"the folder {folder}",
                    found="none",
                    remedy=f"fill it on the GPU to serve with: {record_evidence(artifacts)}",
                )
            )
        trust.admit_local_evidence(folder)
        files += [(path, None) for path in _listed(folder)[0]]
    return EvidenceFiles(files, artifacts)


def load_evidence(folder: Path, artifacts: Path | None = None) -> Evidence:
    """Return every record in a folder; none if the folder does not exist. A file whose name does
    not look like a record's is skipped. Raises ArtifactError for one whose name does, if it is not
    a valid record, or if its name is not exactly its record's ``file_name``.

    ``artifacts`` is the artifacts folder that they are about, for advice.
    """
    found = EvidenceFiles([(path, None) for path in _listed(folder)[0]], artifacts)
    return Evidence(found.records, found.emulations)


def files(artifacts: Path) -> tuple[list[Path], list[Path]]:
    """Return the files in the folders from which evidence is read: those with a record's name, and
    the others, which are not read.
    """
    shipped, *own = folders(artifacts)
    records, strays = _listed(shipped, signed=trust.in_force())
    for folder in own:
        more, others = _listed(folder)
        records, strays = records + more, strays + others
    return records, strays


def _listed(folder: Path, *, signed: bool = False) -> tuple[list[Path], list[Path]]:
    if not exists(folder):
        return [], []
    names = list_folder(folder, "evidence folder", "name a folder", signed=signed)
    records = [name for name in names if _RECORD_NAME.fullmatch(name)]
    strays = [name for name in names if not _RECORD_NAME.fullmatch(name)]
    return [folder / name for name in records], [folder / name for name in strays]


def _read_record(path: Path, admit: Admit | None, artifacts: Path | None) -> Record:
    again = f"delete it and run on such a GPU: {record_evidence(artifacts)}"
    return _read(path, admit, verification_record.loads, again)


def _read_emulation(path: Path, admit: Admit | None) -> EmulationRecord:
    return _read(path, admit, emulation_record.loads, f"delete it, and {record_emulation()}")


def _read(path: Path, admit: Admit | None, loads: Callable[[bytes], _Kind], again: str) -> _Kind:
    """The record in a file. ``admit`` is called with its path and bytes before they are parsed.

    ``again`` is how a record of the user's is made again; those of a wheel come with it.
    """
    if path.parent.resolve() == artifacts_places()[0] / EVIDENCE_NAME:
        again = build_artifacts()
    try:
        # A record that is admitted by its signature may be writable by others.
        signed = admit is not None and trust.in_force()
        data = read_file(path, MAX_RECORD_BYTES, f"evidence {path}", again, signed=signed)
        if admit is not None:
            admit(path, data)
        record = loads(data)
    except FormatError as error:
        raise ArtifactError(
            explain(f"evidence {path}", expected="a valid record", found=error, remedy=again)
        ) from error
    if path.name != record.file_name:
        raise ArtifactError(
            explain(
                f"evidence {path}",
                expected=f"the name {record.file_name}",
                found=path.name,
                remedy=f"rename it back, or {again}",
            )
        )
    return record


def require_writable(folder: Path, artifacts: Path) -> None:
    """Raise ArtifactError if records of an artifacts folder cannot be written into ``folder``,
    which is created.

    Called before the suite runs, so that no GPU time is spent on records that are lost. The records
    that are there must be valid: ``write_record`` reads them.
    """
    with _writing(folder, artifacts):
        folder.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    load_evidence(folder, artifacts)


def write_record(record: AnyRecord, folder: Path) -> Path:
    """Write a record, and remove those of its kind of the same entry and device about another
    cubin.

    Returns the path. Raises ArtifactError if the record cannot be written, or if another file in
    the folder has the name of a record and is not a valid one.
    """
    data = dumps(record)
    path = folder / record.file_name
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with _writing(folder):
        folder.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
        try:
            with open(temporary, "xb", opener=_open_for_owner) as file:
                file.write(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    found = load_evidence(folder)
    others: Sequence[AnyRecord] = found.records
    if isinstance(record, EmulationRecord):
        others = found.emulations
    for other in others:
        if (other.entry, other.device) == (record.entry, record.device) and (
            other.file_name != record.file_name
        ):
            (folder / other.file_name).unlink()
    return path


def _open_for_owner(path: str, flags: int) -> int:
    """Open a new file that only its owner may write, whatever the umask is."""
    return os.open(path, flags, 0o644)


@contextlib.contextmanager
def _writing(folder: Path, artifacts: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into ArtifactError."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            explain(
                "evidence folder",
                expected=f"a folder that can be written, {folder}",
                found=system_errors.found(error),
                remedy=system_errors.remedy(
                    error,
                    "name one of your own: "
                    f"{record_evidence(artifacts, '--evidence DIR')}, or {ENVIRONMENT_VARIABLE}",
                ),
            )
        ) from error
