"""What every row of the catalog and every model file must be; checked before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

from build_kernels.catalog import kernels as catalog
from build_kernels.catalog import models as shapes
from build_kernels.catalog import targets as architectures
from build_kernels.catalog.kernels import Kernel, Variant
from build_kernels.catalog.models import ANY, Model
from build_kernels.compile.languages import LANGUAGES
from build_kernels.errors import BuildError, unknown
from router_runtime.errors import FormatError
from router_runtime.format.scoring import SCORINGS, TEMPERATURES, is_temperature
from router_runtime.format.target import Target

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NAMED = "letters, digits and ._-, beginning with a letter or _"

#: The type of each field of a model, and those that a model file may leave out.
FIELDS: Mapping[str, type] = {
    "name": str,
    "hidden": int,
    "experts": int,
    "top_k": int,
    "scale": float,
    "hash_layers": int,
    "vocab": int,
    "scoring": str,
    "gate_temperature": float,
}
OPTIONAL = ("scoring", "gate_temperature")

_Rule = tuple[str, object, str]


def check_catalog() -> None:
    """Raise BuildError for the first row of the catalog that breaks a rule."""
    for target in architectures.TARGETS:
        _check_target(target)
    for model in shapes.MODELS:
        where = f"build_kernels/catalog/models.py: model {getattr(model, 'name', model)!r}"
        check_model(where, model)
    for kernel in catalog.KERNELS:
        _check_kernel(kernel)
    for what, rows in (("models", shapes.MODELS), ("kernels", catalog.KERNELS)):
        remedy = f"correct build_kernels/catalog/{what}.py"
        check_distinct(what, [row.name for row in rows], remedy)


def check_model(where: str, model: Model) -> None:
    """Raise BuildError, beginning with ``where``, for a model that no kernel can serve."""
    for name, kind in FIELDS.items():
        value = getattr(model, name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise BuildError(
                f"{where}: {name}: expected {kind.__name__}, found {value!r}; next: correct it"
            )
    rules: tuple[_Rule, ...] = (
        ("name", _NAME.fullmatch(model.name), _NAMED),
        ("name", model.name != ANY, f"a name other than {ANY!r}, which means every model"),
        ("hidden", model.hidden > 0 and model.hidden % 64 == 0, "a positive multiple of 64"),
        ("experts", 1 <= model.experts <= 1024, "1 to 1024"),
        ("top_k", 1 <= model.top_k <= min(32, model.experts), "1 to 32, at most experts"),
        ("scale", math.isfinite(model.scale) and 0 <= model.scale <= 1e18, "0 to 1e18"),
        ("hash_layers", model.hash_layers >= 0, "0 or more"),
        ("vocab", 1 <= model.vocab < 2**31, "1 to 2^31 - 1"),
        ("scoring", model.scoring in SCORINGS, f"one of {list(SCORINGS)}"),
        (
            "gate_temperature",
            is_temperature(model.gate_temperature),
            "{:g} to {:g}".format(*TEMPERATURES),
        ),
    )
    for name, holds, expected in rules:
        if not holds:
            raise BuildError(
                f"{where}: {name}: expected {expected}, found {getattr(model, name)!r}; "
                "next: correct it"
            )


def check_distinct(what: str, names: Collection[str], remedy: str) -> None:
    """Raise BuildError if one of the names is there twice."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise BuildError(
            f"expected {what} with names of their own, found more than one called "
            f"{', '.join(map(repr, twice))}; next: {remedy}"
        )


def _check_target(target: str) -> None:
    try:
        Target.parse(target)
    except FormatError as error:
        raise BuildError(f"build_kernels/catalog/targets.py: {error}; next: correct it") from error


def _check_kernel(kernel: Kernel) -> None:
    where = f"build_kernels/catalog/kernels.py: kernel {kernel.name!r}"
    remedy = "next: correct build_kernels/catalog/kernels.py"
    _check_name(f"{where}: name", kernel.name)
    if kernel.language not in LANGUAGES:
        raise unknown(f"language of kernel {kernel.name!r}", kernel.language, LANGUAGES, remedy)
    names = [variant.name for variant in kernel.variants]
    check_distinct(f"variants of kernel {kernel.name!r}", names, remedy.removeprefix("next: "))
    for variant in kernel.variants:
        _check_variant(f"{where}: variant {variant.name!r}", variant, remedy)


def _check_variant(where: str, variant: Variant, remedy: str) -> None:
    _check_name(f"{where}: name", variant.name)
    for target in variant.targets:
        if target not in architectures.TARGETS:
            raise unknown(f"target in {where}", target, architectures.TARGETS, remedy)
    rows = variant.by_model or {}
    models = [ANY, *(model.name for model in shapes.MODELS)]
    for model in rows:
        if model not in models:
            raise unknown(f"model in {where}", model, models, remedy)
    for constants in (variant.constants, *rows.values()):
        _check_constants(where, constants.items())


def _check_constants(where: str, constants: Iterable[tuple[str, object]]) -> None:
    for name, value in constants:
        number = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        if not number and not (isinstance(value, str) and _NAME.fullmatch(value)):
            raise BuildError(
                f"{where}: constant {name}: expected a finite number or a plain name, "
                f"found {value!r}; next: correct it"
            )


def _check_name(where: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BuildError(f"{where}: expected {_NAMED}, found {name!r}; next: correct it")
