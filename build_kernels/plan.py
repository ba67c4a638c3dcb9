"""What a build makes: catalog rows x models x targets, narrowed by the command line.

A ``Job`` is one cubin to be. Its ``source_sha256`` covers everything that goes into it except the
target and the toolchain packages, so that entries of two targets made from the same source say so.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from typing import Any

from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile.job import Job
from build_kernels.compile.languages import LANGUAGES, Language
from build_kernels.compile.sources import KERNELS, PACKAGE
from build_kernels.errors import BuildError, unknown
from build_kernels.kernels.common.numerics import CONSTANTS
from router_runtime.format.manifest import source_digest


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
        models: Only these, and ``extra_models``. Empty: those alone, or without them every model
            of the catalog. Kernels that serve every model are always included.
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
            raise unknown("target", found, TARGETS, "next: build-kernels list")
    for found in models:
        if found not in known_models:
            raise unknown("model", found, known_models, "next: build-kernels list, or --model-file")
    for found in kernels:
        if found not in known_kernels:
            raise unknown("kernel", found, known_kernels, "next: build-kernels list")
    wanted = {*models, *(model.name for model in extra_models)}
    jobs = []
    latencies = Latencies(PACKAGE / "catalog" / "latency.toml")
    for kernel in catalog.KERNELS:
        if kernels and kernel.name not in kernels:
            continue
        chosen: list[Model | None] = [None]
        if kernel.per_model:
            chosen = [m for name, m in known_models.items() if not wanted or name in wanted]
        own_files = _source_files(kernel.name, kernel.language)
        for model in chosen:
            for variant in kernel.variants:
                if not variant.has(model):
                    continue
                constants = _constants(kernel, model, variant)
                if constants is None:
                    continue
                files = dict(own_files)
                for shared in variant.shares:
                    files |= _source_files(shared, kernel.language)
                digest = source_digest(
                    files,
                    json.dumps(constants, sort_keys=True, allow_nan=False),
                    json.dumps(LANGUAGES[kernel.language].flags),
                )
                for target in dict.fromkeys(targets or DEFAULT_TARGETS):
                    if variant.targets and target not in variant.targets:
                        continue
                    name = model.name if model else None
                    jobs.append(
                        Job(
                            kernel=kernel.name,
                            language=kernel.language,
                            model=name,
                            target=target,
                            variant=variant.name,
                            constants=constants,
                            source_sha256=digest,
                            latency=latencies.of(kernel.name, variant.name, name, target),
                        )
                    )
    return sorted(jobs, key=lambda job: job.key)


def tree_digest() -> str:
    """The digest of every file that can change a manifest entry, for the whole commit."""
    files = {
        path.relative_to(PACKAGE).as_posix(): path.read_bytes()
        for path in KERNELS.rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".toml")
    }
    data = (
        "catalog/kernels.py",
        "catalog/latency.py",
        "catalog/latency.toml",
        "catalog/models.py",
        "catalog/targets.py",
        "plan.py",
        "toolchain.lock",
    )
    for name in (*data, *sorted(facts.compiler for facts in LANGUAGES.values())):
        files[name] = (PACKAGE / name).read_bytes()
    return source_digest(files)


def _constants(
    kernel: Kernel, model: Model | None, variant: Variant
) -> dict[str, int | float | str] | None:
    """All compile-time constants of one cubin; a more specific source replaces a general one. What
    nobody stated the kernel's contract may derive, by ``derive(constants)``; None from it says that
    the model has no such variant.
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


def _source_files(kernel: str, language: Language) -> dict[str, bytes]:
    """Every file that one kernel consists of, by its path inside the package."""
    facts = LANGUAGES[language]
    folder = KERNELS / kernel
    source = folder / f"{kernel}{facts.suffixes[0]}"
    contract = folder / "contract.py"
    for path in (source, contract):
        if not path.is_file():
            raise BuildError(
                f"kernel {kernel}: expected the file {path.relative_to(PACKAGE.parent)}, "
                "found none; next: add it, or remove the kernel's row "
                "from build_kernels/catalog/kernels.py"
            )
    # contract.py and what it imports are Python for either language.
    paths = [p for p in folder.iterdir() if p.suffix in (".py", *facts.suffixes)]
    # limits.py and parameters.py are what contracts of both languages share.
    paths += [
        path
        for path in (KERNELS / "common").iterdir()
        if path.suffix in facts.suffixes or path.name in ("limits.py", "parameters.py")
    ]
    paths += [KERNELS / "common" / "numerics.py", PACKAGE / facts.compiler]
    return {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in paths}
