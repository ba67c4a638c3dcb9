"""Every kernel that this GPU loads, on small cases of the oracle suite, for compute-sanitizer.

``make sanitize`` runs it under memcheck, racecheck and synccheck in turn. Nothing is judged here:
the suite does that, and under a sanitizer even one large batch takes minutes. So: one case of every
pattern and each combination of serving inputs, and random rows in every number up to
``MOST_ROWS``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch

from router_runtime import driver, suite
from router_runtime.artifacts import find_artifacts, read_manifest
from router_runtime.examine import ROWS
from router_runtime.inputs import make_inputs
from router_runtime.loader import load_entry
from router_runtime.manifest import Target
from router_runtime.suite import Case
from router_runtime.verify import KernelRun

MOST_ROWS = 300
DEVICE = "cuda:0"


def small(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases to run: large rows cost a sanitizer as much as many rows."""
    seen = set()
    for case in cases:
        rows = case.sizes.get("tokens", case.sizes.get("rows", 0))
        if rows > MOST_ROWS:
            continue
        sign = (case.pattern, case.serving, rows if case.pattern == "random" else 0)
        if sign not in seen:
            seen.add(sign)
            yield case


def main() -> int:
    artifacts = find_artifacts()
    manifest = read_manifest(artifacts)
    driver.initialise()
    facts = driver.device_facts(0)
    launches = 0
    for entry in manifest.entries:
        if not Target.parse(entry.target).runs_on(facts.major, facts.minor):
            continue
        run = KernelRun(load_entry(entry, manifest, artifacts, 0), DEVICE)
        stores_logits = any(item.name == "logits_out" for item in entry.contract.parameters)
        for case in small(suite.cases(entry.kernel, entry.constants, entry.contract.limits)):
            inputs = {
                name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
                for name, value in make_inputs(case).items()
            }
            rows, k = inputs[ROWS[case.kernel]].shape[0], case.sizes["top_k"]
            weights = torch.empty(rows, k, device=DEVICE)
            integers = torch.int64 if inputs.get("wide_ids") else torch.int32
            ids, logical_ids = torch.empty(2, rows, k, dtype=integers, device=DEVICE)
            outputs = [weights, ids]
            if stores_logits:
                outputs.append(torch.empty(rows, case.sizes["experts"], device=DEVICE))
            mapped = {"logical_ids": logical_ids} if "expert_map" in inputs else {}
            run(inputs, *outputs, **mapped)
            torch.cuda.synchronize()
            launches += 1
        print(f"{entry.key}", flush=True)
    print(f"{launches} launches")
    return 0 if launches else 1


if __name__ == "__main__":
    sys.exit(main())
