"""Fixtures of the runtime's tests: synthetic artifacts and a fake driver (tests/fake_driver)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from router_runtime.device import kernels
from tests.fake_driver import artifacts, contracts
from tests.fake_driver.calls import FakeDriver
from tests.fake_driver.install import installed, serve_cpu_memory


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
