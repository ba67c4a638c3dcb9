"""A release as a receiver checks it: who signed it, and whether it is whole.

Everything is checked against the statement: each file beside the wheel, the wheel itself and each
file of the artifacts folder inside it, the names and versions that they give themselves, the cubins
and the evidence about them. Where the files can be read, every contradiction is listed, not only
the first. Reading needs the standard library only; checking a signature needs the package
``cryptography``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_runtime.errors import ArtifactError, FormatError, TrustError, explain
from router_runtime.evidence.release_checks import wrong_contents, wrong_digests, wrong_names
from router_runtime.format import system_errors, wheel
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, loads
from router_runtime.format.provenance import (
    BESIDE,
    ENVELOPE_SUFFIX,
    NOTES_SUFFIX,
    SBOM_SUFFIX,
    STATEMENT_SUFFIX,
    WHEEL_SUFFIX,
    Statement,
    statement_loads,
)
from router_runtime.format.wheel import FETCH_AGAIN
from router_runtime.trust import dsse

_WHEEL = re.compile(r"([A-Za-z0-9_.]+-[A-Za-z0-9_.!+]+)-py3-none-any\.whl")


@dataclass(frozen=True, slots=True)
class Release:
    """A release that was found whole.

    Attributes:
        statement: What it says about itself.
        files: The files that were given, by name.
        entries: The files in its wheel, by path.
        manifest: Of its cubins.
        signed_by: Fingerprint of the key that signed it; None: no key was given to check a
            signature with.
        signed: Whether there is a signature, checked or not.

    """

    statement: Statement
    files: Mapping[str, bytes]
    entries: Mapping[str, bytes]
    manifest: Manifest
    signed_by: str | None
    signed: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the files beside the wheel that the statement names and that were not given."""
        return tuple(
            name
            for name in sorted(self.statement.subjects)
            if (name == MANIFEST_NAME or name.endswith(BESIDE)) and name not in self.files
        )


def description(found: Release) -> Iterator[str]:
    """Yield what was found, and what was not checked, in lines for a person."""
    statement = found.statement
    yield (
        f"{statement.distribution} {statement.version} of commit {statement.commit}, "
        f"{'clean' if statement.clean else 'WITH UNCOMMITTED CHANGES'}: "
        f"{len(found.manifest.entries)} cubins for {', '.join(statement.targets)}"
    )
    if found.signed_by:
        yield f"signed by the key {found.signed_by}"
    elif found.signed:
        yield (
            "signature NOT CHECKED: without --key KEY.pub, the key that the releaser published, "
            "anyone can have made these files"
        )
    else:
        yield "UNSIGNED: anyone can have made these files"
    for name in found.missing:
        yield f"not checked, for it was not given: {name}"


def verify(paths: Sequence[Path], key: Path | None) -> Release:
    """Check the files of one release: those named; those in the one folder that was named; or a
    wheel that was named alone, with its statement, envelope, SBOM and notes where they lie beside
    it. ``SHA256SUMS`` and ``manifest.json`` beside such a wheel are not read.

    Raises ArtifactError or FormatError: at once if the files, the statement or the wheel cannot be
    read, else with every contradiction between them. With ``key``, a PEM file, an envelope signed
    by it must be among the files; TrustError is raised if it is not.
    """
    try:
        files = _read(paths)
    except OSError as error:
        where = Path(os.fsdecode(error.filename)) if error.filename else paths[0]
        raise ArtifactError(
            explain(
                "release",
                expected="files that can be read",
                found=system_errors.found(error),
                remedy=system_errors.reading_remedy(error, where, "name files that can be read"),
            )
        ) from error
    start = _stem(files)
    data, signed_by = _statement(files, start, key)
    try:
        statement = statement_loads(data)
    except FormatError as error:
        raise FormatError(f"{start}: {error}; {FETCH_AGAIN}") from error
    wheel_name = start + WHEEL_SUFFIX
    entries = wheel.read(files[wheel_name], wheel_name)
    wrong = list(wrong_digests(statement, files, entries))
    manifest = None
    try:
        manifest = loads(entries.get(wheel.ARTIFACTS + MANIFEST_NAME, b""))
    except FormatError as error:
        wrong.append(f"{MANIFEST_NAME}: {error}")
    if manifest is not None:
        wrong += wrong_names(statement, start, entries, manifest)
        wrong += wrong_contents(entries, manifest)
    if wrong or manifest is None:
        raise ArtifactError(
            f"expected the release that {start}{STATEMENT_SUFFIX} describes, found:\n  "
            + "\n  ".join(wrong)
            + f"\n{FETCH_AGAIN}"
        )
    signed = start + ENVELOPE_SUFFIX in files
    return Release(statement, files, entries, manifest, signed_by, signed)


def _read(paths: Sequence[Path]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for path in _listed(paths):
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(
                f"expected a plain file {path}, found {_kind(path)}; name the folder of one "
                "release, its wheel, or its plain files"
            )
        if path.name in files:
            raise ArtifactError(
                f"expected the files of one release, found two called {path.name}; "
                "name the files of one folder"
            )
        files[path.name] = path.read_bytes()
    return files


def _listed(paths: Sequence[Path]) -> list[Path]:
    if len(paths) != 1:
        return list(paths)
    (path,) = paths
    if path.is_dir():
        return sorted(path.iterdir())
    match = _WHEEL.fullmatch(path.name)
    if match is None:
        return [path]
    suffixes = (STATEMENT_SUFFIX, ENVELOPE_SUFFIX, SBOM_SUFFIX, NOTES_SUFFIX)
    beside = (path.with_name(match[1] + suffix) for suffix in suffixes)
    return [path, *(each for each in beside if each.is_symlink() or each.exists())]


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a symbolic link"
    if path.is_dir():
        return "a folder"
    return "something else" if path.exists() else "none"


def _stem(files: Mapping[str, bytes]) -> str:
    found = [match[1] for name in files if (match := _WHEEL.fullmatch(name))]
    if len(found) != 1:
        raise ArtifactError(
            f"expected one wheel of a release among the files, found {len(found)}; "
            "name a release's folder, or its wheel"
        )
    return found[0]


def _statement(
    files: Mapping[str, bytes], start: str, key: Path | None
) -> tuple[bytes, str | None]:
    """The statement's bytes and the fingerprint of the key that signed them."""
    plain, envelope = start + STATEMENT_SUFFIX, start + ENVELOPE_SUFFIX
    others = [name for name in files if name.endswith(ENVELOPE_SUFFIX) and name != envelope]
    if others:
        raise ArtifactError(f"expected the envelope {envelope}, found {others}; {FETCH_AGAIN}")
    data = files.get(plain)
    signed_by = None
    if envelope in files:
        if key is None:
            inside = _envelope(files[envelope], envelope).payload
        else:
            inside, signed_by = _signed(files[envelope], key, envelope)
        if data is not None and data != inside:
            raise ArtifactError(
                f"expected {plain} to be the statement inside {envelope}, found another; "
                f"{FETCH_AGAIN}"
            )
        data = inside
    elif key is not None:
        raise TrustError(
            f"expected a release signed by {key}, found no {envelope} among "
            f"{', '.join(sorted(files))}: it is unsigned; fetch {envelope} too, beside the wheel, "
            "or do not install it"
        )
    if data is None:
        raise ArtifactError(
            f"expected {plain} or {envelope} beside the wheel, found neither; fetch one of them "
            "from where the wheel is"
        )
    return data, signed_by


def _signed(data: bytes, key: Path, where: str) -> tuple[bytes, str]:
    """The statement in an envelope that ``key`` signed, and the key's fingerprint."""
    public = dsse.public_key_file(key)
    fingerprint = dsse.fingerprint(public.public_bytes_raw())
    envelope = _envelope(data, where)
    if not dsse.is_signed_by(envelope, public):
        signers = ", ".join(each.keyid for each in envelope.signatures)
        raise TrustError(
            f"{where}: expected a signature by the key {fingerprint}, found none that is valid "
            f"among those that name {signers}: it was signed with another key or altered; do not "
            "install it, and ask those who released it"
        )
    return envelope.payload, fingerprint


def _envelope(data: bytes, where: str) -> dsse.Envelope:
    """The envelope in a file, in the one form that ``dsse.dumps`` writes."""
    try:
        envelope = dsse.loads(data)
    except FormatError as error:
        raise FormatError(
            f"{where}: expected a DSSE envelope of a statement, found: {error}; {FETCH_AGAIN}"
        ) from error
    if dsse.dumps(envelope) != data:
        raise FormatError(
            f"{where}: expected a DSSE envelope of a statement in its canonical form, found "
            f"another; {FETCH_AGAIN}"
        )
    return envelope
