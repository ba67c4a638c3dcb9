"""Which entry of the catalog serves which batch, by the runtime's own rule.

``build-kernels list --dispatch`` prints it, and ``kernels/README.md`` shows it. Nothing is built:
what decides is in the catalog, the kernels' contracts, ``artifacts.lock`` and the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels import lock
from build_kernels.catalog.models import MODELS
from build_kernels.compile import toolchain
from build_kernels.compile.job import Job
from build_kernels.emulation.standing import is_of_another_model, marked
from build_kernels.entries import planned as planned_entry
from build_kernels.evidence import read_records
from build_kernels.plan import plan
from router_runtime.evidence.choice import (
    DENSE,
    Option,
    TokenRange,
    closeness,
    divide,
)
from router_runtime.evidence.ladder import serves, status_rank
from router_runtime.evidence.status import status
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence
from router_runtime.format.manifest import Entry, Manifest

#: The routers whose batches several entries share: name -> the kernels of which one sets the order
#: of sums, and others that may serve if they have it. Of hash_gate, only batches without images.
ROUTERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dense": (DENSE, ()),
    "hash_gate": (("hash_gate",), DENSE[-1:]),
}

#: For an entry that artifacts.lock does not name: no evidence is about it.
_NO_DIGEST = "0" * 64

HEAD = ("model", "router", "tokens", "entry", "form", "MMA")


@dataclass(frozen=True, slots=True)
class Row:
    """What serves one range of batches.

    Attributes:
        model: The model's name.
        router: A name of ``ROUTERS``.
        tokens: The numbers of tokens in words, when batches are divided among all entries as if
            every one were verified.
        entry: The entry that serves the range then.
        status: Its evidence: ``verified``, ``source-verified``, ``emulated`` or ``unproven``.
        by_default: What serves the range today, when only entries with evidence are chosen: "yes"
            if it is ``entry``, else "no: " and the variants that serve, or "nothing".
        stale_model: Whether the entry is ``emulated`` by another model than the checkout's.

    """

    model: str
    router: str
    tokens: str
    entry: Entry
    status: str
    by_default: str
    stale_model: bool = False

    def cells(self) -> tuple[str, ...]:
        """Return the cells below ``HEAD``."""
        form, mma = (str(self.entry.constants.get(name, "-")) for name in ("FORM", "MMA"))
        name = f"{self.entry.kernel}/{self.entry.variant}"
        return self.model, self.router, self.tokens, name, form, mma

    def data(self) -> dict[str, object]:
        """Return the row as data: the cells by their heads, and the evidence."""
        cells = dict(zip((head.lower() for head in HEAD), self.cells(), strict=True))
        evidence = {"status": self.status, "stale_model": self.stale_model}
        return {**cells, **evidence, "by_default": self.by_default}


def rows(target: str, artifacts: Path | None) -> list[Row]:
    """Return what serves each batch of each model of the catalog on a target.

    Args:
        target: Such as sm_90a.
        artifacts: The folder with artifacts.lock and the evidence. None: nothing has evidence.

    Raises:
        BuildError: An unknown target, or a lock or evidence that cannot be read.

    """
    manifest = planned(plan(targets=[target]), artifacts)
    status_of = recorded_status(manifest, artifacts)
    evidence = recorded(artifacts)
    found = []
    for model in MODELS:
        for router, (leading, others) in ROUTERS.items():
            entries = [
                entry
                for entry in manifest.entries
                if (entry.kernel in (*leading, *others) and entry.model == model.name)
                and not entry.constants.get("IMAGES")
            ]

            def option(entry: Entry, rank: int, leading: Collection[str] = leading) -> Option:
                return Option(entry, rank, closeness(entry, ()), entry.kernel in leading)

            accepted = divide([option(entry, 0) for entry in entries])
            default = divide(
                [
                    option(entry, status_rank(status_of(entry)))
                    for entry in entries
                    if serves(status_of(entry))
                ]
            )
            found += [
                Row(
                    model.name,
                    router,
                    _tokens(each),
                    each.entry,
                    status_of(each.entry),
                    _by_default(each, default.token_ranges),
                    is_of_another_model(each.entry, evidence),
                )
                for each in accepted.token_ranges
            ]
    return found


def planned(jobs: Sequence[Job], artifacts: Path | None) -> Manifest:
    """Return the manifest of a plan, with the cubins' digests that artifacts.lock records.

    What can only be read from a built cubin (size, symbol, resources) is empty.
    """
    recorded = lock.read(artifacts / lock.LOCK_NAME).entries if artifacts else {}
    digests = (recorded[job.key].sha256 if job.key in recorded else _NO_DIGEST for job in jobs)
    entries = tuple(map(planned_entry, jobs, digests))
    return Manifest(_NO_DIGEST, toolchain.of_lock(), entries)


def recorded_status(manifest: Manifest, artifacts: Path | None) -> Callable[[Entry], str]:
    """Return the status of each entry on the device of its target where it is best, by the evidence
    in ``artifacts``; None: all are unproven.
    """
    evidence = recorded(artifacts)
    found = {entry.key: status(entry, manifest, evidence, None) for entry in manifest.entries}
    return lambda entry: found[entry.key]


def recorded(artifacts: Path | None) -> Evidence:
    """Return the evidence in ``artifacts``, none if it is None. Raises BuildError for a record that
    is not valid.
    """
    return read_records(None if artifacts is None else artifacts / EVIDENCE_NAME)


def text(found: Sequence[Row]) -> str:
    """Return the rows as a table for a terminal, with the evidence."""
    lines: list[tuple[str, ...]] = [(*HEAD, "status", "by default")]
    lines += [(*row.cells(), marked(row.status, row.stale_model), row.by_default) for row in found]
    return aligned(lines)


def markdown(found: Sequence[Row]) -> str:
    """Return the rows as a table for a page, without the evidence, which is no part of a source."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def aligned(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return lines of cells as columns. ``right``: the columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


def _tokens(found: TokenRange) -> str:
    """A range of tokens in words. The largest batch of an entry is beyond what is measured."""
    if found.high >= 1 << 20:
        return f"{found.low} and more"
    return f"{found.low} to {found.high}" if found.low < found.high else str(found.low)


def _by_default(row: TokenRange, default: Sequence[TokenRange]) -> str:
    if not default:
        return "nothing"
    serving = [each for each in default if each.low <= row.high and row.low <= each.high]
    if (
        serving
        and all(each.entry is row.entry for each in serving)
        and (serving[-1].high >= row.high)
    ):
        return "yes"
    names = [each.entry.variant for each in serving]
    last = default[-1]
    if last.high < row.high:
        names.append(f"{last.entry.variant} in pieces of {last.high}")
    return f"no: {', '.join(dict.fromkeys(names))}"
