"""What a release says about itself: the marker inside the wheel, the files beside it.

The marker binds a wheel's manifest to one distribution and version. The statement (in-toto v1 with
an SLSA v1 provenance predicate) names every file of the release by digest and everything that went
into it; it is what a release's DSSE envelope carries. Both are canonical JSON: there is one way to
write each, and any other bytes are refused. Plain standard-library Python, no cryptography.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from router_runtime.errors import FormatError
from router_runtime.format.codec import canonical_json, decode, encode, parse_json
from router_runtime.format.contract import Constants
from router_runtime.format.target import Target

FORMAT_VERSION = 1

#: ``<distribution>-<version>`` and one of these is a file's name. The marker lies in the artifacts
#: folder, the others beside the wheel.
MARKER_SUFFIX = ".release.json"
STATEMENT_SUFFIX = ".provenance.json"
ENVELOPE_SUFFIX = ".dsse.json"
SBOM_SUFFIX = ".cdx.json"
NOTES_SUFFIX = ".notes.md"
WHEEL_SUFFIX = "-py3-none-any.whl"
#: The digests of the wheel and of what describes it, as ``sha256sum --check`` reads them.
SUMS_NAME = "SHA256SUMS"
#: How these names end: the wheel's, and those of files that lie beside it and not inside it.
BESIDE = (WHEEL_SUFFIX, SBOM_SUFFIX, NOTES_SUFFIX, SUMS_NAME)

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:dsv4-router:release:v1"
BUILDER = "urn:dsv4-router:build-kernels"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DISTRIBUTION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"[0-9][0-9a-z.]*(\+[0-9a-z.]+)?")
_PACKAGE_URI = re.compile(r"pkg:pypi/([a-z0-9-]+)@([0-9a-z.+!]+)")


@dataclass(frozen=True, slots=True)
class Marker:
    """The file ``<stem>.release.json`` of a wheel's artifacts folder.

    ``commit`` is the source's; ``clean`` is False if the files differed from it.
    """

    distribution: str
    version: str
    commit: str
    clean: bool
    targets: tuple[str, ...]
    manifest_sha256: str
    format_version: int = FORMAT_VERSION

    @property
    def file_name(self) -> str:
        """The name of the marker's file in the artifacts folder."""
        return stem(self.distribution, self.version) + MARKER_SUFFIX


@dataclass(frozen=True, slots=True)
class Package:
    """A toolchain package: its version and the digests that its lock accepts."""

    version: str
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """What a release consists of, and what it was built from and with.

    ``subjects``: name -> SHA-256 of every file: those beside the wheel by file name, those of its
    artifacts folder by their path inside it. ``changes``: what differed from ``commit``, empty if
    the tree was clean. ``locks``: path -> SHA-256 of each lock file. ``models``: name -> shape of
    each model that the commit does not have, from a model file.
    """

    distribution: str
    version: str
    targets: tuple[str, ...]
    commit: str
    changes: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]]
    locks: Mapping[str, str]
    packages: Mapping[str, Package]
    subjects: Mapping[str, str]
    models: Mapping[str, Constants] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether the sources were exactly those of ``commit``."""
        return not self.changes


def stem(distribution: str, version: str) -> str:
    """What every file name of a release starts with."""
    return f"{distribution.replace('-', '_')}-{version}"


def local_version(
    commit: str,
    changes_sha256: str | None = None,
    models: Mapping[str, Constants] = types.MappingProxyType({}),
) -> str:
    """What follows the ``+`` of a release's version: its commit, and digests of the changes to it
    and of the shapes of models that it does not have.

    pip takes other contents for another version because of it (a local version of PEP 440). The
    digests follow letters: a part of digits alone would be read as a number.
    """
    parts = [f"g{commit[:12]}"]
    parts += [] if changes_sha256 is None else [f"dirty{changes_sha256[:12]}"]
    if models:
        parts.append(f"models{hashlib.sha256(canonical_json(models)).hexdigest()[:12]}")
    return ".".join(parts)


def sums_dumps(digests: Mapping[str, str]) -> bytes:
    """The bytes of ``SUMS_NAME`` for files: name -> SHA-256."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    return "".join(lines).encode("ascii")


def marker_dumps(marker: Marker) -> bytes:
    """The canonical bytes of a marker. Raises FormatError if a field is not allowed."""
    _check(marker.distribution, marker.version, marker.commit, marker.targets)
    _match(_SHA256, marker.manifest_sha256, "manifest_sha256")
    return canonical_json(marker)


def marker_loads(data: bytes) -> Marker:
    """Parse a marker. Raises FormatError unless ``marker_dumps`` would give these bytes."""
    document = parse_json(data, "a release marker")
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise FormatError(
            f"expected a release marker of format version {FORMAT_VERSION}, found {found!r}"
        )
    marker: Marker = decode(Marker, document, "release marker")
    if marker_dumps(marker) != data:
        raise FormatError("expected a release marker in its canonical form, found another")
    return marker


def statement_dumps(statement: Statement) -> bytes:
    """The canonical bytes of a statement. Raises FormatError if a field is not allowed."""
    _check(statement.distribution, statement.version, statement.commit, statement.targets)
    for name, digest in (*statement.subjects.items(), *statement.locks.items()):
        _match(_SHA256, digest, f"digest of {name}")
    source: dict[str, Any] = {
        "name": "source",
        "digest": {"gitCommit": statement.commit},
        "annotations": {"clean": statement.clean, "changes": sorted(statement.changes)},
    }
    locks = [
        {"name": name, "digest": {"sha256": digest}}
        for name, digest in sorted(statement.locks.items())
    ]
    packages = [
        {
            "name": name,
            "uri": f"pkg:pypi/{name}@{package.version}",
            "annotations": {"sha256": sorted(package.sha256)},
        }
        for name, package in sorted(statement.packages.items())
    ]
    parameters: dict[str, Any] = {
        "distribution": statement.distribution,
        "version": statement.version,
        "targets": list(statement.targets),
    }
    if statement.models:
        parameters["models"] = encode(statement.models)
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "predicateType": PREDICATE_TYPE,
            "subject": [
                {"name": name, "digest": {"sha256": digest}}
                for name, digest in sorted(statement.subjects.items())
            ],
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": parameters,
                    "internalParameters": {"flags": encode(statement.flags)},
                    "resolvedDependencies": [source, *locks, *packages],
                },
                "runDetails": {"builder": {"id": BUILDER}},
            },
        }
    )


def statement_loads(data: bytes) -> Statement:
    """Parse a statement. Raises FormatError unless ``statement_dumps`` would give these bytes."""
    document = parse_json(data, "a provenance statement")
    try:
        statement = _statement(document)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError(
            f"expected a provenance statement of build type {BUILD_TYPE}, found {error!r}"
        ) from error
    # One way to write it: no key, type or order that is not this format's passes.
    if statement_dumps(statement) != data:
        raise FormatError(
            f"expected a provenance statement of build type {BUILD_TYPE} in its canonical form, "
            "found another"
        )
    return statement


def _statement(document: Any) -> Statement:
    definition = document["predicate"]["buildDefinition"]
    parameters = definition["externalParameters"]
    source, *others = definition["resolvedDependencies"]
    packages = {}
    for item in others:
        if "uri" in item:
            match = _PACKAGE_URI.fullmatch(item["uri"])
            if match is None:
                raise ValueError(f"the package {item['uri']!r}")
            hashes = tuple(_match(_SHA256, h, "hash") for h in item["annotations"]["sha256"])
            packages[match[1]] = Package(match[2], hashes)
    return Statement(
        distribution=parameters["distribution"],
        version=parameters["version"],
        targets=tuple(parameters["targets"]),
        commit=source["digest"]["gitCommit"],
        changes=tuple(str(change) for change in source["annotations"]["changes"]),
        flags={
            language: tuple(str(flag) for flag in flags)
            for language, flags in definition["internalParameters"]["flags"].items()
        },
        locks={item["name"]: item["digest"]["sha256"] for item in others if "uri" not in item},
        packages=packages,
        subjects={item["name"]: item["digest"]["sha256"] for item in document["subject"]},
        models={
            str(name): {str(key): _constant(value) for key, value in shape.items()}
            for name, shape in parameters.get("models", {}).items()
        },
    )


def _constant(value: Any) -> int | float | str:
    if type(value) is int or type(value) is float or type(value) is str:
        return value
    raise ValueError(f"the number or name {value!r}")


def _check(distribution: str, version: str, commit: str, targets: tuple[str, ...]) -> None:
    _match(_DISTRIBUTION, distribution, "distribution")
    _match(_VERSION, version, "version")
    _match(_COMMIT, commit, "commit")
    for target in targets:
        Target.parse(target)
    if not targets or len(set(targets)) != len(targets):
        raise FormatError(f"targets: expected distinct ones, found {list(targets)}")


def _match(pattern: re.Pattern[str], text: Any, where: str) -> str:
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise FormatError(f"{where}: expected {pattern.pattern}, found {text!r}")
    return text
