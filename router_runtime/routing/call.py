"""The serving inputs of a call: all that a routing op takes beside its rows and the Router's own
weights. A serving system passes them to mark padding, to select image tokens, to repeat earlier
routing or to choose the type of the ids; a call without them is a *plain* call. They are the same
for every routing op. This module checks them, allocates outputs, and makes the kernels' arguments.
The mathematics is in ``spec.py``.

is_padding        bool [tokens]: those rows get the sentinel and zero weights
num_valid_tokens  int32, one element: the rows from that number on are padding; read by the kernel,
                  so that a captured graph can be replayed with another count
image_mask        bool [tokens]: those rows are selected by the router's ``image_bias``
given_ids         int32 or int64 [tokens, top_k]: the experts to weigh, in their order
token_ids         int32 or int64 [tokens]: what hash_gate looks experts up by, beside its rows
ids_dtype         torch.int32 or torch.int64, of the ids that are returned

Logits, where they are wanted, are stored for padding tokens too: the products of the weight with
whatever their rows of hidden states hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.packing import selector
from router_runtime.routing.checks import check_int, refuse_grad, wrong_tensor, wrong_value
from router_runtime.routing.placement import Placement

#: The parameters of a kernel that have a value in a call with serving inputs and are 0 in a plain
#: call. A contract has some of them.
SERVED = (
    *("serving", "first_row", "ids_out_i64", "logical_ids_out", "logical_ids_out_i64"),
    *("is_padding", "num_valid_tokens", "image_mask", "given_ids_i32", "given_ids_i64"),
    *("expert_map", "replica_counts", "replicas"),
)


class Inputs(TypedDict, total=False):
    """The serving inputs of a method or an op that are keyword arguments."""

    ids_dtype: torch.dtype | None
    is_padding: Tensor | None
    num_valid_tokens: Tensor | None
    image_mask: Tensor | None


class Results(NamedTuple):
    """fp32 ``[tokens, top_k]``, ids ``[tokens, top_k]`` (physical ones in a mapped call), fp32
    ``[tokens, experts]``, and the logical ids of a mapped call.
    """

    weights: Tensor
    ids: Tensor
    logits: Tensor | None = None
    logical_ids: Tensor | None = None

    def given(self) -> tuple[Tensor, ...]:
        """The results that are not None."""
        return tuple(tensor for tensor in self if tensor is not None)

    def part(self, rows: slice) -> Results:
        """The results of those rows of the batch, in the same memory."""
        weights, ids, *others = self
        parts = (None if tensor is None else tensor[rows] for tensor in others)
        return Results(weights[rows], ids[rows], *parts)


class ExpertMap(NamedTuple):
    """int32 ``[experts, replicas]`` and ``[experts]``, contiguous."""

    physical: Tensor
    counts: Tensor


@dataclass(slots=True, eq=False)
class Call:
    """The arguments of one call beside its rows, and the results that it wants.

    Attributes:
        ids_dtype: torch.int32 or torch.int64, of the ids that are returned. The module's docstring
            says what this and the next five mean.
        is_padding: bool ``[tokens]``.
        num_valid_tokens: int32, one element.
        image_mask: bool ``[tokens]``.
        given_ids: int32 or int64 ``[tokens, top_k]``.
        token_ids: int32 or int64 ``[tokens]``.
        logits: whether the logits are wanted.
        mapped: whether physical ids by the expert map are wanted.
        outputs: the caller's own tensors for the results, or None for new ones. Those that are
            there say which results are wanted, and of which dtype the ids are.

    """

    ids_dtype: torch.dtype | None = None
    is_padding: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    image_mask: Tensor | None = None
    given_ids: Tensor | None = None
    token_ids: Tensor | None = None
    logits: bool = False
    mapped: bool = False
    outputs: Results | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None:
            self.mapped = self.outputs.logical_ids is not None

    @classmethod
    def taking(cls, inputs: dict[str, Any], **wanted: Any) -> Call:
        """A call with those of ``inputs`` that every op has, which are removed from ``inputs``."""
        names = inputs.keys() & Inputs.__annotations__.keys()
        return cls(**{name: inputs.pop(name) for name in names}, **wanted)

    def check(self, tokens: int, top_k: int, device: torch.device, image_bias: bool) -> None:
        """Make every tensor contiguous. Raises InputError for one that does not fit a batch of that
        many tokens.
        """
        self.is_padding = _checked_mask("is_padding", self.is_padding, tokens, device)
        self.image_mask = _checked_mask("image_mask", self.image_mask, tokens, device)
        if self.image_mask is not None and not image_bias:
            raise wrong_value("image_mask", "a router with an image_bias", "one without")
        count = self.num_valid_tokens
        if count is not None and (
            count.dtype is not torch.int32 or count.numel() != 1 or count.device != device
        ):
            raise wrong_tensor("num_valid_tokens", f"torch.int32, one element on {device}", count)
        ids = self.given_ids
        if ids is not None:
            if (
                ids.dtype not in (torch.int32, torch.int64)
                or ids.shape != (tokens, top_k)
                or ids.device != device
            ):
                expected = f"torch.int32 or torch.int64 [{tokens}, {top_k}] on {device}"
                raise wrong_tensor("given_ids", expected, ids)
            self.given_ids = ids.contiguous()
        dtype = self.ids_dtype
        # By identity: an array compares by its items, and is not the dtype that it may hold.
        if not (dtype is None or dtype is torch.int32 or dtype is torch.int64):
            raise wrong_value("ids_dtype", "torch.int32 or torch.int64", dtype)

    def results(self, placement: Placement, tokens: int, top_k: int, experts: int) -> Results:
        """New tensors for the wanted results, or the caller's after a check."""
        if self.outputs is not None:
            return self._checked_outputs(placement.device, tokens, top_k, experts)
        weights, ids = placement.outputs(tokens, top_k)
        if self.ids_dtype is torch.int64:
            ids = ids.new_empty(ids.shape, dtype=torch.int64)
        return Results(
            weights,
            ids,
            placement.floats(tokens, experts) if self.logits else None,
            torch.empty_like(ids) if self.mapped else None,
        )

    def _checked_outputs(
        self, device: torch.device, tokens: int, top_k: int, experts: int
    ) -> Results:
        outputs = self.outputs
        assert outputs is not None
        chosen = (tokens, top_k)
        integers = (torch.int32, torch.int64)
        for name, tensor, dtypes, shape in (
            ("weights_out", outputs.weights, (torch.float32,), chosen),
            ("ids_out", outputs.ids, integers, chosen),
            ("logits_out", outputs.logits, (torch.float32,), (tokens, experts)),
            ("logical_ids_out", outputs.logical_ids, integers, chosen),
        ):
            if tensor is None:
                continue
            if (
                tensor.dtype not in dtypes
                or tensor.shape != shape
                or tensor.device != device
                or not tensor.is_contiguous()
            ):
                kinds = " or ".join(map(str, dtypes))
                raise wrong_tensor(name, f"{kinds} {list(shape)} on {device}, contiguous", tensor)
            refuse_grad(name, tensor)
        return outputs

    def arguments(
        self, rows: slice, results: Results, expert_map: ExpertMap | None
    ) -> tuple[int, ...]:
        """The values of ``SERVED`` for a launch of some rows of the batch.

        Every tensor of this call and of ``results`` must stay alive until the launch.

        Args:
            rows: the rows.
            results: where their results go.
            expert_map: the router's.

        """
        start = rows.start
        replicas = (0, 0, 0)
        if self.mapped and expert_map is not None:
            physical, counts = expert_map
            replicas = physical.data_ptr(), counts.data_ptr(), physical.shape[1]
        return (
            1,
            start,
            _address(results.ids, torch.int64),
            _address(results.logical_ids, torch.int32),
            _address(results.logical_ids, torch.int64),
            _address(self.is_padding, torch.bool, start),
            _address(self.num_valid_tokens, torch.int32),
            _address(self.image_mask, torch.bool, start),
            _address(self.given_ids, torch.int32, start),
            _address(self.given_ids, torch.int64, start),
            *replicas,
        )

    def padding(self, rows: Tensor) -> Tensor:
        """Which rows are padding, bool, by ``spec.py``. ``rows`` are their numbers in the batch."""
        return spec.padding_rows(rows, self.is_padding, self.num_valid_tokens)

    def store(
        self,
        results: Results,
        weights: Tensor,
        ids: Tensor,
        sentinel: int,
        expert_map: ExpertMap | None,
    ) -> Results:
        """Store weights and ids of ``spec.py``, in which no expert is ``spec.NO_EXPERT``."""
        results.weights.copy_(weights)
        if results.logical_ids is not None and expert_map is not None:
            results.logical_ids.copy_(spec.with_sentinel(ids, sentinel))
            rows = torch.arange(ids.shape[0], device=ids.device)
            results.ids.copy_(spec.physical_ids(ids, rows, *expert_map, sentinel))
        else:
            results.ids.copy_(spec.with_sentinel(ids, sentinel))
        return results


class ServingLaunch:
    """A kernel bound twice: ``plain`` is called with the arguments named in ``varying``, ``serve``
    also with the values of ``SERVED``.
    """

    __slots__ = ("_select", "_serve", "plain")

    def __init__(self, kernel: LoadedKernel, varying: tuple[str, ...], **fixed: Any) -> None:
        own = kernel.arguments
        names = tuple(name for name in SERVED if name in own)
        fixed = {name: value for name, value in fixed.items() if name in own}
        self.plain = kernel.bind(varying, **fixed, **dict.fromkeys(names, 0))
        self._select = selector([SERVED.index(name) for name in names])
        self._serve = kernel.bind((*varying, *names), **fixed)

    def serve(self, stream: int, varying: tuple[Any, ...], served: tuple[int, ...]) -> None:
        """Launch with the values of the varying arguments and of ``SERVED``."""
        self._serve(stream, *varying, *self._select(served))


def narrow_ids(ids: Tensor) -> int:
    """The address of int32 ids; 0 for int64 ids, whose address is another argument."""
    return _address(ids, torch.int32)


def checked_expert_map(
    expert_map: Tensor, replica_counts: Tensor, experts: int, start: int, step: int
) -> ExpertMap:
    """The two tensors of an expert map, each row in the order in which row i of a batch takes place
    i modulo the count of it: the one that was in place ``(start + i * step)`` modulo that count.

    Raises InputError unless they are int32 or int64, the map ``[experts, replicas]``, the counts
    ``[experts]`` in [1, replicas], and the first ``counts[e]`` entries of row e from 0 to the
    largest int32; the other entries may have any value. ``start`` and ``step`` are from 0 to the
    largest uint32.
    """
    integers = (torch.int32, torch.int64)
    for name, tensor in (("expert_map", expert_map), ("replica_counts", replica_counts)):
        if tensor.is_meta:
            raise wrong_value(name, "a torch.Tensor with values", "a meta tensor")
    if expert_map.dtype not in integers or expert_map.dim() != 2 or len(expert_map) != experts:
        expected = f"torch.int32 or torch.int64 [{experts}, replicas]"
        raise wrong_tensor("expert_map", expected, expert_map)
    replicas = expert_map.shape[1]
    if replica_counts.dtype not in integers or replica_counts.shape != (experts,):
        raise wrong_tensor(
            "replica_counts", f"torch.int32 or torch.int64 [{experts}]", replica_counts
        )
    check_int("replica_start", start, 0, 2**32 - 1)
    check_int("replica_step", step, 0, 2**32 - 1)
    _check_range("replica_counts", replica_counts, 1, replicas)
    places = torch.arange(replicas, device=expert_map.device)
    counts = replica_counts.to(expert_map.device).long().unsqueeze(1)
    used = places < counts
    _check_range("expert_map", expert_map, 0, 2**31 - 1, used)
    # Kernels take the copy in place row modulo count, so the copy for row i goes to place i. That
    # is right for every row, because (start + i * step) modulo count repeats after ``count`` rows.
    taken = torch.where(used, (start + places * step) % counts, places)
    return ExpertMap(expert_map.gather(1, taken), replica_counts)


def _check_range(
    name: str, tensor: Tensor, low: int, high: int, counted: Tensor | None = None
) -> None:
    """Raise InputError for an entry outside [low, high], among those that ``counted`` marks."""
    outside = (tensor < low) | (tensor > high)
    if counted is not None:
        outside &= counted
    if bool(outside.any()):
        where = outside.nonzero()
        first = where[0].tolist()
        raise wrong_value(
            name,
            f"entries from {low} to {high}",
            f"{len(where)} others, the first at {first}: {int(tensor[*first])}",
        )


def _checked_mask(
    name: str, mask: Tensor | None, tokens: int, device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype is not torch.bool or mask.shape != (tokens,) or mask.device != device:
        raise wrong_tensor(name, f"torch.bool [{tokens}] on {device}", mask)
    return mask.contiguous()


def _address(tensor: Tensor | None, dtype: torch.dtype, row: int = 0) -> int:
    """The address of a row of ``tensor`` if it is of that dtype, else null."""
    if tensor is None or tensor.dtype is not dtype:
        return 0
    return tensor.data_ptr() + (row * tensor.stride(0) * tensor.element_size() if row else 0)
