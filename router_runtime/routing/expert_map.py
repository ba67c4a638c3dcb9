"""The physical copies of each expert, and which of them a row of a batch takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from router_runtime.routing.checks import check_int, wrong_tensor, wrong_value


class ExpertMap(NamedTuple):
    """The physical ids of each expert.

    A token in row i of its batch takes, of the n copies of an expert, the one in place
    ``((start + step * i) modulo 2^32) modulo n``.

    Attributes:
        physical: int32 ``[experts, replicas]``, contiguous.
        counts: int32 ``[experts]``, contiguous: how many places of a row are used.
        start: from 0 to 2^32 - 1.
        step: from 0 to 2^32 - 1.

    """

    physical: Tensor
    counts: Tensor
    start: int = 0
    step: int = 1

    def arguments(self) -> tuple[int, ...]:
        """What a kernel gets of it: two addresses, the number of replicas, start and step."""
        addresses = self.physical.data_ptr(), self.counts.data_ptr()
        return *addresses, self.physical.shape[1], signed(self.start), signed(self.step)


def signed(number: int) -> int:
    """The signed number with the 32 bits of an unsigned one: what kernels are given."""
    return number - 2**32 if number >= 2**31 else number


def check_order(start: int, step: int) -> None:
    """Raise InputError unless both are from 0 to 2^32 - 1."""
    check_int("replica_start", start, 0, 2**32 - 1)
    check_int("replica_step", step, 0, 2**32 - 1)


def checked_expert_map(
    expert_map: Tensor, replica_counts: Tensor, experts: int, start: int, step: int
) -> ExpertMap:
    """The expert map of these tensors, of any width and on any device.

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
    check_order(start, step)
    _check_range("replica_counts", replica_counts, 1, replicas)
    places = torch.arange(replicas, device=expert_map.device)
    used = places < replica_counts.to(expert_map.device).unsqueeze(1)
    _check_range("expert_map", expert_map, 0, 2**31 - 1, used)
    return ExpertMap(expert_map, replica_counts, start, step)


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
