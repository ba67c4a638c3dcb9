"""The options of a call: what a routing op does beside weights and ids, in the same launch.

shared_experts  1 or 2: so many experts, which every token has, follow its k own ones. The first has
                the id ``shared_id`` (without it: the number of experts), the next the one after
                it; each has the weight ``shared_weight`` (without it: 1). Padding has the sentinel
                and 0 there
expert_load     int32 [physical experts]: 1 is added for each expert of each token, at its physical
                id. Not for padding, for no expert, for shared experts, nor for ids beyond its end
record_load     bool, one element: False keeps ``expert_load`` as it is. Read by the kernel
captured_ids    int16 or int32 [tokens or more, top_k], rows at any stride: its first rows become
                the logical ids, those before the expert map

Output tensors of the caller whose rows are not adjacent, and packed results, are options too. The
mathematics is in ``spec.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.routing.checks import (
    address,
    check_int,
    check_scale,
    wrong_tensor,
    wrong_value,
)
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.weights import Weights

#: The parameters of a kernel that have a value in a call with options and are 0 in any other.
OPTIONS = (
    *("weights_stride", "ids_stride", "packed_out", "expert_load", "load_experts", "record_load"),
    *("captured_ids_i16", "captured_ids_i32", "captured_stride"),
    *("shared_experts", "shared_id", "shared_weight"),
)

#: The most shared experts that a row can have.
MAX_SHARED = 2


class Shared(TypedDict, total=False):
    """The options that are arguments of every routing op."""

    shared_experts: int | None
    shared_id: int | None
    shared_weight: float | None


class Records(TypedDict, total=False):
    """The options that a call writes into, or that say whether it does: arguments of the forms that
    write into the caller's tensors.
    """

    expert_load: Tensor | None
    record_load: Tensor | None
    captured_ids: Tensor | None


NAMES = frozenset(Shared.__annotations__) | frozenset(Records.__annotations__)


class Sizes(NamedTuple):
    """What is known of a router, or of a row op's arguments, to check the inputs of a call.

    Attributes:
        top_k: k.
        experts: E.
        sentinel: the id of no expert.
        images: whether there is a bias for image tokens.
        scores: whether experts are weighed by scores, so that they can be given.

    """

    top_k: int
    experts: int
    sentinel: int
    images: bool = False
    scores: bool = True

    @classmethod
    def of(cls, config: RouterConfig, weights: Weights) -> Sizes:
        """Those of a router."""
        return cls(
            config.top_k,
            config.num_experts,
            config.sentinel,
            weights.image_bias is not None,
            config.mode != "hash",
        )


class _Results(Protocol):
    """Where the results of a call go, as ``call.Results`` says it."""

    @property
    def weights(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def packed(self) -> Tensor | None: ...


@dataclass(slots=True, eq=False)
class Options:
    """The options of one call; the module's docstring says what each means."""

    shared_experts: int | None = None
    shared_id: int | None = None
    shared_weight: float | None = None
    expert_load: Tensor | None = None
    record_load: Tensor | None = None
    captured_ids: Tensor | None = None

    @classmethod
    def taking(cls, inputs: dict[str, Any]) -> Options | None:
        """Those of ``inputs``, which are removed from it; None without any."""
        found = {name: inputs.pop(name) for name in inputs.keys() & NAMES}
        used = {name: value for name, value in found.items() if value is not None}
        return cls(**used) if used else None

    def check(self, tokens: int, sizes: Sizes, device: torch.device) -> None:
        """Raise InputError for an option that does not fit a batch of that many tokens. Afterwards
        the numbers of the shared experts are never None.
        """
        self._check_shared(sizes)
        load, record, captured = self.expert_load, self.record_load, self.captured_ids
        if load is not None and (
            load.dtype is not torch.int32
            or load.dim() != 1
            or load.device != device
            or not load.is_contiguous()
        ):
            expected = f"torch.int32 [physical experts] on {device}, contiguous"
            raise wrong_tensor("expert_load", expected, load)
        if record is not None:
            if load is None:
                raise wrong_value("record_load", "expert_load beside it", "none")
            if record.dtype is not torch.bool or record.numel() != 1 or record.device != device:
                raise wrong_tensor("record_load", f"torch.bool, one element on {device}", record)
        if captured is not None:
            self._check_captured(captured, tokens, sizes, device)

    def _check_shared(self, sizes: Sizes) -> None:
        if self.shared_experts is None:
            for name in ("shared_id", "shared_weight"):
                if getattr(self, name) is not None:
                    raise wrong_value(name, "shared_experts beside it", "none")
            self.shared_experts, self.shared_id, self.shared_weight = 0, 0, 0.0
            return
        check_int("shared_experts", self.shared_experts, 0, min(MAX_SHARED, sizes.top_k))
        if self.shared_id is None:
            self.shared_id = sizes.experts
        check_int("shared_id", self.shared_id, 0, 2**31 - MAX_SHARED)
        if self.shared_weight is None:
            self.shared_weight = 1.0
        check_scale("shared_weight", self.shared_weight)

    def _check_captured(
        self, captured: Tensor, tokens: int, sizes: Sizes, device: torch.device
    ) -> None:
        top_k = sizes.top_k
        if (
            captured.dtype not in (torch.int16, torch.int32)
            or captured.dim() != 2
            or captured.shape[0] < tokens
            or captured.shape[1] != top_k
            or captured.device != device
            or not has_rows(captured)
        ):
            expected = f"torch.int16 or torch.int32 [{tokens} or more, {top_k}] on {device}"
            found = f"{expected}, the elements of a row side by side and no two rows in one place"
            raise wrong_tensor("captured_ids", found, captured)
        if captured.dtype is torch.int16 and not -(2**15) <= sizes.sentinel < 2**15:
            expected = "a sentinel from -32768 to 32767 where captured_ids is of torch.int16"
            raise wrong_value("sentinel", expected, sizes.sentinel)

    @property
    def columns(self) -> int:
        """How many columns follow the k own experts of a row."""
        return self.shared_experts or 0

    def arguments(self, rows: slice, results: _Results) -> tuple[Any, ...]:
        """The values of ``OPTIONS`` for a launch of some rows of the batch, whose results go to
        ``results``. Every tensor must stay alive until the launch.
        """
        packed, load, captured = results.packed, self.expert_load, self.captured_ids
        return (
            row_stride(results.weights),
            row_stride(results.ids if packed is None else packed),
            address(packed, torch.int32),
            address(load, torch.int32),
            0 if load is None else load.shape[0],
            address(self.record_load, torch.bool),
            address(captured, torch.int16, rows.start),
            address(captured, torch.int32, rows.start),
            0 if captured is None else row_stride(captured),
            self.shared_experts,
            self.shared_id,
            self.shared_weight,
        )

    def record(self, physical: Tensor, logical: Tensor, ids: Tensor) -> None:
        """Record loads and ids of ``spec.py``: ``ids`` with ``spec.NO_EXPERT``, ``logical`` with
        the sentinel.
        """
        load, captured = self.expert_load, self.captured_ids
        if load is not None and (self.record_load is None or bool(self.record_load)):
            load += spec.expert_load(physical, ids, load.shape[0])
        if captured is not None:
            captured[: len(logical)].copy_(logical)

    def with_shared_experts(
        self, weights: Tensor, ids: Tensor, padding: Tensor, sentinel: int
    ) -> tuple[Tensor, Tensor]:
        """Weights and ids of ``spec.py`` with the columns of the shared experts."""
        if not self.columns:
            return weights, ids
        assert self.shared_id is not None
        assert self.shared_weight is not None
        return spec.with_shared_experts(
            weights, ids, padding, self.shared_id, self.shared_weight, self.columns, sentinel
        )


def has_rows(tensor: Tensor) -> bool:
    """Whether the elements of each row of a matrix are side by side, and no two rows share one."""
    rows, columns = tensor.shape
    row_stride, stride = tensor.stride()
    return (stride == 1 or columns <= 1) and (columns <= row_stride < 2**31 or rows <= 1)


def row_stride(tensor: Tensor) -> int:
    """Elements from a row to the next; 0 where there is no other, and any number would do."""
    return tensor.stride(0) if len(tensor) > 1 else 0
