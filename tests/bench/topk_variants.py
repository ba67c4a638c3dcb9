"""Builds variants of ``topk_indices`` that are candidates, beside those of the catalog, to be timed
by ``tests.bench.topk_trial``. For the environment of the builder; needs no GPU.

``.venv/bin/python -m tests.bench.topk_variants FOLDER``. What a trial finds the fastest goes into
the catalog, the others leave this table.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from unittest import mock

from build_kernels.build import build
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Variant
from build_kernels.plan import plan
from build_kernels.progress import Screen

KERNEL = "topk_indices"

#: Name -> the variant of the catalog that it differs from, and in what.
CANDIDATES: dict[str, tuple[str, dict[str, int]]] = {
    # As many bytes in flight on each multiprocessor, in smaller pieces.
    "t_block_42": ("block", {"LOADS": 4, "STAGES": 2}),
    # More warps, of which each has one chunk.
    "t_pair_1024": ("pair_4096", {"THREADS": 1024, "STAGES": 1}),
}


def candidates(kernel: catalog.Kernel) -> tuple[Variant, ...]:
    """The candidates as variants of the kernel."""
    known = {variant.name: variant for variant in kernel.variants}
    found = []
    for name, (base, changes) in CANDIDATES.items():
        constants = {**known[base].constants_of(None), **changes}
        found.append(
            dataclasses.replace(known[base], name=name, constants=constants, by_model=None)
        )
    return tuple(found)


def build_all(folder: Path, targets: tuple[str, ...]) -> None:
    """Build the variants of the catalog and the candidates into ``folder``. Raises BuildError."""
    kernels = tuple(
        dataclasses.replace(kernel, variants=(*kernel.variants, *candidates(kernel)))
        if kernel.name == KERNEL
        else kernel
        for kernel in catalog.KERNELS
    )
    with mock.patch.object(catalog, "KERNELS", kernels):
        jobs = plan(targets=targets, kernels=[KERNEL])
        manifest = build(jobs, folder, len(os.sched_getaffinity(0)), Screen(None).step)
    for entry in manifest.entries:
        print(f"{entry.key:45} {entry.resources}")


if __name__ == "__main__":
    build_all(Path(sys.argv[1]), tuple(sys.argv[2:]) or ("sm_90a",))
