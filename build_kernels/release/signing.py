"""DSSE envelopes signed with ed25519. Keys are the releaser's: read from a path, never made here.

ed25519 is deterministic, so the same statement and key give the same envelope. The libraries are of
``release.lock``: they are imported where they are used, so that a build does without them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from build_kernels.errors import BuildError
from router_runtime.format.provenance import PAYLOAD_TYPE

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

_MAKE_KEY = "next: openssl genpkey -algorithm ed25519 -out KEY.pem, and keep it out of the checkout"


def private_key(path: Path, root: Path, password: Callable[[], str]) -> CryptoSigner:
    """Return the signer of a PEM file. ``password`` is called only if the key needs one.

    Raises BuildError for another kind of key, one inside the checkout ``root``, and one that others
    can read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

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
    return CryptoSigner(key)


def public_key(path: Path) -> SSlibKey:
    """Return the key that a signature is checked with. Raises BuildError for another kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        key = load_pem_public_key(_read(path, "public"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BuildError(
            f"{path}: expected an ed25519 public key in PEM, found {error}; "
            f"next: openssl pkey -in KEY.pem -pubout -out {path}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BuildError(
            f"{path}: expected an ed25519 public key, found {type(key).__name__}; "
            "next: the key that the releaser published"
        )
    return SSlibKey.from_crypto(key)


def sign(payload: bytes, signer: CryptoSigner) -> bytes:
    """Return the bytes of the envelope around a statement."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return _dumps(envelope)


def payload(data: bytes, where: str) -> bytes:
    """Return the statement in an envelope without checking who signed it."""
    return _envelope(data, where).payload


def verified(data: bytes, key: SSlibKey, where: str) -> bytes:
    """Return the statement in an envelope. Raises BuildError if ``key`` did not sign it."""
    from securesystemslib.exceptions import VerificationError

    envelope = _envelope(data, where)
    try:
        envelope.verify([key], 1)
    except VerificationError as error:
        raise BuildError(
            f"{where}: expected a signature by the key {key.keyid[:16]}, found none that is valid "
            f"among {[keyid[:16] for keyid in envelope.signatures]}: it was signed with another "
            "key or altered; next: do not install it; ask the releaser"
        ) from error
    return envelope.payload


def _envelope(data: bytes, where: str) -> Envelope:
    """The envelope in a file. Raises BuildError for another form than ``_dumps`` writes."""
    from securesystemslib.dsse import Envelope

    try:
        envelope = Envelope.from_dict(json.loads(data))
    except Exception as error:  # whatever a library raises for a document of another shape
        raise BuildError(
            f"{where}: expected a DSSE envelope, found {error!r}; next: fetch it again"
        ) from error
    if envelope.payload_type != PAYLOAD_TYPE or _dumps(envelope) != data:
        raise BuildError(
            f"{where}: expected a DSSE envelope of {PAYLOAD_TYPE} in its canonical form, found "
            f"another (of {envelope.payload_type!r}); next: fetch it again"
        )
    return envelope


def _dumps(envelope: Envelope) -> bytes:
    text = json.dumps(envelope.to_dict(), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(
            f"expected a {kind} key in {path}, found {os.strerror(error.errno or 0)}; "
            "next: name the PEM file with --key"
        ) from error
