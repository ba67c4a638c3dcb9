"""Routers of every model of the artifacts, each by its own scoring function and gate temperature.

The models of the catalog have one rule. For others, build a folder with a model file and name it:
``ROUTER_RUNTIME_ARTIFACTS=build/kimi-k2 python -m pytest tests/gpu/test_scoring_gpu.py``.
"""

from __future__ import annotations

import pytest
import torch

from router_runtime import Router, RouterConfig, spec
from router_runtime.evidence.suite import cases_of
from router_runtime.format.scoring import scoring_constants
from router_runtime.verification.inputs import make_inputs
from tests.gpu.test_ops_gpu import ACTIVATION_LIMITS, check, on_gpu, plain


def test_activation_topk_by_a_sigmoid():
    constants = scoring_constants("sigmoid", 1.0)
    for case in plain(cases_of("activation_topk", constants, ACTIVATION_LIMITS)):
        given = make_inputs(case)
        arguments = on_gpu(given["logits"]), given["bias"].cuda(), given["top_k"], given["scale"]
        found = torch.ops.dsv4.activation_topk(
            *arguments, bool(given["renormalize"]), scoring="sigmoid"
        )
        check(case, given, found)
        replayed = torch.ops.dsv4.activation_topk_replay(
            arguments[0], found[1], given["scale"], bool(given["renormalize"]), scoring="sigmoid"
        )
        assert torch.equal(replayed[1], found[1])
        assert torch.equal(replayed[0].view(torch.int32), found[0].view(torch.int32))


@pytest.mark.parametrize("mode", ["dense", "hash_gate"])
def test_routers_of_every_rule(all_models, mode):
    for constants in all_models:
        sizes = {name: constants[name] for name in ("HIDDEN", "EXPERTS", "TOP_K")}
        rule = {"scoring": constants["SCORING"], "gate_temperature": constants["GATE_TEMPERATURE"]}
        kernel = "dense_router_decode" if mode == "dense" else "hash_gate"
        own = {**constants, "IMAGES": 0}
        for case in plain(cases_of(kernel, own, {"tokens": (1, 1000)})):
            given = make_inputs(case)
            vocabulary = None if mode == "dense" else case.sizes["vocab"]
            if mode == "dense" and not given["bias"].isfinite().all():
                continue  # a Router refuses such a bias; the kernels are verified with it
            config = RouterConfig(
                *sizes.values(),
                case.scale,
                mode=mode,
                vocab_size=vocabulary,
                renormalize=bool(given["renormalize"]),
                sentinel=case.sizes.get("sentinel", -1),
                **rule,
            )
            x = on_gpu(given["hidden_states"])
            if mode == "dense":
                router = Router(config, weight=given["weight"], bias=given["bias"], device="cuda")
                found = router(x)
                check(case, given, found)
                check(case, given, router.forward_with_logits(x))
                replayed = router(x, given_ids=found[1])
                assert torch.equal(replayed[1], found[1])
                assert torch.equal(replayed[0].view(torch.int32), found[0].view(torch.int32))
            else:
                router = Router(config, weight=given["weight"], table=given["table"], device="cuda")
                check(case, given, router(x, given["token_ids"].cuda()))


def test_dense_scores_have_the_bits_of_activation_topk(all_models):
    """Both languages, on the logits that the dense kernel stores. The op has no temperature: the
    rounded product of step 2 comes before it.
    """
    for constants in all_models:
        hidden, experts, top_k = (int(constants[name]) for name in ("HIDDEN", "EXPERTS", "TOP_K"))
        temperature = float(constants["GATE_TEMPERATURE"])
        config = RouterConfig(
            hidden,
            experts,
            top_k,
            1.5,
            scoring=constants["SCORING"],
            gate_temperature=temperature,
        )
        generator = torch.Generator("cuda").manual_seed(5)
        weight, x = (
            torch.randn(rows, hidden, generator=generator, device="cuda").bfloat16()
            for rows in (experts, 500)
        )
        bias = torch.randn(experts, generator=generator, device="cuda")
        for spread in (2.0**-6, 2.0**-3, 1.0):  # with 1, sigmoids are 0, 1 and anything between
            router = Router(config, weight=weight * spread, bias=bias, device="cuda")
            for tokens in (1, 64, 500):
                weights, ids, logits = router.forward_with_logits(x[:tokens])
                op = torch.ops.dsv4.activation_topk(
                    spec.tempered(logits, temperature),
                    *(bias, top_k, 1.5, True),
                    scoring=config.scoring,
                )
                assert torch.equal(ids, op[1])
                assert torch.equal(weights.view(torch.int32), op[0].view(torch.int32))
