"""The cases of every kernel, and the digest of the module that lists them.

Most kernels have their cases in ``cases.py`` and share its digest. A kernel whose cases are in a
module of their own can change them without making the evidence of other kernels stale. This module
imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

from router_runtime.evidence import cases, topk_indices_cases
from router_runtime.evidence.cases import Case, Limits
from router_runtime.format.contract import Constants
from router_runtime.format.source_digest import RUNTIME, PythonSources

#: Kernel -> the module of its cases, and what lists them.
_OWN: Mapping[str, tuple[ModuleType, Callable[[Constants, Limits], Iterator[Case]]]] = {
    "topk_indices": (topk_indices_cases, topk_indices_cases.topk_indices),
}


def cases_of(kernel: str, constants: Constants, limits: Limits) -> tuple[Case, ...]:
    """Every case of an entry, in a fixed order; arguments and errors as of ``cases.cases``."""
    if kernel in _OWN:
        return tuple(_OWN[kernel][1](constants, limits))
    return cases.cases(kernel, constants, limits)


def cases_sha256(kernel: str) -> str:
    """Digest of the cases of a kernel: of the code that lists them, in which comments, docstrings
    and layout do not count. The same for all kernels of ``cases.py``.
    """
    module = _OWN[kernel][0] if kernel in _OWN else cases
    return _digest(module.__name__)


@functools.cache
def _digest(module: str) -> str:
    sources = PythonSources({"router_runtime": RUNTIME}, boundaries=("router_runtime.format",))
    return sources.digest(module)
