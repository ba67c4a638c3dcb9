"""The policy on load: a process may require that every file it loads is covered by a signature.

``require_signature`` sets it, or two environment variables do for programs that cannot call it.
From then on the manifest, every cubin and every evidence file are refused unless the digest of the
very bytes that were read, and that the driver is given, stands in a release's provenance statement
signed by the given key. The policy holds for the process, cannot be taken back or exchanged, and
covers what was loaded before it: whoever sets it late is told what is not covered.

Nothing here matters until a policy is set, and only then is ``cryptography`` imported: it is an
optional requirement of the package (``signature``), and without it a policy is refused.

What is not covered: the Python files of this package, which do the checking. Install them by hash.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_runtime.errors import (
    DISTRIBUTION,
    ArtifactError,
    FormatError,
    TrustError,
    explain,
    install_extra,
)
from router_runtime.format import provenance
from router_runtime.format.codec import parse_json
from router_runtime.format.files import read_file
from router_runtime.format.provenance import Statement
from router_runtime.version import __version__

PUBLIC_KEY_VARIABLE = "ROUTER_RUNTIME_PUBLIC_KEY"
ENVELOPE_VARIABLE = "ROUTER_RUNTIME_ENVELOPE"
LOCAL_EVIDENCE_VARIABLE = "ROUTER_RUNTIME_LOCAL_EVIDENCE"

#: Far above what a release needs, far below what hurts.
_MAX_ENVELOPE = 16 * 2**20
_MAX_KEY = 64 * 2**10
_MAX_SIGNATURES = 16

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----")
#: What precedes the key in a SubjectPublicKeyInfo (RFC 8410).
_ED25519 = bytes.fromhex("302a300506032b6570032100")

_VERIFY_RELEASE = "take both from one release, and see: build-kernels verify-release"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the process requires: files of this statement, signed by this key (32 raw bytes).

    ``local_evidence``: evidence in the user's own folder counts, unsigned as it is.
    """

    public_key: bytes
    statement: Statement
    local_evidence: bool

    def __str__(self) -> str:
        statement = self.statement
        local = ", local evidence trusted" if self.local_evidence else ""
        return (
            f"{statement.distribution} {statement.version} of commit {statement.commit[:12]} by "
            f"the key {self.public_key.hex()[:16]}{local}"
        )


_lock = threading.RLock()
_policy: Policy | None = None
#: Why a policy that was asked for could not be set. Until one is, nothing may be loaded.
_refusal: TrustError | None = None
#: The environment that has been acted on.
_environment: tuple[str | None, ...] = (None, None)
#: Every (name, digest) read so far, and every local evidence folder, for a policy set later.
_admitted: dict[tuple[str, str], Path] = {}
_local_folders: set[Path] = set()


def require_signature(
    public_key: bytes | str | os.PathLike[str],
    envelope: str | os.PathLike[str],
    *,
    local_evidence: bool = False,
) -> None:
    """Load nothing in this process that a release signed by ``public_key`` does not contain.

    ``public_key`` is an ed25519 key in PEM, or the path of one; ``envelope`` is the path of the
    release's DSSE file. Both are read now, once. Evidence that a user has recorded in a folder of
    their own (``ROUTER_RUNTIME_EVIDENCE``) is unsigned: it is refused unless ``local_evidence``
    says that this folder is trusted. It can only make a signed cubin eligible, never add one.

    Repeating a call changes nothing; asking for another key, release or ``local_evidence`` is
    refused. If the call fails, the process loads nothing until one succeeds. If files were loaded
    before that the release does not contain, the policy is in force for whatever is loaded from now
    on, and the error names them: routers that use them keep running until the process ends.

    A policy belongs to a process. Processes started from it need a call of their own, or the
    environment variables ``ROUTER_RUNTIME_PUBLIC_KEY`` and ``ROUTER_RUNTIME_ENVELOPE`` (paths), and
    ``ROUTER_RUNTIME_LOCAL_EVIDENCE=1`` for ``local_evidence``.

    Raises TrustError: the package ``cryptography`` is absent, a file is unreadable, the signature
    is not this key's, the release is of another package or version, another policy is in force.
    """
    global _refusal
    with _lock:
        try:
            wanted = _read_policy(public_key, Path(envelope), local_evidence)
        except TrustError as error:
            if _policy is None:
                _refusal = error
            raise
        _set(wanted)


def policy() -> Policy | None:
    """The policy in force, or None. Reads the environment variables if they are set."""
    global _environment, _refusal
    with _lock:
        key = os.environ.get(PUBLIC_KEY_VARIABLE) or None
        envelope = os.environ.get(ENVELOPE_VARIABLE) or None
        local = os.environ.get(LOCAL_EVIDENCE_VARIABLE)
        found = (key, envelope, local)
        if (key or envelope) and found != _environment:
            if key is None or envelope is None:
                raise TrustError(
                    explain(
                        "signature policy from the environment",
                        expected=f"both {PUBLIC_KEY_VARIABLE} and {ENVELOPE_VARIABLE}",
                        found=f"{PUBLIC_KEY_VARIABLE if key else ENVELOPE_VARIABLE} only",
                        remedy="set both, or neither",
                    )
                )
            if local not in (None, "", "0", "1"):
                raise TrustError(
                    explain(
                        LOCAL_EVIDENCE_VARIABLE, expected="1 or 0", found=local, remedy="set one"
                    )
                )
            _set(_read_policy(key, Path(envelope), local == "1"))
            _environment = found
        if _policy is None and _refusal is not None:
            raise _refusal
        return _policy


def admit(name: str, sha256: str, path: Path) -> None:
    """Let pass a file of an artifacts folder whose bytes have this digest, or raise TrustError.

    ``name`` is its path inside the folder, ``path`` says where it was read. Without a policy the
    digest is remembered, so that a policy set later covers it too.
    """
    with _lock:
        required = policy()
        if required is None:
            _admitted[name, sha256] = path
            return
    signed = required.statement.subjects.get(name)
    if signed != sha256:
        release = f"{required.statement.distribution} {required.statement.version}"
        raise TrustError(
            explain(
                f"signature over {path}",
                expected=f"sha256 {signed}, as {release} was signed"
                if signed
                else f"a file that {release} was signed with",
                found=f"sha256 {sha256}" if signed else f"{name}, which is not among them",
                remedy="install that release anew, or require the signature of this one",
            )
        )


def admit_local_evidence(folder: Path) -> None:
    """Let pass evidence recorded on this machine, which nobody signed, or raise TrustError."""
    with _lock:
        required = policy()
        if required is None:
            _local_folders.add(folder)
            return
    if not required.local_evidence:
        raise TrustError(
            explain(
                f"evidence in {folder}",
                expected="signed evidence, as this process requires",
                found="a folder of the user's own",
                remedy="unset ROUTER_RUNTIME_EVIDENCE, or say that the folder is trusted: "
                f"require_signature(..., local_evidence=True) or {LOCAL_EVIDENCE_VARIABLE}=1",
            )
        )


def verify_envelope(data: bytes, public_key: Any) -> Statement:
    """The statement of a DSSE envelope that ``public_key`` has signed.

    ``public_key`` is an ``Ed25519PublicKey``. The key ids in the envelope are hints that anyone can
    write, so they are ignored. Raises TrustError or FormatError.
    """
    invalid, _, _ = _library()
    payload, signatures = _parse_envelope(data)
    kind = provenance.PAYLOAD_TYPE.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    for signature in signatures:
        try:
            public_key.verify(signature, message)
        except invalid:
            continue
        return provenance.statement_loads(payload)
    raise TrustError(
        explain(
            "envelope",
            expected="a signature by the given public key",
            found=f"{len(signatures)} by others, or over other bytes",
            remedy=_VERIFY_RELEASE,
        )
    )


def _parse_envelope(data: bytes) -> tuple[bytes, list[bytes]]:
    """Payload and signatures. Raises FormatError for whatever DSSE or this format has not."""
    document = parse_json(data, "a DSSE envelope")
    expected = {"payload", "payloadType", "signatures"}
    if not isinstance(document, dict) or document.keys() != expected:
        raise FormatError(f"expected an envelope with exactly the keys {sorted(expected)}")
    if document["payloadType"] != provenance.PAYLOAD_TYPE:
        raise FormatError(
            f"expected the payload type {provenance.PAYLOAD_TYPE}, found "
            f"{document['payloadType']!r}"
        )
    signatures = document["signatures"]
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= _MAX_SIGNATURES:
        raise FormatError(f"expected 1 to {_MAX_SIGNATURES} signatures; the envelope is unsigned")
    found = []
    for signature in signatures:
        if not isinstance(signature, dict) or signature.keys() != {"keyid", "sig"}:
            raise FormatError("expected signatures with exactly the keys ['keyid', 'sig']")
        found.append(_base64(signature["sig"], "sig"))
    return _base64(document["payload"], "payload"), found


def _base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise FormatError(f"{where}: expected base64, found {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: expected base64, found {error}") from error


def _read_policy(
    public_key: bytes | str | os.PathLike[str], envelope: Path, local_evidence: bool
) -> Policy:
    what = f"signature policy with envelope {envelope}"
    try:
        key = _load_key(public_key)
        data = read_file(envelope, _MAX_ENVELOPE, "envelope", _VERIFY_RELEASE)
        statement = verify_envelope(data, key)
    except TrustError:
        raise
    except (ArtifactError, FormatError) as error:
        raise TrustError(
            explain(what, expected="a signed release", found=error, remedy=_VERIFY_RELEASE)
        ) from error
    _check_release(what, statement.distribution, statement.version)
    return Policy(key.public_bytes_raw(), statement, local_evidence)


def _check_release(what: str, distribution: str, version: str) -> None:
    """An older signed release under a newer runtime is a rollback; another package is a mix-up."""
    related = distribution == DISTRIBUTION or distribution.startswith(f"{DISTRIBUTION}-sm")
    if not related or version != __version__:
        raise TrustError(
            explain(
                what,
                expected=f"{DISTRIBUTION} {__version__}, which this runtime is",
                found=f"{distribution} {version}",
                remedy="use the envelope that was released with this wheel",
            )
        )


def _library() -> tuple[Any, Any, Any]:
    """The library's exceptions for a wrong signature and for what its build cannot do, and its type
    of key. Raises TrustError if it is absent or broken.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise TrustError(
            explain(
                "signature policy",
                expected="the package cryptography",
                found=error,
                remedy=install_extra("signature"),
            )
        ) from error
    return InvalidSignature, UnsupportedAlgorithm, Ed25519PublicKey


def _load_key(public_key: bytes | str | os.PathLike[str]) -> Any:
    _, unsupported, key_type = _library()
    where = "given as bytes"
    if isinstance(public_key, bytes):
        pem = public_key
    else:
        where = os.fspath(public_key)
        try:
            with open(where, "rb") as file:
                pem = file.read(_MAX_KEY)
        except OSError as error:
            raise TrustError(
                explain(
                    "public key", expected=f"a readable {where}", found=error, remedy="name the key"
                )
            ) from error
    raw = _raw_key(pem, f"public key {where}")
    try:
        return key_type.from_public_bytes(raw)
    except (unsupported, ValueError) as error:
        raise TrustError(
            explain(
                f"public key {where}",
                expected="an ed25519 key that the package cryptography can use",
                found=error,
                remedy="use a build of it that has ed25519",
            )
        ) from error


def _raw_key(pem: bytes, what: str) -> bytes:
    """The 32 bytes of an ed25519 key in PEM. Of this one kind of key every file is the same but for
    them; the library's own reader knows all kinds, and importing it doubles the time that a policy
    takes to set.
    """
    match = _PEM.fullmatch(pem.strip())
    try:
        found = base64.b64decode(b"".join(match[1].split()), validate=True) if match else b""
    except binascii.Error:
        found = b""
    if not found.startswith(_ED25519) or len(found) != len(_ED25519) + 32:
        raise TrustError(
            explain(
                what,
                expected="an ed25519 public key in PEM",
                found="a key of another kind" if found else "no key",
                remedy="use the public half of the key that the release was signed with",
            )
        )
    return found.removeprefix(_ED25519)


def _set(wanted: Policy) -> None:
    """Put a policy in force, and tell what was read before that it does not cover."""
    global _policy, _refusal
    if _policy is not None and _policy != wanted:
        raise TrustError(
            explain(
                "signature policy",
                expected=f"the one in force, {_policy}",
                found=f"another, {wanted}",
                remedy="a process has one policy for good: start another process",
            )
        )
    if _policy is None:
        _policy, _refusal = wanted, None
    uncovered = [
        str(path)
        for (name, sha256), path in _admitted.items()
        if wanted.statement.subjects.get(name) != sha256
    ]
    if not wanted.local_evidence:
        uncovered += [f"evidence in {folder}" for folder in sorted(_local_folders)]
    if uncovered:
        more = f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else ""
        raise TrustError(
            explain(
                "signature policy",
                expected="nothing loaded before it that the release does not contain",
                found=", ".join(uncovered[:5]) + more,
                remedy="set the policy before the first Router, in a new process; it is in force "
                "here, and what was loaded before stays in use",
            )
        )
