"""Whether an installed engine is one that this package knows: its version, and the signatures of
what is hooked.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any


class UnknownEngine(Exception):
    """The installed engine is not one that this package knows; the message says in what."""


def named(path: str) -> Any:
    """What a module defines, by ``module:name``, with dots in the name for what a class has."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def check_version(
    engine: str, found: str, oldest: tuple[int, ...], newest: tuple[int, ...]
) -> None:
    """Raise UnknownEngine for a version outside of [oldest, newest], compared as far as they are
    given: any patch release of ``newest`` is in it.
    """
    numbers = re.match(r"\d+(\.\d+)*", found)
    parts = () if numbers is None else tuple(map(int, numbers[0].split(".")))
    if not (
        len(parts) >= len(oldest)
        and oldest <= parts[: len(oldest)]
        and parts[: len(newest)] <= newest
    ):
        first, last = (".".join(map(str, each)) for each in (oldest, newest))
        between = "to" if len(oldest) == len(newest) else "or a newer"
        raise UnknownEngine(f"expected {engine} {first} {between} {last}, found {found}")


def check_signature(owner: Any, method: str, expected: Sequence[str]) -> None:
    """Raise UnknownEngine for a method with other arguments."""
    found = tuple(inspect.signature(getattr(owner, method)).parameters)
    if found != tuple(expected):
        raise UnknownEngine(
            f"expected {owner.__name__}.{method}({', '.join(expected)}), found ({', '.join(found)})"
        )


def check_first_arguments(path: str, expected: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a function that ``named`` finds. Raises UnknownEngine for one that does not
    begin with those expected.
    """
    found = tuple(inspect.signature(named(path)).parameters)
    if found[: len(expected)] != tuple(expected):
        name = path.rpartition(":")[2]
        raise UnknownEngine(
            f"expected {name}({', '.join(expected)}, ...), found ({', '.join(found)})"
        )
    return found
