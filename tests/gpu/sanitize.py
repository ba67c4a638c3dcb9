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

from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts, read_manifest
from router_runtime.device.loader import load_entry
from router_runtime.errors import explain
from router_runtime.evidence import cases as suite
from router_runtime.evidence.cases import Case
from router_runtime.evidence.suite import cases_of
from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target
from router_runtime.verification.inputs import ROW_INPUT, Inputs, make_inputs
from router_runtime.verification.kernel_run import KernelRun

#: Rows of a launch, and how far below its limit a kernel with fewer stays: no tile of any kernel
#: divides what that gives.
ROWS_AT_MOST, BELOW_LIMIT = 129, 3
DEVICE = "cuda:0"

#: Patterns in which keys tie, or stand in for it in a kernel that compares none.
_TIES = ("ties", "repeated", "out_of_range")


def chosen(entry: Entry) -> Iterator[Case]:
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
    widest = max(random, key=lambda case: (case.sizes.get("images", 0), _size(case)))
    yield cut(widest, ROWS_AT_MOST)
    by_pattern = {case.pattern: case for case in plain}
    yield cut(next(by_pattern[name] for name in _TIES if name in by_pattern), suite.PATTERN_TOKENS)
    served = [case for case in cases if case.serving]
    names = dict.fromkeys(name for case in served for name in case.serving)
    # Given ids are neither selected, so no bias matters, nor looked up.
    for without in (("replay",), ("images", "table")) if "replay" in names else (("replay",),):
        if served:
            inputs = tuple(name for name in names if name not in without)
            yield cut(served[0], ROWS_AT_MOST, inputs)


def _size(case: Case) -> int:
    """What a row of the case costs: large rows cost a sanitizer as much as many."""
    return case.sizes.get("row_length", case.sizes.get("experts", 0)) * case.sizes["top_k"]


def named(entries: Sequence[Entry], prefixes: Sequence[str]) -> list[Entry]:
    """Those whose key, with or without the target, starts with one of the prefixes; all of them if
    there is none.
    """
    return [
        entry
        for entry in entries
        if not prefixes
        or entry.key.startswith(tuple(prefixes))
        or entry.key.replace(f"/{entry.target}", "").startswith(tuple(prefixes))
    ]


def launch(run: KernelRun, case: Case, inputs: Inputs, stores_logits: bool) -> None:
    rows = inputs[ROW_INPUT[case.kernel]]
    assert isinstance(rows, torch.Tensor)
    shape = rows.shape[0], case.sizes["top_k"]
    integers = torch.int64 if inputs.get("wide_ids") else torch.int32
    ids, logical_ids = torch.empty(2, *shape, dtype=integers, device=DEVICE)
    outputs = [torch.empty(shape, device=DEVICE), ids]
    if stores_logits:
        outputs.append(torch.empty(shape[0], case.sizes["experts"], device=DEVICE))
    named = {"logical_ids": logical_ids} if "expert_map" in inputs else {}
    if case.kernel == "topk_indices":
        named["slots"] = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    run(inputs, *outputs, **named)
    torch.cuda.synchronize()


def main(prefixes: Sequence[str]) -> int:
    # Each tensor is an allocation of its own, so that memcheck sees reads past its end.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    artifacts = find_artifacts()
    manifest = read_manifest(artifacts)
    driver.initialise()
    facts = driver.device_facts(0)
    here = [
        entry
        for entry in manifest.entries
        if Target.parse(entry.target).runs_on(facts.major, facts.minor)
    ]
    entries = named(here, prefixes)
    if not entries:
        keys = [entry.key for entry in here]
        print(
            explain(
                "entries to sanitize",
                expected=f"some of {keys}",
                found=list(prefixes) or "none for this GPU",
                remedy="name the start of one, or run: make build-cubins",
            )
        )
        return 1
    begun = time.perf_counter()
    launches = 0
    for entry in entries:
        started = time.perf_counter()
        run = KernelRun(load_entry(entry, manifest, artifacts, 0), DEVICE)
        stores_logits = any(item.name == "logits_out" for item in entry.contract.parameters)
        for case in chosen(entry):
            inputs = {
                name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
                for name, value in make_inputs(case).items()
            }
            launch(run, case, inputs, stores_logits)
            launches += 1
        print(f"{time.perf_counter() - started:7.1f} s  {entry.key}", flush=True)
    print(f"{time.perf_counter() - begun:7.1f} s  {launches} launches, {len(entries)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
