"""The signature policy: a process may require that a release's signature covers what it loads.

``require_signature`` sets the policy; two environment variables set it for programs that cannot
make that call. From then on a manifest, a cubin or a record of evidence is refused unless the
SHA-256 of the bytes that were read (the same bytes that the driver gets) is in the provenance
statement of a release that the given key has signed. The policy holds until the process ends, and
cannot be exchanged. It covers what was loaded before it: setting it fails with the names of files
that the release does not contain.

Nothing here matters until a policy is set, and only then is ``cryptography`` imported, which is an
optional requirement of the package (``signature``). Without it a policy is refused.

The Python files of this package, which do the checking, are not covered: install them by hash.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from router_runtime.arguments import checks_arguments
from router_runtime.errors import DISTRIBUTION, ArtifactError, FormatError, TrustError, explain
from router_runtime.format.advice import runtime
from router_runtime.format.files import read_file
from router_runtime.format.provenance import Statement, statement_loads
from router_runtime.trust import dsse
from router_runtime.version import __version__

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PUBLIC_KEY_VARIABLE = "ROUTER_RUNTIME_PUBLIC_KEY"
ENVELOPE_VARIABLE = "ROUTER_RUNTIME_ENVELOPE"
LOCAL_EVIDENCE_VARIABLE = "ROUTER_RUNTIME_LOCAL_EVIDENCE"

#: Bytes: far above what a release needs, far below what hurts.
_MAX_ENVELOPE = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Policy:
    """What the process requires.

    Attributes:
        public_key: The ed25519 key, 32 bytes.
        statement: The signed provenance statement. Only its subjects may be loaded.
        local_evidence: Whether records in the user's own folder count, which are not signed.

    """

    public_key: bytes
    statement: Statement
    local_evidence: bool

    def __str__(self) -> str:
        statement = self.statement
        local = ", local evidence trusted" if self.local_evidence else ""
        return (
            f"{statement.distribution} {statement.version} of commit {statement.commit[:12]} by "
            f"the key {dsse.fingerprint(self.public_key)}{local}"
        )


@dataclass(slots=True)
class Process:
    """The state of this process: the policy, and what was read, for a policy that is set later.

    Attributes:
        policy: The one in force, or None.
        refusal: Why a policy that was requested could not be set. Until one is, nothing is loaded.
        environment: The values of the three variables that were acted on last.
        admitted: (name, SHA-256) of each file that was read without a policy -> its path.
        local_folders: The user's own evidence folders that were read without a policy.

    """

    policy: Policy | None = None
    refusal: TrustError | None = None
    environment: tuple[str | None, ...] = (None, None, None)
    admitted: dict[tuple[str, str], Path] = field(default_factory=dict)
    local_folders: set[Path] = field(default_factory=set)


process = Process()
_lock = threading.RLock()


@checks_arguments
def require_signature(
    public_key: bytes | str | os.PathLike[str],
    envelope: str | os.PathLike[str],
    *,
    local_evidence: bool = False,
) -> None:
    """Load only files that a release signed by ``public_key`` contains, from now on.

    Repeating a call changes nothing. A policy belongs to one process: a process that is started
    from it needs a call of its own, or the environment variables ``ROUTER_RUNTIME_PUBLIC_KEY`` and
    ``ROUTER_RUNTIME_ENVELOPE`` (paths), and ``ROUTER_RUNTIME_LOCAL_EVIDENCE=1`` for
    ``local_evidence``.

    Args:
        public_key: An ed25519 key in PEM, as bytes, or the path of one.
        envelope: The path of the release's ``.dsse.json`` file. Both files are read once, now.
        local_evidence: Whether evidence that the user has recorded in a folder of their own
            (``ROUTER_RUNTIME_EVIDENCE``) counts although it is not signed. It can make a signed
            cubin eligible; it can never add a cubin.

    Raises:
        InputError: An argument is of the wrong kind.
        TrustError: The package ``cryptography`` is absent, a file cannot be read, the signature is
            not by this key, the release is of another package or version, or a policy with another
            key, release or ``local_evidence`` is in force. If no policy is in force then, the
            process loads nothing until a call succeeds. It is also raised if files were loaded
            before that the release does not contain: then the policy is in force, the error names
            the files, and Routers that use them keep running until the process ends.

    """
    with _lock:
        try:
            wanted = _read_policy(public_key, Path(envelope), local_evidence)
        except TrustError as error:
            if process.policy is None:
                process.refusal = error
            raise
        _set(wanted)


def policy() -> Policy | None:
    """Return the policy in force, or None. Sets the one that the environment variables name.

    Raises TrustError if a policy was requested and could not be set.
    """
    with _lock:
        key = os.environ.get(PUBLIC_KEY_VARIABLE) or None
        envelope = os.environ.get(ENVELOPE_VARIABLE) or None
        local = os.environ.get(LOCAL_EVIDENCE_VARIABLE)
        found = (key, envelope, local)
        if (key or envelope) and found != process.environment:
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
            process.environment = found
        if process.policy is None and process.refusal is not None:
            raise process.refusal
        return process.policy


def in_force() -> bool:
    """Return whether every file that is read must be signed. Raises TrustError as ``policy``."""
    return policy() is not None


def admit(name: str, sha256: str, path: Path) -> None:
    """Raise TrustError if the policy in force does not cover a file of an artifacts folder.

    Without a policy the digest is remembered, so that a policy that is set later covers it too.

    Args:
        name: The file's path inside the artifacts folder.
        sha256: The digest of the bytes that were read.
        path: Where they were read, for the error.

    """
    with _lock:
        required = policy()
        if required is None:
            process.admitted[name, sha256] = path
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
    """Raise TrustError if the policy in force does not let unsigned records in a folder count."""
    with _lock:
        required = policy()
        if required is None:
            process.local_folders.add(folder)
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


def _read_policy(
    public_key: bytes | str | os.PathLike[str], envelope: Path, local_evidence: bool
) -> Policy:
    what = f"signature policy with envelope {envelope}"
    try:
        key = _load_key(public_key)
        data = read_file(envelope, _MAX_ENVELOPE, "envelope", _verify_release(), signed=True)
        statement = _verified(data, key)
    except TrustError:
        raise
    except (ArtifactError, FormatError) as error:
        raise TrustError(
            explain(what, expected="a signed release", found=error, remedy=_verify_release())
        ) from error
    _check_release(what, statement.distribution, statement.version)
    return Policy(key.public_bytes_raw(), statement, local_evidence)


def _verified(data: bytes, public_key: Ed25519PublicKey) -> Statement:
    """The statement in an envelope. Raises TrustError if the key has not signed it, FormatError if
    it is not an envelope of a statement.
    """
    envelope = dsse.loads(data)
    if not dsse.is_signed_by(envelope, public_key):
        raise TrustError(
            explain(
                "envelope",
                expected="a signature by the given public key",
                found=f"{len(envelope.signatures)} by other keys, or over other bytes",
                remedy=_verify_release(),
            )
        )
    return statement_loads(envelope.payload)


def _verify_release() -> str:
    return f"take both from one release, and see: {runtime('verify-release')}"


def _check_release(what: str, distribution: str, version: str) -> None:
    """Raise TrustError for a signed release that is not the one this runtime belongs to."""
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


def _load_key(public_key: bytes | str | os.PathLike[str]) -> Ed25519PublicKey:
    if isinstance(public_key, bytes):
        return dsse.read_public_key(public_key, "public key given as bytes")
    return dsse.public_key_file(public_key)


def _set(wanted: Policy) -> None:
    """Put a policy in force. Raises TrustError with what was read before and is not covered."""
    if process.policy is not None and process.policy != wanted:
        raise TrustError(
            explain(
                "signature policy",
                expected=f"the one in force, {process.policy}",
                found=f"another, {wanted}",
                remedy="a process keeps its first policy: start another process",
            )
        )
    if process.policy is None:
        process.policy, process.refusal = wanted, None
    uncovered = [
        str(path)
        for (name, sha256), path in process.admitted.items()
        if wanted.statement.subjects.get(name) != sha256
    ]
    if not wanted.local_evidence:
        uncovered += [f"evidence in {folder}" for folder in sorted(process.local_folders)]
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
