"""What is logged under ``router_runtime``: at INFO once for each Router, at DEBUG more, and nothing
for a program that does not configure logging.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from router_runtime import Router, RouterConfig
from router_runtime.device import kernels
from router_runtime.routing import row_ops
from tests.runtime.routers import build_on_the_fake_gpu

ROOT = Path(__file__).resolve().parents[2]
H, E, K, V = 128, 24, 4, 50


def make_router(mode: Any = "dense", **options: Any) -> Router:
    config = RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=None if mode == "dense" else V)
    tensors: dict[str, Any] = {
        "dense": {"weight": torch.ones(E, H, dtype=torch.bfloat16), "bias": torch.zeros(E)},
        "hash": {"table": torch.zeros(V, K, dtype=torch.int32)},
    }
    return Router(config, **tensors[mode], device="cpu", **options)


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    assert all(each.name.partition(".")[0] == "router_runtime" for each in caplog.records)
    return [each.getMessage() for each in caplog.records if each.levelno == level]


def test_info_once_for_each_router(
    gpu: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    caplog.set_level(logging.INFO, logger="router_runtime")
    router = make_router()
    (line,) = logged(caplog, logging.INFO)
    assert line.startswith("Router(dense, hidden_size=128, num_experts=24, top_k=4")
    for each in router.token_ranges:
        assert f"{each.entry.key} (verified) for {each.low} to {each.high} tokens" in line
    assert line.endswith(f"evidence of {tmp_path / 'artifacts' / 'evidence'}")
    router(torch.zeros(3, H, dtype=torch.bfloat16))
    router.warmup()
    assert len(caplog.records) == 1
    copy.deepcopy(router)
    make_router("hash")
    lines = logged(caplog, logging.INFO)
    assert lines[1] == line
    assert "hash_router/" in lines[2]
    assert "(verified) for any number of tokens" in lines[2]
    assert len(caplog.records) == 3


def test_info_says_what_the_caller_named(
    gpu: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "status", lambda *_: "unproven")
    caplog.set_level(logging.INFO, logger="router_runtime")
    make_router(variants={"dense_router_decode": "portable"})
    assert "(unproven, named by the caller) for 1 to " in logged(caplog, logging.INFO)[0]


def test_info_says_what_serves_as_emulated(
    gpu: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "status", lambda *_: "emulated")
    caplog.set_level(logging.INFO, logger="router_runtime")
    router = make_router(accept="emulated")
    (line,) = logged(caplog, logging.INFO)
    for each in router.token_ranges:
        assert f"{each.entry.key} (emulated) for {each.low} to " in line


def test_info_of_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="router_runtime")
    make_router()
    (line,) = logged(caplog, logging.INFO)
    assert line.endswith("device='cpu'): computed on the CPU by plain torch, without kernels")


def test_info_once_for_each_row_op(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="router_runtime")
    for _ in range(2):
        row_ops.topk_select_cuda(torch.zeros(3, 9), 2)
    (line,) = logged(caplog, logging.INFO)
    assert line.startswith("topk_select on cpu: topk_select/")
    assert "(verified)" in line


def test_debug_says_what_was_read_decided_and_loaded(
    gpu: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    caplog.set_level(logging.DEBUG, logger="router_runtime")
    router = make_router()
    lines = logged(caplog, logging.DEBUG)
    assert any(line.startswith(f"artifacts {tmp_path / 'artifacts'}: ") for line in lines)
    assert any("dense_router_decode" in line and "[verified]: chosen" in line for line in lines)
    for entry in {each.entry.key: each.entry for each in router.token_ranges}.values():
        assert f"loaded {entry.key}, sha256 {entry.sha256}, on cuda:0" in lines
    router.weight.neg_()
    router(torch.zeros(3, H, dtype=torch.bfloat16))
    assert logged(caplog, logging.DEBUG)[-1] == "followed a change of weight on cpu"


@pytest.mark.parametrize("configured", [False, True])
def test_a_program_that_configures_nothing_sees_nothing(configured: bool) -> None:
    code = (
        "import torch, router_runtime as rt\n"
        "import logging\n"
        f"if {configured}: logging.basicConfig(level=logging.INFO)\n"
        "config = rt.RouterConfig(64, 8, 2, 1.5)\n"
        "weight = torch.zeros(8, 64, dtype=torch.bfloat16)\n"
        "rt.Router(config, weight=weight, bias=torch.zeros(8), device='cpu')\n"
        "logging.getLogger('router_runtime.x').error('an error is no exception')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert ("INFO:router_runtime.routing.router:Router(dense" in done.stderr) == configured
    assert bool(done.stderr) == configured
