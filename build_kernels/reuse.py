"""Cubins of earlier builds, for jobs into which exactly the same goes again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from build_kernels import publish
from build_kernels.compile.job import Job
from router_runtime.format.manifest import Entry, Toolchain


class Reuse:
    """The cubins in some build folders.

    A cubin counts as the same if its kernel, target, source digest (sources, constants and flags)
    and toolchain are: its model's and its variant's name do not go into it.

    Args:
        folders: Build folders, the preferred one first. Those without a manifest have no cubins.
        toolchain: The one that is installed. Builds by another one are not used.

    """

    def __init__(self, folders: Iterable[Path], toolchain: Toolchain) -> None:
        self._found: dict[tuple[str, str, str], list[tuple[Path, Entry]]] = {}
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            manifest = publish.current(folder)
            if manifest is not None and manifest.toolchain == toolchain:
                for entry in manifest.entries:
                    same = (entry.kernel, entry.target, entry.source_sha256)
                    self._found.setdefault(same, []).append((folder, entry))

    def cubin(self, job: Job) -> bytes | None:
        """Return the bytes of the job's cubin, None if no folder has them with their digest."""
        for folder, entry in self._found.get((job.kernel, job.target, job.source_sha256), ()):
            data = publish.verified(folder, entry.file, entry.sha256)
            if data is not None:
                return data
        return None
