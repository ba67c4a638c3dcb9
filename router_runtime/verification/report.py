"""The table that ``router-runtime verify`` prints: one row per entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from router_runtime.evidence.record import CaseRecord

_HEADER = ("entry", "cases", "rows", "clear", "reordered", "error/bound", "relative", "s", "result")


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
    """The lines of the table: the first column is aligned left, the others right."""
    rows = [_HEADER, *entry_rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        name, *numbers = row
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join(cells)
