"""Puts the double of an engine (fake_vllm.py, fake_sglang.py) in the place of its modules."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any


def made(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, types.ModuleType]:
    """Return modules of these names, with these contents."""
    modules = {}
    for name, values in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(values)
    return modules


def _loaded(engine: str) -> dict[str, types.ModuleType]:
    return {name: each for name, each in sys.modules.items() if name.split(".")[0] == engine}


@contextlib.contextmanager
def in_place_of(engine: str, modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Have imports find ``modules`` in place of an engine's, whether that is installed or not."""
    before = _loaded(engine)
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _loaded(engine):
            del sys.modules[name]
        sys.modules.update(before)
