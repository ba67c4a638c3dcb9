"""Compute capability 10.0, 10.3 and 10.7: one target serves all three, each by its own evidence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import router_runtime as rt
from build_kernels import dispatch as table
from build_kernels.catalog.models import MODELS, Model
from build_kernels.plan import plan
from router_runtime import spec
from router_runtime.cli.decisions import (
    DENSE_ROUTER,
    imagined_device,
    router_decisions,
    row_op_decisions,
)
from router_runtime.device import kernels
from router_runtime.device.kernels import kernels_on
from router_runtime.evidence.choice import DENSE
from router_runtime.evidence.ladder import serves
from router_runtime.evidence.record import Record
from router_runtime.evidence.status import status, toolchain_sha256
from router_runtime.evidence.store import EVIDENCE_NAME, Evidence, load_evidence, write_record
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target
from router_runtime.routing import row_ops
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router
from tests.fake_driver.artifacts import make_entry
from tests.fake_driver.calls import FakeDriver
from tests.fake_driver.install import serve_cpu_memory
from tests.runtime import releases
from tests.runtime.routers import build_on_the_fake_gpu

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"
FAMILY, HOPPER = "sm_100f", "sm_90a"
MEMBERS = Target.parse(FAMILY).capabilities
H, E, K, V = 128, 24, 4, 50

#: The largest batch that has to be one launch.
MOST_TOKENS = 65536

every_member = pytest.mark.parametrize(
    "capability", MEMBERS, ids=[f"{major}.{minor}" for major, minor in MEMBERS]
)


@pytest.fixture(scope="module")
def shipped() -> Manifest:
    """The manifest of a default build: what artifacts.lock records."""
    return table.planned(plan(), ARTIFACTS)


@pytest.fixture(scope="module")
def committed() -> Evidence:
    return load_evidence(ARTIFACTS / EVIDENCE_NAME)


@pytest.fixture(scope="module")
def hopper_verified(shipped: Manifest) -> Evidence:
    """A record of every entry for sm_90a, from a device of that target."""
    return Evidence(
        tuple(hopper_record(entry, shipped) for entry in shipped.entries if entry.target == HOPPER)
    )


def hopper_record(entry: Entry, manifest: Manifest) -> Record:
    return releases.record_of(entry, toolchain_sha256=toolchain_sha256(manifest.toolchain))


def with_synthetic_code(entry: Entry) -> Entry:
    """The entry with a cubin that the fake driver has, in place of its own."""
    made = make_entry(
        entry.kernel,
        entry.contract,
        model=entry.model,
        target=entry.target,
        variant=entry.variant,
    )
    names = ("file", "sha256", "size", "symbol", "resources")
    return dataclasses.replace(entry, **{name: getattr(made, name) for name in names})


def status_on(
    capability: tuple[int, int], manifest: Manifest, evidence: Evidence
) -> Callable[[Entry], str]:
    return lambda entry: status(entry, manifest, evidence, capability)


def served(
    capability: tuple[int, int], manifest: Manifest, evidence: Evidence
) -> tuple[dict[tuple[str, bool], Any], dict[str, Any]]:
    """The decision for each router, by its name and whether it selects image tokens, and for each
    row op.
    """
    device = imagined_device(*capability)
    status_of = status_on(capability, manifest, evidence)
    routers = {
        (f"{each.kernel}/{model}", bool(each.constants.get("IMAGES"))): each
        for each in router_decisions(manifest, device, status_of)
        for model in each.models
    }
    row_ops = {each.kernel: each for each in row_op_decisions(manifest, device, status_of)}
    return routers, row_ops


@every_member
def test_every_op_of_every_model_is_served_today(
    shipped: Manifest, committed: Evidence, capability: tuple[int, int]
) -> None:
    """By entries of the family's target that have evidence, and by no others."""
    entries = {entry.key: entry for entry in shipped.entries}
    routers, row_ops = served(capability, shipped, committed)
    assert set(routers) == {
        *((f"{DENSE_ROUTER}/{model.name}", False) for model in MODELS),
        *((f"hash_gate/{model.name}", images) for model in MODELS for images in (False, True)),
    }
    for name, decision in routers.items():
        assert decision.ranges, name
        assert decision.ranges[0].low == 1
        for each in decision.ranges:
            assert entries[each.entry].target == FAMILY
            assert serves(each.status)
    assert set(row_ops) == {"hash_router", "activation_topk", "topk_select", "topk_indices"}
    for each in row_ops.values():
        assert {entries[key].target for key in each.entries} == {FAMILY}
        assert all(map(serves, each.statuses))
    assert row_ops["topk_select"].limits["row_length"] == 65536
    limits = row_ops["topk_indices"].limits
    assert (limits["row_length"], limits["top_k"]) == (2**21, 4096)
    assert row_ops["activation_topk"].limits["experts"] == 1024


def test_no_member_differs_from_another_today(shipped: Manifest, committed: Evidence) -> None:
    first, *others = (served(capability, shipped, committed) for capability in MEMBERS)
    assert others == [first] * 2


@every_member
def test_the_kernels_of_verified_sources_have_evidence(
    shipped: Manifest, committed: Evidence, capability: tuple[int, int]
) -> None:
    """Every entry that sm_90a has too; those with tcgen05 are the others."""
    status_of = status_on(capability, shipped, committed)
    proven = {e.key for e in shipped.entries if e.target == FAMILY and status_of(e) != "unproven"}
    hopper = {(e.kernel, e.model, e.variant) for e in shipped.entries if e.target == HOPPER}
    own = [entry for entry in shipped.entries if entry.target == FAMILY]
    assert proven >= {e.key for e in own if (e.kernel, e.model, e.variant) in hopper}
    assert {e.constants["MMA"] for e in own if e.key not in proven} <= {"tcgen05"}


@pytest.mark.parametrize("recorded", MEMBERS)
def test_what_one_member_recorded_serves_the_others(
    shipped: Manifest, recorded: tuple[int, int]
) -> None:
    """There it is verified, on the others source-verified; the same entries serve everywhere."""
    own = [entry for entry in shipped.entries if entry.target == FAMILY]
    evidence = Evidence(
        tuple(releases.record_of(entry, compute_capability=recorded) for entry in own)
    )
    for capability in MEMBERS:
        status_of = status_on(capability, shipped, evidence)
        expected = "verified" if capability == recorded else "source-verified"
        assert {status_of(entry) for entry in own} == {expected}
        routers, _ = served(capability, shipped, evidence)
        for model in MODELS:
            ranges = routers[f"{DENSE_ROUTER}/{model.name}", False].ranges
            assert {each.status for each in ranges} == {expected}


@every_member
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_portable_entries_serve_every_batch_once_sm_90a_is_verified(
    shipped: Manifest, hopper_verified: Evidence, capability: tuple[int, int], model: Model
) -> None:
    """The default of a user of the family before anything was recorded there: each batch of 1 to
    65536 tokens is one launch of an entry with the sources of a verified one.
    """
    routers, _ = served(capability, shipped, hopper_verified)
    ranges = routers[f"{DENSE_ROUTER}/{model.name}", False].ranges
    assert ranges[0].low == 1
    assert all(after.low == each.high + 1 for each, after in itertools.pairwise(ranges))
    assert ranges[-1].high >= MOST_TOKENS
    assert {each.status for each in ranges} == {"source-verified"}
    assert {each.variant.partition("_")[0] for each in ranges} == {"portable"}
    for each in ranges:
        few = each.high <= 64
        assert each.kernel == ("dense_router_decode" if few else "dense_router_prefill")


def test_a_call_of_any_size_is_one_launch_there(
    shipped: Manifest,
    fake: FakeDriver,
    build: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The catalog's own contracts, in a Router on a fake device of compute capability 10.0, with
    evidence of the sm_90a entries alone.
    """
    model = MODELS[0]
    fake.capability = (10, 0)
    fake.entries = [
        with_synthetic_code(entry)
        for entry in shipped.entries
        if entry.kernel in DENSE and entry.model == model.name
    ]
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)
    for entry in fake.entries:
        if entry.target == HOPPER:
            made = hopper_record(entry, build.manifest(fake.entries))
            write_record(made, folder / EVIDENCE_NAME)
    serve_cpu_memory(monkeypatch)
    build_on_the_fake_gpu(monkeypatch)
    router = Router(
        RouterConfig(model.hidden, model.experts, model.top_k, model.scale),
        weight=torch.zeros(model.experts, model.hidden, dtype=torch.bfloat16),
        bias=torch.zeros(model.experts),
        device="cpu",
        artifacts=folder,
    )
    for tokens in (1, 64, 65, 1000, 4097, MOST_TOKENS):
        fake.launches.clear()
        router(torch.empty(tokens, model.hidden, dtype=torch.bfloat16))
        (launch,) = fake.launches
        assert launch.arguments["tokens"] == tokens


def test_only_the_family_target_reaches_every_member(shipped: Manifest) -> None:
    targets = {entry.target for entry in shipped.entries}
    for capability in MEMBERS:
        assert [each for each in targets if Target.parse(each).runs_on(*capability)] == [FAMILY]


@pytest.fixture
def gpu(
    request: pytest.FixtureRequest,
    gpu: Any,
    build: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """The fake driver as a member of the family, with a small model's artifacts for the family,
    recorded on 10.0. The records decide, not a fixture.
    """
    gpu.capability = request.param
    gate = build.entry(
        "hash_gate",
        build.gate(),
        model="small",
        target=FAMILY,
        constants={"HIDDEN": H, "EXPERTS": E, "TOP_K": K, "IMAGES": 0},
        numerics="gathered",
    )
    gpu.entries = [*build.small(FAMILY), gate]
    folder = build.artifacts(tmp_path / "artifacts", gpu.entries)
    for entry in gpu.entries:
        record = releases.record_of(entry, "B200", compute_capability=(10, 0))
        write_record(record, folder / EVIDENCE_NAME)
    monkeypatch.setattr(kernels, "status", status)
    build_on_the_fake_gpu(monkeypatch)
    return gpu


@pytest.mark.parametrize("gpu", MEMBERS, indirect=True)
def test_every_op_is_executed(gpu: Any) -> None:
    """On a fake device: loaded, launched, and the results are the oracle's."""
    found = {kernels_on(0).status(entry) for entry in gpu.entries}
    assert found == {"verified" if gpu.capability == (10, 0) else "source-verified"}
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(E, H, generator=generator).bfloat16()
    bias = torch.randn(E, generator=generator)
    x = torch.randn(20, H, generator=generator).bfloat16()
    table_ = torch.randint(0, E, (V, K), generator=generator)
    token_ids = torch.randint(0, V, (20,), generator=generator)
    config = RouterConfig(H, E, K, 1.5)
    dense = Router(config, weight=weight, bias=bias, device="cpu")
    hashed = Router(
        RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V), table=table_, device="cpu"
    )
    gated = Router(
        RouterConfig(H, E, K, 1.5, mode="hash_gate", vocab_size=V),
        weight=weight,
        table=table_,
        device="cpu",
    )
    numbers = [rt.register_router(router) for router in (dense, hashed, gated)]
    try:
        expected = spec.dense_router(x, weight, bias, K, 1.5)
        assert_same(rt.dense_router(x, numbers[0], E, K), expected)
        assert_same(rt.dense_router_logits(x, numbers[0], E, K)[:2], expected)
        assert_same(rt.dense_router_replay(x, expected[1], numbers[0], E, K), expected)
        assert_same(
            rt.hash_router(token_ids, numbers[1], K), spec.hash_router(token_ids, table_, K)
        )
        assert_same(
            rt.hash_gate(x, token_ids, numbers[2], E, K),
            spec.hash_gate(x, token_ids, weight, table_, 1.5),
        )
    finally:
        for number in numbers:
            rt.unregister_router(number)
    logits = torch.randn(20, E, generator=generator)
    assert_same(row_ops.topk_select_cuda(logits, K), spec.topk_select(logits, K))
    assert_same(
        row_ops.activation_topk_cuda(logits, bias, K, 1.5, True),
        spec.activation_topk(logits, bias, K, 1.5, True),
    )
    launched = {launch.symbol for launch in gpu.launches}
    assert launched == {entry.kernel for entry in gpu.entries}


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].long(), expected[1].long())
