"""Editions of an artifacts folder: the same cubins, launched in another way or chosen otherwise.

What the runtime launches, and how, is data in the manifest. An edition changes that data in a copy,
so the product's own dispatch and launch path is what gets timed, unpatched.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from build_kernels.catalog.models import Model
from router_runtime.device.artifact_store import read_manifest
from router_runtime.evidence.store import EVIDENCE_NAME
from router_runtime.format.manifest import MANIFEST_NAME, Entry, dumps
from router_runtime.format.target import Target

#: Kernels of which a dense router consists start with this.
DENSE = "dense_router"


def edition(
    folder: Path, into: Path, *, dependent: bool = True, only: tuple[str, str] | None = None
) -> Path:
    """A copy of ``folder`` in ``into``.

    Without ``dependent``, no contract has programmatic dependent launch; the wait inside a
    kernel then returns at once. ``only`` is the one (kernel, variant) that dense routers may use.
    """
    manifest = read_manifest(folder)
    entries = []
    for entry in manifest.entries:
        if only and entry.kernel.startswith(DENSE) and (entry.kernel, entry.variant) != only:
            continue
        if not dependent:
            contract = dataclasses.replace(entry.contract, programmatic_dependent_launch=False)
            entry = dataclasses.replace(entry, contract=contract)
        entries.append(entry)
    into.mkdir(parents=True)
    for entry in entries:
        shutil.copy(folder / entry.file, into)
    if (folder / EVIDENCE_NAME).is_dir():
        shutil.copytree(folder / EVIDENCE_NAME, into / EVIDENCE_NAME)
    changed = dataclasses.replace(manifest, entries=tuple(entries))
    (into / MANIFEST_NAME).write_bytes(dumps(changed))
    return into


def entries_here(folder: Path, capability: tuple[int, int]) -> list[Entry]:
    """The entries that run on that compute capability and can be part of a cell."""
    return [
        entry
        for entry in read_manifest(folder).entries
        if Target.parse(entry.target).runs_on(*capability)
        and entry.kernel.startswith((DENSE, "activation_topk", "hash_", "topk_indices"))
    ]


def variants_of(family: str, model: Model, entries: list[Entry]) -> list[tuple[str, str]]:
    """Every (kernel, variant) among ``entries`` whose kernel starts so and that routes batches of
    the model by itself, in their order. A variant may exist for some models only, and those that
    select image tokens serve nothing else.
    """
    wanted = model.constants()
    found = [
        (entry.kernel, entry.variant)
        for entry in entries
        if entry.kernel.startswith(family)
        and wanted.items() <= entry.constants.items()
        and not entry.constants.get("IMAGES")
    ]
    return list(dict.fromkeys(found))
