"""A user's own model, described in a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from build_kernels.catalog import measured
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.rules import FIELDS, OPTIONAL, check_model
from build_kernels.errors import BuildError, unknown
from router_runtime.format import system_errors


def read_model(path: Path) -> Model:
    """Return the model of a TOML file that has the fields of ``Model``, of which those of
    ``OPTIONAL`` may be absent, and perhaps the tables that ``build-kernels tune`` writes.

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
        raise BuildError(
            f"{where}: expected a readable TOML file, found: {error}; next: correct it"
        ) from error
    tables = {name: document.pop(name) for name in measured.TABLES if name in document}
    for found in document:
        if found not in FIELDS:
            raise unknown(f"key in {where}", found, FIELDS, "next: rename or remove it")
    required = [name for name in FIELDS if name not in OPTIONAL]
    missing = [name for name in required if name not in document]
    if missing:
        raise BuildError(
            f"{where}: expected the keys {required}, missing {missing}; next: add them"
        )
    values = {name: _field(where, name, value) for name, value in document.items()}
    model = Model(**values, measured=measured.flattened(tables))
    check_model(where, model)
    measured.check(where, model)
    taken = [known.name for known in MODELS]
    if model.name in taken:
        raise BuildError(
            f"{where}: name: expected a name other than any of {taken}, found {model.name!r}; "
            "next: rename the model"
        )
    return model


def _field(where: str, name: str, value: Any) -> Any:
    kind = FIELDS[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BuildError(
            f"{where}: {name}: expected {kind.__name__}, found {value!r}; next: correct it"
        )
    return value
