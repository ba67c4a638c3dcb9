"""The command line: ``python -m tests.emulation FOLDER [--defects]``.

FOLDER is what ``build-kernels emulate --out FOLDER`` made. Needs a Hopper GPU, torch and
cuda-python; no compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from router_runtime.device import driver
from router_runtime.errors import RouterRuntimeError
from tests.emulation import defects, suite


def main() -> int:
    """Run what the arguments choose, and return how much of it was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulation", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="entries or defects with this in their name")
    parser.add_argument("--mode", action="append", default=[], help="one mode; repeatable")
    parser.add_argument("--defects", action="store_true", help="kernels with defects instead")
    parser.add_argument("--defect-worker", nargs="+", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.defects:
        folder /= "defects"
    document = json.loads((folder / "emulation.json").read_text())
    record = document["entries"]
    if options.defect_worker:
        defects.worker(folder, record, options.defect_worker)
        return 0
    started = time.perf_counter()

    def echo(line: str) -> None:
        print(line, flush=True)

    driver.initialise()
    echo(f"{driver.device_name(0)}, {driver.device_facts(0)}, torch {torch.__version__}")
    echo(f"model {document['model_sha256'][:16]}, assembler {document['assembler']}")
    if options.defects:
        wrong = defects.run(folder, record, lambda key: options.only in key, echo)
    else:
        work = suite.Suite(folder, record, echo)
        wrong = work.run(lambda entry: options.only in entry.key, suite.modes(options.mode))
        echo("  ".join(f"{name} {number:.0f}" for name, number in work.totals.items()))
    echo(f"{wrong} wrong, {time.perf_counter() - started:.0f} s")
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (OSError, RouterRuntimeError) as error:
        sys.exit(f"{error}")
