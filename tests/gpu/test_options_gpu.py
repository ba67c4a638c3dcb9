"""Options on the GPU, beyond the oracle suite and the fuzz suite: every kernel that can serve a
router, and a captured graph whose flag, mask and counts change between its replays.
"""

from __future__ import annotations

import pytest
import torch

from router_runtime import Router, RouterConfig
from router_runtime.verification.prng import Random
from tests.gpu.each_kernel import each_kernel
from tests.gpu.graphs import captured

#: Around every boundary between the kernels and their tiles.
SIZES = (1, 2, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257, 1025, 4096)
POOL = max(SIZES)
VLLM_STEP = 2654435769


class Subject:
    """A dense router with an expert map, and what it gives for a pool of rows."""

    def __init__(self, model):
        hidden, experts, top_k = model
        random = Random(hidden + experts)
        self.router = Router(
            RouterConfig(hidden, experts, top_k, 1.5),
            weight=(random.normal(experts, hidden) * 2.0**-6).bfloat16(),
            bias=random.normal(experts) * 0.125,
            device="cuda",
        )
        self.experts = experts
        copies = torch.arange(experts).unsqueeze(1) + experts * torch.arange(3)
        counts = random.integers(1, 4, experts)
        self.router.set_expert_map(copies, counts, replica_step=VLLM_STEP)
        self.pool = random.normal(POOL, hidden).bfloat16().cuda()
        self.padding = (random.integers(0, 5, POOL) == 0).cuda()
        self.mask = (random.integers(0, 3, POOL) == 0).cuda()
        self.given = random.integers(0, experts, POOL, top_k).int().cuda()
        self.weights, self.physical, self.logical = self.router.forward_mapped(
            self.pool, is_padding=self.padding
        )


@pytest.fixture(scope="module")
def subjects(models):
    return [Subject(model) for model in models]


def loads(ids, size):
    """How often each physical id was chosen."""
    return torch.bincount(ids[ids >= 0].long(), minlength=size).int()


def test_every_kernel_does_the_same(subjects):
    for subject in subjects:
        k, experts = subject.router.config.top_k, subject.experts
        for kernel in each_kernel(subject.router):
            for size in SIZES:
                rows = slice(0, size)
                weights, ids = (
                    torch.full((size, k + 5), -9, dtype=dtype, device="cuda")
                    for dtype in (torch.float32, torch.int32)
                )
                load = torch.zeros(3 * experts, dtype=torch.int32, device="cuda")
                buffer = torch.full((size + 1, 2, k), -9, dtype=torch.int16, device="cuda")
                subject.router.forward_out(
                    subject.pool[rows],
                    weights_out=weights[:, : k + 2],
                    ids_out=ids[:, : k + 2],
                    mapped=True,
                    is_padding=subject.padding[rows],
                    shared_experts=2,
                    shared_weight=0.25,
                    expert_load=load,
                    captured_ids=buffer[:, 1],
                )
                where = f"{kernel}, {size} tokens"
                physical = subject.physical[rows]
                assert torch.equal(weights[:, :k], subject.weights[rows]), where
                assert torch.equal(ids[:, :k], physical), where
                assert torch.equal(buffer[:size, 1], subject.logical[rows].short()), where
                assert torch.equal(load, loads(physical, 3 * experts)), where
                padding = subject.padding[rows]
                for shared in range(2):
                    wanted = torch.where(padding, -1, experts + shared)
                    assert torch.equal(ids[:, k + shared].long(), wanted), where
                    wanted = torch.where(padding, 0.0, 0.25)
                    assert torch.equal(weights[:, k + shared], wanted), where
                untouched = (weights[:, k + 2 :], ids[:, k + 2 :], buffer[:, 0], buffer[size:])
                assert all(bool((each == -9).all()) for each in untouched), where


def test_packed_words_of_every_kernel(subjects):
    for subject in subjects:
        for kernel in each_kernel(subject.router):
            for size in SIZES:
                rows = slice(0, size)
                words = subject.router.forward_packed(
                    subject.pool[rows], mapped=True, is_padding=subject.padding[rows]
                )
                halves = subject.weights[rows].bfloat16().view(torch.int16).int() & 0xFFFF
                wanted = (subject.physical[rows] << 16) | halves
                assert torch.equal(words, wanted), f"{kernel}, {size} tokens"


def test_given_rows_beside_others_in_every_kernel(subjects):
    for subject in subjects:
        plain = subject.router(subject.pool)
        whole = subject.router.replay(subject.pool, subject.given)
        mask = subject.mask.unsqueeze(1)
        wanted = [torch.where(mask, a, b) for a, b in zip(whole, plain, strict=True)]
        for kernel in each_kernel(subject.router):
            for size in SIZES:
                found = subject.router(
                    subject.pool[:size],
                    given_ids=subject.given[:size],
                    given_mask=subject.mask[:size],
                )
                for one, other in zip(found, wanted, strict=True):
                    assert torch.equal(one, other[:size]), f"{kernel}, {size} tokens"


@pytest.mark.parametrize("tokens", [3, 64, 300])
def test_a_captured_graph_follows_flag_mask_and_count(tokens, subjects):
    subject = subjects[0]
    router, k, experts = subject.router, subject.router.config.top_k, subject.experts
    x = subject.pool[:tokens]
    given, mask = subject.given[:tokens].clone(), subject.mask[:tokens].clone()
    flag = torch.ones((), dtype=torch.bool, device="cuda")
    valid = torch.full((1,), tokens, dtype=torch.int32, device="cuda")
    load = torch.zeros(3 * experts, dtype=torch.int32, device="cuda")
    taken = torch.zeros(tokens, k, dtype=torch.int32, device="cuda")
    weights, ids = torch.zeros(tokens, k, device="cuda"), torch.zeros_like(taken)

    def call():
        router.forward_out(
            x,
            weights_out=weights,
            ids_out=ids,
            mapped=True,
            num_valid_tokens=valid,
            given_ids=given,
            given_mask=mask,
            expert_load=load,
            record_load=flag,
            captured_ids=taken,
        )

    graph, _ = captured(call)
    expected = torch.zeros_like(load)
    load.zero_()
    for replay, (recorded, last) in enumerate(
        ((True, tokens), (False, tokens), (True, tokens // 2), (True, 0))
    ):
        flag.fill_(recorded)
        valid.fill_(last)
        mask.copy_(mask.roll(1))
        given.copy_(given.roll(replay, 0))
        graph.replay()
        torch.cuda.synchronize()
        eager = router.forward_mapped(x, num_valid_tokens=valid, given_ids=given, given_mask=mask)
        for one, other in zip((weights, ids, taken), eager, strict=True):
            assert torch.equal(one, other)
        if recorded:
            expected += loads(ids, 3 * experts)
        assert torch.equal(load, expected)
