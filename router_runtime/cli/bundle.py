"""The file that ``verify --bundle`` writes: what one run found on one GPU, to be sent to somebody.

It holds the printed report, the records that were written, the doctor's report after the run and
the latencies (``bench``), both as text and as JSON, and ``bits.json``: for each entry and case the
digests of the inputs and of every bit of the outputs. The same findings give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from router_runtime.cli import screen
from router_runtime.cli.report import Diagnosis
from router_runtime.errors import RouterRuntimeError, explain
from router_runtime.format import system_errors
from router_runtime.format.codec import encode
from router_runtime.verification.outcome import EntryOutcome, Outcome
from router_runtime.verification.report import timing_table
from router_runtime.verification.timing import Timing

#: The earliest time that a zip file can state.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def require_writable(path: Path) -> None:
    """Raise RouterRuntimeError if a bundle cannot be written to ``path``.

    Called before the suite runs, so that no GPU time is spent on findings that are lost.
    """
    if path.suffix != ".zip":
        raise _refusal(path.name)
    with _writing(), tempfile.TemporaryFile(dir=path.parent):
        pass


def write(
    path: Path,
    report: Iterable[str],
    outcome: Outcome,
    diagnosis: Diagnosis,
    timings: Sequence[Timing],
) -> None:
    """Write a bundle; an earlier file of that name is replaced once the new one is complete.

    Args:
        path: Of the zip file.
        report: The lines that the run printed.
        outcome: What the run found.
        diagnosis: The doctor's, after the run.
        timings: The latencies, measured after the run.

    """
    data = _zipped(_contents(report, outcome, diagnosis, timings))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing():
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turn an OSError of the block into RouterRuntimeError."""
    try:
        yield
    except OSError as error:
        raise _refusal(system_errors.found(error)) from error


def _refusal(found: str) -> RouterRuntimeError:
    return RouterRuntimeError(
        explain(
            "bundle",
            expected="the name of a .zip file in a folder that can be written",
            found=found,
            remedy="name another one: --bundle FILE.zip",
        )
    )


def _contents(
    report: Iterable[str], outcome: Outcome, diagnosis: Diagnosis, timings: Sequence[Timing]
) -> Mapping[str, bytes]:
    files = {
        "report.txt": _text(report),
        "doctor.txt": _text(screen.lines(diagnosis)),
        "doctor.json": _json(encode(diagnosis)),
        "bench.txt": _text(timing_table(timings)),
        "bench.json": _json(encode(timings)),
        "bits.json": _json({entry.key: _bits(entry) for entry in outcome.entries}),
    }
    for entry in outcome.entries:
        if entry.record is not None:
            files[f"evidence/{entry.record.name}"] = entry.record.read_bytes()
    return files


def _bits(entry: EntryOutcome) -> Mapping[str, object]:
    return {
        "sha256": entry.sha256,
        "problems": list(entry.problems),
        "cases": {
            case.name: {
                "seed": case.seed,
                "inputs_sha256": case.inputs_sha256,
                "bits_sha256": case.bits_sha256,
            }
            for case in entry.cases
        },
    }


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
