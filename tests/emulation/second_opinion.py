"""Has ``sentryward`` verify the tcgen05 kernels: ``python -m tests.emulation.second_opinion``.

It is a static verifier of PTX: synchronisation, lifetime of tensor memory and barriers, races, in
every schedule of one launch. Needs the toolchain and the packages of ``tests/conformance.lock``; no
GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build_kernels.compile.job import Job
from build_kernels.contracts import declared
from build_kernels.emulation.changes import Code
from build_kernels.emulation.defects import DEFECTS
from build_kernels.emulation.emulate import smallest
from build_kernels.emulation.sources import emulated_jobs, sources
from build_kernels.emulation.statements import Statement, edited
from router_runtime.format.contract import Contract, GridAxis

#: Results with which it says that a kernel is wrong.
FINDINGS = ("not_wellsynced", "potential_race", "invalid_lifecycle")

#: Arguments of the launch; pointers that are not here are null.
_NUMBERS = {"scale": 1.5, "renormalize": 1, "sentinel": 2**32 - 1, "replicas": 1}
_POINTERS = ("packed_weight", "bias", "workspace", "weights_out", "ids_out")
_NAME = re.compile(r"(?<![\w%.$])t(?=\d+\b|<\d+>)")


def without_selection(ptx: str) -> str:
    """Return a kernel that ends when its sums are in shared memory.

    The selection of experts has branches that depend on the sums, which a static verifier cannot
    follow. What it does of the cluster's barriers at its end stays. Registers whose name has no
    percent sign get one, without which the verifier takes them for something else.
    """
    code = Code(ptx)
    statements = code.statements
    if code.form == "turns":
        # The warps that multiply pass the cluster's last barriers elsewhere: these are the same.
        freed = _last(statements, "tcgen05.dealloc.")
        loaded = next(i for i in range(freed, len(statements)) if _is(statements[i], "tcgen05.ld."))
        barriers = [s.name for s in statements[freed:loaded] if _is(s, "barrier.cluster.")]
        end = statements[_last(statements, "griddepcontrol.wait")].end
    else:
        # Every thread has arrived at the cluster's last barrier before it frees tensor memory.
        freed = _last(statements, "tcgen05.dealloc.")
        barriers = ["barrier.cluster.wait"]
        end = next(s.end for s in statements[freed:] if s.kind == "label")
    tail = "".join(f"\n{name};" for name in (*barriers, "ret"))
    renamed = [(m.start(), m.end(), "%e_t") for m in _NAME.finditer(ptx)]
    return edited(ptx, [*renamed, (end, end, tail)])


def _is(statement: Statement, beginning: str) -> bool:
    return statement.kind == "instruction" and statement.name.startswith(beginning)


def _last(statements: tuple[Statement, ...], beginning: str) -> int:
    return max(i for i, statement in enumerate(statements) if _is(statement, beginning))


def request(contract: Contract, hidden: int, tokens: int) -> dict[str, Any]:
    """Return what sentryward is told of a launch: one cluster, or the clusters of one tile."""
    declarations: list[dict[str, Any]] = []
    arguments: list[dict[str, Any]] = []
    for index, parameter in enumerate(contract.parameters):
        name, place = parameter.name, {"parameter": index}
        if parameter.type == "tensormap":
            declarations.append({**place, "type": "tensor_map", "object": name})
        elif name in _POINTERS:
            named = {"type": "pointer", "space": "global", "object": name}
            declarations.append({**place, **named})
        elif parameter.type.startswith("ptr:"):
            arguments.append({**place, "type": "pointer", "value": None})
        else:
            kind = "f32" if parameter.type == "f32" else "u32"
            value = tokens if name == "tokens" else _NUMBERS.get(name, 0)
            arguments.append({**place, "type": kind, "value": value})
    names = [parameter.name for parameter in contract.parameters]
    maps = [
        {
            "parameter": names.index(recipe.parameter),
            "object": recipe.parameter,
            "element_type": recipe.dtype,
            "rank": 2,
            "base_byte_offset": 0,
            "global_shape": [hidden, tokens],
            "box_shape": list(recipe.box),
            "global_strides_bytes": [2 * hidden],
            "element_strides": [1, 1],
            "swizzle": recipe.swizzle,
            "interleave": "none",
            "oob_fill": "zero",
        }
        for recipe in contract.tensor_maps
    ]
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            # Groups of experts share nothing until the selection.
            "grid_dim": [*(_extent(axis, tokens) for axis in contract.grid[:2]), 1],
            "block_dim": list(contract.block),
            "cluster_dim": list(contract.cluster),
            "dynamic_shared_bytes": contract.dynamic_shared_memory,
        },
        "declarations": declarations,
        "arguments": arguments,
        "tma_descriptors": maps,
    }


def _extent(axis: GridAxis, tokens: int) -> int:
    return axis.value if axis.form == "constant" else -(-tokens // axis.divisor) * axis.value


def verified(ptx: str, launch: dict[str, Any], seconds: int, mebibytes: int) -> dict[str, Any]:
    """Return what sentryward says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kernel, described = folder / "kernel.ptx", folder / "input.json"
        kernel.write_text(ptx)
        described.write_text(json.dumps(launch))
        limits = ["--timeout", str(seconds), "--memory-limit-mib", str(mebibytes)]
        result = subprocess.run(
            [sys.executable, "-m", "sentryward", str(kernel), "--input", str(described), *limits],
            stdout=subprocess.PIPE,
            check=False,
        )
    if not result.stdout:
        raise SystemExit("expected an answer of sentryward, found none; next: make second-opinion")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def kernels(defects: bool) -> Iterator[tuple[str, Job, str]]:
    """Return name, job and PTX of each kernel: the project's own, or those with defects."""
    found = sources(emulated_jobs(), 2)
    if not defects:
        for source in found:
            yield source.jobs[0].key, source.jobs[0], without_selection(source.ptx)
        return
    for form, source in smallest(found).items():
        code = Code(without_selection(source.ptx))
        for defect in DEFECTS:
            ptx = defect.inserted(code) if defect.form == form else None
            if ptx is not None:
                yield defect.name, source.jobs[0], ptx


def main() -> int:
    """Verify what the arguments choose, and return how many of the project's kernels are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kernels or defects with this in their name")
    parser.add_argument("--defects", action="store_true", help="kernels with defects instead")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=600, help="for one kernel")
    parser.add_argument("--mebibytes", type=int, default=6000, help="of memory")
    options = parser.parse_args()
    wrong = 0
    for name, job, ptx in kernels(options.defects):
        if options.only not in name:
            continue
        contract, _ = declared(job)
        launch = request(contract, int(job.constants["HIDDEN"]), options.tokens)
        begun = time.perf_counter()
        answer = verified(ptx, launch, options.seconds, options.mebibytes)
        print(f"{answer['result']:18}  {name}  {time.perf_counter() - begun:.0f} s", flush=True)
        for diagnostic in answer.get("diagnostics", ())[:3]:
            print(f"      {diagnostic.get('code')}: {diagnostic.get('message', '')[:200]}")
        wrong += answer["result"] in FINDINGS and not options.defects
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
