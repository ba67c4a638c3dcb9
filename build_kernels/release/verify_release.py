"""A release as a receiver checks it: who signed it, whether it is whole, whether it rebuilds.

Everything is checked against the statement: each file beside the wheel, each file inside it, the
names and versions that they give themselves. Whatever is wrong is listed, not only the first.
"""

from __future__ import annotations

import email.parser
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.compile import cubin
from build_kernels.errors import BuildError
from build_kernels.release import signing, wheel
from router_runtime.errors import FormatError
from router_runtime.evidence import record as records
from router_runtime.evidence.store import EVIDENCE_NAME
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, loads
from router_runtime.format.provenance import (
    ENVELOPE_SUFFIX,
    MARKER_SUFFIX,
    NOTES_SUFFIX,
    SBOM_SUFFIX,
    STATEMENT_SUFFIX,
    WHEEL_SUFFIX,
    Statement,
    marker_loads,
    statement_loads,
    stem,
)

_WHEEL = re.compile(r"([A-Za-z0-9_.]+-[A-Za-z0-9_.!+]+)-py3-none-any\.whl")
#: The suffixes of the files beside the wheel; every other subject is inside it.
_BESIDE = (WHEEL_SUFFIX, SBOM_SUFFIX, NOTES_SUFFIX)
#: What a receiver does about a release that is not whole.
REFETCH = "next: do not install it; fetch it again; if that does not help, contact the releaser"


@dataclass(frozen=True, slots=True)
class Release:
    """A release that was found whole.

    Attributes:
        statement: What it says about itself.
        files: The files that were given, by name.
        entries: The files in its wheel, by path.
        manifest: Of its cubins.
        signed_by: Id of the key that signed it; None: no key was given to check a signature with.

    """

    statement: Statement
    files: Mapping[str, bytes]
    entries: Mapping[str, bytes]
    manifest: Manifest
    signed_by: str | None

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the files beside the wheel that the statement names and that were not given."""
        return tuple(
            name
            for name in sorted(self.statement.subjects)
            if name.endswith(_BESIDE) and name not in self.files
        )


def verify(paths: Sequence[Path], key: Path | None) -> Release:
    """Check the files of one release, or the one folder that holds them.

    Raises BuildError with everything that is wrong. With ``key``, a PEM file, an envelope signed by
    it must be among them.
    """
    files = _read(paths)
    start = _stem(files)
    data, signed_by = _statement(files, start, key)
    try:
        statement = statement_loads(data)
    except FormatError as error:
        raise BuildError(f"{start}: {error}; {REFETCH}") from error
    wheel_name = start + WHEEL_SUFFIX
    entries = wheel.read(files[wheel_name], wheel_name)
    wrong = list(_wrong_digests(statement, files, entries))
    manifest = None
    try:
        manifest = loads(entries.get(wheel.ARTIFACTS + MANIFEST_NAME, b""))
    except FormatError as error:
        wrong.append(f"{MANIFEST_NAME}: {error}")
    if manifest is not None:
        wrong += _wrong_names(statement, start, entries, manifest)
        wrong += _wrong_contents(entries, manifest)
    if wrong or manifest is None:
        raise BuildError(
            f"expected the release that {start}{STATEMENT_SUFFIX} describes, found:\n  "
            + "\n  ".join(wrong)
            + f"\n{REFETCH}"
        )
    return Release(statement, files, entries, manifest, signed_by)


def _read(paths: Sequence[Path]) -> dict[str, bytes]:
    listed = sorted(paths[0].iterdir()) if len(paths) == 1 and paths[0].is_dir() else list(paths)
    files: dict[str, bytes] = {}
    for path in listed:
        if path.is_symlink() or not path.is_file():
            kind = "a symbolic link" if path.is_symlink() else "none"
            raise BuildError(f"expected a plain file {path}, found {kind}; {REFETCH}")
        if path.name in files:
            raise BuildError(
                f"expected the files of one release, found two called {path.name}; "
                "next: name the files of one folder"
            )
        files[path.name] = path.read_bytes()
    return files


def _stem(files: Mapping[str, bytes]) -> str:
    found = [match[1] for name in files if (match := _WHEEL.fullmatch(name))]
    if len(found) != 1:
        raise BuildError(
            f"expected one wheel of a release among the files, found {len(found)}; "
            "next: name a release's folder, or its wheel and its .dsse.json"
        )
    return found[0]


def _statement(
    files: Mapping[str, bytes], start: str, key: Path | None
) -> tuple[bytes, str | None]:
    """The statement's bytes and the key that signed them."""
    plain, envelope = start + STATEMENT_SUFFIX, start + ENVELOPE_SUFFIX
    others = [name for name in files if name.endswith(ENVELOPE_SUFFIX) and name != envelope]
    if others:
        raise BuildError(f"expected the envelope {envelope}, found {others}; {REFETCH}")
    data = files.get(plain)
    signed_by = None
    if envelope in files:
        if key is not None:
            public = signing.public_key(key)
            inside = signing.verified(files[envelope], public, envelope)
            signed_by = signing.fingerprint(public)
        else:
            inside = signing.payload(files[envelope], envelope)
        if data is not None and data != inside:
            raise BuildError(
                f"expected {plain} to be the statement inside {envelope}, found another; {REFETCH}"
            )
        data = inside
    elif key is not None:
        raise BuildError(
            f"expected a release signed by {key}, found no {envelope}: it is unsigned; {REFETCH}"
        )
    if data is None:
        raise BuildError(
            f"expected {plain} or {envelope} beside the wheel, found neither; {REFETCH}"
        )
    return data, signed_by


def _wrong_digests(
    statement: Statement, files: Mapping[str, bytes], entries: Mapping[str, bytes]
) -> Iterator[str]:
    inside = _inside(entries)
    own = (STATEMENT_SUFFIX, ENVELOPE_SUFFIX)
    beside = {name: data for name, data in files.items() if not name.endswith(own)}
    for place, found in (("", beside), ("the wheel's ", inside)):
        for name, data in sorted(found.items()):
            expected = statement.subjects.get(name)
            digest = sha256(data)
            if expected is None:
                yield f"{place}{name}: expected no such file, found one not in the statement"
            elif digest != expected:
                yield f"{place}{name}: expected sha256 {expected}, found {digest}"
    for name in sorted(statement.subjects):
        if name not in inside and not name.endswith(_BESIDE):
            yield f"the wheel's {name}: expected a file, found none"


def _wrong_names(
    statement: Statement, start: str, entries: Mapping[str, bytes], manifest: Manifest
) -> Iterator[str]:
    """The name and version that the statement, the files and the metadata give must be one."""
    expected = stem(statement.distribution, statement.version)
    if start != expected:
        yield f"the wheel's name: expected {expected}, found {start}"
    metadata = entries.get(f"{expected}.dist-info/METADATA", b"")
    headers = email.parser.BytesHeaderParser().parsebytes(metadata)
    name, version = headers.get("Name"), headers.get("Version")
    if (name, version) != (statement.distribution, statement.version):
        yield (
            f"the wheel's metadata: expected {statement.distribution} {statement.version}, "
            f"found {name} {version}"
        )
    marker_name = expected + MARKER_SUFFIX
    try:
        marker = marker_loads(entries.get(wheel.ARTIFACTS + marker_name, b""))
    except FormatError as error:
        yield f"{marker_name}: {error}"
    else:
        pairs = {
            "distribution": (statement.distribution, marker.distribution),
            "version": (statement.version, marker.version),
            "commit": (statement.commit, marker.commit),
            "clean": (statement.clean, marker.clean),
            "targets": (statement.targets, marker.targets),
            "manifest": (
                sha256(entries[wheel.ARTIFACTS + MANIFEST_NAME]),
                marker.manifest_sha256,
            ),
        }
        for what, (wanted, found) in pairs.items():
            if wanted != found:
                yield f"{marker_name}: {what}: expected {wanted}, found {found}"
    packages = {name: package.version for name, package in statement.packages.items()}
    if packages != dict(manifest.toolchain.packages):
        yield f"{MANIFEST_NAME}: expected the statement's toolchain, found another"
    if dict(statement.flags) != dict(manifest.toolchain.flags):
        yield f"{MANIFEST_NAME}: expected the statement's flags, found others"
    if targets := {entry.target for entry in manifest.entries} - {*statement.targets}:
        yield f"{MANIFEST_NAME}: expected entries for {statement.targets}, found {sorted(targets)}"


def _wrong_contents(entries: Mapping[str, bytes], manifest: Manifest) -> Iterator[str]:
    """Each cubin must be what its entry says, and each record of evidence about one of them."""
    inside = _inside(entries)
    for entry in manifest.entries:
        data = inside.pop(entry.file, None)
        if data is None:
            yield f"{entry.key}: expected {entry.file} in the wheel, found none"
        elif sha256(data) != entry.sha256 or len(data) != entry.size:
            yield (
                f"{entry.key}: expected {entry.size} bytes with sha256 {entry.sha256}, found "
                f"{len(data)} with {sha256(data)}"
            )
        else:
            try:
                facts = cubin.read(data, entry.key)
            except BuildError as error:
                yield str(error)
                continue
            if (facts.target, facts.symbol) != (entry.target, entry.symbol):
                yield (
                    f"{entry.key}: expected {entry.symbol} for {entry.target}, found "
                    f"{facts.symbol} for {facts.target}"
                )
    for name, data in sorted(inside.items()):
        if name.startswith(f"{EVIDENCE_NAME}/"):
            try:
                record = records.loads(data)
            except (FormatError, ValueError) as error:
                yield f"{name}: {error}"
                continue
            if name != f"{EVIDENCE_NAME}/{record.file_name}":
                yield f"{name}: expected the name {record.file_name}"
            if not any(record.concerns(entry) for entry in manifest.entries):
                yield f"{name}: expected a record about a cubin of this release, found another's"
        elif name.endswith(".cubin"):
            yield f"{name}: expected only cubins that the manifest names"


def _inside(entries: Mapping[str, bytes]) -> dict[str, bytes]:
    """The wheel's artifacts folder, by path inside it."""
    return {
        name.removeprefix(wheel.ARTIFACTS): data
        for name, data in entries.items()
        if name.startswith(wheel.ARTIFACTS)
    }


def sha256(data: bytes) -> str:
    """Return the SHA-256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
