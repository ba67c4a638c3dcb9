"""The files of a release: the wheel, its bill of materials, notes, manifest and statement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_kernels.catalog.models import Model
from build_kernels.catalog.targets import DEFAULT_TARGETS
from build_kernels.compile import toolchain
from build_kernels.compile.sources import PACKAGE as BUILDER
from build_kernels.errors import BuildError
from build_kernels.release import checkout, guide, notes, sbom, wheel
from router_runtime.evidence import kinds
from router_runtime.evidence.release_checks import sha256
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, dumps
from router_runtime.format.provenance import (
    NOTES_SUFFIX,
    SBOM_SUFFIX,
    STATEMENT_SUFFIX,
    SUMS_NAME,
    WHEEL_SUFFIX,
    Marker,
    Package,
    Statement,
    local_version,
    marker_dumps,
    statement_dumps,
    stem,
    sums_dumps,
)
from router_runtime.format.wheel import ARTIFACTS, PACKAGE
from router_runtime.version import __version__

#: What pyproject.toml refers to and the wheel therefore holds.
_BESIDE = ("LICENSE", "NOTICE", "README.md")
#: Where the runtime states its version.
_VERSION = f"{PACKAGE}/version.py"


def files(
    root: Path,
    source: checkout.Source,
    targets: Sequence[str],
    models: Sequence[Model],
    manifest: Manifest,
    evidence: Evidence,
    staging: Path,
) -> dict[str, bytes]:
    """Return every file of a release but the envelope, by name.

    Args:
        root: The checkout.
        source: Its commit and changes.
        targets: Those of the release.
        models: Those from model files.
        manifest: Of the cubins in ``staging/artifacts``.
        evidence: Of which the records about these cubins are shipped.
        staging: A folder that the build backend may work in.

    """
    pyproject = (root / "pyproject.toml").read_bytes()
    shapes = {model.name: model.shape() for model in sorted(models, key=lambda each: each.name)}
    version = f"{__version__}+{local_version(source.commit, source.changes_sha256, shapes)}"
    project = wheel.project(pyproject, version)
    name = distribution(project.name, targets, list(shapes))
    start = stem(name, project.version)
    text = dumps(manifest)
    marker = Marker(
        distribution=name,
        version=project.version,
        commit=source.commit,
        clean=not source.changes,
        targets=tuple(targets),
        manifest_sha256=sha256(text),
    )
    shipped = notes.counting(manifest, evidence)
    artifacts = {MANIFEST_NAME: text, marker.file_name: marker_dumps(marker)}
    for entry in manifest.entries:
        artifacts[entry.file] = (staging / "artifacts" / entry.file).read_bytes()
    for record in shipped.of_both_kinds:
        artifacts[f"{EVIDENCE_NAME}/{record.file_name}"] = kinds.dumps(record)
    bill = sbom.dumps(project, name, manifest)
    package = _stating(project.version, checkout.files(root, PACKAGE))
    made = wheel.make(
        name,
        pyproject,
        {file: (root / file).read_bytes() for file in _BESIDE},
        package | {ARTIFACTS + path: data for path, data in artifacts.items()},
        bill,
        staging / "wheel",
    )
    advice = guide.text(root, project, start + WHEEL_SUFFIX, sha256(made))
    found = {
        start + WHEEL_SUFFIX: made,
        start + SBOM_SUFFIX: bill,
        start + NOTES_SUFFIX: notes.text(marker, manifest, shipped, advice).encode(),
        MANIFEST_NAME: text,
    }
    found[SUMS_NAME] = sums_dumps({path: sha256(data) for path, data in found.items()})
    statement = Statement(
        distribution=name,
        version=project.version,
        targets=tuple(targets),
        commit=source.commit,
        changes=source.changes,
        flags=manifest.toolchain.flags,
        locks={
            path.relative_to(BUILDER.parent).as_posix(): sha256(path.read_bytes())
            for path in (toolchain.LOCK, toolchain.RELEASE_LOCK)
        },
        packages=_packages(),
        subjects={path: sha256(data) for path, data in {**artifacts, **found}.items()},
        models=shapes,
    )
    found[start + STATEMENT_SUFFIX] = statement_dumps(statement)
    return found


def _stating(version: str, package: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of the runtime with the release's version in place of the sources' own."""
    before, after = (f'__version__ = "{each}"\n'.encode() for each in (__version__, version))
    text = package[_VERSION]
    if text.count(before) != 1:
        raise BuildError(
            f"expected one line {before.decode().strip()} in {_VERSION}, found {text.decode()!r}; "
            "next: write the version as one plain string"
        )
    return {**package, _VERSION: text.replace(before, after)}


def distribution(name: str, targets: Sequence[str], models: Sequence[str] = ()) -> str:
    """Return the wheel's name for these targets and models from model files: the plain one for the
    default targets and no such model.
    """
    parts = [name]
    if tuple(targets) != DEFAULT_TARGETS:
        parts += [target.replace("_", "") for target in targets]
    for model in models:
        # Names of distributions have one separator.
        parts += ["with", re.sub(r"[-_.]+", "-", model).strip("-").lower() or "model"]
    return "-".join(parts)


def _packages() -> dict[str, Package]:
    """The toolchain as its lock pins it. Which of a package's accepted files pip takes depends on
    the machine, so all of them are named.
    """
    text = toolchain.LOCK.read_text(encoding="ascii")
    hashes = toolchain.hashes(text)
    return {
        name: Package(version, hashes[name]) for name, version in toolchain.locked(text).items()
    }
