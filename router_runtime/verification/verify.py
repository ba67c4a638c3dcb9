"""``router-runtime verify``: the oracle suite against every cubin that this device can load."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from router_runtime.device import driver
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.loader import load_entry
from router_runtime.errors import DriverError, TrustError, explain
from router_runtime.evidence import cases as suite
from router_runtime.evidence import store
from router_runtime.evidence.record import CaseRecord, Record
from router_runtime.evidence.suite import cases_of
from router_runtime.format.advice import build_for_device, runtime
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target
from router_runtime.trust import policy as trust
from router_runtime.verification.examine import Run, examine
from router_runtime.verification.kernel_run import KernelRun, largest_batch, stores_logits
from router_runtime.verification.outcome import CaseBits, EntryOutcome, Outcome
from router_runtime.verification.recording import case_record, examined, keep
from router_runtime.verification.report import entry_row, table
from router_runtime.verification.shared_trials import SharedTrials, sharing_key

Echo = Callable[[str], object]

#: (numerics tag, seed of a case) -> the first entry that ran it, and the digest of its bits.
_Siblings = dict[tuple[str, int], tuple[str, str]]


def run(artifacts: Path, record: bool, echo: Echo, own: Path | None = None) -> Outcome:
    """Verify every entry that the current device can load, and return what was found.

    Args:
        artifacts: The folder of the manifest and its cubins.
        record: Write the evidence of each entry that passes, and remove that of each that fails.
        echo: Called with each line of the report.
        own: The folder of the evidence. Without it: the one that ``ROUTER_RUNTIME_EVIDENCE`` names,
            else ``evidence`` beside the manifest.

    Raises:
        ArtifactError: The evidence is to be recorded and its folder cannot be written.
        DriverError: There is no GPU that torch can use.

    """
    manifest = read_manifest(artifacts)
    folder = store.own_folder(own) or artifacts / store.EVIDENCE_NAME
    if record:
        _require_own_folder(folder, artifacts)
    echo("initialising CUDA: a context, memory and kernel launches on the current GPU")
    driver.initialise(needs_gpu=True)
    if not torch.cuda.is_available():
        raise DriverError(
            explain(
                "GPU",
                expected=f"one that torch {torch.__version__} can use",
                found="none",
                remedy=f"install a torch built for CUDA, or see: {runtime('doctor')}",
            )
        )
    index = torch.cuda.current_device()
    facts = driver.device_facts(index)
    loadable = sorted(
        (
            entry
            for entry in manifest.entries
            if Target.parse(entry.target).runs_on(facts.major, facts.minor)
        ),
        key=sharing_key,
    )
    if record and loadable:
        store.require_writable(folder, artifacts)
    echo(f"{driver.device_name(index)}, {facts}, torch {torch.__version__}")
    echo(f"oracle suite {suite.SUITE_VERSION}, {len(loadable)} entries of {artifacts}")
    if not loadable:
        echo(
            f"expected an entry for compute capability {facts.major}.{facts.minor}, found none; "
            f"{build_for_device(facts.major, facts.minor)}"
        )
        return Outcome(())
    rows: list[tuple[str, ...]] = []
    outcomes: list[EntryOutcome] = []
    siblings: _Siblings = {}
    trials = SharedTrials(f"cuda:{index}")
    for entry in loadable:
        started = time.perf_counter()
        trials.turn_to(entry)
        problems, records, bits = _verify_entry(entry, manifest, artifacts, index, siblings, trials)
        row = entry_row(entry.key, records, time.perf_counter() - started, not problems)
        rows.append(row)
        echo(f"{row[-1]:4}  {entry.key}")
        path = None
        if record:
            made = Record(**examined(entry, manifest, driver.device_name(index), facts, records))
            path = keep(made, not problems, folder, echo)
        outcomes.append(EntryOutcome(entry.key, entry.sha256, tuple(problems), tuple(bits), path))
    echo("")
    for line in table(rows):
        echo(line)
    for outcome in outcomes:
        for problem in outcome.problems:
            echo(f"{outcome.key}: {problem}")
    if record and folder.resolve() not in [each.resolve() for each in store.folders(artifacts)]:
        echo(f"for the runtime to read it: export {store.ENVIRONMENT_VARIABLE}={folder.resolve()}")
    return Outcome(tuple(outcomes))


def _require_own_folder(folder: Path, artifacts: Path) -> None:
    """Raise TrustError if this process requires signed evidence and would write beside it."""
    shipped = artifacts / store.EVIDENCE_NAME
    if trust.policy() is not None and folder.resolve() == shipped.resolve():
        raise TrustError(
            explain(
                f"evidence in {folder}",
                expected="signed evidence, as this process requires",
                found="a record about to be written beside it",
                remedy="name a folder of your own: --evidence DIR",
            )
        )


def _verify_entry(
    entry: Entry,
    manifest: Manifest,
    artifacts: Path,
    index: int,
    siblings: _Siblings,
    trials: SharedTrials,
) -> tuple[list[str], list[CaseRecord], list[CaseBits]]:
    """The problems of an entry, and the records and bits of the cases that ran.

    The entry must give the same bits as every earlier one with its numerics tag; ``siblings`` holds
    the digests of those.
    """
    device = f"cuda:{index}"
    try:
        cases = cases_of(entry.kernel, entry.constants, entry.contract.limits)
        kernel_run: Run = KernelRun(load_entry(entry, manifest, artifacts, index), device)
    except (RuntimeError, ValueError) as error:
        return [str(error)], [], []
    largest, logits = largest_batch(entry), stores_logits(entry)
    problems: list[str] = []
    found: list[CaseRecord] = []
    bits: list[CaseBits] = []
    for case in cases:
        trial = trials.trial(case)
        try:
            verdict = examine(trial, kernel_run, largest, logits)
        except RuntimeError as error:
            # A CUDA error may be sticky: the next launch on this device would fail with it too.
            trials.drop()
            return [*problems, f"{case.name}: {type(error).__name__}: {error}"], found, bits
        problems += [f"{case.name}: {problem}" for problem in verdict.problems]
        if verdict.problems:
            trials.drop()
        else:
            trials.keep(trial)
        if entry.numerics is not None:
            # Cases of equal seeds have the same inputs: a seed follows from what is computed, the
            # sizes of the model and the batch, and the pattern. So kernels of one tag must give the
            # same bits.
            name = (entry.numerics, case.seed)
            sibling, known = siblings.setdefault(name, (entry.key, verdict.bits_sha256))
            if known != verdict.bits_sha256:
                problems.append(f"{case.name}: other bits than {sibling} with the same numerics")
        bits.append(CaseBits(case.name, case.seed, trial.inputs_sha256, verdict.bits_sha256))
        found.append(case_record(trial, verdict))
    return problems, found, bits
