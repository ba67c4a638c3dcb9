"""Making a release: cubins built from nothing, and the wheel around them.

Everything is made in a staging folder, checked as a receiver would check it, and renamed into place
as one folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from build_kernels import lock, out_folder, publish
from build_kernels.build import Progress, build
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.errors import BuildError
from build_kernels.plan import Selection
from build_kernels.release import checkout, contents, notes, requirements
from build_kernels.release.release_folder import Result, put
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence, load_evidence
from router_runtime.format.manifest import Manifest

_STAGING = ".release-"
_UNFINISHED = ".tmp"


def release(
    root: Path,
    out: Path,
    *,
    selection: Selection,
    verified: Sequence[str],
    sign: Callable[[bytes], bytes] | None,
    allow_dirty: bool,
    processes: int,
    progress: Progress,
) -> Result:
    """Make a release of a checkout in a folder of its own, and return it.

    Args:
        root: The checkout.
        out: The folder below which the release is put.
        selection: What the release has the entries of.
        verified: Targets of which every digest must be verified.
        sign: Returns the envelope of a statement. None: the release is unsigned.
        allow_dirty: Whether the checkout may differ from its commit.
        processes: The most worker processes at a time.
        progress: Called for each cubin.

    Raises:
        BuildError: Something failed or is not allowed; nothing was put below ``out``.

    """
    source = checkout.source(root)
    if source.changes and not allow_dirty:
        raise BuildError(
            f"expected a checkout without changes, so that the commit {source.commit[:12]} names "
            "the sources, found:\n  "
            + "\n  ".join(source.changes)
            + "\nnext: commit or remove them, or --allow-dirty for a release to try out"
        )
    jobs = selection.jobs()
    own = {model.name for model in selection.extra_models}
    chosen = [t for t in TARGETS if t in (selection.targets or DEFAULT_TARGETS)]
    if not source.changes:
        requirements.check_lock(root / "artifacts", [job for job in jobs if job.model not in own])
    evidence = _evidence(root / "artifacts" / EVIDENCE_NAME)
    requirements.check_verified(
        root / "artifacts", jobs, verified, evidence, clean=not source.changes
    )
    with publish.locked(out):
        _clear(out)
        # A release folder has the cubins three times while it is made: as files, in the backend's
        # wheel, and in the release's.
        out_folder.require_room(out, jobs * 3)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, suffix=_UNFINISHED, dir=out))
        try:
            manifest = build(jobs, staging / "artifacts", processes, progress)
            if not source.changes:
                compare_with_lock(root, manifest, own)
            for target in verified:
                notes.require_verified(target, manifest, evidence)
            files = contents.files(
                root, source, chosen, selection.extra_models, manifest, evidence, staging
            )
            if checkout.source(root) != source:
                raise BuildError(
                    "expected the checkout to stay as it was during the release, found it "
                    "changed; next: run the command again"
                )
            return put(out, files, sign, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _evidence(folder: Path) -> Evidence:
    try:
        return load_evidence(folder)
    except RouterRuntimeError as error:
        text, _, advice = str(error).rpartition("; ")
        raise BuildError(f"{text}; next: {advice}") from error


def compare_with_lock(root: Path, manifest: Manifest, own: Collection[str]) -> None:
    """Raise BuildError if a build is not the one that the commit's artifacts.lock records. It has
    nothing of the models ``own``, which the commit does not have.
    """
    recorded = lock.read(root / "artifacts" / lock.LOCK_NAME)
    entries = tuple(entry for entry in manifest.entries if entry.model not in own)
    built = lock.of(dataclasses.replace(manifest, entries=entries))
    # The lock has the full plan. A target that is built only on request has no line in it.
    targets = {entry.target for entry in manifest.entries}.intersection(DEFAULT_TARGETS)
    requirements.refuse_differences(
        lock.differences(_of_targets(recorded, targets), _of_targets(built, targets))
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
