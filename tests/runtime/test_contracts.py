"""The runtime against the builder's own contracts and constants.

Contracts are plain Python and need no compiler, so they are read here from the builder's folders:
a parameter that the ops do not give, or give under another name, shows without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build_kernels.catalog.models import MODELS
from build_kernels.catalog.targets import DEFAULT_TARGETS
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.plan import plan
from router_runtime import spec
from router_runtime.device.dispatch import dispatch
from router_runtime.device.facts import DeviceFacts
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request
from router_runtime.evidence.choice import DENSE
from router_runtime.routing import row_ops as rows
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cuda_dense import CudaDense
from router_runtime.routing.cuda_hash import CudaHash
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights

DECODE, PREFILL = DENSE


def contract_module(kernel: str) -> Any:
    return importlib.import_module(f"build_kernels.kernels.{kernel}.contract")


def test_constants_are_the_oracles() -> None:
    assert CONSTANTS["RENORM_EPSILON"] == spec.RENORM_EPSILON
    assert CONSTANTS["LOGIT_MAX"] == spec.LOGIT_MAX
    assert CONSTANTS["NAN_LOGIT_BITS"] == spec.NAN_LOGIT_BITS


@pytest.fixture
def catalog(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """Every row of the catalog for sm_90a as an entry with its own contract and no code."""
    gpu.execute = False
    gpu.entries = []
    for job in plan(targets=["sm_90a"]):
        module = contract_module(job.kernel)
        gpu.entries.append(
            build.entry(
                job.kernel,
                module.contract(job.constants),
                model=job.model,
                variant=job.variant,
                constants=job.constants,
                numerics=module.numerics(job.constants) if hasattr(module, "numerics") else None,
                latency=job.latency,
            )
        )
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_dense_router_binds(catalog: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    config = RouterConfig(model.hidden, model.experts, model.top_k, model.scale)
    weights = Weights(config, torch.device("cpu"))
    path = CudaDense(config, weights, kernels_on(0), Selection())
    weight = torch.zeros(model.experts, model.hidden, dtype=torch.bfloat16)
    weights.write({"weight": weight, "bias": torch.zeros(model.experts)})
    # Both kernels serve, as the figures say, and either can serve alone.
    assert {each.entry.kernel for each in path.token_ranges} == {DECODE, PREFILL}
    assert path.token_ranges[0].entry.kernel == DECODE
    for each in path.token_ranges:
        path.route(torch.zeros(each.low, model.hidden, dtype=torch.bfloat16))
    path.route_with_logits(torch.zeros(3, model.hidden, dtype=torch.bfloat16))
    symbols = [launch.symbol for launch in catalog.launches]
    assert symbols == [*(each.entry.symbol for each in path.token_ranges), DECODE]
    for launch in catalog.launches:
        assert launch.arguments["scale"] == model.scale
        assert launch.arguments["renormalize"] == 1
    assert catalog.launches[0].arguments["row_stride"] == model.hidden


@pytest.mark.parametrize("target", DEFAULT_TARGETS)
def test_dense_variants_agree_and_are_measured(target: str) -> None:
    """One numerics tag for all variants of a model, another one for all its tcgen05 variants, and
    figures to choose among them."""
    dense = [job for job in plan(targets=[target]) if job.kernel in (DECODE, PREFILL)]
    assert {job.model for job in dense} == {model.name for model in MODELS}
    for model in MODELS:
        jobs = [job for job in dense if job.model == model.name]
        tags: dict[bool, set[str]] = {}
        for job in jobs:
            tag = contract_module(job.kernel).numerics(job.constants)
            tags.setdefault("tcgen05" in job.variant, set()).add(tag)
        assert all(len(found) == 1 for found in tags.values())
        assert len(set.union(*tags.values())) == len(tags)
        assert (True in tags) == (target != "sm_90a")
        assert all(job.latency for job in jobs)
        # The portable variant serves any number of tokens, whatever else a device can run.
        assert f"{DECODE}/{model.name}/{target}/portable" in {job.key for job in jobs}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("target", ["sm_100a", "sm_103a"])
def test_blackwell_dispatch(build: SimpleNamespace, model: Any, target: str) -> None:
    """Today the portable kernels serve, being verified elsewhere; once this device has verified
    everything, the set with the smaller figures serves every batch; and a caller that names a
    variant gets it.
    """
    entries = [
        build.entry(
            job.kernel,
            contract_module(job.kernel).contract(job.constants),
            model=job.model,
            target=target,
            variant=job.variant,
            constants=job.constants,
            numerics=contract_module(job.kernel).numerics(job.constants),
            latency=job.latency,
        )
        for job in plan(targets=[target], models=[model.name])
        if job.kernel in DENSE
    ]
    device = DeviceFacts(10, int(target[5]), 13000, 148, 227 * 1024)
    shape = {"HIDDEN": model.hidden, "EXPERTS": model.experts, "TOP_K": model.top_k}
    manifest = build.manifest(entries)

    def served(status: Any, **variants: str) -> set[str]:
        requests = [Request(k, shape, variant=variants.get(k)) for k in DENSE]
        token_ranges = dispatch(requests, device, manifest, status).require()
        return {each.entry.variant for each in token_ranges}

    def today(entry: Any) -> str:
        return "source-verified" if entry.variant.startswith("portable") else "unproven"

    assert all(variant.startswith("portable") for variant in served(today))
    verified = served(lambda entry: "verified")
    assert {variant.partition("_")[0] for variant in verified} == {"tcgen05"}
    assert "tcgen05" in verified
    assert served(today, **dict.fromkeys(DENSE, "tcgen05")) == {"tcgen05"}


def test_hash_router_binds(catalog: Any) -> None:
    config = RouterConfig(4096, 256, 6, 1.5, mode="hash", vocab_size=11)
    path = CudaHash(config, Weights(config, torch.device("cpu")), kernels_on(0), Selection())
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
