"""What a build makes: catalog rows x models x targets, narrowed by the command line.

A ``Job`` is one cubin to be compiled. Its ``source_sha256`` covers everything that goes into the
cubin except the target and the packages of the toolchain, so entries of two targets made from the
same sources have the same (``digests.py`` says what counts).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from build_kernels import digests
from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile.job import Job
from build_kernels.compile.languages import LANGUAGES
from build_kernels.compile.sources import PACKAGE
from build_kernels.digests import Sources
from build_kernels.errors import BuildError, unknown
from build_kernels.kernels.common.numerics import CONSTANTS


def plan(
    *,
    targets: Collection[str] = (),
    models: Collection[str] = (),
    kernels: Collection[str] = (),
    extra_models: Collection[Model] = (),
) -> list[Job]:
    """Return the jobs of a build in the order of their keys.

    Args:
        targets: Only these. Empty: the default targets.
        models: Only these models of the catalog, and all ``extra_models``. If this is empty: only
            ``extra_models``; if those are empty too, every model of the catalog. Kernels that serve
            every model are always included.
        kernels: Only these. Empty: all.
        extra_models: Models that are not in the catalog.

    Raises:
        BuildError: An unknown name, a kernel without its files, or a model that a kernel cannot
            be compiled for.

    """
    known_models = {model.name: model for model in (*MODELS, *extra_models)}
    known_kernels = {kernel.name: kernel for kernel in catalog.KERNELS}
    for found in targets:
        if found not in TARGETS:
            raise unknown("target", found, TARGETS, "next: .venv/bin/python -m build_kernels list")
    for found in models:
        if found not in known_models:
            raise unknown(
                "model",
                found,
                known_models,
                "next: .venv/bin/python -m build_kernels list, or --model-file",
            )
    for found in kernels:
        if found not in known_kernels:
            raise unknown(
                "kernel", found, known_kernels, "next: .venv/bin/python -m build_kernels list"
            )
    wanted = {*models, *(model.name for model in extra_models)}
    jobs: list[Job] = []
    sources = Sources(PACKAGE)
    for kernel in catalog.KERNELS:
        if kernels and kernel.name not in kernels:
            continue
        chosen: list[Model | None] = [None]
        if kernel.per_model:
            chosen = [m for name, m in known_models.items() if not wanted or name in wanted]
        jobs += _jobs(kernel, chosen, tuple(targets) or DEFAULT_TARGETS, sources)
    return sorted(jobs, key=lambda job: job.key)


def tree_digest() -> str:
    """Return the digest of all that this commit can build: of every job of the catalog, for every
    target, and of the toolchain's lock.

    A kernel for which there is no plan counts as such, so that others can be built beside it.
    """
    facts = [digests.digest([(PACKAGE / "toolchain.lock").read_text(encoding="ascii")])]
    sources = Sources(PACKAGE)
    for kernel in sorted(catalog.KERNELS, key=lambda kernel: kernel.name):
        models = MODELS if kernel.per_model else (None,)
        try:
            jobs = list(_jobs(kernel, models, TARGETS, sources))
        except BuildError:
            facts.append(f"{kernel.name}: no plan")
        else:
            facts += sorted(f"{job.key} {job.source_sha256} {job.latency}" for job in jobs)
    return digests.digest(facts)


def files_digest() -> str:
    """Return the digest of the bytes of every file that a build reads: a build compares it to see
    that the sources stay as they are while it runs.
    """
    files = {
        path.relative_to(PACKAGE).as_posix(): path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".toml", ".lock")
    }
    return digests.files_digest(files)


def _jobs(
    kernel: Kernel, models: Iterable[Model | None], targets: Iterable[str], sources: Sources
) -> Iterator[Job]:
    """The jobs of one kernel, for each of the models that has it."""
    latencies = Latencies(PACKAGE / "catalog" / "latency.toml")
    identity = sources.identity(kernel.name, kernel.language)
    exact = sources.exact(kernel.name, kernel.language)
    flags = json.dumps(LANGUAGES[kernel.language].flags)
    for model in models:
        for variant in kernel.variants:
            if not variant.has(model):
                continue
            constants = _constants(kernel, model, variant)
            if constants is None:
                continue
            given = json.dumps(constants, sort_keys=True, allow_nan=False)
            source_sha256 = digests.digest([identity, given, flags])
            for target in dict.fromkeys(targets):
                if variant.targets and target not in variant.targets:
                    continue
                name = model.name if model else None
                yield Job(
                    kernel=kernel.name,
                    language=kernel.language,
                    model=name,
                    target=target,
                    variant=variant.name,
                    constants=constants,
                    source_sha256=source_sha256,
                    inputs_sha256=digests.digest([exact, given, flags, target]),
                    latency=latencies.of(kernel.name, variant.name, name, target),
                )


def _constants(
    kernel: Kernel, model: Model | None, variant: Variant
) -> dict[str, int | float | str] | None:
    """All compile-time constants of one cubin; a more specific source replaces a general one.

    ``derive(constants)`` of the kernel's contract, if it has one, returns those that the catalog
    does not state, or None where the model has no such variant. Then this returns None too.
    """
    merged: dict[str, int | float | str] = dict(CONSTANTS) if kernel.scores else {}
    merged |= variant.constants_of(model)
    contract = _contract(kernel)
    if hasattr(contract, "derive"):
        try:
            derived = contract.derive(merged)
        except ValueError as error:
            where = f"kernel {kernel.name}" + (f", model {model.name}" if model else "")
            raise BuildError(
                f"{where}: {error}; next: --kernel to build the others, or another model"
            ) from error
        if derived is None:
            return None
        merged = {**derived, **merged}
    return dict(sorted(merged.items()))


def _contract(kernel: Kernel) -> Any:
    return importlib.import_module(f"build_kernels.kernels.{kernel.name}.contract")
