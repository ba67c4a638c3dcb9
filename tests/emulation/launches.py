"""Launches of emulated kernels and of their siblings, and the comparison of their bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from router_runtime.device.launch import LoadedKernel
from router_runtime.evidence.cases import Case
from router_runtime.format.manifest import Entry
from router_runtime.verification.inputs import Inputs, make_inputs
from router_runtime.verification.kernel_run import KernelRun
from router_runtime.verification.trial import copied

DEVICE = "cuda:0"


class TimedRun:
    """A kernel as ``examine`` launches it, with the time that the GPU spends on it."""

    def __init__(self, kernel: LoadedKernel) -> None:
        self._run = KernelRun(kernel, DEVICE)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.launches = 0

    def __call__(self, inputs: Inputs, *outputs: Tensor, **more: Any) -> None:
        """Launch on the current stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run(inputs, *outputs, **more)
        end.record()
        self._events.append((begin, end))
        self.launches += 1

    def seconds(self) -> float:
        """Return the seconds that the GPU has spent since the last call."""
        torch.cuda.synchronize()
        spent = sum(float(begin.elapsed_time(end)) for begin, end in self._events)
        self._events.clear()
        return spent / 1000


def random_case(entry: Entry, tokens: int) -> Case:
    """Return a case of random rows; of the same model and number of tokens, the same rows."""
    names = {"hidden": "HIDDEN", "experts": "EXPERTS", "top_k": "TOP_K"}
    sizes = {size: int(entry.constants[name]) for size, name in names.items()}
    shape = "{hidden}x{experts}-k{top_k}".format(**sizes)
    name = f"emulation-n{tokens}-{shape}"
    return Case(entry.kernel, name, "random", {**sizes, "tokens": tokens, "padding": 0})


def on_device(case: Case) -> Inputs:
    """Return the inputs of a case on the GPU."""
    return copied(make_inputs(case), DEVICE)


def outputs(case: Case, run: TimedRun, inputs: Inputs, logits: bool) -> Mapping[str, Tensor]:
    """Launch once and return weights, ids and, if wanted, logits, from poisoned memory."""
    tokens, k = case.sizes["tokens"], case.sizes["top_k"]
    found = {
        "weights": torch.full((tokens, k), float("nan"), device=DEVICE),
        "ids": torch.full((tokens, k), -7, dtype=torch.int32, device=DEVICE),
    }
    if logits:
        found["logits"] = torch.full((tokens, case.sizes["experts"]), float("nan"), device=DEVICE)
    run(inputs, *found.values())
    return found


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return output -> how many of its elements have other bits, and the first rows of those."""
    wrong = {}
    for name, tensor in found.items():
        if name not in expected:
            continue
        differ = tensor.view(torch.int32) != expected[name].view(torch.int32)
        number = int(differ.sum())
        if number:
            rows = differ.any(dim=1).nonzero().flatten().tolist()
            first = rows[0]
            columns = differ[first].nonzero().flatten().tolist()[:8]
            shown = [
                f"[{first}, {c}] {tensor[first, c].item():.6g} for {expected[name][first, c]:.6g}"
                for c in columns[:3]
            ]
            wrong[name] = (
                f"{number} of {tensor.numel()} differ, {len(rows)} rows, first {rows[:8]}, of row "
                f"{first} columns {columns}: {'; '.join(shown)}"
            )
    return wrong
