"""Checks of a kernel's options: launches beside one with serving inputs alone, whose results are
judged.

What an option adds follows exactly from those results, so nothing here has a tolerance: the same
weights and ids, in rows that are apart, in words, or beside shared experts; the load of each
physical id; the captured ids; and rows with given experts beside rows without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.verification.inputs import Inputs

#: The options of every launch here. Each shared expert's weight has bits that bf16 rounds.
SHARED: Mapping[str, Any] = {
    "shared_experts": 2,
    "shared_id": 1021,
    "shared_weight": 0.3,
}
#: Elements between the rows of the weights, of the ids and of the captured ids.
_GAPS = (3, 1, 2)
#: Counts of loads at most: the maps of the suite have physical ids on both sides of their end.
_COUNTS = 2**19
#: What every byte of an output is before the launch.
_POISON = 0x5A


class Problem(NamedTuple):
    """A problem that exists unless ``passed``, one bool on the device, is true."""

    text: str
    passed: Tensor


class Run(Protocol):
    """Launches a kernel, as ``examine.Run`` says it, with options by the names of
    ``routing.options.OPTIONS`` without the parts that say how wide integers are.
    """

    def __call__(self, inputs: Inputs, *outputs: Tensor, **options: Any) -> None:
        """Launch on the current stream."""


def option_checks(
    run: Run, inputs: Inputs, rows: int, found: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """The checks of a case with serving inputs; ``found`` are its results, of ``rows`` tokens."""
    values, ids = found["values"], found["ids"]
    logical = found.get("logical_ids", ids)
    yield from _records(run, inputs, rows, values, ids, logical)
    if "given_ids" in inputs:
        yield from _given_rows(run, inputs, rows, found)


def _records(
    run: Run, inputs: Inputs, rows: int, values: Tensor, ids: Tensor, logical: Tensor
) -> Iterator[Problem]:
    """With everything at once: shared experts, rows that are apart, loads, captured ids; then
    packed, with the flag that turns loads off.
    """
    device, k = ids.device, ids.shape[1]
    columns = k + int(SHARED["shared_experts"])
    weights, stored = (
        _poisoned(rows, columns + gap, kind.dtype, device)
        for kind, gap in zip((values, ids), _GAPS[:2], strict=True)
    )
    captured = _poisoned(rows + 1, k + _GAPS[2], torch.int16, device)
    before = torch.arange(_COUNTS, dtype=torch.int32, device=device) * 4099 + 2**31 - 999
    load = before.clone()
    more = {"logical_ids": logical.clone()} if "expert_map" in inputs else {}
    more |= {"expert_load": load, "captured_ids": captured[:, :k]}
    run(inputs, weights[:, :columns], stored[:, :columns], **SHARED, **more)
    sentinel = int(inputs["sentinel"])
    padding = _padding(inputs, rows, device)
    shared = int(SHARED["shared_id"]), float(SHARED["shared_weight"]), columns - k
    wanted = spec.with_shared_experts(values, ids, padding, *shared, sentinel)
    yield Problem("options: other weights", _equal(weights[:, :columns], wanted[0]))
    yield Problem("options: other ids", _equal(stored[:, :columns], wanted[1]))
    yield Problem("options: other captured ids", _equal(captured[:rows, :k], logical.short()))
    chosen = torch.where(logical == sentinel, spec.NO_EXPERT, logical)
    counts = before + spec.expert_load(ids, chosen, _COUNTS)
    yield Problem("options: other loads", _equal(load, counts))
    untouched = (weights[:, columns:], stored[:, columns:], captured[:, k:], captured[rows:])
    for name, part in zip(("weights", "ids", "captured ids", "rows"), untouched, strict=True):
        yield Problem(f"options: wrote beside its {name}", _is_poison(part))

    words = _poisoned(rows, columns, torch.int32, device)
    off = torch.zeros(1, dtype=torch.bool, device=device)
    none = values.new_empty(0), ids.new_empty(0)
    run(inputs, *none, packed_out=words, expert_load=load, record_load=off, **SHARED)
    yield Problem("options: other packed words", _equal(words, spec.packed(*wanted)))
    yield Problem("options: loads in spite of the flag", _equal(load, counts))


def _given_rows(
    run: Run, inputs: Inputs, rows: int, found: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """With a mask, some rows are those of ``found``, the others those of a call without given
    experts.
    """
    mask = torch.arange(rows, device=found["ids"].device) % 3 == 1
    selecting = {name: value for name, value in inputs.items() if name != "given_ids"}
    others, mixed = ({name: each.clone() for name, each in found.items()} for _ in range(2))
    for given, outputs in ((selecting, others), ({**inputs, "given_mask": mask}, mixed)):
        own = (outputs[name] for name in ("values", "ids", "logits") if name in outputs)
        more = {"logical_ids": outputs["logical_ids"]} if "logical_ids" in outputs else {}
        run(given, *own, **more)
    for name, results in found.items():
        wanted = torch.where(mask.unsqueeze(1), results, others[name])
        yield Problem(f"given rows: other {name}", _equal(mixed[name], wanted))


def _padding(inputs: Inputs, rows: int, device: torch.device) -> Tensor:
    marks, count = inputs.get("is_padding"), inputs.get("num_valid_tokens")
    assert not isinstance(marks, int | float)
    assert not isinstance(count, int | float)
    return spec.padding_rows(torch.arange(rows, device=device), marks, count)


def _poisoned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = rows * columns * dtype.itemsize
    memory = torch.full((size,), _POISON, dtype=torch.uint8, device=device)
    return memory.view(dtype).view(rows, columns)


def _is_poison(tensor: Tensor) -> Tensor:
    return (tensor.contiguous().view(torch.uint8) == _POISON).all()


def _equal(found: Tensor, expected: Tensor) -> Tensor:
    """Whether two tensors of one dtype are equal bit for bit."""
    assert found.dtype is expected.dtype
    words = (each.contiguous().view(torch.uint8) for each in (found, expected))
    return torch.eq(*words).all()
