"""Routers whose kernels the fake driver of ``conftest.py`` runs, on CPU memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from router_runtime.device.kernels import Kernels, kernels_on
from router_runtime.routing import router


def build_on_the_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a Router with ``device="cpu"`` the kernels of device 0, as one on a GPU has."""

    def kernels_for(device: torch.device, artifacts: Any = None) -> Kernels:
        return kernels_on(0, artifacts)

    monkeypatch.setattr(router, "kernels_for", kernels_for)
