"""Which entries of a finished build are not what these sources give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from build_kernels import lock
from build_kernels.compile import toolchain
from build_kernels.replan import jobs_of
from router_runtime.format.manifest import Entry, Manifest

#: How a sentence about such entries begins.
DIFFERS = "artifacts differ from the sources"


def outdated(manifest: Manifest, entries: Sequence[Entry] | None = None) -> dict[str, str]:
    """Return the key of each entry that would be built otherwise today, and in what it differs.

    Args:
        manifest: Of the build.
        entries: Those of its entries to look at. None: all.

    """
    looked_at = manifest.entries if entries is None else entries
    jobs = jobs_of(looked_at)
    found = {}
    for entry in looked_at:
        job = jobs.get(entry.key)
        if job is None:
            found[entry.key] = "the sources do not build it"
        elif manifest.toolchain != toolchain.of_lock():
            found[entry.key] = "another toolchain"
        elif job.source_sha256 != entry.source_sha256:
            found[entry.key] = "other sources or constants"
        elif job.latency != entry.latency:
            found[entry.key] = "other latencies"
    return found


def differences_from_lock(manifest: Manifest, path: Path, full: bool) -> list[str]:
    """Return in what a build differs from ``artifacts.lock``, a line for each difference.

    Args:
        manifest: Of the build.
        path: The lock. Without that file there is nothing to differ from.
        full: Whether the build is the full plan; of another one, the entries that both have are
            compared.

    """
    if not path.is_file():
        return []
    recorded, built = lock.read(path), lock.of(manifest)
    if not full:
        both = recorded.entries.keys() & built.entries.keys()
        recorded, built = (
            lock.Lock(built.source_sha256, {key: each.entries[key] for key in both})
            for each in (recorded, built)
        )
    return lock.differences(recorded, built)
