"""What is wrong with a release: each check yields one line for each contradiction that it finds."""

from __future__ import annotations

import email.parser
import hashlib
from collections.abc import Iterator, Mapping

from router_runtime.errors import FormatError
from router_runtime.evidence import kinds
from router_runtime.evidence.store import EVIDENCE_NAME
from router_runtime.format import cubin, wheel
from router_runtime.format.manifest import MANIFEST_NAME, Manifest
from router_runtime.format.provenance import (
    BESIDE,
    ENVELOPE_SUFFIX,
    MARKER_SUFFIX,
    STATEMENT_SUFFIX,
    SUMS_NAME,
    Statement,
    local_version,
    marker_loads,
    stem,
    sums_dumps,
)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def wrong_digests(
    statement: Statement, files: Mapping[str, bytes], entries: Mapping[str, bytes]
) -> Iterator[str]:
    """Yield the files, beside the wheel or in its artifacts folder, that the statement denies."""
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
        if name not in inside and not name.endswith(BESIDE):
            yield f"the wheel's {name}: expected a file, found none"
    listed = {
        name: digest
        for name, digest in statement.subjects.items()
        if name == MANIFEST_NAME or (name.endswith(BESIDE) and name != SUMS_NAME)
    }
    if SUMS_NAME in files and files[SUMS_NAME] != sums_dumps(listed):
        yield f"{SUMS_NAME}: expected the digests of the statement, found others"


def wrong_names(
    statement: Statement, start: str, entries: Mapping[str, bytes], manifest: Manifest
) -> Iterator[str]:
    """Yield where the name, version or commit in the statement, in the files' names and in the
    metadata is not one and the same.
    """
    expected = stem(statement.distribution, statement.version)
    if start != expected:
        yield f"the wheel's name: expected {expected}, found {start}"
    local = local_version(statement.commit)
    ending = statement.version.partition("+")[2]
    models = local_version(statement.commit, models=statement.models).removeprefix(local)
    if statement.clean:
        right, changed = ending == f"{local}{models}", ""
    else:
        right = ending.startswith(f"{local}.dirty") and ending.endswith(models)
        changed = ".dirty and a digest of its changes"
    if not right:
        wanted = f"+{local}{changed}{models}"
        yield f"the version: expected it to end with {wanted}, found {statement.version}"
    metadata = entries.get(f"{expected}.dist-info/METADATA", b"")
    headers = email.parser.BytesHeaderParser().parsebytes(metadata)
    name, version = headers.get("Name"), headers.get("Version")
    if (name, version) != (statement.distribution, statement.version):
        yield (
            f"the wheel's metadata: expected {statement.distribution} {statement.version}, "
            f"found {name} {version}"
        )
    yield from _wrong_marker(statement, expected + MARKER_SUFFIX, entries)
    packages = {name: package.version for name, package in statement.packages.items()}
    if packages != dict(manifest.toolchain.packages):
        yield f"{MANIFEST_NAME}: expected the statement's toolchain, found another"
    if dict(statement.flags) != dict(manifest.toolchain.flags):
        yield f"{MANIFEST_NAME}: expected the statement's flags, found others"
    if targets := {entry.target for entry in manifest.entries} - {*statement.targets}:
        yield f"{MANIFEST_NAME}: expected entries for {statement.targets}, found {sorted(targets)}"


def _wrong_marker(
    statement: Statement, file_name: str, entries: Mapping[str, bytes]
) -> Iterator[str]:
    try:
        marker = marker_loads(entries.get(wheel.ARTIFACTS + file_name, b""))
    except FormatError as error:
        yield f"{file_name}: {error}"
        return
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
            yield f"{file_name}: {what}: expected {wanted}, found {found}"


def wrong_contents(entries: Mapping[str, bytes], manifest: Manifest) -> Iterator[str]:
    """Yield the cubins that are not what their entry says, and the evidence that is about none."""
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
            except FormatError as error:
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
                record = kinds.loads(name.removeprefix(f"{EVIDENCE_NAME}/"), data)
            except (FormatError, ValueError) as error:
                yield f"{name}: {error}"
                continue
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
