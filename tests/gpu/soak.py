"""Launch every kernel that this GPU loads for a while, to see whether its bits ever change.

``make soak`` runs it. With names, of all entries only those that start with one of them:
``python -m tests.gpu.soak --seconds 10 dense_router_prefill/dsv4-pro``. A race that the few
launches of the oracle suite do not meet may show in thousands. Launches follow one another with
nothing between them, so they overlap as far as the kernel's contract allows; their batches have
several sizes in turn; and copies on another stream take memory bandwidth meanwhile. Whether the
bits are right is for the oracle suite: here each row's must be those of the first launch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from router_runtime.device.loader import load_entry
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.cases import Case
from router_runtime.evidence.suite import cases_of
from router_runtime.format.manifest import Entry
from router_runtime.verification.arrangements import in_order
from router_runtime.verification.examine import Run
from router_runtime.verification.inputs import ROW_INPUT, Inputs, make_inputs
from router_runtime.verification.kernel_run import KernelRun
from tests.gpu.entries import DEVICE, choose, new_outputs, on_device, stores_logits

#: Batches, as multiples of the rows of a case: parts of a tile, and more tiles than a GPU runs at
#: once.
SHARES = (4, 1, 0.3, 8, 0.1)
#: How often each batch is launched before the results are compared.
REPEATS = 4
#: What the other stream copies at a time: more than an L2 cache holds.
COPIED_BYTES = 2**28


class Launch:
    """A launch on rows of a case in a cycle, with outputs of its own."""

    def __init__(self, case: Case, inputs: Inputs, rows: int, logits: bool) -> None:
        order = torch.arange(rows, device=DEVICE) % len(_rows(case, inputs))
        self._sources = order
        self._inputs = in_order(case.kernel, inputs, order)
        self._outputs, self._by_name = new_outputs(case, self._inputs, logits)

    @property
    def found(self) -> list[Tensor]:
        """The bits of the outputs."""
        return [each.view(torch.int32) for each in (*self._outputs, *self._by_name.values())]

    def poison(self) -> None:
        for output in self.found:
            output.fill_(0x7FDEAD01)

    def __call__(self, run: Run) -> None:
        run(self._inputs, *self._outputs, **self._by_name)

    def differs(self, first: Launch) -> Tensor:
        """Whether any bit of a row is not that of the same row in ``first``: one bool."""
        pairs = zip(self.found, first.found, strict=True)
        return torch.stack([(mine != its[self._sources]).any() for mine, its in pairs]).any()


def largest_case(entry: Entry) -> Case:
    """The case of random rows that has the most of them."""
    cases = cases_of(entry.kernel, entry.constants, entry.contract.limits)
    random = [case for case in cases if case.pattern == "random" and not case.serving]
    return max(random, key=lambda case: case.sizes.get("tokens", case.sizes.get("rows", 0)))


def launches_of(entry: Entry) -> list[Launch]:
    """One of all rows, in their order, then those of a burst."""
    case = largest_case(entry)
    inputs = on_device(make_inputs(case))
    limits = entry.contract.limits
    _, most = limits.get("tokens", limits.get("rows", (1, 2**31 - 1)))
    count = len(_rows(case, inputs))
    sizes = dict.fromkeys(min(most, max(1, int(count * share))) for share in SHARES)
    return [
        Launch(case, inputs, size, stores_logits(entry)) for size in (count, *(*sizes,) * REPEATS)
    ]


def soak(entry: Entry, run: Run, seconds: float) -> tuple[int, int]:
    """How often the entry was launched after the first time, and how many of those differ."""
    first, *burst = launches_of(entry)
    first.poison()
    first(run)
    torch.cuda.synchronize()
    other = torch.cuda.Stream(DEVICE)
    data, copy = torch.empty(2, COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    launches = differing = 0
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for launch in burst:
            launch.poison()
        with torch.cuda.stream(other):
            copy.copy_(data)
        for launch in burst:
            launch(run)
        launches += len(burst)
        differing += int(torch.stack([launch.differs(first) for launch in burst]).sum())
    return launches, differing


def _rows(case: Case, inputs: Mapping[str, object]) -> Tensor:
    rows = inputs[ROW_INPUT[case.kernel]]
    assert isinstance(rows, Tensor)
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="for each entry; default: 5")
    parser.add_argument("prefixes", nargs="*", metavar="NAME", help="start of an entry's name")
    options = parser.parse_args(arguments)
    try:
        chosen = choose(options.prefixes)
    except RouterRuntimeError as error:
        print(error)
        return 1
    bad = 0
    for entry in chosen.entries:
        run = KernelRun(load_entry(entry, chosen.manifest, chosen.artifacts, 0), DEVICE)
        launches, differing = soak(entry, run, options.seconds)
        bad += bool(differing)
        print(f"{differing} of {launches} launches differ  {entry.key}", flush=True)
    print(f"{bad} of {len(chosen.entries)} entries had other bits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
