"""Run one case of the oracle suite on a kernel, between guard bands, and judge the outputs.

Beyond the mathematics (``judge.py``) a kernel must write every element of its outputs and nothing
else, leave its inputs unchanged, give the same bits twice, have results with options that follow
from those without (``option_checks.py``), and, where the case says so, give a
token the same bits at every row position, in every batch size and beside any neighbour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from router_runtime.evidence.cases import Case
from router_runtime.verification.arrangements import arrangements
from router_runtime.verification.inputs import ROW_INPUT, Inputs
from router_runtime.verification.judge import Verdict, judge
from router_runtime.verification.option_checks import option_checks
from router_runtime.verification.trial import Trial, copied, whole_storage

#: 32-bit words before and after each output: 256 bytes keep the output's alignment.
_GUARD_WORDS = 64
#: Two runs start from different words, so an element that was not written differs between them.
_POISONS = (0x7FDEAD01, -0x21524111)

#: The outputs of a kernel: ``values`` and ``ids``, ``logits`` if they were requested,
#: ``logical_ids`` if there is an expert map, ``slots`` of topk_indices.
Outputs = Mapping[str, Tensor]


class Run(Protocol):
    """Launches a kernel on inputs on its device and writes the outputs.

    The outputs are values and ids, then the logits if they are requested (only kernels that can
    store them). ``more`` are ``logical_ids`` where the inputs have an expert map, ``slots`` of
    topk_indices, and options.
    """

    def __call__(self, inputs: Inputs, *outputs: Tensor, **more: Any) -> None:
        """Launch on the current stream."""


def examine(trial: Trial, run: Run, largest_batch: int, logits: bool = False) -> Verdict:
    """The verdict on a kernel in one case, with everything that the suite requires of it.

    Args:
        trial: The case; its inputs are copied before the kernel gets them.
        run: Launches the kernel.
        largest_batch: The kernel's limit of rows.
        logits: Whether the kernel can store logits. It is then launched with and without them:
            storing them must change no other output.

    """
    case, inputs = trial.case, copied(trial.on_device, trial.device)
    found, checks = _run_twice(case, run, inputs, logits)
    if logits:
        without, more = _run_twice(case, run, inputs, False)
        same = _same_bits(without, {name: found[name] for name in without})
        checks += [*more, _Check("storing logits changes the other outputs", same)]
    if case.serving:
        count = len(found["ids"])
        checks += [_Check(*each) for each in option_checks(run, inputs, count, found)]
    before, after = _bytes(trial.on_device), _bytes(inputs)
    checks += [
        _Check(f"changed its input {name}", (data == after[name]).all())
        for name, data in before.items()
    ]
    problems = [check.problem for check in _failed(checks)]
    if case.variations:
        problems += _batch_problems(case, run, inputs, largest_batch, found)
    verdict = judge(trial.oracle, **{name: output.cpu() for name, output in found.items()})
    return dataclasses.replace(verdict, problems=(*verdict.problems, *problems))


class _GuardedOutput:
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
        """Whether no word of the guard bands has changed: one bool on the device."""
        bands = torch.cat((self._buffer[:_GUARD_WORDS], self._buffer[-_GUARD_WORDS:]))
        return (bands == self._poison).all()


class _Check(NamedTuple):
    """A problem that exists unless ``passed``, one bool on the device, is true.

    The bools of many checks are read at once: waiting for each would take longer than the launches.
    """

    problem: str
    passed: Tensor
    arrangement: str = ""


def _failed(checks: list[_Check]) -> list[_Check]:
    passed = torch.stack([check.passed for check in checks]).tolist()
    return [check for check, fine in zip(checks, passed, strict=True) if not fine]


def _run_twice(case: Case, run: Run, inputs: Inputs, logits: bool) -> tuple[Outputs, list[_Check]]:
    """The outputs of the second of two runs, and the checks of both."""
    checks = []
    results: list[Outputs] = []
    rows = inputs[ROW_INPUT[case.kernel]]
    assert isinstance(rows, Tensor)
    count, k = rows.shape[0], case.sizes["top_k"]
    integers = torch.int64 if inputs.get("wide_ids") else torch.int32
    for poison in _POISONS:
        guarded = {
            "values": _GuardedOutput(count, k, torch.float32, rows.device, poison),
            "ids": _GuardedOutput(count, k, integers, rows.device, poison),
        }
        if logits:
            experts = case.sizes["experts"]
            guarded["logits"] = _GuardedOutput(count, experts, torch.float32, rows.device, poison)
        written = [output.tensor for output in guarded.values()]
        named = ["logical_ids"] if "expert_map" in inputs else []
        named += ["slots"] if case.kernel == "topk_indices" else []
        for name in named:
            guarded[name] = _GuardedOutput(count, k, integers, rows.device, poison)
        run(inputs, *written, **{name: guarded[name].tensor for name in named})
        checks += [
            _Check(f"wrote outside its output {name}", output.bands_intact())
            for name, output in guarded.items()
        ]
        results.append({name: output.tensor for name, output in guarded.items()})
    differ = "two runs differ: not deterministic, or an output element was not written"
    return results[1], [*checks, _Check(differ, _same_bits(*results))]


def _batch_problems(
    case: Case, run: Run, inputs: Inputs, largest_batch: int, expected: Outputs
) -> list[str]:
    """The problems of the first arrangement of the rows whose outputs differ from the same rows of
    ``expected``.
    """
    rows = inputs[ROW_INPUT[case.kernel]]
    assert isinstance(rows, Tensor)
    checks = []
    for arranged in arrangements(rows.shape[0], largest_batch, str(rows.device)):
        moved = arranged.apply(case.kernel, inputs)
        found, more = _run_twice(case, run, moved, "logits" in expected)
        wanted = {name: output[arranged.sources] for name, output in expected.items()}
        same = _same_bits({name: output[arranged.kept] for name, output in found.items()}, wanted)
        more.append(_Check("bits of a token depend on its batch", same))
        checks += [check._replace(arrangement=arranged.name) for check in more]
    failed = _failed(checks)
    return [
        f"{check.problem} ({check.arrangement})"
        for check in failed
        if check.arrangement == failed[0].arrangement
    ]


def _bytes(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: whole_storage(value).view(torch.uint8)
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
