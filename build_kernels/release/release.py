"""A release: cubins built from nothing, the wheel around them, and what it says about itself.

Everything is made in a staging folder, checked as a receiver would check it, and renamed into place
as one folder. A release that exists is never changed: made again it must be the same bytes. Only
its envelope can be added or replaced, which is one file and one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build_kernels import lock, publish
from build_kernels.build import Progress, build
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile import toolchain
from build_kernels.compile.sources import PACKAGE
from build_kernels.errors import BuildError
from build_kernels.plan import plan
from build_kernels.release import checkout, notes, sbom, verify_release, wheel
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence import record as records
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence, load_evidence
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, dumps
from router_runtime.format.provenance import (
    ENVELOPE_SUFFIX,
    NOTES_SUFFIX,
    SBOM_SUFFIX,
    STATEMENT_SUFFIX,
    WHEEL_SUFFIX,
    Marker,
    Package,
    Statement,
    marker_dumps,
    statement_dumps,
    stem,
)
from router_runtime.version import __version__

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

#: What pyproject.toml refers to and the wheel therefore holds.
_BESIDE = ("LICENSE", "NOTICE", "README.md")
_STAGING = ".release-"
_UNFINISHED = ".tmp"


@dataclass(frozen=True, slots=True)
class Result:
    """``made`` is False if the same release lay there already."""

    folder: Path
    made: bool
    signed: bool


def release(
    root: Path,
    out: Path,
    *,
    targets: Sequence[str],
    verified: Sequence[str],
    signer: CryptoSigner | None,
    allow_dirty: bool,
    processes: int,
    progress: Progress,
) -> Result:
    """Make a release of the checkout ``root`` in a folder of its own below ``out``."""
    source = checkout.source(root)
    if source.changes and not allow_dirty:
        raise BuildError(
            f"expected a checkout without changes, so that the commit {source.commit[:12]} names "
            "the sources, found:\n  "
            + "\n  ".join(source.changes)
            + "\nnext: commit or remove them, or --allow-dirty for a release to try out"
        )
    jobs = plan(targets=targets)
    chosen = [t for t in TARGETS if t in (targets or DEFAULT_TARGETS)]
    with publish.locked(out):
        _clear(out)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, suffix=_UNFINISHED, dir=out))
        try:
            manifest = build(jobs, staging / "artifacts", processes, progress)
            if not source.changes:
                _compare_with_lock(root, manifest)
            evidence = _evidence(root / "artifacts" / EVIDENCE_NAME)
            for target in verified:
                notes.require_verified(target, manifest, evidence)
            files = _files(root, source, chosen, manifest, evidence, staging)
            if checkout.source(root) != source:
                raise BuildError(
                    "expected the checkout to stay as it was during the release, found it "
                    "changed; next: run the command again"
                )
            return _publish(out, source, files, signer, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def distribution(name: str, targets: Sequence[str]) -> str:
    """The name of the wheel for these targets; the plain one if it holds the default targets."""
    if tuple(targets) == DEFAULT_TARGETS:
        return name
    return "-".join((name, *(target.replace("_", "") for target in targets)))


def _files(
    root: Path,
    source: checkout.Source,
    targets: Sequence[str],
    manifest: Manifest,
    evidence: Evidence,
    staging: Path,
) -> dict[str, bytes]:
    """Every file of the release but the envelope, by name."""
    pyproject = (root / "pyproject.toml").read_bytes()
    project = wheel.project(pyproject, __version__)
    name = distribution(project.name, targets)
    start = stem(name, project.version)
    text = dumps(manifest)
    marker = Marker(
        distribution=name,
        version=project.version,
        commit=source.commit,
        clean=not source.changes,
        targets=tuple(targets),
        manifest_sha256=_sha256(text),
    )
    shipped = notes.counting(manifest, evidence)
    artifacts = {MANIFEST_NAME: text, marker.file_name: marker_dumps(marker)}
    for entry in manifest.entries:
        artifacts[entry.file] = (staging / "artifacts" / entry.file).read_bytes()
    for record in shipped:
        artifacts[f"{EVIDENCE_NAME}/{record.file_name}"] = records.dumps(record)
    bill = sbom.dumps(project, name, manifest)
    package = checkout.files(root, wheel.PACKAGE)
    files = {
        start + WHEEL_SUFFIX: wheel.make(
            name,
            pyproject,
            {file: (root / file).read_bytes() for file in _BESIDE},
            package | {wheel.ARTIFACTS + path: data for path, data in artifacts.items()},
            bill,
            staging / "wheel",
        ),
        start + SBOM_SUFFIX: bill,
        start + NOTES_SUFFIX: notes.text(marker, manifest, Evidence(shipped)).encode(),
    }
    statement = Statement(
        distribution=name,
        version=project.version,
        targets=tuple(targets),
        commit=source.commit,
        changes=source.changes,
        flags=manifest.toolchain.flags,
        locks={
            path.relative_to(PACKAGE.parent).as_posix(): _sha256(path.read_bytes())
            for path in (toolchain.LOCK, toolchain.RELEASE_LOCK)
        },
        packages=_packages(),
        subjects={path: _sha256(data) for path, data in {**artifacts, **files}.items()},
    )
    files[MANIFEST_NAME] = text
    files[start + STATEMENT_SUFFIX] = statement_dumps(statement)
    return files


def _packages() -> dict[str, Package]:
    """The toolchain as its lock pins it: which of the accepted files pip took depends on the
    machine, so all of them are named.
    """
    text = toolchain.LOCK.read_text(encoding="ascii")
    hashes = toolchain.hashes(text)
    return {
        name: Package(version, hashes[name]) for name, version in toolchain.locked(text).items()
    }


def _publish(
    out: Path,
    source: checkout.Source,
    files: dict[str, bytes],
    signer: CryptoSigner | None,
    staging: Path,
) -> Result:
    (statement,) = (name for name in files if name.endswith(STATEMENT_SUFFIX))
    start = statement.removesuffix(STATEMENT_SUFFIX)
    envelope = start + ENVELOPE_SUFFIX
    if signer is not None:
        from build_kernels.release import signing

        files[envelope] = signing.sign(files[statement], signer)
    place = out / f"{start}-{source.commit[:12]}{'-dirty' if source.changes else ''}"
    if place.is_dir():
        _compare_with_existing(place, files, envelope)
        if envelope in files:
            # Written elsewhere first: half an envelope must not lie among a release's files.
            publish.write_file(staging / envelope, files[envelope])
            os.replace(staging / envelope, place / envelope)
            publish.sync(place)
        return Result(place, made=False, signed=(place / envelope).exists())
    fresh = staging / "release"
    fresh.mkdir(mode=0o755)
    for name, data in files.items():
        publish.write_file(fresh / name, data)
    fresh.chmod(0o755)
    # What a receiver would refuse is not published.
    verify_release.verify([fresh], None)
    os.rename(fresh, place)
    publish.sync(out)
    return Result(place, made=True, signed=envelope in files)


def _compare_with_existing(place: Path, files: Mapping[str, bytes], envelope: str) -> None:
    found = {path.name: path.read_bytes() for path in place.iterdir() if path.name != envelope}
    made = {name: data for name, data in files.items() if name != envelope}
    wrong = sorted(name for name in {*found, *made} if found.get(name) != made.get(name))
    if wrong:
        raise BuildError(
            f"expected {place} to hold the same release, found {', '.join(wrong)} to differ; a "
            "release is never overwritten; next: find out why, then another --out, or remove it"
        )


def _evidence(folder: Path) -> Evidence:
    try:
        return load_evidence(folder)
    except RouterRuntimeError as error:
        raise BuildError(f"{error}; next: restore the file, or record it again") from error


def _compare_with_lock(root: Path, manifest: Manifest) -> None:
    """A clean commit says in artifacts.lock what it builds; a release must be that."""
    recorded = lock.read(root / "artifacts" / lock.LOCK_NAME)
    built = lock.of(manifest)
    # The lock has the full plan. A target that is built only on request has no line in it.
    targets = {entry.target for entry in manifest.entries}.intersection(DEFAULT_TARGETS)
    found = lock.differences(_of_targets(recorded, targets), _of_targets(built, targets))
    if found:
        raise BuildError(
            "expected the build that artifacts.lock records, found:\n  "
            + "\n  ".join(found)
            + "\nnext: make lock-cubins, and commit the lock"
        )


def _of_targets(whole: lock.Lock, targets: Collection[str]) -> lock.Lock:
    """The part of a lock that is about these targets; a key is kernel/model/target/variant."""
    entries = {key: line for key, line in whole.entries.items() if key.split("/")[2] in targets}
    return lock.Lock(whole.source_sha256, entries)


def _clear(out: Path) -> None:
    """Remove what a killed release left; the caller holds the folder's lock. A build backend that
    outlived it may still write there: what cannot be removed now, the next release removes.
    """
    for path in out.glob(f"{_STAGING}*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
