"""Signed releases of synthetic artifacts, made the way the format says and not by the builder."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from router_runtime import __version__
from router_runtime.evidence import cases as suite
from router_runtime.evidence.emulation_record import MODES, EmulationRecord
from router_runtime.evidence.record import CaseRecord, Record
from router_runtime.evidence.store import write_record
from router_runtime.evidence.suite import cases_of, cases_sha256
from router_runtime.format import provenance
from router_runtime.format.manifest import MANIFEST_NAME, Entry
from router_runtime.format.provenance import Marker, Statement

KEY = Ed25519PrivateKey.from_private_bytes(b"release key of these tests, 32 b")
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"another key of these tests, 32 b")

DISTRIBUTION = "dsv4-router-runtime"
COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Release:
    """An artifacts folder, the envelope over it, and the public key in PEM beside them."""

    folder: Path
    envelope: Path
    public_key: Path


def pem(key: Any) -> bytes:
    found: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def record_of(entry: Entry, device: str = "Fake GPU", **changes: Any) -> Record:
    """A current record of ``entry`` whose digests are made up."""
    cases = tuple(
        CaseRecord(case.name, case.seed, "1" * 64, 1, 1, 0, "2" * 64, {})
        for case in cases_of(entry.kernel, entry.constants, entry.contract.limits)
    )
    fields: dict[str, Any] = {
        "entry": entry.key,
        "kernel": entry.kernel,
        "constants": entry.constants,
        "limits": entry.contract.limits,
        "target": entry.target,
        "file": entry.file,
        "sha256": entry.sha256,
        "source_sha256": entry.source_sha256,
        "toolchain_sha256": "3" * 64,
        "suite_version": suite.SUITE_VERSION,
        "cases_sha256": cases_sha256(entry.kernel),
        "device": device,
        "compute_capability": (9, 0),
        "driver": 13000,
        "torch": "2.13.0",
        "cases": cases,
    }
    return Record(**(fields | changes))


def emulation_of(entry: Entry, device: str = "Fake GPU", **changes: Any) -> EmulationRecord:
    """A current record of emulation of ``entry``, on a GPU for sm_90a; its digests are made up."""
    fields = dataclasses.asdict(record_of(entry, device)) | {"cases": record_of(entry).cases}
    del fields["format_version"]
    fields |= {
        "ptx_sha256": "6" * 64,
        "model_sha256": "7" * 64,
        "ptxas": "13.5.37",
        "ran_target": "sm_90a",
        "ran_sha256": "8" * 64,
        "modes": MODES,
    }
    return EmulationRecord(**(fields | changes))


def subjects_of(folder: Path) -> dict[str, str]:
    """Path inside the folder -> digest, of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def statement_of(subjects: Mapping[str, str], **changes: Any) -> Statement:
    fields: dict[str, Any] = {
        "distribution": DISTRIBUTION,
        "version": __version__,
        "targets": ("sm_90a",),
        "commit": COMMIT,
        "changes": (),
        "flags": {"cuda": ("--std=c++20",)},
        "locks": {"build_kernels/toolchain.lock": "4" * 64},
        "packages": {"nvrtc": provenance.Package("13.5", ("5" * 64,))},
        "subjects": subjects,
    }
    return Statement(**(fields | changes))


def envelope_of(payload: bytes, *keys: Any, kind: str = provenance.PAYLOAD_TYPE) -> dict[str, Any]:
    """A DSSE envelope of ``payload``, signed by every key."""
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [
            {"keyid": "anything", "sig": base64.b64encode(key.sign(message)).decode()}
            for key in keys
        ],
    }


def add_marker(folder: Path, **changes: Any) -> Path:
    """Write the release marker that belongs to the folder's manifest."""
    fields: dict[str, Any] = {
        "distribution": DISTRIBUTION,
        "version": __version__,
        "commit": COMMIT,
        "clean": True,
        "targets": ("sm_90a",),
        "manifest_sha256": hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest(),
    }
    marker = Marker(**(fields | changes))
    path = folder / marker.file_name
    path.write_bytes(provenance.marker_dumps(marker))
    return path


def sign(folder: Path, name: str = "release", key: Any = KEY, **changes: Any) -> Release:
    """Sign a folder as it is now; the envelope and the key lie beside it."""
    envelope = folder.parent / f"{name}.dsse.json"
    statement = statement_of(subjects_of(folder), **changes)
    payload = provenance.statement_dumps(statement)
    envelope.write_text(json.dumps(envelope_of(payload, key)))
    public_key = folder.parent / f"{name}.pub"
    public_key.write_bytes(pem(key))
    return Release(folder, envelope, public_key)


def add_evidence(folder: Path, entries: list[Entry], device: str = "Fake GPU") -> None:
    for entry in entries:
        write_record(record_of(entry, device), folder)
