"""The manifest of an artifacts folder: what the builder writes and the runtime reads.

A manifest is strict. An unknown key, a missing key, a value of the wrong type or another format
version is refused with the JSON path of the value; a file name that could leave the artifacts
folder is refused too. Serialisation is canonical (sorted keys, fixed separators, entries in
``Entry.key`` order, no times, no paths, no host names), so equal manifests are equal bytes.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from router_runtime.errors import FormatError
from router_runtime.format.codec import canonical_json, decode, parse_json
from router_runtime.format.contract import Constants, Contract, validate_contract
from router_runtime.format.target import Target

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.cubin")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_SYMBOL = re.compile(r"[!-~]+")

#: Nothing here is larger: what a manifest says is added and handed to C without further checks.
_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cubin states that it uses.

    Attributes:
        registers: Registers per thread.
        spill_stores: Bytes per thread that the compiler spills.
        spill_loads: Bytes per thread that it loads back.
        local_memory: Bytes of local memory per thread.
        static_shared_memory: Bytes per CTA; the dynamic part is in the contract.

    """

    registers: int
    spill_stores: int
    spill_loads: int
    local_memory: int
    static_shared_memory: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One cubin and how it is launched.

    Attributes:
        kernel: The kernel's name, a folder of ``build_kernels/kernels``.
        model: The model that it is compiled for; None: it serves every model.
        target: What it is compiled for, such as ``sm_90a``.
        variant: Which of the kernel's compilations it is.
        constants: The compile-time constants.
        file: The content-addressed name of the cubin's file (``artifact_name``).
        sha256: The digest of the file.
        size: The size of the file in bytes.
        symbol: The name of the kernel inside the cubin.
        contract: How it is launched.
        source_sha256: The digest of what the compiler reads: sources, constants and flags.
        numerics: What decides the bits of its results; entries with the same tag give the same
            bits. None: it accumulates nothing over the hidden dimension.
        resources: What the cubin states that it uses.
        latency: (tokens, microseconds) of one call, measured or predicted, ascending in tokens;
            empty: there are no figures. They choose among entries that may all serve.

    """

    kernel: str
    model: str | None
    target: str
    variant: str
    constants: Constants
    file: str
    sha256: str
    size: int
    symbol: str
    contract: Contract
    source_sha256: str
    numerics: str | None
    resources: Resources
    latency: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> str:
        """The entry's name: ``kernel/model/target/variant``, with ``any`` for no model."""
        return f"{self.kernel}/{self.model or 'any'}/{self.target}/{self.variant}"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiled the cubins: package -> version, language -> compiler flags."""

    packages: Mapping[str, str]
    flags: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that one build made: its sources' digest, its toolchain, its cubins."""

    source_sha256: str
    toolchain: Toolchain
    entries: tuple[Entry, ...]
    format_version: int = FORMAT_VERSION


def artifact_name(kernel: str, model: str | None, target: str, variant: str, sha256: str) -> str:
    """The content-addressed file name of a cubin."""
    return f"{kernel}-{model or 'any'}-{target}-{variant}-{digest_in_name(sha256)}.cubin"


def digest_in_name(sha256: str) -> str:
    """The part of a cubin's digest that its file name ends with."""
    return sha256[:16]


def dumps(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest. Raises FormatError if it breaks a rule of the format."""
    validate(manifest)
    ordered = dataclasses.replace(
        manifest, entries=tuple(sorted(manifest.entries, key=lambda entry: entry.key))
    )
    return canonical_json(ordered)


def loads(data: bytes) -> Manifest:
    """Parse manifest bytes. Raises FormatError naming the JSON path, the expected and the
    found."""
    document = parse_json(data, "a manifest")
    if not isinstance(document, dict):
        raise FormatError(f"expected a JSON object, found {type(document).__name__}")
    found = document.get("format_version")
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise FormatError(f"expected manifest format version {FORMAT_VERSION}, found {found!r}")
    manifest: Manifest = decode(Manifest, document, "manifest")
    validate(manifest)
    return manifest


def validate(manifest: Manifest) -> None:
    """Check every rule of the format that the types alone do not express."""
    if manifest.format_version != FORMAT_VERSION:
        raise FormatError(
            f"expected format version {FORMAT_VERSION}, found {manifest.format_version}"
        )
    _match(_SHA256, manifest.source_sha256, "source_sha256", "64 lower-case hex digits")
    seen: set[str] = set()
    for entry in manifest.entries:
        where = f"entry {entry.key}"
        for field, name in (("kernel", entry.kernel), ("variant", entry.variant)):
            _match(_NAME, name, f"{where}: {field}", "a plain name")
        if entry.model is not None:
            _match(_NAME, entry.model, f"{where}: model", "a plain name")
        for name, value in entry.constants.items():
            if isinstance(value, str):
                _match(_NAME, value, f"{where}: constant {name}", "a number or a plain name")
        Target.parse(entry.target)
        _match(_SHA256, entry.sha256, f"{where}: sha256", "64 lower-case hex digits")
        _match(_SHA256, entry.source_sha256, f"{where}: source_sha256", "64 lower-case hex digits")
        _match(_FILE, entry.file, f"{where}: file", "a plain .cubin file name inside the folder")
        # Swapped entries, or a file under another's name, show here already.
        named = artifact_name(entry.kernel, entry.model, entry.target, entry.variant, entry.sha256)
        if entry.file != named:
            raise FormatError(f"{where}: expected the file {named}, found {entry.file}")
        _match(_SYMBOL, entry.symbol, f"{where}: symbol", "printable ASCII")
        if not 0 < entry.size < _LIMIT:
            raise FormatError(f"{where}: expected a positive size, found {entry.size}")
        if entry.key in seen:
            raise FormatError(f"{where}: expected one entry of this name, found two")
        seen.add(entry.key)
        counts = [tokens for tokens, _ in entry.latency]
        if sorted({0, *counts}) != [0, *counts] or not all(
            0 < microseconds < float("inf") for _, microseconds in entry.latency
        ):
            raise FormatError(
                f"{where}: latency: expected ascending token counts and positive microseconds, "
                f"found {entry.latency}"
            )
        validate_contract(entry.contract, where)


def _match(pattern: re.Pattern[str], text: str, where: str, expected: str) -> None:
    if pattern.fullmatch(text) is None:
        raise FormatError(f"{where}: expected {expected}, found {text!r}")
