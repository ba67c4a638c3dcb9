"""The tensors of a gate on its device, and the orders in which kernels read the weight."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from router_runtime.checkpoint.tensors import TENSORS
from router_runtime.errors import InputError, explain
from router_runtime.format.contract import Repack
from router_runtime.routing.checks import wrong_value
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.placement import quiet
from router_runtime.routing.versions import Source

_log = logging.getLogger(__name__)

#: What a gate's tensors can be: the names of the Router's arguments and buffers.
NAMES = ("weight", "bias", "image_bias", "table")


class Weights:
    """The tensors of a gate on its device, at addresses that never change.

    ``packed`` returns the buffer of a kernel's Repack recipe; equal recipes share one buffer.

    Before a launch a back end compares the sum of the ``_version`` of ``keys`` with ``version``,
    and calls ``follow`` where they differ: that costs a call nothing but the comparison.

    Attributes:
        device: where the tensors are.
        tensors: the tensors, by name.
        keys: the tensors that kernels cannot read as somebody left them: the weight, of which they
            read packed copies, and the table, whose entries they use as addresses.
        version: torch's count of writes to ``keys`` when all was last up to date; -1 if ``follow``
            has more to look at.

    """

    def __init__(
        self, config: RouterConfig, device: torch.device, image_bias: bool = False
    ) -> None:
        """Allocate the tensors that a gate of that mode has; ``write`` gives them values.

        Args:
            config: sizes and mode of the gate.
            device: where the tensors are.
            image_bias: whether there is a bias for image tokens.

        """
        experts = config.num_experts
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.bfloat16, (experts, config.hidden_size)),
            "bias": (torch.float32, (experts,)),
            "image_bias": (torch.float32, (experts,)),
            "table": (torch.int32, (config.vocab_size or 0, config.top_k)),
        }
        wanted = {*TENSORS[config.mode], *(["image_bias"] if image_bias else [])}
        # Normal tensors also under torch.inference_mode: they are written again outside of it.
        with torch.inference_mode(False):
            self.tensors = {
                name: torch.empty(shape, dtype=dtype, device=device)
                for name, (dtype, shape) in kinds.items()
                if name in wanted
            }
        self._packed: list[tuple[Repack, Tensor]] = []
        self.device = device
        self._config = config
        self._key_names = tuple(name for name in ("weight", "table") if name in self.tensors)
        self.keys = tuple(self.tensors[name] for name in self._key_names)
        self._sources: dict[str, Source] = {}
        self._replaced: set[str] = set()
        self._lock = threading.RLock()
        self._written = self._versions()
        self.version = sum(self._written)

    def _versions(self) -> tuple[int, ...]:
        return tuple(key._version for key in self.keys)

    @property
    def weight(self) -> Tensor:
        """bf16 ``[num_experts, hidden_size]``. KeyError in mode ``hash``, which has none."""
        return self.tensors["weight"]

    @property
    def bias(self) -> Tensor:
        """fp32 ``[num_experts]``. KeyError in other modes than ``dense``."""
        return self.tensors["bias"]

    @property
    def image_bias(self) -> Tensor | None:
        """fp32 ``[num_experts]``, or None."""
        return self.tensors.get("image_bias")

    @property
    def table(self) -> Tensor:
        """int32 ``[vocab_size, top_k]``. KeyError in mode ``dense``, which has none."""
        return self.tensors["table"]

    def packed(self, recipe: Repack) -> Tensor:
        """The buffer for ``recipe``. ``write`` gives it values.

        Raises InputError for a recipe of another argument than the weight, or of another size.
        """
        if recipe.argument != "weight":
            raise wrong_value("repack recipe", "the argument 'weight'", recipe.argument)
        for known, buffer in self._packed:
            if dataclasses.replace(known, parameter=recipe.parameter) == recipe:
                return buffer
        with torch.inference_mode(False):
            buffer = self.weight.new_empty(packed_shape(recipe, *self.weight.shape))
        self._packed.append((recipe, buffer))
        return buffer

    def packed_buffers(self) -> list[Tensor]:
        """Every buffer that ``packed`` has made."""
        return [buffer for _, buffer in self._packed]

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy checked values, by name, into place, on the current stream."""
        for name, value in values.items():
            self.tensors[name].copy_(value)
        if "weight" in values:
            for recipe, buffer in self._packed:
                repack(recipe, self.weight, buffer)
        self._written = self._versions()
        self._settle()

    # --- changes that do not come through ``write`` ---

    def watch(self, given: Mapping[str, Tensor], *, of_module: bool = False) -> None:
        """Follow the tensors, by name, that values were copied from if they are those of a module:
        if one of them is an ``nn.Parameter``, or the caller says so. Those of that name before are
        forgotten.
        """
        of_module |= any(isinstance(tensor, nn.Parameter) for tensor in given.values())
        for name, tensor in given.items():
            self._sources.pop(name, None)
            if of_module:
                self._sources[name] = Source(tensor)
        self._settle()

    def sources(self) -> dict[str, Tensor]:
        """The tensors of a module that are followed and alive, by name."""
        found = {name: source.tensor() for name, source in self._sources.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def replaced(self, name: str, tensor: Tensor | None) -> None:
        """Take note that ``tensor`` is in the place of the buffer of that name, for a while."""
        if _is_at_the_place_of(tensor, self.tensors.get(name)):
            self._replaced.discard(name)
        else:
            self._replaced.add(name)
        self._settle()

    def current(self) -> Weights:
        """These tensors, once ``follow`` has seen every change."""
        if sum(self._versions()) != self.version:
            self.follow()
        return self

    def follow(self) -> None:
        """Bring what kernels read up to date with writes to ``keys``, and with the tensors of the
        module that the values were copied from.

        Raises InputError for values that are refused, for other tensors in the places of the
        buffers, and where there is something to be done while a graph is being captured.
        """
        if self._replaced:
            raise InputError(
                explain(
                    f"{', '.join(sorted(self._replaced))} of a Router",
                    expected="its own tensors, of which kernels read copies",
                    found="others in their place, such as torch.func.functional_call puts there",
                    remedy="call router.update_weights(...) with them, or build a Router from them",
                )
            )
        with self._lock:
            changed = {
                name: tensor
                for name, tensor in self.sources().items()
                if self._sources[name].changed()
            }
            given = dict(changed)
            now = zip(self._key_names, self.keys, self._written, strict=True)
            for name, key, written in now:
                if key._version != written:
                    given.setdefault(name, key)
            if given:
                values = self._checked(given, changed)
                with quiet(self.device, f"a call after a change of {', '.join(given)}"):
                    self.write(values)
                _log.debug("followed a change of %s on %s", ", ".join(given), self.device)
                self._sources |= {name: Source(tensor) for name, tensor in changed.items()}
            elif len(self.sources()) < len(self._sources):
                self._sources = {name: self._sources[name] for name in self.sources()}
                self._settle()

    def _checked(
        self, given: Mapping[str, Tensor], of_module: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """``checked_values``, with an error that says whose values are refused."""
        try:
            return checked_values(self._config, given)
        except InputError as error:
            if not of_module:
                raise
            raise InputError(
                f"the module that this Router was built from has changed: {error}; or call "
                f"router.update_weights(...) to go on with other values"
            ) from error

    def _settle(self) -> None:
        self.version = -1 if self._sources or self._replaced else sum(self._written)


def checked_values(config: RouterConfig, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` of a gate's tensors, by name, detached from autograd.

    Raises InputError for what is no tensor with a value in each place, for a dtype or a shape that
    does not fit ``config``, for a weight or a bias
    with a value that is not finite, and for a table with an entry outside [0, num_experts).
    """
    experts = config.num_experts
    checks: dict[str, Callable[[Tensor], Tensor]] = {
        "weight": lambda tensor: _finite(
            "weight", tensor, torch.bfloat16, (experts, config.hidden_size)
        ),
        "bias": lambda tensor: _finite("bias", tensor, torch.float32, (experts,)),
        "image_bias": lambda tensor: _finite("image_bias", tensor, torch.float32, (experts,)),
        "table": lambda tensor: _checked_table(tensor, config),
    }
    for name, tensor in values.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            found = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise wrong_value(name, "a dense torch.Tensor", str(found))
    return {name: checks[name](tensor.detach()) for name, tensor in values.items()}


def _finite(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise wrong_value(name, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    _refuse_meta(name, tensor)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        where = (~finite).nonzero()
        first = where[0].tolist()
        raise wrong_value(
            name, "finite values", f"{len(where)} others, the first at {first}: {tensor[*first]}"
        )
    return tensor


def _checked_table(table: Tensor, config: RouterConfig) -> Tensor:
    shape = (config.vocab_size, config.top_k)
    if table.dtype not in (torch.int32, torch.int64) or tuple(table.shape) != shape:
        raise wrong_value(
            "table",
            f"torch.int32 or torch.int64 {list(shape)}",
            f"{table.dtype} {list(table.shape)}",
        )
    _refuse_meta("table", table)
    outside = (table < 0) | (table >= config.num_experts)
    if bool(outside.any()):
        where = outside.nonzero()
        first = where[0].tolist()
        raise wrong_value(
            "table",
            f"entries from 0 to {config.num_experts - 1}",
            f"{len(where)} others, the first at {first}: {int(table[*first])}",
        )
    return table


def _refuse_meta(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise wrong_value(name, "a tensor with values", "a meta tensor")


def _is_at_the_place_of(tensor: Tensor | None, own: Tensor | None) -> bool:
    """Whether ``tensor`` is ``own`` or another view of the same values."""
    if tensor is None or own is None or tensor is own:
        return tensor is own
    try:
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) == (
            *(own.data_ptr(), own.shape, own.stride(), own.dtype),
        )
    except RuntimeError:  # a tensor without memory, as inside the transformations of torch.func
        return False


def packed_shape(recipe: Repack, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the buffer for a matrix of that size. Raises InputError if it does not fit."""
    if recipe.rows < rows or math.prod(recipe.shape) != recipe.rows * columns:
        raise wrong_value(
            f"repack recipe of {recipe.parameter}",
            f"at least {rows} rows, and a shape of that many times {columns} elements",
            f"{recipe.rows} rows, shape {recipe.shape}",
        )
    return tuple(recipe.shape[axis] for axis in recipe.order)


def repack(recipe: Repack, matrix: Tensor, buffer: Tensor) -> None:
    """Write ``matrix`` into ``buffer``, which has the shape of ``packed_shape``, by ``recipe``."""
    rows, columns = matrix.shape
    if recipe.rows > rows:
        padded = matrix.new_zeros(recipe.rows, columns)
        padded[:rows] = matrix
        matrix = padded
    buffer.copy_(matrix.reshape(recipe.shape).permute(recipe.order))


def repacked(recipe: Repack, matrix: Tensor) -> Tensor:
    """A new buffer with ``matrix`` by ``recipe``."""
    buffer = matrix.new_empty(packed_shape(recipe, *matrix.shape))
    repack(recipe, matrix, buffer)
    return buffer
