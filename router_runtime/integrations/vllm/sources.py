"""The engine's tensors that a layer's Router has copies of, and notice of new values in them.

A captured graph reads the Router's copies, and no Python runs when it is replayed, so the copies
must be renewed when weights are loaded and not at the next call. vLLM loads weights in two ways:

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

    def __init__(self, gate: nn.Module, router: Any, default_loader: Callable[..., Any]) -> None:
        """Know of no tensor yet; ``default_loader`` loads parameters that have no loader."""
        self._gate, self._router, self._default_loader = gate, router, default_loader
        self._known: dict[str, Tensor] = {}
        self._seen: list[tuple[int, int]] = []
        self._undo: list[Callable[[], None]] = []

    def find(self) -> None:
        """Look which tensors there are; the others of this class speak of these from now on."""
        self._known = self._current()

    def read(self) -> dict[str, Tensor]:
        """The tensors with the values that they have now; later changes count as such."""
        self._seen = _state(self._known)
        return {name: tensor.detach() for name, tensor in self._known.items()}

    def changed(self) -> bool:
        """Whether a tensor is another one, or was written to, since ``read``."""
        return self._seen != _state(self._current())

    def _current(self) -> dict[str, Tensor]:
        router = self._router
        found: dict[str, Tensor] = {"weight": self._gate.weight}  # type: ignore[dict-item]
        if router._hash_indices_table is not None:
            # Some checkpoints have a bias here too, which selects nothing.
            found["table"] = router._hash_indices_table
        else:
            found["bias"] = router.e_score_correction_bias
        if _has_images(router):
            found["image_bias"] = router.bias_vl
        return found

    def listen(self, loaded: Callable[[], None]) -> None:
        """Call ``loaded`` whenever values were loaded into a tensor."""
        self.forget()
        known = {id(tensor) for tensor in self._known.values()}

        def told(tensor: Any) -> None:
            if id(tensor) in known:
                loaded()

        for tensor in self._known.values():
            self._undo.append(_listen_to_loader(tensor, self._default_loader, told))
        self._undo.append(_listen_to_registration(self._gate, told))

    def forget(self) -> None:
        """Stop listening: loaders and gate are as they were."""
        for undo in self._undo:
            undo()
        self._undo = []


def _has_images(router: Any) -> bool:
    """Whether the router selects by another bias for image tokens."""
    return getattr(router, "bias_vl", None) is not None and router.image_sentinel_lo > 0


def _state(tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
    # Inference tensors have no version; for these there are the loaders.
    return [
        (id(tensor), -1 if tensor.is_inference() else tensor._version)
        for tensor in tensors.values()
    ]


def _listen_to_loader(
    tensor: Any, default_loader: Callable[..., Any], told: Callable[[Any], None]
) -> Callable[[], None]:
    own = getattr(tensor, "weight_loader", None)
    original = default_loader if own is None else own

    @functools.wraps(original)
    def load(parameter: Any, *arguments: Any, **options: Any) -> Any:
        result = original(parameter, *arguments, **options)
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
