"""Which divisions of a model are worth timing: those that are predicted to be the fastest, and
those that are given by hand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from build_kernels import divisions
from build_kernels.catalog.kernels import COLUMNS, Kernel, Variant
from build_kernels.catalog.models import Model
from build_kernels.errors import BuildError
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.dense.geometry import search
from build_kernels.kernels.dense.geometry.table import geometry_of
from router_runtime.format.contract import Constants

#: A division that differs from better ones in the tokens of a tile alone is ranked as if it took
#: this many times as long, once for each of them, so that the candidates are not all alike.
ALIKE = 1.04

#: No candidate is predicted to take more than this times the best one.
WITHIN = 1.5

_GIVEN = re.compile(
    r"(?:(?P<model>[^/:]+)/)?(?P<tokens>\d+):"
    r"(?:(?P<swap>\d+x\d+:\d+:\d+)|\d+:\d+:\d+)"
)


@dataclass(frozen=True, slots=True)
class Given:
    """A division given by hand.

    Attributes:
        text: As it was given.
        model: The one model that it is for; None: every model.
        tokens: A number of tokens of the class that it is for.
        division: FORM and the constants of the division.

    """

    text: str
    model: str | None
    tokens: int
    division: Constants


def parsed(text: str) -> Given:
    """Return the division that a text such as ``4096:128x64:2:1`` gives.

    It is ``[MODEL/]TOKENS:EXPERTSxTOKENS:CLUSTER_T:SPLIT_K`` for the form swap_ab, or
    ``[MODEL/]TOKENS:CLUSTER_E:CLUSTER_T:PASSES`` for the form tile. Raises BuildError for another.
    """
    found = _GIVEN.fullmatch(text)
    if found is None:
        raise BuildError(
            "--division: expected [MODEL/]TOKENS:EXPERTSxTOKENS:CLUSTER_T:SPLIT_K (swap_ab) or "
            f"[MODEL/]TOKENS:CLUSTER_E:CLUSTER_T:PASSES (tile), found {text!r}; "
            "next: --division 4096:128x64:2:1"
        )
    numbers = [int(number) for number in re.findall(r"\d+", text.rpartition("/")[2])]
    form = "tile" if found["swap"] is None else "swap_ab"
    division = dict(zip(COLUMNS[form], numbers[1:], strict=True))
    return Given(text, found["model"], int(found["tokens"]), {"FORM": form, **division})


def division_of(constants: Constants) -> dict[str, int | float | str]:
    """Return the constants of the division, in the order of ``COLUMNS``, of all of an entry."""
    return {name: constants[name] for name in COLUMNS[str(constants["FORM"])]}


def division_text(constants: Constants) -> str:
    """Return a division in short, as ``--division`` takes it, for the forms that it takes."""
    division = division_of(constants)
    values = [str(value) for value in division.values()]
    if constants["FORM"] == "swap_ab":
        return f"{values[0]}x{':'.join(values[1:])}"
    if constants["FORM"] == "tile":
        return ":".join(values)
    return " ".join(f"{name}={value}" for name, value in division.items())


def classes(kernel: Kernel, target: str, tokens: Set[int]) -> list[Variant]:
    """Return the variants of a kernel whose divisions are worth timing on a target.

    ``tokens``: only the classes of these batches; empty: all. Where a target has variants with an
    MMA of its own, those for every target are left as they are.
    """
    able = [v for v in kernel.variants if v.batches and (not v.targets or target in v.targets)]
    own = [variant for variant in able if variant.targets] or able
    return [v for v in own if not tokens or not tokens.isdisjoint(v.batches)]


def candidates(
    variant: Variant, model: Model, today: Constants | None, count: int, given: Sequence[Given]
) -> tuple[list[Variant], dict[str, str]]:
    """Return the candidates of one class of a model as variants, and those that no form can build.

    Args:
        variant: The class.
        model: The model.
        today: The constants of what serves these batches today; None: nothing.
        count: How many of the divisions that are predicted to be the fastest.
        given: Divisions given by hand; those for other models and classes are ignored.

    Returns:
        Variants called as the class with a number, such as ``wgmma_4096.2``, and text of a given
        division -> why it cannot be built.

    """
    shape = {**CONSTANTS, **model.constants()}
    mma = str(variant.constants["MMA"])
    chosen: list[Constants] = [] if today is None else [today]
    refused: dict[str, str] = {}
    for each in given:
        if each.model in (None, model.name) and each.tokens in variant.batches:
            division: Constants = {**each.division, "MMA": mma}
            try:
                if division["FORM"] not in variant.forms:
                    raise ValueError(
                        f"expected one of the forms {', '.join(variant.forms)} for this class, "
                        f"found {division['FORM']}"
                    )
                g = geometry_of({**shape, "MAX_TOKENS": variant.batches[-1], **division})
            except (ValueError, ArithmeticError) as error:
                refused[f"{model.name}/{each.text.rpartition('/')[2]}"] = str(error)
                continue
            _add(chosen, search.stated(str(division["FORM"]), mma, g))
    by_hand = len(chosen)
    machine = divisions.machine(mma, variant.targets)
    for likely in _spread(search.ranked(variant.forms, mma, shape, variant.batches, machine)):
        if len(chosen) - by_hand < count:
            _add(chosen, likely)
    new = chosen if today is None else chosen[1:]
    return [_variant(variant, model, number, row) for number, row in enumerate(new, 1)], refused


def _add(chosen: list[Constants], division: Constants) -> None:
    """Add a division unless it is there."""
    if not any(division.items() <= other.items() for other in chosen):
        chosen.append(division)


def _spread(ranked: Sequence[tuple[float, Constants]]) -> Iterator[Constants]:
    """The divisions in the order in which they are worth a trial, those that are too slow left out.

    ``ranked``: microseconds and constants, the fastest first.
    """
    alike: dict[tuple[tuple[str, object], ...], int] = {}
    weighed = []
    for microseconds, division in ranked:
        if microseconds > WITHIN * ranked[0][0]:
            break
        family = tuple(item for item in sorted(division.items()) if "TOKENS" not in item[0])
        weighed.append((microseconds * ALIKE ** alike.get(family, 0), division))
        alike[family] = alike.get(family, 0) + 1
    weighed.sort(key=lambda item: item[0])
    yield from (division for _, division in weighed)


def _variant(variant: Variant, model: Model, number: int, division: Constants) -> Variant:
    rows: Mapping[str, Constants] = {model.name: division}
    return dataclasses.replace(
        variant, name=f"{variant.name}.{number}", constants={}, by_model=rows
    )
