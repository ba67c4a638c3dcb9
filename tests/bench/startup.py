"""The time that a process spends before its first token, for one model and device.

Every check of files is part of it.

``python -m tests.bench.startup --model dsv4-flash`` is one fresh process with torch imported, in
which each step is taken once, cold, as a Router and the ops take it; it prints milliseconds as
JSON. The device is imagined and no driver is called: what the driver takes to load the modules is
its own. With ``--signed`` the folder is signed by a throw-away key first, and the signature is
required.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from router_runtime import __version__
from router_runtime.device import artifact_store as artifacts
from router_runtime.device.dispatch import dispatch
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.device.resolve import Request, resolve, status_if_fitting
from router_runtime.errors import DISTRIBUTION
from router_runtime.evidence import status as evidence
from router_runtime.evidence.choice import DENSE
from router_runtime.evidence.store import read_evidence
from router_runtime.format import provenance
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.scoring import CONSTANTS as SCORING
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust

ROOT = Path(__file__).parents[2]

#: Kernels of ops that take no Router: their own first call loads them.
WITHOUT_A_ROUTER = ("activation_topk", "topk_select")

#: The most that all checks together may take.
BAR_MS = 50.0
PROCESSES = 5

STEPS = ("signature", "manifest", "evidence", "resolution", "cubins")


@dataclass(frozen=True, slots=True)
class StartupCell:
    """Milliseconds of one step for one model: median, least and most over fresh processes."""

    model: str
    signed: bool
    step: str
    median_ms: float
    low_ms: float
    high_ms: float


def measure(model: str, folder: Path, capability: tuple[int, int]) -> list[StartupCell]:
    """Every step and their total, without a signature and, where the library for it is, with."""
    cells = []
    signable = importlib.util.find_spec("cryptography") is not None
    for signed in (False, True) if signable else (False,):
        found = [_in_a_process(model, folder, capability, signed) for _ in range(PROCESSES)]
        steps = {step: [times[step] for times in found] for step in STEPS if step in found[0]}
        steps["total"] = [sum(times.values()) for times in found]
        cells += [
            StartupCell(model, signed, step, statistics.median(times), min(times), max(times))
            for step, times in steps.items()
        ]
    return cells


def table(cells: Sequence[StartupCell]) -> list[list[str]]:
    """Rows of text: a model with and without a signature, its steps in columns."""
    if not cells:
        return []
    rows = [["startup", "signed", *STEPS, "total", "bar", "met"]]
    for model, signed in dict.fromkeys((cell.model, cell.signed) for cell in cells):
        by_step = {c.step: c for c in cells if (c.model, c.signed) == (model, signed)}
        figures = [
            f"{by_step[step].median_ms:.1f}" if step in by_step else "-"
            for step in (*STEPS, "total")
        ]
        met = "yes" if by_step["total"].median_ms <= BAR_MS else "NO"
        rows.append([model, "yes" if signed else "no", *figures, f"{BAR_MS:g}", met])
    return rows


def _in_a_process(
    model: str, folder: Path, capability: tuple[int, int], signed: bool
) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.startup", "--model", model]
    command += ["--artifacts", str(folder), "--capability", *map(str, capability)]
    command += ["--signed"] if signed else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def steps(model: str, folder: Path, capability: tuple[int, int]) -> dict[str, float]:
    """Milliseconds of each step, each taken once in this process."""
    times: dict[str, float] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times[step] = (time.perf_counter() - start) * 1e3

    device = DeviceFacts(*capability, MINIMUM_DRIVER, 132, 227 * 1024)
    with timed("manifest"):
        manifest = artifacts.read_manifest(folder)
    with timed("evidence"):
        found = read_evidence(folder)
    known: dict[str, str] = {}
    reading = 0.0

    def status(entry: Entry) -> str:
        nonlocal reading
        if entry.key not in known:
            start = time.perf_counter()
            known[entry.key] = evidence.status(entry, manifest, found, capability)
            reading += (time.perf_counter() - start) * 1e3
        return known[entry.key]

    with timed("resolution"):
        chosen = _chosen(model, manifest, device, status)
    times["evidence"] += reading
    times["resolution"] -= reading
    with timed("cubins"):
        for entry in chosen:
            artifacts.read_cubin(entry, folder)
    return times


def _chosen(
    model: str, manifest: Manifest, device: DeviceFacts, status: Callable[[Entry], str]
) -> list[Entry]:
    """What a Router of the model loads, in every mode."""
    sizes = next(
        entry.constants
        for entry in manifest.entries
        if entry.model == model and entry.kernel in DENSE
    )
    constants = {name: sizes[name] for name in ("HIDDEN", "EXPERTS", "TOP_K", *SCORING)}
    requests = [Request(kernel, constants) for kernel in DENSE]
    dense = dispatch(requests, device, manifest, status_if_fitting(requests, device, status))
    chosen = [each.entry for each in dense.require()]
    taken = (*DENSE, *WITHOUT_A_ROUTER)
    others = {entry.kernel: entry for entry in manifest.entries if entry.kernel not in taken}
    for kernel, one in sorted(others.items()):
        stated = {name: value for name, value in constants.items() if name in one.constants}
        request = Request(kernel, stated)
        found = resolve(request, device, manifest, status_if_fitting([request], device, status))
        chosen += [candidate.entry for candidate in found.candidates if candidate.accepted]
    return chosen


def sign(folder: Path, into: Path) -> tuple[Path, Path]:
    """A public key and an envelope over every file of the folder, by a key that is not kept."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    subjects = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    targets = sorted({entry.target for entry in artifacts.read_manifest(folder).entries})
    statement = provenance.Statement(
        DISTRIBUTION, __version__, tuple(targets), "0" * 40, (), {}, {}, {}, subjects
    )
    payload = provenance.statement_dumps(statement)
    kind = provenance.PAYLOAD_TYPE
    key = Ed25519PrivateKey.generate()
    signature = key.sign(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload)
    envelope, public_key = into / "envelope", into / "key"
    document = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    envelope.write_text(json.dumps(document))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public_key.write_bytes(pem)
    return public_key, envelope


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--artifacts", "folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--capability", type=(int, int), help="Default: of the manifest's first target.")
@click.option("--signed", is_flag=True, help="Require a signature.")
def main(model: str, folder: Path | None, capability: tuple[int, int] | None, signed: bool) -> None:
    import torch  # noqa: F401  what is measured comes after it in every process

    folder = artifacts.find_artifacts(folder).resolve()
    if capability is None:
        first = Target.parse(artifacts.read_manifest(folder).entries[0].target)
        capability = first.major, first.minor
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if signed:
            # In another process: this one is to be as fresh as a server's.
            code = "import sys; from pathlib import Path; from tests.bench.startup import sign; "
            code += "sign(*map(Path, sys.argv[1:]))"
            subprocess.run([sys.executable, "-c", code, folder, scratch], cwd=ROOT, check=True)
            start = time.perf_counter()
            trust.require_signature(Path(scratch, "key"), Path(scratch, "envelope"))
            times["signature"] = (time.perf_counter() - start) * 1e3
        times |= steps(model, folder, capability)
    click.echo(json.dumps(times))


if __name__ == "__main__":
    main()
