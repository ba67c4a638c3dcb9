"""Which orders of the experts are correct, given the intervals of their keys.

Expert j must be ranked before expert i if

- the lowest possible key of j is above the highest possible key of i; or
- j has the lower id, and the lowest possible key of j equals the highest possible key of i; or
- j has the lower id, and both have bit-identical inputs, hence equal keys.

A row in which these rules leave only one outcome is *clear*: its ids are the same for every correct
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.verification.bounds import Interval


def must_precede(keys: Interval, same_inputs: Tensor, expert: Tensor) -> Tensor:
    """The experts that every correct ranking puts before ``expert[n]``.

    Args:
        keys: fp32 ``[N, E]``.
        same_inputs: Labels ``[N, E]``: in a row, equal labels mean bit-identical inputs.
        expert: One expert per row, int64 ``[N]``.

    Returns:
        bool ``[N, E]``.

    """
    column = expert.unsqueeze(1)
    highest = keys.high.gather(1, column)
    lower_id = torch.arange(same_inputs.shape[1]) < column
    tie = (keys.low == highest) | (same_inputs == same_inputs.gather(1, column))
    return (keys.low > highest) | (tie & lower_id)


def may_precede(keys: Interval, same_inputs: Tensor, expert: Tensor) -> Tensor:
    """The experts that some correct ranking puts before ``expert[n]``. Arguments and result as
    those of ``must_precede``.
    """
    column = expert.unsqueeze(1)
    lowest = keys.low.gather(1, column)
    lower_id = torch.arange(same_inputs.shape[1]) < column
    by_key = (keys.high > lowest) | ((keys.high == lowest) & lower_id)
    return torch.where(same_inputs == same_inputs.gather(1, column), lower_id, by_key)


def clear_rows(ids: Tensor, keys: Interval, same_inputs: Tensor) -> Tensor:
    """The clear rows, bool ``[N]``. ``ids`` are the chosen experts ``[N, k]`` in rank order.

    For each chosen expert, the others are those that are ranked after it or not chosen. A row is
    clear if, for every chosen expert, none of the others may precede it.
    """
    clear = torch.ones(ids.shape[0], dtype=torch.bool)
    remaining = torch.ones(same_inputs.shape, dtype=torch.bool)
    for expert in ids.long().unbind(1):
        remaining.scatter_(1, expert.unsqueeze(1), False)
        clear &= ~(remaining & may_precede(keys, same_inputs, expert)).any(dim=1)
    return clear


def out_of_order(ids: Tensor, keys: Interval, same_inputs: Tensor) -> Tensor:
    """The rows whose ids no correct kernel can give, bool ``[N]``: those with a chosen expert that
    must come after an expert which is ranked after it or not chosen. ``ids`` as in ``clear_rows``.
    """
    wrong = torch.zeros(ids.shape[0], dtype=torch.bool)
    remaining = torch.ones(same_inputs.shape, dtype=torch.bool)
    for expert in ids.long().unbind(1):
        remaining.scatter_(1, expert.unsqueeze(1), False)
        wrong |= (remaining & must_precede(keys, same_inputs, expert)).any(dim=1)
    return wrong


def value_bits(numbers: Tensor) -> Tensor:
    """The bits of fp32 numbers as unsigned 32-bit values in int64, equal for both zeros and for all
    NaNs.
    """
    stored = torch.where(numbers == 0, torch.zeros_like(numbers), numbers).view(torch.int32)
    stored = torch.where(numbers.isnan(), torch.full_like(stored, spec.NAN_LOGIT_BITS), stored)
    return stored.long() & 0xFFFFFFFF


def first_twins(weight_rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """For each expert, the lowest id that has the same weight row and bias, and the lowest id that
    has the same bias.

    Args:
        weight_rows: Labels ``[E]``: equal labels mean equal rows of the gate weight.
        bias: fp32 ``[E]``.

    Returns:
        Two tensors of ids, int64 ``[E]``.

    """
    bits = value_bits(bias)
    same_bias = bits.unsqueeze(0) == bits.unsqueeze(1)
    same_row = weight_rows.unsqueeze(0) == weight_rows.unsqueeze(1)
    return (same_bias & same_row).int().argmax(dim=1), same_bias.int().argmax(dim=1)
