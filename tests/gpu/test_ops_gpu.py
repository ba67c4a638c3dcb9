"""The ops and the Router against the oracle, with the cases of the suite, and at the edges of what
an op accepts.
"""

from __future__ import annotations

import math

import pytest
import torch

from router_runtime import Router, RouterConfig, register_router, spec, unregister_router
from router_runtime.evidence import cases as suite
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.judge import judge
from router_runtime.verification.prng import Random
from router_runtime.verification.reference import Oracle

#: Sizes for which the cases are drawn: those that the kernels of these names serve. The op
#: topk_select takes longer rows and a larger k.
SELECT_LIMITS = {"row_length": (1, 65536), "top_k": (1, 32)}
ACTIVATION_LIMITS = {"experts": (1, 1024), "top_k": (1, 32)}


def on_gpu(rows):
    """A copy on the GPU with the same row stride."""
    if rows.stride(0) == rows.shape[1] or rows.shape[0] == 1:
        return rows.cuda()
    wide = rows.new_empty(rows.shape[0], rows.stride(0)).cuda()
    wide[:, : rows.shape[1]] = rows.cuda()
    return wide[:, : rows.shape[1]]


def plain(cases):
    """Cases without serving inputs; test_serving_gpu.py has the others."""
    return [case for case in cases if not case.serving]


def check(case, given, outputs):
    verdict = judge(Oracle(case, given), *(output.cpu() for output in outputs))
    assert not verdict.problems, f"{case.name}: {verdict.problems}"


def test_topk_select():
    for case in suite.cases("topk_select", {}, SELECT_LIMITS):
        given = make_inputs(case)
        check(case, given, torch.ops.dsv4.topk_select(on_gpu(given["scores"]), given["top_k"]))


def test_activation_topk():
    for case in plain(suite.cases("activation_topk", {}, ACTIVATION_LIMITS)):
        given = make_inputs(case)
        found = torch.ops.dsv4.activation_topk(
            on_gpu(given["logits"]),
            given["bias"].cuda(),
            given["top_k"],
            given["scale"],
            bool(given["renormalize"]),
        )
        check(case, given, found)


def test_hash_router():
    for case in plain(suite.cases("hash_router", {}, {"top_k": (1, 32)})):
        given = make_inputs(case)
        config = RouterConfig(
            hidden_size=64,
            num_experts=case.sizes["experts"],
            top_k=case.sizes["top_k"],
            routed_scaling_factor=1.5,
            mode="hash",
            vocab_size=case.sizes["vocab"],
            sentinel=case.sizes["sentinel"],
        )
        router = Router(config, table=given["table"], device="cuda")
        router_id = register_router(router)
        token_ids = given["token_ids"].cuda()
        check(case, given, router(token_ids))
        check(case, given, torch.ops.dsv4.hash_router(token_ids, router_id, config.top_k))
        unregister_router(router_id)


def test_dense_router(models):
    """Whatever kernel serves each size, with and without logits."""
    for hidden, experts, top_k in models:
        constants = {"HIDDEN": hidden, "EXPERTS": experts, "TOP_K": top_k}
        for case in plain(suite.cases("dense_router_decode", constants, {"tokens": (1, 1000)})):
            given = make_inputs(case)
            if not given["bias"].isfinite().all():
                continue  # a Router refuses such a bias; the kernels are verified with it
            config = RouterConfig(
                hidden, experts, top_k, case.scale, renormalize=bool(given["renormalize"])
            )
            router = Router(config, weight=given["weight"], bias=given["bias"], device="cuda")
            router_id = register_router(router)
            x = on_gpu(given["hidden_states"])
            check(case, given, router(x))
            check(case, given, router.forward_with_logits(x))
            check(case, given, torch.ops.dsv4.dense_router(x, router_id, experts, top_k))
            check(case, given, torch.ops.dsv4.dense_router_logits(x, router_id, experts, top_k))
            unregister_router(router_id)


def test_no_tokens(make_router):
    router = make_router()
    config = router.config
    table = torch.zeros(8, 6, dtype=torch.int32)
    lookup = Router(
        RouterConfig(64, 16, 6, 1.0, mode="hash", vocab_size=8), table=table, device="cuda"
    )
    empty = torch.empty(0, config.hidden_size, dtype=torch.bfloat16, device="cuda")
    scores = torch.empty(0, 256, device="cuda")
    for weights, ids in (
        router(empty),
        lookup(torch.empty(0, dtype=torch.int64, device="cuda")),
        torch.ops.dsv4.topk_select(scores, 6),
        torch.ops.dsv4.activation_topk(scores, torch.zeros(256, device="cuda"), 6, 1.5, True),
    ):
        assert weights.shape == ids.shape == (0, 6)
        assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
        assert weights.is_cuda
        assert ids.is_cuda


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
def test_layouts_of_hidden_states(tokens, make_router, draw, same):
    """A row stride, rows out of order, columns first, an odd address: handled, never wrong."""
    router = make_router()
    hidden = router.config.hidden_size
    x = draw(tokens, hidden)
    expected = router(x)
    wide = torch.full((tokens, hidden + 24), math.nan, dtype=x.dtype, device="cuda")
    wide[:, 8 : hidden + 8] = x
    odd = torch.full((tokens * hidden + 1,), math.nan, dtype=x.dtype, device="cuda")
    odd[1:] = x.flatten()
    layouts = {
        "strided": wide[:, 8 : hidden + 8],
        "every second row": x.repeat_interleave(2, dim=0)[::2],
        "columns first": x.T.contiguous().T,
        "odd address": odd[1:].view(tokens, hidden),
    }
    for name, layout in layouts.items():
        assert torch.equal(layout, x), name
        same(router(layout), expected)
    one = x[:1].expand(tokens, hidden)  # a row stride of zero
    same(router(one), router(one.contiguous()))


def test_layouts_of_rows(same):
    scores, bias = Random(3).normal(65, 257).cuda(), Random(4).normal(257).cuda()
    ops = (
        lambda rows: torch.ops.dsv4.topk_select(rows, 8),
        lambda rows: torch.ops.dsv4.activation_topk(rows, bias, 8, 1.5, True),
    )
    buffer = torch.full((65 * 300 + 1,), math.nan, device="cuda")
    odd = buffer[1:].view(65, 300)[:, 1:258]
    odd.copy_(scores)
    for op in ops:
        expected = op(scores)
        for layout in (odd, scores.T.contiguous().T, scores.repeat_interleave(2, dim=0)[::2]):
            same(op(layout), expected)
        one = scores[:1].expand(65, 257)
        same(op(one), op(one.contiguous()))


def test_strided_token_ids(same):
    table = Random(5).integers(0, 32, 100, 6).int()
    config = RouterConfig(64, 32, 6, 1.0, mode="hash", vocab_size=100)
    router = Router(config, table=table, device="cuda")
    token_ids = Random(6).integers(-20, 120, 400).cuda()
    same(router(token_ids[::4]), router(token_ids[::4].contiguous()))
    found = router(token_ids)
    expected = spec.hash_router(token_ids.cpu(), table, 6)
    same(tuple(output.cpu() for output in found), expected)
    assert (found[1][(token_ids < 0) | (token_ids >= 100)] == -1).all()


def scores_of(logits, scoring):
    """The kernel's scores: with every expert chosen, no bias, no renormalisation and scale 1, the
    weights are the scores in rank order.
    """
    experts = logits.shape[1]
    bias = torch.zeros(experts, device="cuda")
    weights, ids = torch.ops.dsv4.activation_topk(
        logits, bias, experts, 1.0, False, scoring=scoring
    )
    return torch.empty_like(logits).scatter_(1, ids.long(), weights)


#: The absolute error of a score below a logit of -80.
UNDERFLOW = {"sqrtsoftplus": 4e-23, "sigmoid": 2.0**-149}

#: fp32 logits tried in each range below, evenly spaced among all bit patterns of the range.
SAMPLES = 2**24


@pytest.mark.parametrize(
    ("first", "last", "absolute"),
    [
        (0x00000000, 0x42A00000, None),  # 0 to 80, subnormals included
        (0x80000000, 0xC2A00000, None),  # -0 to -80
        (0xC2A00001, 0xC3800000, UNDERFLOW),  # below -80 to -256
        (0x42A00001, 0x7F7FFFFF, None),  # above 80 to FLT_MAX
    ],
    ids=["0..80", "-80..0", "-256..-80", "80..max"],
)
@pytest.mark.parametrize("scoring", UNDERFLOW)
def test_accuracy_of_scores(first, last, absolute, scoring):
    step = max(1, (last - first) // SAMPLES) | 1
    bits = torch.arange(first, last + 1, step, device="cuda")
    bits = torch.cat((torch.tensor([last], device="cuda"), bits))
    bits = bits[: bits.numel() // 32 * 32]
    worst = 0.0
    for part in bits.split(2**22):
        logits = part.to(torch.int32).view(torch.float32).view(-1, 32)
        exact = spec.SCORINGS[scoring](logits)
        found = scores_of(logits, scoring).double()
        assert found.isfinite().all()
        error = (found - exact).abs()
        allowed = 4e-7 * exact + (absolute[scoring] if absolute else 0.0)
        worst = max(worst, float((error / allowed).max()))
    print(f"{bits.numel()} logits, worst error {worst:.3f} of the allowed one")
    assert worst <= 1
