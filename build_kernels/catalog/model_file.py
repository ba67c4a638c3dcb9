"""A user's own model, described in a TOML file."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_kernels.catalog.models import ANY, MODELS, Model
from build_kernels.errors import BuildError, unknown
from router_runtime.format import system_errors

_FIELDS: Mapping[str, type] = {
    "name": str,
    "hidden": int,
    "experts": int,
    "top_k": int,
    "scale": float,
    "hash_layers": int,
    "vocab": int,
}


def read_model(path: Path) -> Model:
    """Return the model of a TOML file that has exactly the fields of ``Model``.

    Raises BuildError for a file that cannot be read, other keys, values of another type or out of
    range, and the name of a model of the catalog.
    """
    where = path.name
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(
            f"{where}: expected a readable TOML file, found: {system_errors.found(error)}; "
            f"next: {system_errors.remedy(error, 'check the path')}"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"{where}: expected a readable TOML file, found: {error}") from error
    for found in document:
        if found not in _FIELDS:
            raise unknown(f"key in {where}", found, _FIELDS, "next: rename or remove it")
    missing = [name for name in _FIELDS if name not in document]
    if missing:
        raise BuildError(f"{where}: expected the keys {list(_FIELDS)}, missing {missing}")
    values = {name: _field(where, name, document[name]) for name in _FIELDS}
    model = Model(**values)
    _check(where, model)
    return model


def _field(where: str, name: str, value: Any) -> Any:
    kind = _FIELDS[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BuildError(f"{where}: {name}: expected {kind.__name__}, found {value!r}")
    return value


def _check(where: str, model: Model) -> None:
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
