"""How long one call of each variant takes: ``catalog/latency.toml`` as data.

The builder puts the figures into the manifest, and the runtime serves a batch with the variant that
has the smallest figure for its size. They decide speed only, never results, so they are in no
source digest: new figures recompile nothing and make no evidence stale.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_kernels.catalog import kernels as catalog
from build_kernels.catalog.models import ANY, MODELS
from build_kernels.catalog.targets import TARGETS
from build_kernels.errors import BuildError, unknown

_WHERE = "latency.toml"
_REMEDY = "next: correct build_kernels/catalog/latency.toml"

#: (tokens, microseconds), tokens ascending.
Latency = tuple[tuple[int, float], ...]


class Latencies:
    """The figures of one file. A file that does not exist has none.

    Raises BuildError for another form, and for names that are not in the catalog.
    """

    def __init__(self, path: Path) -> None:
        self._tables: dict[tuple[str, str], Mapping[str, Latency]] = {}
        #: The numbers of tokens that have figures.
        self.tokens: tuple[int, ...] = ()
        if not path.is_file():
            return
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BuildError(f"{_WHERE}: expected TOML, found: {error}; {_REMEDY}") from error
        tokens = _tokens(document.pop("tokens", None))
        self.tokens = tuple(tokens)
        models = [ANY, *(model.name for model in MODELS)]
        variants = [f"{k.name}/{v.name}" for k in catalog.KERNELS for v in k.variants]
        for target, by_model in document.items():
            _known("target", target, [ANY, *TARGETS], by_model)
            for model, rows in by_model.items():
                _known("model", model, models, rows)
                table = {}
                for variant, figures in rows.items():
                    where = f"{_WHERE}: {target}.{model}.{variant}"
                    if variant not in variants:
                        raise unknown(f"variant in {_WHERE}", variant, variants, _REMEDY)
                    table[variant] = _latency(where, tokens, figures)
                self._tables[target, model] = table

    def of(self, kernel: str, variant: str, model: str | None, target: str) -> Latency:
        """Return the figures of one entry: those of its target and model, else those of its target,
        else those of its model, else those for any target and model, else none.
        """
        for key in ((target, model or ANY), (target, ANY), (ANY, model or ANY), (ANY, ANY)):
            found = self._tables.get(key, {}).get(f"{kernel}/{variant}")
            if found is not None:
                return found
        return ()


def _known(what: str, found: str, names: list[str], table: Any) -> None:
    if found not in names:
        raise unknown(f"{what} in {_WHERE}", found, names, _REMEDY)
    if not isinstance(table, dict):
        raise BuildError(f"{_WHERE}: {found}: expected a table, found {table!r}; {_REMEDY}")


def _tokens(found: Any) -> list[int]:
    whole = isinstance(found, list) and all(type(item) is int and item > 0 for item in found)
    if not whole or not found or sorted(set(found)) != found:
        raise BuildError(
            f"{_WHERE}: tokens: expected ascending token counts, found {found!r}; {_REMEDY}"
        )
    return list(found)


def _latency(where: str, tokens: list[int], found: Any) -> Latency:
    """One figure for each of the first token counts: a variant need not serve all of them."""
    right = isinstance(found, list) and all(
        type(item) in (int, float) and math.isfinite(item) and item > 0 for item in found
    )
    if not right or not 0 < len(found) <= len(tokens):
        raise BuildError(
            f"{where}: expected 1 to {len(tokens)} positive microseconds, found {found!r}; "
            f"{_REMEDY}"
        )
    return tuple((count, float(figure)) for count, figure in zip(tokens, found, strict=False))
