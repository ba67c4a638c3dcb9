"""Every kernel that this GPU loads, launched a few times, for compute-sanitizer.

``make sanitize`` runs it under memcheck, synccheck and racecheck in turn. With arguments, of all
entries only those whose name starts with one of them: ``python -m tests.gpu.sanitize
dense_router_prefill/dsv4-pro``. Nothing is judged here: the oracle suite does that, and under a
sanitizer its launches would take hours. So an entry is launched on the few cases that reach what a
sanitizer looks at: random rows of which the last tile is ragged, every serving input that the
kernel has, at once, with and without given ids, and a pattern of ties.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence import cases as suite
from router_runtime.evidence.cases import Case
from router_runtime.evidence.suite import cases_of
from router_runtime.format.manifest import Entry
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.kernel_run import stores_logits
from tests.gpu.entries import choose, new_outputs, on_device, row_cost

#: Rows of a launch, and how far below its limit a kernel with fewer stays: no tile of any kernel
#: divides what that gives.
ROWS_AT_MOST, BELOW_LIMIT = 129, 3

#: Patterns in which keys tie, or stand in for it in a kernel that compares none.
_TIES = ("ties", "repeated", "out_of_range")


def cases_to_launch(entry: Entry) -> Iterator[Case]:
    """The cases to launch. They have the rows that suit them here, so they are not the suite's."""
    cases = cases_of(entry.kernel, entry.constants, entry.contract.limits)
    most = max(1, entry.contract.limits.get("tokens", (1, 2**31 - 1))[1] - BELOW_LIMIT)

    def cut(case: Case, rows: int, serving: tuple[str, ...] = ()) -> Case:
        sizes = dict(case.sizes)
        if "tokens" in sizes:
            sizes["tokens"] = min(rows, most)
        return dataclasses.replace(case, sizes=sizes, serving=serving, variations=False)

    plain = [case for case in cases if not case.serving]
    random = [case for case in plain if case.pattern == "random"]
    # Images of hash_gate are an input of some cases, as serving inputs are of others.
    yield cut(max(random, key=row_cost), ROWS_AT_MOST)
    by_pattern = {case.pattern: case for case in plain}
    yield cut(next(by_pattern[name] for name in _TIES if name in by_pattern), suite.PATTERN_TOKENS)
    served = [case for case in cases if case.serving]
    names = dict.fromkeys(name for case in served for name in case.serving)
    # Given ids are neither selected, so no bias matters, nor looked up.
    for without in (("replay",), ("images", "table")) if "replay" in names else (("replay",),):
        if served:
            inputs = tuple(name for name in names if name not in without)
            yield cut(served[0], ROWS_AT_MOST, inputs)


def main(prefixes: Sequence[str]) -> int:
    # Each tensor is an allocation of its own, so that memcheck sees reads past its end.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        chosen = choose(prefixes)
    except RouterRuntimeError as error:
        print(error)
        return 1
    entries = chosen.entries
    begun = time.perf_counter()
    launches = 0
    for entry in entries:
        print(entry.key, end="", flush=True)
        started = time.perf_counter()
        run = chosen.load(entry)
        for case in cases_to_launch(entry):
            inputs = on_device(make_inputs(case))
            outputs, by_name = new_outputs(case, inputs, stores_logits(entry))
            run(inputs, *outputs, **by_name)
            torch.cuda.synchronize()
            launches += 1
        print(f" {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{len(entries)} entries, {launches} launches, {time.perf_counter() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
