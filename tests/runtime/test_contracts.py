"""The runtime against the builder's own contracts and constants.

Contracts are plain Python and need no compiler, so they are read here from the builder's folders:
a parameter that the ops do not give, or give under another name, shows without a GPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build_kernels.catalog import KERNELS, MODELS
from build_kernels.numerics import CONSTANTS
from router_runtime import rows, spec
from router_runtime.kernels import kernels_on
from router_runtime.router import RouterConfig, _CudaDense, _CudaHash, _Weights


def test_constants_are_the_oracles() -> None:
    assert CONSTANTS["RENORM_EPSILON"] == spec.RENORM_EPSILON
    assert CONSTANTS["LOGIT_MAX"] == spec.LOGIT_MAX
    assert CONSTANTS["NAN_LOGIT_BITS"] == spec.NAN_LOGIT_BITS


@pytest.fixture
def catalog(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """Every row of the catalog for sm_90a as an entry with its own contract and no code."""
    gpu.execute = False
    gpu.entries = []
    for kernel in KERNELS:
        module = importlib.import_module(f"build_kernels.kernels.{kernel.name}.contract")
        for model in MODELS if kernel.per_model else (None,):
            for variant in kernel.variants:
                constants = {
                    **(CONSTANTS if kernel.scores else {}),
                    **(model.constants() if model else {}),
                    **variant.constants,
                    **(variant.tuned.get(model.name, {}) if model else {}),
                }
                gpu.entries.append(
                    build.entry(
                        kernel.name,
                        module.contract(constants),
                        model=model.name if model else None,
                        variant=variant.name,
                        constants=constants,
                    )
                )
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_dense_router_binds(catalog: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    config = RouterConfig(model.hidden, model.experts, model.top_k, model.scale)
    weights = _Weights(config, torch.device("cpu"))
    path = _CudaDense(config, weights, kernels_on(0), {})
    weights.write(
        torch.zeros(model.experts, model.hidden, dtype=torch.bfloat16), torch.zeros(model.experts)
    )
    for tokens in (1, path.decode_limit, path.decode_limit + 1):
        path.route(torch.zeros(tokens, model.hidden, dtype=torch.bfloat16))
    symbols = [launch.symbol for launch in catalog.launches]
    assert symbols == ["dense_router_decode"] * 2 + ["activation_topk"]
    for launch in catalog.launches:
        assert launch.arguments["scale"] == model.scale
        assert launch.arguments["renormalize"] == 1
    assert catalog.launches[0].arguments["row_stride"] == model.hidden


def test_hash_router_binds(catalog: Any) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, mode="hash", vocab_size=11)
    path = _CudaHash(config, torch.zeros(11, 6, dtype=torch.int32), kernels_on(0), {})
    path.route(torch.arange(300))
    (launch,) = catalog.launches
    assert (launch.arguments["vocab"], launch.arguments["top_k"]) == (11, 6)
    assert launch.arguments["sentinel"] == -1


@pytest.mark.parametrize("length", [32, 33, 256, 384, 1000, 1024, 1025, 16384, 16385, 65536])
def test_topk_select_serves_every_length(catalog: Any, length: int) -> None:
    rows.topk_select_cuda(torch.zeros(3, length), 32)
    (launch,) = catalog.launches
    assert (launch.arguments["row_length"], launch.arguments["row_stride"]) == (length, length)


@pytest.mark.parametrize("experts", [32, 256, 257, 384, 1024])
def test_activation_topk_serves_every_number_of_experts(catalog: Any, experts: int) -> None:
    rows.activation_topk_cuda(torch.zeros(3, experts), torch.zeros(experts), 6, 2.5, False)
    (launch,) = catalog.launches
    assert (launch.arguments["experts"], launch.arguments["renormalize"]) == (experts, 0)
