"""Launch every kernel that this GPU loads for a while, to see whether its bits ever change.

``make soak`` runs it. With names, of all entries only those that start with one of them:
``python -m tests.gpu.soak --seconds 60 dense_router_prefill/dsv4-pro``. A race that the few
launches of the oracle suite do not meet may show in thousands. The launches of a burst are one CUDA
graph, so that they follow one another without a gap and overlap as far as the kernel's contract
allows; their batches have several sizes; and copies on another stream take memory bandwidth all the
while. Rows are random, without serving inputs and ties. Whether the bits are right is for the
oracle suite: here each row's must be those of the first launch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.cases import Case
from router_runtime.evidence.suite import cases_of
from router_runtime.format.manifest import Entry
from router_runtime.verification.arrangements import in_order
from router_runtime.verification.examine import Run
from router_runtime.verification.inputs import Inputs, make_inputs
from router_runtime.verification.kernel_run import largest_batch, stores_logits
from tests.gpu.entries import DEVICE, choose, new_outputs, on_device, row_cost, rows_of
from tests.gpu.graphs import captured

#: Rows of a launch, as multiples of those of its case: from a part of a tile to more tiles than a
#: GPU runs at once. A kernel's limit cuts them.
SHARES = (4, 1, 0.3, 20, 0.1)
#: How often a burst has each of these.
REPEATS = 4
#: What the other stream copies at a time: more than an L2 cache holds.
COPIED_BYTES = 2**28
POISON = 0x7FDEAD01


class Launch:
    """A launch on rows of a case in a cycle, with outputs of its own."""

    def __init__(self, case: Case, inputs: Inputs, rows: int, logits: bool) -> None:
        self.sources = torch.arange(rows, device=DEVICE) % len(rows_of(case, inputs))
        self._inputs = in_order(case.kernel, inputs, self.sources)
        self._outputs, self._by_name = new_outputs(case, self._inputs, logits)

    @property
    def bits(self) -> list[Tensor]:
        """The outputs, as words of 32 bits."""
        return [each.view(torch.int32) for each in (*self._outputs, *self._by_name.values())]

    def poison(self) -> None:
        for output in self.bits:
            output.fill_(POISON)

    def __call__(self, run: Run) -> None:
        run(self._inputs, *self._outputs, **self._by_name)

    def differs(self, first: Launch) -> Tensor:
        """Whether any bit of a row is not that of the same row in ``first``: one bool."""
        pairs = zip(self.bits, first.bits, strict=True)
        return torch.stack([(mine != its[self.sources]).any() for mine, its in pairs]).any()


def cases_to_launch(entry: Entry) -> list[Case]:
    """Of the cases of random rows, the one with the most rows and the one whose rows cost most; of
    hash_gate's, one with rows of image tokens, if the kernel has them.
    """
    cases = cases_of(entry.kernel, entry.constants, entry.contract.limits)
    random = [case for case in cases if case.pattern == "random" and not case.serving]

    def rows(case: Case) -> int:
        return case.sizes.get("tokens", case.sizes.get("rows", 0))

    most = max(random, key=rows)
    widest = max(random, key=lambda case: (row_cost(case), rows(case)))
    return [most] if widest is most else [most, widest]


def launches_of(entry: Entry, case: Case) -> list[Launch]:
    """One of all rows, in their order, then those of a burst."""
    inputs = on_device(make_inputs(case))
    most, count = largest_batch(entry), len(rows_of(case, inputs))
    sizes = dict.fromkeys(min(most, max(1, int(count * share))) for share in SHARES)
    return [
        Launch(case, inputs, size, stores_logits(entry)) for size in (count, *(*sizes,) * REPEATS)
    ]


def soak(entry: Entry, case: Case, run: Run, seconds: float) -> tuple[int, list[int]]:
    """Launch bursts until the seconds are over, one at least. Returns how many launches there were
    after the first one, and of each that differs from it, how many rows it has.
    """
    first, *burst = launches_of(entry, case)
    first.poison()
    first(run)
    graph, _ = captured(lambda: [launch(run) for launch in burst])
    other, done = torch.cuda.Stream(DEVICE), torch.cuda.Event()
    data, copy = torch.empty(2, COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    launches, differing = 0, []
    ends = time.perf_counter() + seconds
    while True:
        for launch in burst:
            launch.poison()
        graph.replay()
        done.record()
        while not done.query():
            with torch.cuda.stream(other):
                copy.copy_(data)
            other.synchronize()
        differ = torch.stack([launch.differs(first) for launch in burst]).tolist()
        launches += len(burst)
        differing += [len(burst[index].sources) for index, bad in enumerate(differ) if bad]
        if time.perf_counter() >= ends:
            return launches, differing


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
        # First the name: whatever ends this process then says which kernel it was.
        print(entry.key, end="", flush=True)
        run, cases = chosen.load(entry), cases_to_launch(entry)
        found = [soak(entry, case, run, options.seconds / len(cases)) for case in cases]
        launches = sum(count for count, _ in found)
        differing = [rows for _, each in found for rows in each]
        where = f", of {sorted(set(differing))} rows" if differing else ""
        print(f" {len(differing)} of {launches} launches differ{where}", flush=True)
        bad += bool(differing)
    print(f"{bad} of {len(chosen.entries)} entries had other bits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
