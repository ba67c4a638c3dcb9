"""What a release is refused for, as far as that is known before anything is compiled.

Everything here is checked again on what was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from build_kernels import lock, plan
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile import toolchain
from build_kernels.compile.job import Job
from build_kernels.entries import planned
from build_kernels.errors import BuildError, unknown
from build_kernels.plan import Selection
from build_kernels.release import notes
from build_kernels.reuse import Reuse
from router_runtime.evidence.store import Evidence
from router_runtime.format.manifest import Manifest

#: For the digest of sources of a manifest that no file holds.
_NO_DIGEST = "0" * 64


def check_verified_names(verified: Sequence[str], selection: Selection) -> None:
    """Raise BuildError for a target in ``verified`` that the release would not have."""
    chosen = selection.targets or DEFAULT_TARGETS
    for target in verified:
        if target not in TARGETS:
            raise unknown("target", target, TARGETS, "next: .venv/bin/python -m build_kernels list")
        if target not in chosen:
            names = " ".join(f"--target {each}" for each in (*chosen, target))
            raise BuildError(
                f"expected --require-verified of a target in this release ({', '.join(chosen)}), "
                f"found {target}; next: {names}"
            )


def check_verified(
    artifacts: Path, jobs: Sequence[Job], verified: Sequence[str], evidence: Evidence, clean: bool
) -> None:
    """Raise BuildError if it is known that an entry of a target in ``verified`` has no evidence.

    The digests of a clean checkout are those of artifacts.lock, because another build of it is
    refused. Of a changed one those are known that ``artifacts`` has a cubin of the same inputs for.
    """
    if not verified:
        return
    recorded = lock.read(artifacts / lock.LOCK_NAME).entries if clean else {}
    built = Reuse([artifacts], toolchain.of_lock())
    entries = []
    for job in jobs:
        sha256 = recorded[job.key].sha256 if job.key in recorded else built.digest(job)
        if sha256 is not None:
            entries.append(planned(job, sha256))
    manifest = Manifest(_NO_DIGEST, toolchain.of_lock(), tuple(entries))
    for target in verified:
        if any(entry.target == target for entry in entries):
            notes.require_verified(target, manifest, evidence)


def check_lock(artifacts: Path, jobs: Sequence[Job]) -> None:
    """Raise BuildError if artifacts.lock records other entries than the plan, or other sources."""
    recorded = lock.read(artifacts / lock.LOCK_NAME)
    targets = {job.target for job in jobs}.intersection(DEFAULT_TARGETS)
    keys = {job.key for job in jobs if job.target in targets}
    known = {key for key in recorded.entries if key.split("/")[2] in targets}
    found = [f"added    {key}" for key in sorted(keys - known)]
    found += [f"removed  {key}" for key in sorted(known - keys)]
    source = plan.tree_digest()
    if recorded.source_sha256 != source:
        found.append(f"changed  source: {recorded.source_sha256[:16]} -> {source[:16]}")
    refuse_differences(found)


def refuse_differences(found: Sequence[str]) -> None:
    """Raise BuildError if there are differences from artifacts.lock."""
    if found:
        raise BuildError(
            "expected the build that artifacts.lock records, found:\n  "
            + "\n  ".join(found)
            + "\nnext: make lock-cubins, and commit the lock"
        )
