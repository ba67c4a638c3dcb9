"""What a build may do with the folder that it is told to write into.

A new or empty folder becomes a build folder. A build folder gets the new entries beside those that
it has, as long as all of them are what these sources and this toolchain give: then it holds what
one build of both would have made. Any other folder belongs to somebody else and is left as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_kernels import publish, replan, reuse
from build_kernels.compile.job import Job
from build_kernels.errors import BuildError
from build_kernels.plan import Selection
from router_runtime.format.manifest import MANIFEST_NAME, Manifest, Toolchain
from router_runtime.format.provenance import MARKER_SUFFIX

#: Marks the folder of ``build-kernels emulate``: what its entries were made from.
EMULATION_NAME = "emulation.json"

#: More than the largest cubin has.
_CUBIN_BYTES = 2**17
#: For a manifest, and for what the compilers write into the temporary folder.
_MARGIN_BYTES = 2**24


def require_ours(folder: Path, other: str = "") -> Manifest | None:
    """Return the manifest of a build folder; None for a folder without files, or one in which a
    build was killed.

    Args:
        folder: The folder.
        other: Name of a file that marks a folder of another command's.

    Raises:
        BuildError: The folder holds something else.

    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if MANIFEST_NAME not in names:
        foreign = [name for name in names if not publish.is_ours(name)]
        if foreign:
            raise _foreign(folder, f"{_listed(foreign)} and no {MANIFEST_NAME}")
        return None
    manifest = publish.current(folder)
    if manifest is None:
        raise _foreign(folder, f"a {MANIFEST_NAME} that this version did not write")
    for name in names:
        if name == other or name.endswith(MARKER_SUFFIX):
            raise _foreign(folder, f"{name}: the folder of a release or of another command")
    return manifest


def kept_jobs(
    folder: Path, manifest: Manifest, selection: Selection, tools: Toolchain
) -> list[Job]:
    """Return the jobs of the entries of a build folder that a build of ``selection`` leaves.

    Raises BuildError if one of them is not what these sources and this toolchain give.
    """
    kept = [entry for entry in manifest.entries if not selection.covers(entry)]
    if not kept:
        return []
    jobs = replan.jobs_of(kept)
    inputs = reuse.read_inputs(folder)
    changed = [
        entry.key
        for entry in kept
        if (job := jobs.get(entry.key)) is None or inputs.get(job.inputs_sha256) != entry.sha256
    ]
    if manifest.toolchain != tools or changed:
        what = (
            f"other sources: {_listed(changed)}"
            if manifest.toolchain == tools
            else f"another toolchain: {_listed([entry.key for entry in kept])}"
        )
        raise BuildError(
            f"expected {folder} to hold entries of these sources and this toolchain, so that they "
            f"can stay beside the new ones, found entries of {what}; "
            f"next: --out with a new folder, or first: rm -r {folder}"
        )
    return [jobs[entry.key] for entry in kept]


def require_room(folder: Path, jobs: Sequence[Job]) -> None:
    """Raise BuildError if the folder cannot be written, or if its disk or that of temporary files
    has no room for the cubins of these jobs. It is an estimate: sizes are known at the end.
    """
    publish.probe(folder)
    for place, needed, remedy in (
        (folder, len(jobs) * _CUBIN_BYTES + _MARGIN_BYTES, "name another folder with --out"),
        (Path(tempfile.gettempdir()), _MARGIN_BYTES, "set TMPDIR to another folder"),
    ):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise BuildError(
                f"expected {needed >> 20} MiB free in {place}, an estimate for {len(jobs)} "
                f"cubins, found {free >> 20} MiB; next: make room, or {remedy}"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _foreign(folder: Path, found: str) -> BuildError:
    return BuildError(
        f"expected {folder} to be a new folder or the folder of an earlier build, found {found}; "
        f"nothing was changed there; next: --out {folder / 'cubins'}"
    )
