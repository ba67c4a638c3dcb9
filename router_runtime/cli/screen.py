"""The doctor's report as text that fits one screen."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from router_runtime.cli.decisions import RouterDecision, RowOpDecision
from router_runtime.cli.report import Device, Diagnosis, Problem

WIDTH = 110
_LABEL = 12

#: A limit that no tensor reaches.
_UNLIMITED = 2**31 - 1


def lines(found: Diagnosis) -> Iterator[str]:
    """The report, line by line. Every token range has a line, if a GPU is here or the devices are
    all of one target. For imagined devices of several targets, there is one line for each kernel
    and the models that it serves alike.
    """
    software = found.software
    yield _labelled(
        "versions",
        f"router_runtime {software.router_runtime}, python {software.python}, "
        f"torch {software.torch or 'not installed'}, "
        f"cuda-bindings {software.cuda_bindings or 'not installed'}",
    )
    yield _labelled(
        "driver", "none" if software.driver is None else f"serves CUDA {software.driver}"
    )
    if found.artifacts is not None:
        artifacts = found.artifacts
        required = f"required: {artifacts.signature}" if artifacts.signature else "not required"
        yield _labelled("artifacts", artifacts.folder)
        yield _labelled(
            "",
            f"{artifacts.entries} entries, {artifacts.intact} cubins match their digest, "
            f"signature {required}",
        )
    if found.evidence is not None:
        evidence = found.evidence
        counts = ", ".join(f"{count} {name}" for name, count in evidence.statuses.items())
        yield _labelled("evidence", f"{counts}; {evidence.stale_records} stale records")
    if found.accept is not None:
        yield _labelled("decisions", f"for Router(..., accept={found.accept!r})")
    here = any(device.indices for device in found.devices)
    brief = not here and len({device.target for device in found.devices}) > 1
    if brief:
        yield "no GPU here: decisions for a device of each target (one in full: --target TARGET)"
    yield from _devices(found.devices, brief)
    yield "problems" if found.problems else "no problems"
    for problem in found.problems:
        yield from _problem(problem)


def serving(found: Diagnosis) -> Iterator[str]:
    """Yield what serves by default on the GPUs that are here, by the evidence as it is now, and
    what nothing serves, with the next command.
    """
    yield ""
    yield "what serves by default now:"
    yield from _devices(found.devices, brief=False)
    for problem in found.problems:
        if problem.severity == "error":
            yield from _problem(problem)


def _devices(devices: Iterable[Device], brief: bool) -> Iterator[str]:
    """Every device, and what serves there once for all that follow each other and do not differ:
    the members of a family, as a rule.
    """
    for _, group in itertools.groupby(devices, lambda each: (each.routers, each.row_ops)):
        alike = tuple(group)
        yield from _heads(alike)
        yield from _served(alike[0], brief)


def _heads(devices: Iterable[Device]) -> Iterator[str]:
    """A line for each device that is here, and one for all that one target is made for."""
    for (name, indices), group in itertools.groupby(
        devices, lambda each: (each.name, each.indices)
    ):
        alike = tuple(group)
        numbers = [
            f"{major}.{minor}" for major, minor in (each.compute_capability for each in alike)
        ]
        facts = f"compute capability {' or '.join(numbers)}"
        if indices:
            facts += f", {alike[0].multiprocessors} multiprocessors"
        where = ", ".join(f"cuda:{index}" for index in indices)
        yield f"{f'{where} ' if where else ''}{name} ({facts})"


def _served(device: Device, brief: bool) -> Iterator[str]:
    rows = _brief_rows(device.routers) if brief else _range_rows(device.routers)
    yield from _table(list(rows))
    if device.row_ops:
        text = "; ".join(_row_op(row_op) for row_op in device.row_ops)
        yield from textwrap.wrap(
            text, WIDTH, initial_indent="  row ops: ", subsequent_indent="    "
        )


def _range_rows(routers: Iterable[RouterDecision]) -> Iterator[tuple[str, ...]]:
    """One row for each token range of each router."""
    for router in routers:
        name = router.name
        if not router.ranges:
            yield name, "nothing serves it"
        for each in router.ranges:
            last = each is router.ranges[-1]
            tokens = f"{each.low} to {each.high} tokens"
            if last:
                tokens = f"{each.low} tokens and more" if each.low > 1 else "any number of tokens"
            yield name, tokens, each.kernel, each.variant, each.status
            name = ""


def _brief_rows(routers: Iterable[RouterDecision]) -> Iterator[tuple[str, ...]]:
    """One row for each kernel and model, with and without image tokens together."""
    grouped: dict[str, list[RouterDecision]] = {}
    for router in routers:
        grouped.setdefault(f"{router.kernel}/{'+'.join(router.models)}", []).append(router)
    for name, group in grouped.items():
        ranges = [each for router in group for each in router.ranges]
        kernels = len({each.entry for each in ranges})
        statuses = " and ".join(sorted({each.status for each in ranges}))
        unserved = [router.name for router in group if not router.ranges]
        if not ranges:
            yield name, "nothing serves it"
        else:
            text = f"{kernels} kernel{'s' if kernels > 1 else ''}, {statuses}"
            yield name, text + (f"; nothing serves {unserved[0]}" if unserved else "")


def _row_op(row_op: RowOpDecision) -> str:
    if not row_op.entries:
        return f"nothing serves {row_op.kernel}"
    limits = ", ".join(
        f"{name} to {high}" for name, high in row_op.limits.items() if high < _UNLIMITED
    )
    return f"{row_op.kernel}{f' ({limits})' if limits else ''} {' and '.join(row_op.statuses)}"


def _problem(problem: Problem) -> Iterator[str]:
    yield from textwrap.wrap(
        f"{problem.severity}: {problem.text}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    if problem.next:
        yield f"    next: {problem.next}"


def _labelled(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows with their columns aligned; a shorter row's last column takes the rest of the line."""
    widths: list[int] = []
    for row in rows:
        for column, text in enumerate(row[:-1]):
            if column == len(widths):
                widths.append(0)
            widths[column] = max(widths[column], len(text))
    for row in rows:
        yield "  " + "  ".join(_padded(row, widths)).rstrip()


def _padded(row: tuple[str, ...], widths: Sequence[int]) -> Iterable[str]:
    for column, text in enumerate(row):
        yield text.ljust(widths[column]) if column < len(row) - 1 else text
