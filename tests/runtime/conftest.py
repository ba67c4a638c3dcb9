"""Fixtures of the runtime's tests: synthetic artifacts and a fake driver (tests/fake_driver)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from router_runtime.device import kernels
from router_runtime.device.facts import DeviceFacts
from router_runtime.format.manifest import Entry
from tests.fake_driver import artifacts, contracts
from tests.fake_driver.calls import FakeDriver
from tests.fake_driver.install import installed, serve_cpu_memory
from tests.gpu import entries as gpu_entries


@pytest.fixture
def build() -> SimpleNamespace:
    """The builders of synthetic contracts, entries, manifests and folders."""
    return SimpleNamespace(
        activation=contracts.activation_contract,
        artifacts=artifacts.write_artifacts,
        code=artifacts.code_of,
        dense=contracts.dense_contract,
        entry=artifacts.make_entry,
        gate=contracts.gate_contract,
        hash=contracts.hash_contract,
        indices=contracts.indices_contract,
        numerics=artifacts.NUMERICS,
        prefill=contracts.prefill_contract,
        manifest=artifacts.make_manifest,
        parameters=contracts.parameters,
        select=contracts.select_contract,
        small=artifacts.small_entries,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A fake driver in place of the real one, and none of the runtime's caches."""
    with installed(monkeypatch) as stand_in:
        yield stand_in


@pytest.fixture
def gpu(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The fake driver with a small model's artifacts, all verified, executing on CPU memory."""
    fake.execute = True
    fake.entries = artifacts.small_entries()
    folder = artifacts.write_artifacts(tmp_path / "artifacts", fake.entries)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    monkeypatch.setattr(kernels, "status", lambda *_: "verified")
    serve_cpu_memory(monkeypatch)
    return fake


@pytest.fixture
def every_kernel(build: SimpleNamespace) -> list[Entry]:
    """One entry of each kernel, and a decode kernel for few tokens."""
    model = {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}
    few = build.dense(128, 24, tokens=(1, 32))
    return [
        *build.small(),
        build.entry("dense_router_decode", few, model="other", constants=model, variant="few"),
        build.entry("hash_gate", build.gate(), model="small", constants=model | {"IMAGES": 1}),
        build.entry("topk_indices", build.indices(), variant="block", constants={"SCORE_BYTES": 4}),
    ]


@pytest.fixture
def in_name_only(
    every_kernel: list[Entry],
    build: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that the commands of tests/gpu find and do not use: tensors are on the CPU."""
    folder = build.artifacts(tmp_path / "artifacts", every_kernel)
    monkeypatch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(folder))
    facts = DeviceFacts(9, 0, 13000, 132, 232448)
    driver = SimpleNamespace(initialise=lambda: None, device_facts=lambda _: facts)
    monkeypatch.setattr(gpu_entries, "driver", driver)
    monkeypatch.setattr(gpu_entries, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_entries, "load_entry", lambda entry, *_: entry)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
