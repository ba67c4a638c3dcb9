"""Run one case of the oracle suite on a kernel, under guard, and judge what came out.

Beyond the mathematics (``judge.py``) a kernel must write every element of its outputs and nothing
else, leave its inputs alone, give the same bits twice, and, where the case asks for it, give a
token the same bits at every row position, in every batch size and beside any neighbour.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from router_runtime.evidence.cases import Case
from router_runtime.verification.inputs import Inputs, digest
from router_runtime.verification.judge import Oracle, Verdict

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


class Trial:
    """A case with its inputs, on the CPU and on a device, and with what is expected of them. All
    kernels that compute the same can be examined on one of these: every part is made when it is
    first asked for, and kept.
    """

    def __init__(self, case: Case, inputs: Inputs, device: str) -> None:
        self.case, self.inputs, self.device = case, inputs, device
        self.oracle = Oracle(case, inputs)

    @functools.cached_property
    def inputs_sha256(self) -> str:
        return digest(self.inputs)

    @functools.cached_property
    def on_device(self) -> Inputs:
        """The inputs on the device; a kernel is given copies."""
        return _copied(self.inputs, self.device)

    def nbytes(self) -> int:
        """What is kept so far, on either side: every storage once."""
        kept = [tensor.untyped_storage() for tensor in _tensors([vars(self), vars(self.oracle)])]
        return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, Case):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


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

    def bands_intact(self) -> Tensor:
        bands = torch.cat((self._buffer[:_GUARD_WORDS], self._buffer[-_GUARD_WORDS:]))
        return (bands == self._poison).all()


class _Check(NamedTuple):
    """What is wrong unless ``fine``, one bool on the device. It is read with many others at once:
    to wait for each would take longer than the launches.
    """

    problem: str
    fine: Tensor
    arrangement: str = ""


def _failed(checks: list[_Check]) -> list[_Check]:
    fine = torch.stack([check.fine for check in checks]).tolist()
    return [check for check, passed in zip(checks, fine, strict=True) if not passed]


def examine(trial: Trial, run: Run, largest_batch: int, logits: bool = False) -> Verdict:
    """Everything that the suite asks of a kernel in one case.

    ``largest_batch`` is the kernel's limit of rows. With ``logits`` the kernel can store them, and
    is asked to; storing them must change nothing else.
    """
    case, given = trial.case, _copied(trial.on_device, trial.device)
    found, checks = _twice(case, run, given, logits)
    if logits:
        without, more = _twice(case, run, given, False)
        same = _same_bits(without, {name: found[name] for name in without})
        checks += [*more, _Check("storing logits changes the other outputs", same)]
    before, after = _words(trial.on_device), _words(given)
    checks += [
        _Check(f"changed its input {name}", (words == after[name]).all())
        for name, words in before.items()
    ]
    problems = [check.problem for check in _failed(checks)]
    if case.variations:
        problems += _vary(case, run, given, largest_batch, found)
    verdict = trial.oracle.judge(**{name: output.cpu() for name, output in found.items()})
    return dataclasses.replace(verdict, problems=(*verdict.problems, *problems))


def _twice(case: Case, run: Run, inputs: Inputs, logits: bool) -> tuple[Outputs, list[_Check]]:
    """Outputs of the second of two runs, and what to check of either."""
    checks = []
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
        checks += [
            _Check(f"wrote outside its output {name}", output.bands_intact())
            for name, output in guarded.items()
        ]
        results.append({name: output.tensor for name, output in guarded.items()})
    differ = "two runs differ: not deterministic, or an output element was not written"
    return results[1], [*checks, _Check(differ, _same_bits(*results))]


def _vary(case: Case, run: Run, given: Inputs, largest_batch: int, expected: Outputs) -> list[str]:
    """Batch invariance: rows of rearranged batches against the same rows of the first batch. What
    is wrong with the first arrangement that is not right.
    """
    name = ROWS[case.kernel]
    rows = given[name]
    assert isinstance(rows, Tensor)
    checks = []
    for arranged in _arranged(rows.shape[0], largest_batch, str(rows.device)):
        batch = rows[arranged.order]
        batch[arranged.strangers] = math.nan
        batch[arranged.strangers[::2]] = math.inf
        moved = {**given, name: batch}
        for beside in set(_BESIDE_ROWS) - {name}:
            if isinstance(value := given.get(beside), Tensor):
                moved[beside] = value[arranged.order]
        found, more = _twice(case, run, moved, "logits" in expected)
        wanted = {name: output[arranged.sources] for name, output in expected.items()}
        same = _same_bits({name: output[arranged.kept] for name, output in found.items()}, wanted)
        more.append(_Check("bits of a token depend on its batch", same))
        checks += [check._replace(arrangement=arranged.what) for check in more]
    failed = _failed(checks)
    return [
        f"{check.problem} ({check.arrangement})"
        for check in failed
        if check.arrangement == failed[0].arrangement
    ]


class _Arrangement(NamedTuple):
    """Which row stands where, the positions given to strangers, those of the others, and the rows
    that stand at these.
    """

    what: str
    order: Tensor
    strangers: Tensor
    kept: Tensor
    sources: Tensor


@functools.lru_cache(maxsize=16)
def _arranged(rows: int, largest: int, device: str) -> list[_Arrangement]:
    """The arrangements on a device. Remembered: many cases have as many rows."""
    found = []
    for what, order, strangers in _arrangements(rows, largest):
        others = torch.ones(len(order), dtype=torch.bool)
        others[strangers] = False
        kept = others.nonzero().flatten()
        parts = (each.to(device) for each in (order, strangers, kept, order[kept]))
        found.append(_Arrangement(what, *parts))
    return found


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


def _copied(inputs: Inputs, device: str) -> Inputs:
    """Copies on a device, strides and gaps included (``Tensor.to`` would close the gaps)."""
    copies: dict[str, Tensor | int | float] = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            storage = _storage(value).to(device, copy=True)
            copies[name] = storage.as_strided(value.shape, value.stride(), value.storage_offset())
    return copies


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


def _same_bits(found: Outputs, expected: Outputs) -> Tensor:
    """Whether outputs of the same names are equal bit for bit: one bool on their device."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.int32)

    return torch.stack(
        [(bits(found[name]) == bits(wanted)).all() for name, wanted in expected.items()]
    ).all()
