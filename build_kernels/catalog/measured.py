"""What a model file says of its kernels beside the shape: divisions, and measured latencies.

In the file they are tables, ``[divisions.KERNEL.VARIANT.FORM]`` with the constants of a division
and ``[latency.TARGET.KERNEL.VARIANT]`` with tokens and microseconds. ``Model.measured`` has each
number by its path, such as ``latency/sm_90a/dense_router_prefill/wgmma_512/1024``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from build_kernels.catalog.kernels import COLUMNS, KERNELS, Kernel, Variant
from build_kernels.catalog.latency import Latency
from build_kernels.catalog.models import Model
from build_kernels.catalog.targets import TARGETS
from build_kernels.errors import BuildError, unknown
from router_runtime.format.contract import Constants

#: The tables of a model file, and how deep their numbers lie.
TABLES = {"divisions": 5, "latency": 5}

Measured = tuple[tuple[str, int | float], ...]


def flattened(tables: Mapping[str, Any]) -> Measured:
    """Return the values of nested tables by their paths, sorted."""
    return tuple(sorted(_leaves("", tables)))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, each in value.items():
        yield from _leaves(f"{path}/{name}" if path else str(name), each)


def check(where: str, model: Model) -> None:
    """Raise BuildError, beginning with ``where``, for names and values that no kernel has."""
    found: dict[tuple[str, ...], set[str]] = {}
    for path, value in model.measured:
        parts = path.split("/")
        if len(parts) != TABLES.get(parts[0]) or not _is_positive(value, parts[0]):
            raise BuildError(
                f"{where}: {path}: expected divisions.KERNEL.VARIANT.FORM.CONSTANT, a positive "
                "integer, or latency.TARGET.KERNEL.VARIANT.TOKENS, positive microseconds, found "
                f"{value!r}; next: correct it, or remove the tables and tune the model again"
            )
        found.setdefault(tuple(parts[:4]), set()).add(parts[4])
    for (table, *names), last in found.items():
        if table == "latency":
            _known(f"{where}: target", names[0], TARGETS)
            _variant(where, names[1], names[2])
            for tokens in last:
                # Written one way only, so that no number of tokens is there twice.
                if not tokens.isdecimal() or tokens.startswith("0"):
                    raise BuildError(
                        f"{where}: {'.'.join((table, *names))}: expected numbers of tokens, found "
                        f"{tokens!r}; next: correct it"
                    )
            continue
        variant = _variant(where, names[0], names[1])
        _known(f"{where}: form of {names[1]}", names[2], variant.forms)
        if last != {*COLUMNS[names[2]]}:
            raise BuildError(
                f"{where}: {'.'.join((table, *names))}: expected the constants "
                f"{', '.join(COLUMNS[names[2]])}, found {', '.join(sorted(last))}; "
                "next: correct it"
            )
    forms = [key[1:3] for key in found if key[0] == "divisions"]
    for kernel, variant_name in forms:
        if forms.count((kernel, variant_name)) > 1:
            raise BuildError(
                f"{where}: divisions.{kernel}.{variant_name}: expected one form, found several; "
                "next: remove all but one"
            )


def _is_positive(value: object, table: str) -> bool:
    kinds = (int,) if table == "divisions" else (int, float)
    return type(value) in kinds and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


def _known(what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise unknown(what, found, known, "next: correct it")


def _variant(where: str, kernel: str, variant: str) -> Variant:
    """The dense variant of that name. Raises BuildError if there is none."""
    dense = {
        (row.name, each.name): each for row in KERNELS for each in row.variants if each.batches
    }
    if (kernel, variant) not in dense:
        names = [f"{row}.{name}" for row, name in dense]
        raise unknown(f"variant in {where}", f"{kernel}.{variant}", names, "next: correct it")
    return dense[kernel, variant]


def divisions_of(model: Model, kernel: Kernel) -> dict[str, Constants]:
    """Return variant -> FORM, MMA and the constants of the division that the model states."""
    variants = {variant.name: variant for variant in kernel.variants}
    found: dict[str, dict[str, int | float | str]] = {}
    for path, value in model.measured:
        table, *names = path.split("/")
        if table == "divisions" and names[0] == kernel.name:
            _, variant, form, constant = names
            start = {"FORM": form, "MMA": variants[variant].constants["MMA"]}
            found.setdefault(variant, start)[constant] = value
    return dict(found)


def latency_of(model: Model, target: str, kernel: str, variant: str) -> Latency:
    """Return the measured latencies of an entry in the model file; empty if it has none."""
    prefix = f"latency/{target}/{kernel}/{variant}/"
    return tuple(
        sorted(
            (int(path.removeprefix(prefix)), float(value))
            for path, value in model.measured
            if path.startswith(prefix)
        )
    )
