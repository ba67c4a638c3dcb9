"""DSSE envelopes signed with ed25519. Keys are the releaser's: read from a path, never made here.

ed25519 is deterministic, so the same statement and key give the same envelope. The package
``cryptography`` is of ``release.lock``: it is imported where it is used, so that a build does
without it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from build_kernels.errors import BuildError
from router_runtime.format import system_errors
from router_runtime.trust import dsse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAKE_KEY = "next: openssl genpkey -algorithm ed25519 -out KEY.pem, and keep it out of the checkout"


def private_key(path: Path, root: Path, password: Callable[[], str]) -> Ed25519PrivateKey:
    """Return the key in a PEM file. ``password`` is called only if the key needs one.

    Raises BuildError for another kind of key, one inside the checkout ``root``, and one that others
    can read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
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


def fingerprint(key: Ed25519PrivateKey) -> str:
    """Return the id of a key's public half, which envelopes name and people compare."""
    return dsse.fingerprint(key.public_key().public_bytes_raw())


def sign(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return the bytes of the envelope around a statement."""
    signature = key.sign(dsse.signed_bytes(payload))
    signed = dsse.Signature(fingerprint(key), signature)
    return dsse.dumps(dsse.Envelope(payload, (signed,)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(
            f"expected a private key in {path}, found {system_errors.found(error)}; "
            f"next: {system_errors.remedy(error, 'name the PEM file with --key')}"
        ) from error
