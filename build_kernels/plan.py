"""What a build makes: catalog rows x models x targets, narrowed by the command line.

A ``Job`` is one cubin to be. Its ``source_sha256`` covers everything that goes into it except the
target and the toolchain packages, so that entries of two targets made from the same source say so.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.kernels import Kernel, Language, Variant
from build_kernels.catalog.latency import Latencies
from build_kernels.catalog.models import ANY, MODELS, Model
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile import cutedsl, nvrtc
from build_kernels.compile.job import Job
from build_kernels.compile.sources import KERNELS, PACKAGE, SUFFIXES
from build_kernels.errors import BuildError, unknown
from build_kernels.kernels.common.numerics import CONSTANTS
from router_runtime.format.manifest import source_digest

#: The module that compiles each language.
_RECIPES: Mapping[Language, str] = {
    "cuda": "compile/nvrtc.py",
    "cutedsl": "compile/cutedsl.py",
}
FLAGS: Mapping[Language, tuple[str, ...]] = {"cuda": nvrtc.FLAGS, "cutedsl": cutedsl.FLAGS}

_MODEL_FIELDS: Mapping[str, type] = {
    "name": str,
    "hidden": int,
    "experts": int,
    "top_k": int,
    "scale": float,
    "hash_layers": int,
    "vocab": int,
}


def plan(
    *,
    targets: Collection[str] = (),
    models: Collection[str] = (),
    kernels: Collection[str] = (),
    extra_models: Iterable[Model] = (),
) -> list[Job]:
    """The jobs of a build in order of their keys. An empty selection means all of its kind, and the
    default targets. ``models`` narrows the kernels that depend on a model; the others always stay:
    a folder that serves one model needs them.
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
    jobs = []
    latencies = Latencies(PACKAGE / "catalog" / "latency.toml")
    for kernel in catalog.KERNELS:
        if kernels and kernel.name not in kernels:
            continue
        chosen: list[Model | None] = [None]
        if kernel.per_model:
            chosen = [m for m in known_models.values() if not models or m.name in models]
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
                    json.dumps(FLAGS[kernel.language]),
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
    for name in (*data, *sorted(_RECIPES.values())):
        files[name] = (PACKAGE / name).read_bytes()
    return source_digest(files)


def read_model(path: Path) -> Model:
    """A model from a TOML file with exactly the fields of ``Model``."""
    where = path.name
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"{where}: expected a readable TOML file, found: {error}") from error
    for found in document:
        if found not in _MODEL_FIELDS:
            raise unknown(f"key in {where}", found, _MODEL_FIELDS, "next: rename or remove it")
    missing = [name for name in _MODEL_FIELDS if name not in document]
    if missing:
        raise BuildError(f"{where}: expected the keys {list(_MODEL_FIELDS)}, missing {missing}")
    values = {name: _field(where, name, document[name]) for name in _MODEL_FIELDS}
    model = Model(**values)
    _check_model(where, model)
    return model


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
    folder = KERNELS / kernel
    source = folder / f"{kernel}{SUFFIXES[language][0]}"
    contract = folder / "contract.py"
    for path in (source, contract):
        if not path.is_file():
            raise BuildError(
                f"kernel {kernel}: expected the file {path.relative_to(PACKAGE.parent)}, "
                "found none; next: add it, or remove the kernel's row "
                "from build_kernels/catalog/kernels.py"
            )
    # contract.py and what it imports are Python for either language.
    paths = [p for p in folder.iterdir() if p.suffix in (".py", *SUFFIXES[language])]
    # limits.py and parameters.py are what contracts of both languages share.
    paths += [
        path
        for path in (KERNELS / "common").iterdir()
        if path.suffix in SUFFIXES[language] or path.name in ("limits.py", "parameters.py")
    ]
    paths += [KERNELS / "common" / "numerics.py", PACKAGE / _RECIPES[language]]
    return {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in paths}


def _field(where: str, name: str, value: Any) -> Any:
    kind = _MODEL_FIELDS[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BuildError(f"{where}: {name}: expected {kind.__name__}, found {value!r}")
    return value


def _check_model(where: str, model: Model) -> None:
    taken = [known.name for known in MODELS]
    rules = (
        ("name", re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", model.name), "letters, digits and ._-"),
        ("name", model.name not in (*taken, ANY), f"a name other than any of {taken}"),
        ("hidden", model.hidden > 0 and model.hidden % 64 == 0, "a positive multiple of 64"),
        ("experts", 1 <= model.experts <= 1024, "1 to 1024"),
        ("top_k", 1 <= model.top_k <= min(32, model.experts), "1 to 32, at most experts"),
        ("scale", math.isfinite(model.scale) and 0 <= model.scale <= 1e18, "0 to 1e18"),
        ("hash_layers", model.hash_layers >= 0, "0 or more"),
        ("vocab", 1 <= model.vocab < 2**31, "1 to 2^31 - 1"),
    )
    for name, holds, expected in rules:
        if not holds:
            raise BuildError(
                f"{where}: {name}: expected {expected}, found {getattr(model, name)!r}"
            )
