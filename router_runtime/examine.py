"""Run one case of the oracle suite on a kernel, under guard, and judge what came out.

Beyond the mathematics (``judge.py``) a kernel must write every element of its outputs and nothing
else, leave its inputs alone, give the same bits twice, and, where the case asks for it, give a
token the same bits at every row position, in every batch size and beside any neighbour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from router_runtime.inputs import Inputs
from router_runtime.judge import Verdict, judge
from router_runtime.suite import Case

#: 32-bit words before and after each output: 256 bytes keep the output's alignment.
_GUARD_WORDS = 64
#: Two runs start from different words, so an element that was not written differs between them.
_POISONS = (0x7FDEAD01, -0x21524111)
#: The input that holds one row a token, and the sizes of batches tried on its rows.
ROWS = {
    "hash_router": "token_ids",
    "hash_gate": "hidden_states",
    "topk_select": "scores",
    "activation_topk": "logits",
    "dense_router_decode": "hidden_states",
    "dense_router_prefill": "hidden_states",
}
BATCHES = (
    *(1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 130, 255, 256),
    257,
)


#: Inputs that hold one element or row a token, beside those of ROWS.
_BESIDE_ROWS = ("is_padding", "image_mask", "given_ids", "token_ids")


class Run(Protocol):
    """Launches a kernel: device inputs in, the outputs written. Logits only where the kernel can
    store them, and if it is asked to; ``logical_ids`` only where there is an expert map.
    """

    def __call__(self, inputs: Inputs, *outputs: Tensor, **logical_ids: Tensor) -> None: ...


#: What a kernel wrote: values and ids, the logits if they were asked for, the logical ids if there
#: is an expert map.
Outputs = Mapping[str, Tensor]


class _Guarded:
    """A poisoned output ``[rows, k]`` between two guard bands."""

    def __init__(
        self, rows: int, k: int, dtype: torch.dtype, device: torch.device, poison: int
    ) -> None:
        self._poison = poison
        words = rows * k * (dtype.itemsize // 4) + 2 * _GUARD_WORDS
        self._buffer = torch.full((words,), poison, dtype=torch.int32, device=device)
        inner = self._buffer[_GUARD_WORDS : words - _GUARD_WORDS]
        self.tensor = inner.view(dtype).view(rows, k)

    def bands_intact(self) -> bool:
        bands = torch.cat((self._buffer[:_GUARD_WORDS], self._buffer[-_GUARD_WORDS:]))
        return bool((bands == self._poison).all())


def examine(
    case: Case, inputs: Inputs, run: Run, device: str, largest_batch: int, logits: bool = False
) -> Verdict:
    """Everything that the suite asks of one case with its inputs.

    ``largest_batch`` is the kernel's limit of rows. With ``logits`` the kernel can store them, and
    is asked to; storing them must change nothing else.
    """
    on_device = _transfer(inputs, device)
    found, problems = _twice(case, run, on_device, logits)
    if logits:
        without, more = _twice(case, run, on_device, False)
        problems += more
        if not _same_bits(without, {name: found[name] for name in without}):
            problems.append("storing logits changes the other outputs")
    before, after = _words(inputs), _words(on_device)
    problems += [
        f"changed its input {name}"
        for name, words in before.items()
        if not torch.equal(words, after[name].cpu())
    ]
    if case.variations:
        problems += _vary(case, run, (inputs, on_device), device, largest_batch, found)
    verdict = judge(case, inputs, **found)
    return dataclasses.replace(verdict, problems=(*verdict.problems, *problems))


def _twice(case: Case, run: Run, inputs: Inputs, logits: bool) -> tuple[Outputs, list[str]]:
    """Outputs of the second of two runs, on the CPU, and what was wrong with either."""
    problems = []
    results: list[Outputs] = []
    for poison in _POISONS:
        rows = inputs[ROWS[case.kernel]]
        assert isinstance(rows, Tensor)
        count, k = rows.shape[0], case.sizes["top_k"]
        integers = torch.int64 if inputs.get("wide_ids") else torch.int32
        guarded = {
            "values": _Guarded(count, k, torch.float32, rows.device, poison),
            "ids": _Guarded(count, k, integers, rows.device, poison),
        }
        if logits:
            experts = case.sizes["experts"]
            guarded["logits"] = _Guarded(count, experts, torch.float32, rows.device, poison)
        written = [output.tensor for output in guarded.values()]
        if "expert_map" in inputs:
            logical = guarded["logical_ids"] = _Guarded(count, k, integers, rows.device, poison)
            run(inputs, *written, logical_ids=logical.tensor)
        else:
            run(inputs, *written)
        for name, output in guarded.items():
            if not output.bands_intact():
                problems.append(f"wrote outside its output {name}")
        results.append({name: output.tensor.cpu() for name, output in guarded.items()})
    if not _same_bits(*results):
        problems.append("two runs differ: not deterministic, or an output element was not written")
    return results[1], problems


def _vary(
    case: Case,
    run: Run,
    both: tuple[Inputs, Inputs],
    device: str,
    largest_batch: int,
    expected: Outputs,
) -> list[str]:
    """Batch invariance: rows of rearranged batches against the same rows of the first batch.

    ``both`` are the inputs on the CPU and on the device.
    """
    name = ROWS[case.kernel]
    inputs, on_device = both
    rows = inputs[name]
    assert isinstance(rows, Tensor)
    for what, order, strangers in _arrangements(rows.shape[0], largest_batch):
        batch = rows[order]
        batch[strangers] = math.nan
        batch[strangers[::2]] = math.inf
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[strangers] = False
        moved = {**on_device, name: batch.to(device)}
        for beside in set(_BESIDE_ROWS) - {name}:
            if isinstance(value := inputs.get(beside), Tensor):
                moved[beside] = value[order].to(device)
        found, problems = _twice(case, run, moved, "logits" in expected)
        wanted = {name: output[order[kept]] for name, output in expected.items()}
        if not _same_bits({name: output[kept] for name, output in found.items()}, wanted):
            problems.append("bits of a token depend on its batch")
        if problems:
            return [f"{problem} ({what})" for problem in problems]
    return []


def _arrangements(rows: int, largest: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(description, which row stands where, positions given to NaN and infinite strangers)."""
    nobody = torch.arange(0)
    for row in sorted({0, rows // 2, rows - 1}):
        yield f"row {row} alone", torch.tensor([row]), nobody
    yield f"{rows} rows reversed", torch.arange(rows).flip(0), nobody
    for size in BATCHES:
        if size <= largest:
            # Five is coprime to every batch size that matters: all rows come up, none in place.
            order = (torch.arange(size) * 5 + 3) % rows
            yield f"batch of {size}", order, nobody
            yield f"batch of {size} among NaN and inf", order, torch.arange(1, size, 2)


def _transfer(inputs: Inputs, device: str) -> Inputs:
    """The inputs on a device, strides and gaps included (``Tensor.to`` would close the gaps)."""
    moved: dict[str, Tensor | int | float] = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            storage = _storage(value).to(device, copy=True)
            moved[name] = storage.as_strided(value.shape, value.stride(), value.storage_offset())
    return moved


def _storage(tensor: Tensor) -> Tensor:
    """All elements behind a tensor, the gaps of a strided one included."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def _words(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: _storage(value).view(torch.uint8)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _same_bits(found: Outputs, expected: Outputs) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].contiguous().view(torch.int32), b.contiguous().view(torch.int32))
        for name, b in expected.items()
    )
