"""Cubins of earlier builds, for jobs into which exactly the same goes again.

Beside its manifest a build leaves ``inputs.json``: from which inputs (``Job.inputs_sha256``) each
of its cubins was compiled. It is a note for the next build and part of no release: without it
everything is compiled again, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from build_kernels import publish
from build_kernels.compile.job import Job
from router_runtime.errors import FormatError
from router_runtime.format.codec import parse_json
from router_runtime.format.manifest import Entry, Toolchain

INPUTS_NAME = "inputs.json"


class Reuse:
    """The cubins in some build folders.

    A cubin is used again only for the very inputs from which it was compiled: names and bytes of
    the sources, constants, flags, target and toolchain. Comments and names of files count here,
    unlike in ``source_sha256``: a compiler may put them into a cubin, and a build has to give the
    bytes that a build from nothing gives.

    Args:
        folders: Build folders, the preferred one first. Those without a manifest have no cubins.
        toolchain: The one that is installed. Builds by another one are not used.

    """

    def __init__(self, folders: Iterable[Path], toolchain: Toolchain) -> None:
        self._found: dict[str, list[tuple[Path, Entry]]] = {}
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            manifest = publish.current(folder)
            if manifest is None or manifest.toolchain != toolchain:
                continue
            entries = {entry.sha256: entry for entry in manifest.entries}
            for inputs, cubin in read_inputs(folder).items():
                if cubin in entries:
                    self._found.setdefault(inputs, []).append((folder, entries[cubin]))

    def cubin(self, job: Job) -> bytes | None:
        """Return the bytes of the job's cubin, None if no folder has them with their digest."""
        for folder, entry in self._of(job):
            data = publish.bytes_with_digest(folder, entry.file, entry.sha256)
            if data is not None:
                return data
        return None

    def digest(self, job: Job) -> str | None:
        """Return the digest of the job's cubin, None if no folder has built it."""
        return next((entry.sha256 for _, entry in self._of(job)), None)

    def _of(self, job: Job) -> Iterator[tuple[Path, Entry]]:
        for folder, entry in self._found.get(job.inputs_sha256, ()):
            if (entry.kernel, entry.target) == (job.kernel, job.target):
                yield folder, entry


def inputs_text(jobs: Iterable[tuple[Job, Entry]]) -> bytes:
    """Return the bytes of ``inputs.json``: the digest of a job's inputs -> that of its cubin."""
    inputs = {job.inputs_sha256: entry.sha256 for job, entry in jobs}
    return json.dumps(inputs, sort_keys=True, indent=1).encode("ascii") + b"\n"


def read_inputs(folder: Path) -> Mapping[str, str]:
    """Return what ``inputs.json`` in a folder says; nothing if it is missing or damaged."""
    try:
        document = parse_json((folder / INPUTS_NAME).read_bytes(), INPUTS_NAME)
    except (FileNotFoundError, FormatError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {inputs: cubin for inputs, cubin in document.items() if isinstance(cubin, str)}
