"""The engine's tensors that a layer's Router has copies of, and notice of new values in them.

A captured graph reads the Router's copies, and no Python runs when it is replayed, so the copies
must be renewed when weights are loaded and not at the next call. Engines load weights in two ways:

- a parameter's ``weight_loader`` (or the default one) writes into the parameter;
- a reload builds a layer anew from other tensors, copies the values into the parameters that the
  layer had, and registers these again.

Both write past torch's version counter, so both are listened to: the loaders of the parameters and
``register_parameter`` of the gate. Whatever else writes into a parameter changes its version, which
every call compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Sources:
    """The tensors of one gate and its router, by the names that they have in a Router."""

    def __init__(
        self,
        gate: nn.Module,
        current: Callable[[], dict[str, Tensor]],
        default_loader: Callable[..., Any] | None,
    ) -> None:
        """Know of no tensor yet.

        Args:
            gate: the engine's gate.
            current: returns the tensors as they are now.
            default_loader: what the engine loads parameters with that have no loader of their own;
                None where the plug-in listens to that itself, by ``told``.

        """
        self._gate, self._current, self._default_loader = gate, current, default_loader
        self._known: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._undo: list[Callable[[], None]] = []
        self._loaded: Callable[[], None] | None = None

    def find(self) -> None:
        """Look which tensors there are; the others of this class speak of these from now on."""
        self._known = self._current()

    def read(self) -> dict[str, Tensor]:
        """The tensors with the values that they have now; later changes count as such."""
        self._seen = {name: (tensor, version_of(tensor)) for name, tensor in self._known.items()}
        return {name: tensor.detach() for name, tensor in self._known.items()}

    def changed(self) -> bool:
        """Whether a tensor is another one, or was written to, since ``read``. Every call asks."""
        seen, current = self._seen, self._current()
        if len(seen) != len(current):
            return True
        for name, tensor in current.items():
            if name not in seen:
                return True
            known, version = seen[name]
            if tensor is not known or (version >= 0 and tensor._version != version):
                return True
        return False

    def listen(self, loaded: Callable[[], None]) -> None:
        """Call ``loaded`` whenever values were loaded into a tensor."""
        self.forget()
        self._loaded = loaded
        for tensor in self._known.values():
            loader = getattr(tensor, "weight_loader", self._default_loader)
            if loader is not None:
                self._undo.append(_listen_to_loader(tensor, loader, self.told))
        self._undo.append(_listen_to_registration(self._gate, self.told))

    def told(self, tensor: Any) -> None:
        """Take note that values were loaded into ``tensor``, whichever layer has it."""
        if self._loaded is not None and any(each is tensor for each in self._known.values()):
            self._loaded()

    def forget(self) -> None:
        """Stop listening: loaders and gate are as they were."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._loaded = None


def version_of(tensor: Tensor) -> int:
    """How often something has written into it; -1 for inference tensors, which do not count that:
    for these there are the loaders.
    """
    return -1 if tensor.is_inference() else tensor._version


def _listen_to_loader(
    tensor: Any, loader: Callable[..., Any], told: Callable[[Any], None]
) -> Callable[[], None]:
    own = getattr(tensor, "weight_loader", None)

    @functools.wraps(loader)
    def load(parameter: Any, *arguments: Any, **options: Any) -> Any:
        result = loader(parameter, *arguments, **options)
        told(parameter)
        return result

    tensor.weight_loader = load

    def undo() -> None:
        if getattr(tensor, "weight_loader", None) is not load:
            return  # something else listens too, and calls this one
        if own is None:
            del tensor.weight_loader
        else:
            tensor.weight_loader = own

    return undo


def _listen_to_registration(gate: nn.Module, told: Callable[[Any], None]) -> Callable[[], None]:
    original = gate.register_parameter

    @functools.wraps(original)
    def register_parameter(name: str, param: nn.Parameter | None) -> None:
        original(name, param)
        told(param)

    gate.register_parameter = register_parameter  # type: ignore[method-assign]

    def undo() -> None:
        if vars(gate).get("register_parameter") is register_parameter:
            del gate.register_parameter

    return undo
