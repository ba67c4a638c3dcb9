"""DSSE envelopes signed with ed25519. Keys are the releaser's: read from a path, never made here.

ed25519 is deterministic, so the same statement and key give the same envelope. The package
``cryptography`` is of ``release.lock``: it is imported where it is used, so that a build does
without it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from build_kernels.errors import BuildError
from router_runtime.errors import FormatError, TrustError
from router_runtime.format.provenance import PAYLOAD_TYPE
from router_runtime.trust import dsse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_MAKE_KEY = "next: openssl genpkey -algorithm ed25519 -out KEY.pem, and keep it out of the checkout"


def private_key(path: Path, root: Path, password: Callable[[], str]) -> Ed25519PrivateKey:
    """Return the key in a PEM file. ``password`` is called only if the key needs one.

    Raises BuildError for another kind of key, one inside the checkout ``root``, and one that others
    can read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, "private")
    if root.resolve() in path.resolve().parents:
        raise BuildError(
            f"expected a private key outside the checkout, found {path} in it; "
            "next: move it where no commit can pick it up"
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise BuildError(
            f"expected a private key that only its owner can read, found {path} of mode "
            f"{mode:04o}; next: chmod 600 {path}"
        )
    try:
        try:
            key = load_pem_private_key(data, None)
        except TypeError:
            key = load_pem_private_key(data, password().encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BuildError(
            f"{path}: expected an ed25519 private key in PEM, found {error}; {_MAKE_KEY}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BuildError(
            f"{path}: expected an ed25519 private key, found {type(key).__name__}; {_MAKE_KEY}"
        )
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Return the key that a signature is checked with. Raises BuildError for another kind."""
    try:
        return dsse.read_public_key(_read(path, "public"), str(path))
    except TrustError as error:
        raise BuildError(
            f"{error}; next: the key that the releaser published, or of your own private key: "
            f"openssl pkey -in KEY.pem -pubout -out {path}"
        ) from error


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the id of a key, which envelopes name and people compare."""
    return dsse.fingerprint(key.public_bytes_raw())


def sign(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return the bytes of the envelope around a statement."""
    signature = key.sign(dsse.signed_bytes(payload))
    signed = dsse.Signature(fingerprint(key.public_key()), signature)
    return dsse.dumps(dsse.Envelope(payload, (signed,)))


def payload(data: bytes, where: str) -> bytes:
    """Return the statement in an envelope without checking who signed it."""
    return _envelope(data, where).payload


def verified(data: bytes, key: Ed25519PublicKey, where: str) -> bytes:
    """Return the statement in an envelope. Raises BuildError if ``key`` did not sign it."""
    envelope = _envelope(data, where)
    if not dsse.is_signed_by(envelope, key):
        raise BuildError(
            f"{where}: expected a signature by the key {fingerprint(key)[:16]}, found none that is "
            f"valid among {[each.keyid[:16] for each in envelope.signatures]}: it was signed with "
            "another key or altered; next: do not install it; ask the releaser"
        )
    return envelope.payload


def _envelope(data: bytes, where: str) -> dsse.Envelope:
    """The envelope in a file. Raises BuildError for another form than ``dsse.dumps`` writes."""
    try:
        envelope = dsse.loads(data)
    except FormatError as error:
        raise BuildError(
            f"{where}: expected a DSSE envelope of {PAYLOAD_TYPE}, found: {error}; "
            "next: fetch it again"
        ) from error
    if dsse.dumps(envelope) != data:
        raise BuildError(
            f"{where}: expected a DSSE envelope of {PAYLOAD_TYPE} in its canonical form, found "
            "another; next: fetch it again"
        )
    return envelope


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(
            f"expected a {kind} key in {path}, found {os.strerror(error.errno or 0)}; "
            "next: name the PEM file with --key"
        ) from error
