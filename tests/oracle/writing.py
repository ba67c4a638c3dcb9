"""What a kernel writes of the oracle's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from router_runtime import spec


def write(
    given: Mapping[str, Any],
    found: Sequence[Tensor],
    values: Tensor,
    ids: Tensor,
    logical_ids: Tensor | None = None,
    slots: Tensor | None = None,
    **options: Any,
) -> None:
    """Write the oracle's results as a correct kernel does.

    Args:
        given: The inputs.
        found: Values and ids; where there is an expert map, physical ids and then logical ones;
            of topk_indices, values, slots and ids.
        values: An output, as of ``examine.Run``.
        ids: An output.
        logical_ids: An output, where there is an expert map.
        slots: An output of topk_indices.
        options: Those of ``option_checks.Run``.

    """
    weights, physical, logical = found[0], found[1], found[-1]
    if logical_ids is not None:
        logical_ids.copy_(logical)
    if slots is not None:
        slots.copy_(found[1])
        physical = logical
    if options:
        weights, physical = _with_options(given, weights, physical, logical, options)
    if "packed_out" in options:
        options["packed_out"].copy_(spec.packed(weights, physical))
    else:
        values.copy_(weights)
        ids.copy_(physical)


def _with_options(
    given: Mapping[str, Any],
    weights: Tensor,
    physical: Tensor,
    logical: Tensor,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    sentinel, rows = given["sentinel"], torch.arange(len(logical))
    if "record_load" not in options or bool(options["record_load"]):
        chosen = torch.where(logical == sentinel, spec.NO_EXPERT, logical)
        load = options["expert_load"]
        load += spec.expert_load(physical, chosen, len(load))
    if "captured_ids" in options:
        options["captured_ids"][: len(logical)].copy_(logical)
    padding = spec.padding_rows(rows, given.get("is_padding"), given.get("num_valid_tokens"))
    shared = options["shared_id"], options["shared_weight"], options["shared_experts"]
    return spec.with_shared_experts(weights, physical, padding, *shared, sentinel)
