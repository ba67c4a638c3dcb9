"""DSSE envelopes of provenance statements: how they are read, written and verified.

An envelope (https://github.com/secure-systems-lab/dsse) is a JSON document with a payload and
signatures over it. Signatures are ed25519. Reading and writing need the standard library only;
verifying needs the package ``cryptography``, which is imported when a key is read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_runtime.errors import ArtifactError, FormatError, TrustError, explain, install_extra
from router_runtime.format import system_errors
from router_runtime.format.codec import parse_json
from router_runtime.format.permissions import require_private
from router_runtime.format.provenance import PAYLOAD_TYPE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_MAX_SIGNATURES = 16
#: Bytes of a file with a key: far above what one needs, far below what hurts.
_MAX_KEY = 64 * 2**10
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----")
#: What precedes the key in a SubjectPublicKeyInfo (RFC 8410).
_ED25519 = bytes.fromhex("302a300506032b6570032100")


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature. ``keyid`` is a hint that anyone can write: nothing is decided by it."""

    keyid: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload of the type ``provenance.PAYLOAD_TYPE`` and the signatures over it, 1 to 16."""

    payload: bytes
    signatures: tuple[Signature, ...]


def loads(data: bytes) -> Envelope:
    """Return the envelope in a file. Raises FormatError for anything that DSSE does not allow, and
    for another type of payload.
    """
    document = parse_json(data, "a DSSE envelope")
    expected = {"payload", "payloadType", "signatures"}
    if not isinstance(document, dict) or document.keys() != expected:
        raise FormatError(f"expected an envelope with exactly the keys {sorted(expected)}")
    if document["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(
            f"expected the payload type {PAYLOAD_TYPE}, found {document['payloadType']!r}"
        )
    listed = document["signatures"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_SIGNATURES:
        raise FormatError(f"expected 1 to {_MAX_SIGNATURES} signatures; the envelope is unsigned")
    signatures = []
    for item in listed:
        if not isinstance(item, dict) or item.keys() != {"keyid", "sig"}:
            raise FormatError("expected signatures with exactly the keys ['keyid', 'sig']")
        if not isinstance(item["keyid"], str):
            raise FormatError(f"keyid: expected text, found {type(item['keyid']).__name__}")
        signatures.append(Signature(item["keyid"], _base64(item["sig"], "sig")))
    return Envelope(_base64(document["payload"], "payload"), tuple(signatures))


def dumps(envelope: Envelope) -> bytes:
    """Return the canonical bytes of an envelope."""
    document = {
        "payload": base64.b64encode(envelope.payload).decode("ascii"),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": each.keyid, "sig": base64.b64encode(each.signature).decode("ascii")}
            for each in envelope.signatures
        ],
    }
    return json.dumps(document, sort_keys=True, indent=1).encode("ascii") + b"\n"


def signed_bytes(payload: bytes) -> bytes:
    """Return what a signature over a payload signs: DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def is_signed_by(envelope: Envelope, public_key: Ed25519PublicKey) -> bool:
    """Return whether one of the signatures is by this key. Key ids are ignored."""
    from cryptography.exceptions import InvalidSignature

    message = signed_bytes(envelope.payload)
    for each in envelope.signatures:
        try:
            public_key.verify(each.signature, message)
        except InvalidSignature:
            continue
        return True
    return False


def read_public_key(pem: bytes, what: str) -> Ed25519PublicKey:
    """Return the ed25519 key in a PEM text. ``what`` starts every error.

    Raises TrustError for any other text, and if ``cryptography`` is absent or cannot use the key.
    """
    try:
        # Not used here, but without it nothing can be verified.
        from cryptography.exceptions import (
            InvalidSignature,  # noqa: F401
            UnsupportedAlgorithm,
        )
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
    raw = _raw_key(pem, what)
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except (UnsupportedAlgorithm, ValueError) as error:
        raise TrustError(
            explain(
                what,
                expected="an ed25519 key that the package cryptography can use",
                found=error,
                remedy="use a build of it that has ed25519",
            )
        ) from error


def public_key_file(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """Return the ed25519 key in a PEM file. Raises TrustError for any other file, and for one that
    another user may write.
    """
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            require_private(file.fileno(), "public key", Path(where))
            pem = file.read(_MAX_KEY)
    except ArtifactError as error:
        raise TrustError(str(error)) from error
    except OSError as error:
        remedy = "name the PEM file of the key that the releaser published"
        raise TrustError(
            explain(
                "public key",
                expected=f"a readable {where}",
                found=system_errors.found(error),
                remedy=system_errors.reading_remedy(error, Path(where), remedy),
            )
        ) from error
    return read_public_key(pem, f"public key {where}")


def fingerprint(raw_public_key: bytes) -> str:
    """Return the id of a key of 32 bytes: the SHA-256 of its DER form, which is also what
    ``openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`` prints.
    """
    return hashlib.sha256(_ED25519 + raw_public_key).hexdigest()


def _raw_key(pem: bytes, what: str) -> bytes:
    """The 32 bytes of a key in PEM. Every PEM file of an ed25519 key is the same but for them; the
    reader of ``cryptography`` knows all kinds of keys, and importing it doubles the time that a
    policy takes to set.
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


def _base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise FormatError(f"{where}: expected base64, found {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: expected base64, found {error}") from error
