"""Tensor-core instructions agree: ``mma.sync`` of the decode kernel and ``wgmma`` of the prefill
forms that can store their logits give the same bits, over more than 1e7 logits of every exponent,
subnormal, cancelled and with the operands' roles swapped. Zero differing bits.
"""

from __future__ import annotations

import pytest
import torch

from router_runtime import Router, RouterConfig
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.cuda_dense import Plan

#: Tokens of one pattern: three models and five patterns make 4e7 logits of each kernel.
TOKENS = 8192


def powers(low, high, *shape, generator):
    exponents = torch.randint(low, high + 1, shape, device="cuda", generator=generator)
    return torch.exp2(exponents.double())


def normal(*shape, generator):
    return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float64)


def make_normal(rows, hidden, generator):
    return normal(rows, hidden, generator=generator)


def make_wide(rows, hidden, generator):
    """Products over 160 binades: most terms of a sum are far below its largest."""
    return make_normal(rows, hidden, generator) * powers(-40, 40, rows, hidden, generator=generator)


def make_rows_of_one_size(rows, hidden, generator):
    """Logits over 200 binades, each from terms of one size."""
    return make_normal(rows, hidden, generator) * powers(-50, 50, rows, 1, generator=generator)


def make_subnormal(rows, hidden, generator):
    """bf16 subnormals beside normal numbers, and sums that are subnormal in FP32."""
    small = powers(-133, -60, rows, 1, generator=generator)
    return make_normal(rows, hidden, generator) * small


def make_cancelling(rows, hidden, generator):
    """Neighbours of opposite sign that leave little of each other."""
    x = make_normal(rows, hidden, generator)
    x[:, 1::2] = -x[:, ::2] * (1 + powers(-8, -3, rows, hidden // 2, generator=generator))
    return x * powers(-20, 20, rows, 1, generator=generator)


def constant(rows, hidden, generator):
    """Weights of one size whose signs repeat: what the hidden states cancel stays cancelled."""
    row = 1 + torch.rand(rows, 1, device="cuda", generator=generator, dtype=torch.float64)
    return row.expand(rows, hidden)


#: Hidden states, and the weights that go with them.
PATTERNS = {
    "normal": (make_normal, make_normal),
    "wide": (make_wide, make_wide),
    "sizes": (make_rows_of_one_size, make_rows_of_one_size),
    "subnormal": (make_subnormal, make_normal),
    "cancelling": (make_cancelling, constant),
}


def kernels(router):
    """Each kernel that can store logits, alone, whatever the batch."""
    backend = router.backend
    own, token_ranges = backend.logits_plan, backend.logits_token_ranges
    launchers = dict(zip((each.entry.key for each in token_ranges), own.launchers, strict=True))
    try:
        for entry in {each.entry.key: each.entry for each in token_ranges}.values():
            low, high = entry.contract.limits["tokens"]
            backend.logits_plan = Plan([TokenRange(low, high, entry)], launchers)
            yield entry.kernel
    finally:
        backend.logits_plan = own


def logits_by_kernel(model, weight, rows):
    """(kernel, logits) of every kernel that serves the model."""
    hidden, experts, top_k = model
    bias = torch.zeros(experts, device="cuda")
    router = Router(
        RouterConfig(hidden, experts, top_k, 1.0), weight=weight, bias=bias, device="cuda"
    )
    return [(kernel, router.forward_with_logits(rows)[2]) for kernel in kernels(router)]


def differing(one, other):
    return int((one.view(torch.int32) != other.view(torch.int32)).sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_agree(models, pattern):
    counts = {"dense_router_decode": 0, "dense_router_prefill": 0}
    for model in models:
        hidden, experts, _ = model
        generator = torch.Generator("cuda").manual_seed(hidden)
        hidden_states, weights = PATTERNS[pattern]
        rows = hidden_states(TOKENS, hidden, generator).bfloat16()
        weight = weights(experts, hidden, generator).bfloat16()
        results = logits_by_kernel(model, weight, rows)
        expected = results[0][1]
        for kernel, logits in results:
            assert differing(logits, expected) == 0, (kernel, model)
            counts[kernel] += logits.numel()
        if pattern == "subnormal":
            tiny = (expected != 0) & (expected.abs() < torch.finfo(torch.float32).tiny)
            assert tiny.any()
        elif pattern == "cancelling":
            sums = rows[:64].double().abs() @ weight.double().abs().t()
            assert (expected[:64].double().abs() < sums * 2.0**-6).float().mean() > 0.5
    # The product's own models alone reach these; five patterns make 3e7 logits.
    assert min(counts.values()) >= TOKENS * sum(experts for _, experts, _ in models)


def test_roles_of_the_operands(models):
    """Whichever matrix is the weights: the logits of A's rows under B are those of B's under A."""
    for model in models:
        hidden, experts, _ = model
        generator = torch.Generator("cuda").manual_seed(experts)
        for make in (make_normal, make_wide, make_rows_of_one_size):
            a, b = (make(experts, hidden, generator).bfloat16() for _ in range(2))
            straight = logits_by_kernel(model, a, b)
            swapped = logits_by_kernel(model, b, a)
            for (kernel, one), (_, other) in zip(straight, swapped, strict=True):
                assert differing(one, other.t().contiguous()) == 0, (kernel, model)
                assert differing(one, straight[0][1]) == 0, (kernel, model)
