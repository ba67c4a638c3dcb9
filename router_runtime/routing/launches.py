"""A kernel bound for each kind of call: plain, with serving inputs, with options beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from router_runtime.device.launch import BoundLaunch, LoadedKernel
from router_runtime.device.packing import selector
from router_runtime.routing.call import SERVED, Call, Results
from router_runtime.routing.checks import address
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.options import OPTIONS

#: Values of a kernel's parameter ``serving``: a plain call, one with serving inputs, and one with
#: options too.
_PLAIN, _SERVED, _WITH_OPTIONS = 0, 1, 2


#: What a launch gets beside the arguments of a plain one: the values of ``SERVED``, and of
#: ``OPTIONS`` or None. A plain tuple, because one is made for each launch.
Served = tuple[tuple[Any, ...], tuple[Any, ...] | None]


def served(call: Call, rows: slice, results: Results, expert_map: ExpertMap | None) -> Served:
    """What a launch of ``rows`` of the batch gets, whose results go to ``results``. Every tensor of
    the call and of its results must stay alive until the launch.
    """
    options = call.options
    values = call.arguments(rows, results, expert_map)
    return values, None if options is None else options.arguments(rows, results)


class ServingLaunch:
    """A kernel bound for each kind of call, so that none is slowed down by what it does not have.

    ``plain`` is called with the arguments named in ``varying``. With ``looks_up``, some arguments
    of a plain call are serving inputs of the kernel, which is told to read those.
    """

    __slots__ = ("_bind_options", "_options", "_serve", "_served", "_with_options", "plain")

    def __init__(
        self,
        kernel: LoadedKernel,
        varying: tuple[str, ...],
        *,
        looks_up: bool = False,
        **fixed: Any,
    ) -> None:
        own = kernel.arguments
        served = tuple(name for name in SERVED if name in own)
        options = tuple(name for name in OPTIONS if name in own)
        fixed = {name: value for name, value in fixed.items() if name in own}

        def bind(serving: int, *more: str) -> BoundLaunch:
            absent = [name for name in (*served, *options) if name not in more]
            kind = {"serving": serving} if "serving" in own else {}
            return kernel.bind((*varying, *more), **fixed, **kind, **dict.fromkeys(absent, 0))

        self.plain = bind(_SERVED if looks_up else _PLAIN)
        self._serve = bind(_SERVED, *served)
        # Bound by the first call with options: most routers never have one.
        self._bind_options: Callable[[], BoundLaunch] = lambda: bind(
            _WITH_OPTIONS, *served, *options
        )
        self._with_options: BoundLaunch | None = None
        self._served = selector([SERVED.index(name) for name in served])
        self._options = selector([OPTIONS.index(name) for name in options])

    def serve(self, stream: int, varying: tuple[Any, ...], served: Served) -> None:
        """Launch with the values of the varying arguments and what ``served`` holds."""
        values, options = served
        if options is None:
            self._serve(stream, *varying, *self._served(values))
            return
        launch = self._with_options
        if launch is None:
            launch = self._with_options = self._bind_options()
        launch(stream, *varying, *self._served(values), *self._options(options))


def narrow_ids(ids: Tensor) -> int:
    """The address of int32 ids; 0 for int64 ids, whose address is another argument."""
    return address(ids, torch.int32)
