"""Runs the kernels with defects and prints which layer sees each.

A defect can stop a kernel for good or break the process's CUDA context, so they run in a process of
their own (``worker``), which is started again without those that it has run.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from build_kernels.emulation.interface import MODES
from router_runtime.device import driver
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.loader import load_entry
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.verification.kernel_run import stores_logits
from tests.emulation.launches import (
    TimedRun,
    differences,
    on_device,
    outputs,
    random_case,
)
from tests.emulation.library import load

#: Tokens of a launch: the last tile is ragged.
TOKENS = {"once": 60, "turns": 300}
#: Launches in each mode, and milliseconds after which a wait does not end.
REPEATS, LIMIT_MS = 2, 500
#: Seconds without an answer after which a defect's process is stopped. The first answer takes
#: longest: torch is imported and a context is made.
PATIENCE = 30

Record = Mapping[str, Mapping[str, Any]]
#: Mode -> what was seen there: kinds of errors, and ``bits`` where outputs differ.
Seen = dict[str, list[str]]


def run(
    folder: Path, record: Record, chosen: Callable[[str], bool], echo: Callable[[str], object]
) -> int:
    """Run the defects, print the table, and return how many were seen by nothing.

    Each row is printed as soon as it is known, so that a run that is cut short has told something.
    """
    waiting = [key for key in sorted(record) if chosen(key)]
    seen: dict[str, Seen] = {}

    def finished(key: str) -> None:
        waiting.remove(key)
        echo("  ".join(table_row(record[key], seen.get(key, {}))))

    while waiting:
        why = _run_some(folder, tuple(waiting), seen, finished)
        if waiting:
            # The next one took the process with it, perhaps after some of its modes.
            seen.setdefault(waiting[0], {})[f"({why})"] = ["fault"]
            finished(waiting[0])
    rows = [table_row(facts, seen.get(key, {})) for key, facts in record.items() if key in seen]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)))
    missed = [row for row in rows if row[0] in ("MISSED", "FALSE")]
    as_expected = sum(row[0] == "seen" for row in rows)
    echo(
        f"{len(rows)} kernels: {as_expected} seen as expected, "
        f"{sum(row[0] == 'other' for row in rows)} by another layer, "
        f"{sum(row[0] == 'gap' for row in rows)} known gaps not seen, {len(missed)} wrong"
    )
    return len(missed)


def table_row(facts: Mapping[str, Any], seen: Seen) -> tuple[str, str, str, str, str]:
    """Return verdict, defect, expected layer, the layers that saw it, and the modes."""
    found = {kind for kinds in seen.values() for kind in kinds}
    if facts["unwaited"]:
        found.add("translation")
    layer = facts["layer"]
    expected = layer.partition(":")[2] if layer.startswith("error:") else layer.partition(":")[0]
    if facts["defect"].startswith("sound."):
        verdict = "FALSE" if found else "sound"
    elif layer == "none":
        verdict = "other" if found else "gap"
    elif not found:
        verdict = "MISSED"
    else:
        verdict = "seen" if expected in found else "other"
    modes = "; ".join(f"{mode}: {', '.join(kinds) or 'nothing'}" for mode, kinds in seen.items())
    return verdict, facts["defect"], layer, ", ".join(sorted(found)) or "nothing", modes


def _run_some(
    folder: Path,
    keys: Sequence[str],
    seen: dict[str, Seen],
    finished: Callable[[str], None],
) -> str:
    """Run defects in a process until it ends or does not answer. Return which of the two it was.

    ``finished`` is called with every defect that ran in all modes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.emulation", str(folder), "--defect-worker", *keys],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a defect that ends the process prints pages of torch's advice
        text=True,
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    why = "the process ended"
    while True:
        try:
            line = lines.get(timeout=PATIENCE)
        except queue.Empty:
            why = "the kernel does not end"
            process.kill()
            break
        if not line:
            break
        answer = json.loads(line)
        if answer["done"]:
            finished(answer["entry"])
        else:
            seen.setdefault(answer["entry"], {})[answer["mode"]] = answer["seen"]
    process.wait()
    return why


def worker(folder: Path, record: Record, keys: Sequence[str]) -> None:
    """Run defects one after the other, and print a JSON object for each mode of each."""
    driver.initialise()
    torch.zeros(1, device="cuda")
    manifest = read_manifest(folder)
    entries = {entry.key: entry for entry in manifest.entries}
    for key in keys:
        entry, tokens = entries[key], TOKENS[record[key]["form"]]
        case = random_case(entry, tokens)
        inputs = on_device(case)
        sibling = _sibling(manifest, record, entry, tokens)
        both = stores_logits(entry) and stores_logits(sibling)
        reference = TimedRun(load_entry(sibling, manifest, folder, 0))
        expected = outputs(case, reference, inputs, both)
        kernel, library = load(entry, manifest, folder, 0)
        run = TimedRun(kernel)
        for mode in MODES:
            kinds: set[str] = set()
            for _ in range(REPEATS):
                library.start(mode, LIMIT_MS)
                found = outputs(case, run, inputs, both)
                kinds.update(library.report().errors)
                if differences(found, expected):
                    kinds.add("bits")
            print(
                json.dumps({"entry": key, "done": False, "mode": mode, "seen": sorted(kinds)}),
                flush=True,
            )
        print(json.dumps({"entry": key, "done": True}), flush=True)


def _sibling(manifest: Manifest, record: Record, entry: Entry, tokens: int) -> Entry:
    for other in manifest.entries:
        low, high = other.contract.limits["tokens"]
        if other.model == entry.model and other.key not in record and low <= tokens <= high:
            return other
    raise LookupError(f"expected an entry for sm_90a of {entry.model}, found none")
