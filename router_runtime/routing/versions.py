"""When a tensor has changed: the address of its values, and the number of writes that torch has
counted.

torch counts every write in place, also of ``load_state_dict`` and of most optimizers, in a number
that costs little to read. It does not count writes through ``tensor.data``, nor any to a tensor
that was made under ``torch.inference_mode``.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

#: The address of the values, and the number of writes (-1 where torch does not count them).
State = tuple[int, int]


def state_of(tensor: Tensor) -> State:
    """A value that is another one after a change of ``tensor`` that torch has counted."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


class Source:
    """A tensor of a module from which values were copied. It is not kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = state_of(tensor)
        count_optimizer_steps(tensor)

    def tensor(self) -> Tensor | None:
        """The tensor; None once it is gone."""
        return self._tensor()

    def changed(self) -> bool:
        """Whether the tensor is alive and has changed since its values were copied."""
        tensor = self._tensor()
        return tensor is not None and state_of(tensor) != self._state


_counted: dict[int, weakref.ref[Tensor]] = {}


def count_optimizer_steps(tensor: Tensor) -> None:
    """Count a step of an optimizer that has ``tensor`` as a write to it: fused ones, such as
    ``Adam(..., fused=True)``, write past torch's count.
    """
    _hook_into_optimizers()
    key = id(tensor)
    _counted[key] = weakref.ref(tensor, lambda _: _counted.pop(key, None))


@functools.cache
def _hook_into_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in _counted and not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)
