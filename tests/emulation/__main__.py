"""The command line: ``python -m tests.emulation FOLDER [--defects]``.

FOLDER is what ``build-kernels emulate --out FOLDER`` made. Needs a Hopper GPU, torch and
cuda-python; no compiler. With --record, every entry that passes the suite in every mode gets a
record of emulation, for each cubin whose PTX it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence import store
from router_runtime.format.manifest import Entry
from tests.emulation import defects, suite
from tests.emulation.recording import Recorder


def main() -> int:
    """Run what the arguments choose, and return how much of it was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulation", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="entries or defects with this in their name")
    parser.add_argument("--mode", action="append", default=[], help="one mode; repeatable")
    parser.add_argument("--defects", action="store_true", help="kernels with defects instead")
    parser.add_argument("--record", action="store_true", help="write records of what passes")
    parser.add_argument(
        "--artifacts", type=Path, help="the cubins that the records are about; default: artifacts/"
    )
    parser.add_argument(
        "--evidence",
        type=Path,
        help=f"where --record writes; default: ${store.ENVIRONMENT_VARIABLE}, then beside the "
        "cubins' manifest",
    )
    parser.add_argument("--defect-worker", nargs="+", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record and (options.mode or options.defects):
        parser.error("expected --record without --mode and --defects: a record is about all modes")
    if (options.artifacts or options.evidence) and not options.record:
        parser.error("expected --artifacts and --evidence with --record, found them without it")
    folder = options.folder
    if options.defects:
        folder /= "defects"
    document = json.loads((folder / "emulation.json").read_text())
    if options.defect_worker:
        defects.worker(folder, document["entries"], options.defect_worker)
        return 0
    started = time.perf_counter()

    def echo(line: str) -> None:
        print(line, flush=True)

    driver.initialise()
    echo(f"{driver.device_name(0)}, {driver.device_facts(0)}, torch {torch.__version__}")
    echo(f"model {document['model_sha256'][:16]}, ptxas {document.get('ptxas')}")
    if options.defects:
        wrong = defects.run(folder, document["entries"], lambda key: options.only in key, echo)
    else:
        wrong = _suite(folder, document, options, echo)
    echo(f"{wrong} wrong, {time.perf_counter() - started:.0f} s")
    return wrong


def _suite(
    folder: Path, document: Mapping[str, Any], options: argparse.Namespace, echo: suite.Echo
) -> int:
    """Run the oracle suite, record what passes if that was asked for, and return how many pairs of
    entry and mode are wrong.
    """
    work = suite.Suite(folder, document["entries"], echo)

    def chosen(entry: Entry) -> bool:
        return options.only in entry.key

    finished: suite.Finished = suite.ignored
    if options.record:
        artifacts = find_artifacts(options.artifacts)
        where = store.own_folder(options.evidence) or artifacts / store.EVIDENCE_NAME
        recorder = Recorder(document, artifacts, where, echo)
        recorder.check(entry.key for entry in work.entries(chosen))
        finished = recorder.finished
    wrong = work.run(chosen, suite.modes(options.mode), finished)
    echo("  ".join(f"{name} {number:.0f}" for name, number in work.totals.items()))
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (OSError, RouterRuntimeError) as error:
        sys.exit(f"{error}")
