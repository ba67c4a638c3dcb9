"""The oracle suite and the comparison with siblings, for every emulated entry in every mode."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.emulation.interface import MODES
from router_runtime.device.artifact_store import read_manifest
from router_runtime.device.loader import load_entry
from router_runtime.evidence.cases import Case
from router_runtime.evidence.record import CaseRecord
from router_runtime.evidence.suite import cases_of
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.verification.examine import examine
from router_runtime.verification.kernel_run import stores_logits
from router_runtime.verification.recording import case_record
from router_runtime.verification.shared_trials import SharedTrials, sharing_key
from router_runtime.verification.trial import Trial
from tests.emulation.launches import (
    DEVICE,
    TimedRun,
    differences,
    on_device,
    outputs,
    random_case,
)
from tests.emulation.library import Library, load

#: The mode in which the suite runs whole: its cases with rearranged rows launch a hundred times
#: each, and the other modes run every case without that.
WHOLE = "deep"
#: Token counts of the comparison with siblings, beside the suite's own.
TOKENS = (3, 5, 17, 40, 61, 100, 192, 255, 384, 777)
#: Milliseconds after which a wait does not end.
LIMIT_MS = 4000

Echo = Callable[[str], object]
Record = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Outcome:
    """One emulated entry in one mode: whether anything was wrong, and what is recorded of the cases
    that ran to their end.
    """

    mode: str
    wrong: bool
    cases: tuple[CaseRecord, ...]


#: Called with an emulated entry and its outcomes, one for each mode that it ran in.
Finished = Callable[[Entry, Sequence[Outcome]], object]


def ignored(entry: Entry, outcomes: Sequence[Outcome]) -> None:
    """Do nothing with the outcomes of an entry."""


class Suite:
    """Examines the emulated entries of a folder."""

    def __init__(self, folder: Path, record: Record, echo: Echo) -> None:
        self._folder, self._echo = folder, echo
        self._manifest: Manifest = read_manifest(folder)
        self._record = record
        self._trials = SharedTrials(DEVICE)
        #: (entry, case's seed) -> digest of the bits.
        self._expected: dict[tuple[str, int], str] = {}
        self._siblings: dict[str, TimedRun] = {}
        self.totals: dict[str, float] = {}

    def entries(self, chosen: Callable[[Entry], bool]) -> list[Entry]:
        """Return the emulated entries that are chosen, those that share inputs together."""
        entries = [e for e in self._manifest.entries if e.key in self._record and chosen(e)]
        return sorted(entries, key=lambda entry: (*sharing_key(entry), entry.key))

    def run(
        self,
        chosen: Callable[[Entry], bool],
        modes: Sequence[str],
        finished: Finished = ignored,
    ) -> int:
        """Return how many (entry, mode) pairs are wrong. ``finished`` is called after each entry,
        also after one that ended the run.
        """
        wrong = 0
        for entry in self.entries(chosen):
            self._trials.turn_to(entry)
            kernel, library = load(entry, self._manifest, self._folder, 0)
            run = TimedRun(kernel)
            outcomes: list[Outcome] = []
            for mode in modes:
                try:
                    outcomes.append(self._one(entry, run, library, mode))
                except RuntimeError as error:
                    finished(entry, [*outcomes, Outcome(mode, True, ())])
                    raise SystemExit(
                        f"FAIL  {entry.key}  {mode}: {error}; the CUDA context is lost, next: the "
                        "others one by one, with --only"
                    ) from error
            finished(entry, outcomes)
            wrong += sum(outcome.wrong for outcome in outcomes)
        return wrong

    def _one(self, entry: Entry, run: TimedRun, library: Library, mode: str) -> Outcome:
        """Examine one entry in one mode, print and return what was found. Raises RuntimeError if
        CUDA no longer answers.
        """
        started, launches = time.perf_counter(), run.launches
        library.start(mode, LIMIT_MS)
        problems: list[str] = []
        cases = list(self._cases(entry, mode))
        records: list[CaseRecord] = []
        for case in cases:
            found, record = self._examined(entry, run, case)
            problems += found
            records.append(record)
            if len(problems) > 20:
                break
        tokens = self._compared(entry, run, problems)
        seconds = run.seconds()
        report = library.report()
        rows = sum(record.rows for record in records)
        bad = bool(problems or report.errors)
        counts = "  ".join(f"{name} {number}" for name, number in report.counts.items())
        self._echo(
            f"{'FAIL' if bad else 'pass'}  {entry.key}  {mode}  cases {len(cases)} rows {rows}  "
            f"token counts {tokens}  launches {run.launches - launches}  GPU {seconds:.2f} s  "
            f"all {time.perf_counter() - started:.1f} s\n      {counts}"
        )
        for kind, text in report.errors.items():
            self._echo(f"      error {kind}: {text}")
        for problem in problems[:8]:
            self._echo(f"      {problem}")
        if len(problems) > 8:
            self._echo(f"      and {len(problems) - 8} more")
        for name in ("mmas", "commits", "loads"):
            self.totals[name] = self.totals.get(name, 0) + report.counts[name]
        self.totals["GPU seconds"] = self.totals.get("GPU seconds", 0) + seconds
        return Outcome(mode, bad, tuple(records))

    def _cases(self, entry: Entry, mode: str) -> Iterator[Case]:
        for case in cases_of(entry.kernel, entry.constants, entry.contract.limits):
            yield case if mode == WHOLE else dataclasses.replace(case, variations=False)

    def _examined(self, entry: Entry, run: TimedRun, case: Case) -> tuple[list[str], CaseRecord]:
        """Return the problems of a case, the bits of the sibling included, and what is recorded."""
        once = dataclasses.replace(case, variations=False)
        kept = self._trials.trial(once)
        # Drawing inputs and computing the reference takes longer than the launches: once for all.
        trial = copy.copy(kept)
        trial.case = case
        largest = entry.contract.limits["tokens"][1]
        verdict = examine(trial, run, largest, stores_logits(entry))
        problems = [f"{case.name}: {problem}" for problem in verdict.problems]
        sibling = self._sibling(entry, case.sizes["tokens"])
        if sibling is not None:
            problems += self._other_bits(kept, verdict.bits_sha256, sibling, largest)
        if problems:
            self._trials.drop()
        else:
            self._trials.keep(kept)
        return problems, case_record(trial, verdict)

    def _other_bits(
        self, trial: Trial, bits_sha256: str, sibling: Entry, largest: int
    ) -> Iterator[str]:
        """Yield what differs from a sibling in a case, and what is wrong with the sibling."""
        name, key = trial.case.name, (sibling.key, trial.case.seed)
        if key not in self._expected:
            theirs = examine(trial, self._siblings[sibling.key], largest, stores_logits(sibling))
            yield from (f"{name}: {sibling.key} itself: {problem}" for problem in theirs.problems)
            self._expected[key] = theirs.bits_sha256
        if bits_sha256 != self._expected[key]:
            yield f"{name}: other bits than {sibling.key}"

    def _compared(self, entry: Entry, run: TimedRun, problems: list[str]) -> int:
        """Compare weights, ids and logits with a sibling's; return how many token counts there
        were.
        """
        low, high = entry.contract.limits["tokens"]
        compared = 0
        for tokens in TOKENS:
            sibling = self._sibling(entry, tokens)
            if sibling is None or not low <= tokens <= high:
                continue
            compared += 1
            case = random_case(entry, tokens)
            inputs = on_device(case)
            both = stores_logits(entry) and stores_logits(sibling)
            expected = outputs(case, self._siblings[sibling.key], inputs, both)
            found = outputs(case, run, inputs, both)
            for name, text in differences(found, expected).items():
                problems.append(f"{tokens} tokens, {name} of {sibling.key}: {text}")
        return compared

    def _sibling(self, entry: Entry, tokens: int) -> Entry | None:
        """Return the loaded entry for sm_90a of the same model that serves this many tokens, if
        there is one.
        """
        for other in self._manifest.entries:
            low, high = other.contract.limits["tokens"]
            same = other.model == entry.model and other.numerics == entry.numerics
            if same and other.key not in self._record and low <= tokens <= high:
                if other.key not in self._siblings:
                    kernel = load_entry(other, self._manifest, self._folder, 0)
                    self._siblings[other.key] = TimedRun(kernel)
                return other
        return None


def modes(names: Sequence[str]) -> list[str]:
    """Return the modes of these names; all of them where there are none."""
    for name in names:
        if name not in MODES:
            raise SystemExit(f"expected a mode of {', '.join(MODES)}, found {name!r}")
    return list(names or MODES)
