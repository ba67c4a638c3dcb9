"""The tables that ``router-runtime verify`` prints: one of entries, one of latencies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from router_runtime.evidence.record import CaseRecord
from router_runtime.verification.timing import Timing

_HEADER = ("entry", "cases", "rows", "clear", "reordered", "error/bound", "relative", "s", "result")
_TIMED = ("served by", "tokens", "launches", "Router", "torch.mm", "ratio", "stated", "ratio")


def entry_row(
    key: str, records: Sequence[CaseRecord], seconds: float, passed: bool
) -> tuple[str, ...]:
    """The cells of one entry: totals over its cases, and the worst errors of its weights."""

    def worst(name: str) -> str:
        errors = [case.worst[name] for case in records if name in case.worst]
        return f"{max(errors):.2g}" if errors else "exact"

    return (
        key,
        str(len(records)),
        str(sum(case.rows for case in records)),
        str(sum(case.clear for case in records)),
        str(sum(case.reordered for case in records)),
        worst("weight"),
        worst("weight_relative"),
        f"{seconds:.1f}",
        "pass" if passed else "FAIL",
    )


def table(entry_rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The lines of the table of entries."""
    return _aligned([_HEADER, *entry_rows])


def timing_table(timings: Sequence[Timing]) -> Iterator[str]:
    """The lines of the table of latencies: what was timed, then what could not be."""
    yield "microseconds of a call of a Router; of torch.mm alone, FP32 out; and what the manifest"
    yield "states, which was measured on another GPU or is predicted. Ratio: Router to the other."
    yield from _aligned([_TIMED, *map(_timing_row, timings)])
    for timing in timings:
        if timing.error is not None:
            first = timing.error.partition("\n")[0]
            yield f"{timing.model}, {timing.tokens} tokens: {first}"


def _timing_row(timing: Timing) -> tuple[str, ...]:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def ratio(other: float | None) -> str:
        return figure(timing.router_us / other if timing.router_us and other else None)

    return (
        " ".join(timing.entries) or timing.model,
        str(timing.tokens),
        str(timing.launches),
        figure(timing.router_us),
        figure(timing.torch_mm_us),
        ratio(timing.torch_mm_us),
        figure(timing.stated_us),
        ratio(timing.stated_us),
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines of columns: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *others in rows:
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(cells)
