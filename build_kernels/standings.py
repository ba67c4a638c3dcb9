"""The evidence of every entry of a plan, by the digests in artifacts.lock, before any build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels import dispatch, lock
from build_kernels.compile.job import Job
from build_kernels.emulation.standing import is_of_another_model, marked
from router_runtime.evidence.status import status


@dataclass(frozen=True, slots=True)
class Standing:
    """The status of an entry, and whether another model than the checkout's has emulated it."""

    status: str
    stale_model: bool

    def __str__(self) -> str:
        return marked(self.status, self.stale_model)


def standings(jobs: Sequence[Job], artifacts: Path | None) -> Mapping[str, Standing]:
    """Return the standing of each job's entry, by its key.

    Args:
        jobs: The plan.
        artifacts: The folder with artifacts.lock and the evidence. Without a lock, or if it is
            None, no cubin's digest is known.

    """
    known = artifacts is not None and (artifacts / lock.LOCK_NAME).is_file()
    manifest = dispatch.planned(jobs, artifacts if known else None)
    evidence = dispatch.recorded(artifacts)
    return {
        entry.key: Standing(
            status(entry, manifest, evidence, None), is_of_another_model(entry, evidence)
        )
        for entry in manifest.entries
    }
