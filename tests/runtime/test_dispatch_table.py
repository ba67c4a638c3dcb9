"""The builder's table of which entry serves which batch is what the runtime does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

from build_kernels import dispatch as table
from build_kernels.catalog.models import MODELS
from build_kernels.catalog.targets import TARGETS
from build_kernels.plan import plan
from router_runtime.device.dispatch import dispatch, gate_requests
from router_runtime.device.facts import MINIMUM_DRIVER, DeviceFacts
from router_runtime.device.resolve import Request
from router_runtime.evidence.choice import DENSE
from router_runtime.format.manifest import Entry
from router_runtime.format.target import Target

pytestmark = pytest.mark.one_torch


def _verified(entry: Entry) -> str:
    return "verified"


def _portable(entry: Entry) -> str:
    return "source-verified" if entry.variant.startswith("portable") else "unproven"


@pytest.mark.parametrize("status_of", [_verified, _portable])
@pytest.mark.parametrize("target", TARGETS)
def test_the_table_is_what_the_runtime_does(
    target: str, status_of: Callable[[Entry], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "recorded_status", lambda manifest, artifacts: status_of)
    found = table.rows(target, None)
    manifest = table.planned(plan(targets=[target]), None)
    parsed = Target.parse(target)
    device = DeviceFacts(parsed.major, parsed.minor, MINIMUM_DRIVER, 132, 227 * 1024)
    for model in MODELS:
        for router in table.ROUTERS:
            if router == "hash_gate":
                requests = gate_requests(Request(router, model.constants() | {"IMAGES": 0}))
            else:
                requests = tuple(Request(kernel, model.constants()) for kernel in DENSE)
            ranges = dispatch(requests, device, manifest, status_of).token_ranges
            assert ranges
            rows = [row for row in found if (row.model, row.router) == (model.name, router)]
            serving = [each.entry.key for each in ranges]
            if status_of is _verified:
                assert [row.entry.key for row in rows] == serving
                assert {row.by_default for row in rows} == {"yes"}
            else:
                told = [name for row in rows for name in _told(row)]
                serving = [each.entry.variant for each in ranges]
                assert _without_repeats(told) == _without_repeats(serving)


def _told(row: table.Row) -> list[str]:
    """The variants that serve a row's batches by default, as the table says."""
    if row.by_default == "yes":
        return [row.entry.variant]
    return row.by_default.removeprefix("no: ").split(", ")


def _without_repeats(names: Iterable[str]) -> list[str]:
    return [name for name, _ in itertools.groupby(names)]
