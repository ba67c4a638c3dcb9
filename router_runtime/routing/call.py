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
given_mask        bool [tokens]: the rows whose experts are given; all of them without a mask
token_ids         int32 or int64 [tokens]: what hash_gate looks experts up by, beside its rows
ids_dtype         torch.int32 or torch.int64, of the ids that are returned

What a call may want beside that is in ``options.py``. Logits, where they are wanted, are stored for
padding tokens too: the products of the weight with whatever their rows of hidden states hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.routing.checks import address, refuse_grad, wrong_tensor, wrong_value
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.options import Options, Shared, Sizes, has_rows
from router_runtime.routing.placement import Placement

#: The parameters of a kernel that have a value in a call with serving inputs and are 0 in a plain
#: call. A contract has some of them.
SERVED = (
    *("first_row", "ids_out_i64", "logical_ids_out", "logical_ids_out_i64"),
    *("is_padding", "num_valid_tokens", "image_mask"),
    *("given_ids_i32", "given_ids_i64", "given_mask"),
    *("expert_map", "replica_counts", "replicas", "replica_start", "replica_step"),
)

#: The parameters of a kernel with which it looks experts up in a table by token id. The kernel
#: hash_gate always does; a dense kernel does where it is given a table.
LOOKUP = ("token_ids_i32", "token_ids_i64", "table", "vocab")


class ReplayInputs(Shared, total=False):
    """The keyword arguments, serving inputs and options, of the methods and ops that compute the
    weights of experts that the caller gives.
    """

    ids_dtype: torch.dtype | None
    is_padding: Tensor | None
    num_valid_tokens: Tensor | None
    image_mask: Tensor | None


class Inputs(ReplayInputs, total=False):
    """The keyword arguments of the methods and ops that select experts: those of
    ``ReplayInputs``, and experts that the caller gives for all rows or, by a mask, for some.
    """

    given_ids: Tensor | None
    given_mask: Tensor | None


#: The keyword arguments that are serving inputs. All of them are fields of ``Call``.
SERVING = frozenset(Inputs.__annotations__) - frozenset(Shared.__annotations__)


class Results(NamedTuple):
    """Weights fp32 ``[tokens, columns]``, ids ``[tokens, columns]`` (physical ones in a mapped
    call), logits fp32 ``[tokens, experts]``, and the logical ids ``[tokens, top_k]`` of a mapped
    call. The columns are the ``top_k`` experts and the shared ones.

    Weights and ids of a packed call are in ``packed``, int32 ``[tokens, columns]``, and the first
    two have no elements.
    """

    weights: Tensor
    ids: Tensor
    logits: Tensor | None = None
    logical_ids: Tensor | None = None
    packed: Tensor | None = None

    def given(self) -> tuple[Tensor, ...]:
        """The results that are there."""
        if self.packed is not None:
            return (self.packed,)
        return tuple(tensor for tensor in self if tensor is not None)

    def part(self, rows: slice) -> Results:
        """The results of those rows of the batch, in the same memory."""
        weights, ids, *others = self
        parts = (None if tensor is None else tensor[rows] for tensor in others)
        return Results(weights[rows], ids[rows], *parts)


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
        given_mask: bool ``[tokens]``.
        token_ids: int32 or int64 ``[tokens]``.
        logits: whether the logits are wanted.
        mapped: whether physical ids by the expert map are wanted.
        packed: whether weights and ids are wanted in one tensor.
        outputs: the caller's own tensors for the results, or None for new ones. Those that are
            there say which results are wanted, and of which dtype the ids are.
        options: what else is wanted, or None.

    """

    ids_dtype: torch.dtype | None = None
    is_padding: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    image_mask: Tensor | None = None
    given_ids: Tensor | None = None
    given_mask: Tensor | None = None
    token_ids: Tensor | None = None
    logits: bool = False
    mapped: bool = False
    packed: bool = False
    outputs: Results | None = None
    options: Options | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and self.outputs.logical_ids is not None:
            self.mapped = True

    @classmethod
    def taking(cls, inputs: dict[str, Any], **wanted: Any) -> Call:
        """A call with those of ``inputs`` that every op has, which are removed from ``inputs``."""
        serving = {name: inputs.pop(name) for name in inputs.keys() & SERVING}
        return cls(**serving, **wanted, options=Options.taking(inputs) if inputs else None)

    def prepare(self, placement: Placement, tokens: int, sizes: Sizes) -> Results:
        """New tensors for the wanted results, or the caller's; every tensor of the call becomes
        contiguous. Raises InputError for one that does not fit a batch of that many tokens.
        """
        device = placement.device
        self._check(device, tokens, sizes)
        outputs = self.outputs
        if self.options is None and (self.packed or (outputs and not _are_contiguous(outputs))):
            self.options = Options()
        if self.options is not None:
            self.options.check(tokens, sizes, device)
        if outputs is None:
            return self._new_results(placement, tokens, sizes)
        return self._checked_outputs(outputs, device, tokens, sizes)

    def _check(self, device: torch.device, tokens: int, sizes: Sizes) -> None:
        top_k = sizes.top_k
        if self.is_padding is not None:
            self.is_padding = _checked_mask("is_padding", self.is_padding, tokens, device)
        if self.image_mask is not None:
            self.image_mask = _checked_mask("image_mask", self.image_mask, tokens, device)
            if not sizes.images:
                raise wrong_value("image_mask", "a router with an image_bias", "one without")
        if self.given_mask is not None:
            self.given_mask = _checked_mask("given_mask", self.given_mask, tokens, device)
            if self.given_ids is None:
                raise wrong_value("given_mask", "given_ids beside it", "none")
        count = self.num_valid_tokens
        if count is not None and (
            count.dtype is not torch.int32 or count.numel() != 1 or count.device != device
        ):
            raise wrong_tensor("num_valid_tokens", f"torch.int32, one element on {device}", count)
        ids = self.given_ids
        if ids is not None:
            if not sizes.scores:
                raise wrong_value("given_ids", "a router that weighs by scores", "mode 'hash'")
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

    def _new_results(self, placement: Placement, tokens: int, sizes: Sizes) -> Results:
        columns = sizes.top_k + (0 if self.options is None else self.options.columns)
        weights, ids = placement.outputs(tokens, columns)
        if self.packed:
            return Results(weights.new_empty(0), ids.new_empty(0), packed=ids)
        if self.ids_dtype is torch.int64:
            ids = ids.new_empty(ids.shape, dtype=torch.int64)
        return Results(
            weights,
            ids,
            placement.floats(tokens, sizes.experts) if self.logits else None,
            ids.new_empty((tokens, sizes.top_k)) if self.mapped else None,
        )

    def _checked_outputs(
        self, outputs: Results, device: torch.device, tokens: int, sizes: Sizes
    ) -> Results:
        options = self.options
        columns = sizes.top_k + (0 if options is None else options.columns)
        integers = (torch.int32, torch.int64)
        for name, tensor, dtypes, shape, strided in (
            ("weights_out", outputs.weights, (torch.float32,), (tokens, columns), True),
            ("ids_out", outputs.ids, integers, (tokens, columns), True),
            ("logits_out", outputs.logits, (torch.float32,), (tokens, sizes.experts), False),
            ("logical_ids_out", outputs.logical_ids, integers, (tokens, sizes.top_k), False),
        ):
            if tensor is None:
                continue
            fits = tensor.dtype in dtypes and tensor.shape == shape and tensor.device == device
            if not (fits and (tensor.is_contiguous() or (strided and has_rows(tensor)))):
                kinds = " or ".join(map(str, dtypes))
                layout = "the elements of a row side by side" if strided else "contiguous"
                raise wrong_tensor(name, f"{kinds} {list(shape)} on {device}, {layout}", tensor)
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
        replicas: tuple[int, ...] = (0, 0, 0, 0, 0)
        if self.mapped and expert_map is not None:
            replicas = expert_map.arguments()
        return (
            start,
            address(results.ids, torch.int64),
            address(results.logical_ids, torch.int32),
            address(results.logical_ids, torch.int64),
            address(self.is_padding, torch.bool, start),
            address(self.num_valid_tokens, torch.int32),
            address(self.image_mask, torch.bool, start),
            address(self.given_ids, torch.int32, start),
            address(self.given_ids, torch.int64, start),
            address(self.given_mask, torch.bool, start),
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
        """Store weights and ids of ``spec.py``, in which no expert is ``spec.NO_EXPERT``, and do
        what the options say.
        """
        rows = torch.arange(ids.shape[0], device=ids.device)
        logical = physical = spec.with_sentinel(ids, sentinel)
        if self.mapped and expert_map is not None:
            table, counts, *order = expert_map
            physical = spec.physical_ids(ids, rows, table, counts, sentinel, *order)
        if results.logical_ids is not None:
            results.logical_ids.copy_(logical)
        options = self.options
        if options is not None:
            options.record(physical, logical, ids)
            weights, physical = options.with_shared_experts(
                weights, physical, self.padding(rows), sentinel
            )
        if results.packed is not None:
            results.packed.copy_(spec.packed(weights, physical))
        else:
            results.weights.copy_(weights)
            results.ids.copy_(physical)
        return results


def _are_contiguous(results: Results) -> bool:
    return results.weights.is_contiguous() and results.ids.is_contiguous()


def _checked_mask(name: str, mask: Tensor, tokens: int, device: torch.device) -> Tensor:
    if mask.dtype is not torch.bool or mask.shape != (tokens,) or mask.device != device:
        raise wrong_tensor(name, f"torch.bool [{tokens}] on {device}", mask)
    return mask.contiguous()
