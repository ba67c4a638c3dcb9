"""Put the fake driver in the place of the real one for the duration of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from router_runtime.device import driver, kernels
from router_runtime.device.launch import LoadedKernel
from router_runtime.routing import placement, row_kernels
from tests.caches import CACHES
from tests.fake_driver.calls import FakeDriver


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A fake driver that the runtime uses, with all caches of the runtime empty."""
    fake = FakeDriver()
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    monkeypatch.setattr(driver, "_initialised_in", None)
    monkeypatch.setattr(driver, "_contexts", {})
    for module, names in CACHES.items():
        for name in names:
            monkeypatch.setattr(module, name, type(getattr(module, name))())
    driver.tensor_map_encoder.cache_clear()
    yield fake
    driver.tensor_map_encoder.cache_clear()


def serve_cpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the runtime take CPU tensors for tensors of device 0, on stream 7."""

    def kernels_on(index: int | None, artifacts: Any = None) -> kernels.Kernels:
        return kernels.kernels_on(0, artifacts)

    monkeypatch.setattr(row_kernels, "kernels_on", kernels_on)
    monkeypatch.setattr(row_kernels, "refuse_capture", lambda what: None)
    monkeypatch.setattr(placement.Placement, "stream", lambda self: 7)
    monkeypatch.setattr(LoadedKernel, "_check_tensor", lambda *_: None)
