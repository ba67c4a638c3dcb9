"""The kernels of the row ops, which no Router owns, loaded once for each device.

The first call of an op on a device loads every variant that may ever be chosen there, so that a
later call, with any row length and inside a graph capture, loads nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from router_runtime.device import driver
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request, option
from router_runtime.errors import RouterRuntimeError
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry
from router_runtime.routing.launches import ServingLaunch
from router_runtime.routing.placement import Placement, refuse_capture

_log = logging.getLogger(__name__)

#: The choices that a kernel remembers, at most.
_REMEMBERED = 4096

#: Called with the entries that serve a call and have the same evidence, the closest fit first, with
#: the sizes of the call, and with the number of multiprocessors; returns the entry to launch.
Choose = Callable[[Sequence[Entry], tuple[int, ...], int], Entry]


class RowKernelUse(NamedTuple):
    """How an op uses a row kernel.

    Attributes:
        name: The kernel's.
        arguments: Of a launch, in the order in which the launchers take them.
        quantities: The names of the sizes of a call, which the entries' limits are about.
        constants: The names of sizes that come before those, and that must be an entry's own.
        choose: Chooses among the entries that serve a call; None: the closest fit.
        fixed: Constants that the entries must have for any call of this use.
        key: What tells this use from others of the kernel; empty: there are none.

    """

    name: str
    arguments: tuple[str, ...]
    quantities: tuple[str, ...]
    constants: tuple[str, ...] = ()
    choose: Choose | None = None
    fixed: Constants = types.MappingProxyType({})
    key: str = ""


class RowKernel:
    """Every variant of a row kernel that may serve on one device, chosen by the sizes of a call."""

    def __init__(self, use: RowKernelUse, device: torch.device) -> None:
        driver.refuse_fork()
        refuse_capture(f"the first call of {use.name} on {device}, which loads its kernels,")
        self._use = use
        self._kernels = kernels_on(device.index)
        resolution = self._kernels.resolve(Request(use.name, use.fixed))
        resolution.require()
        accepted = [each for each in resolution.candidates if each.accepted]
        self._launchers = {
            each.entry.key: ServingLaunch(self._kernels.load_entry(each.entry), use.arguments)
            for each in accepted
        }
        used = ", ".join(f"{each.entry.key} ({each.status})" for each in accepted)
        _log.info("%s on %s: %s; evidence of %s", use.name, device, used, self._kernels.folder)
        self._chosen: dict[tuple[int, ...], ServingLaunch] = {}
        self.placement = Placement(device)

    def launcher(self, *sizes: int) -> ServingLaunch:
        """The launcher for a call of these sizes, in the order of ``constants`` and ``quantities``
        of the kernel's use. The choice is remembered. Raises ResolutionError if nothing serves it.
        """
        found = self._chosen.get(sizes)
        if found is None:
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            found = self._chosen[sizes] = self._launchers[self._entry(sizes).key]
        return found

    def _entry(self, sizes: tuple[int, ...]) -> Entry:
        use = self._use
        fixed = len(use.constants)
        request = Request(
            use.name,
            constants={**use.fixed, **dict(zip(use.constants, sizes[:fixed], strict=True))},
            quantities=dict(zip(use.quantities, sizes[fixed:], strict=True)),
        )
        resolution = self._kernels.resolve(request)
        closest = resolution.require()
        if use.choose is None:
            return closest
        accepted = [each for each in resolution.candidates if each.accepted]
        best = option(accepted[0], request).rank
        entries = [each.entry for each in accepted if option(each, request).rank == best]
        return use.choose(entries, sizes, self._kernels.facts.sms)


_lock = threading.Lock()
_loaded: dict[tuple[str, torch.device], RowKernel] = {}
#: The ops with several kernels that have loaded them on a device, by the name of their first one.
_prepared: set[tuple[str, torch.device]] = set()


def row_kernel(use: RowKernelUse, device: torch.device) -> RowKernel:
    """The kernel on a device, loaded by the first call; from any thread."""
    key = use.key or use.name, device
    found = _loaded.get(key)
    if found is not None:
        return found
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = RowKernel(use, device)
        return found


def one_of(uses: tuple[RowKernelUse, ...], needed: RowKernelUse, device: torch.device) -> RowKernel:
    """The kernel that is ``needed``, of an op that has several.

    The first call of the op on a device loads all of them. What keeps another one from serving
    there is an error only of a call that needs it.
    """
    found = row_kernel(needed, device)
    op = (uses[0].name, device)
    if op not in _prepared:
        for other in uses:
            with contextlib.suppress(RouterRuntimeError):
                row_kernel(other, device)
        _prepared.add(op)
    return found
