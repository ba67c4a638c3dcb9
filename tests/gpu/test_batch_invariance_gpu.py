"""A token's logits, weights and ids are the same bits whatever batch it comes in: every size, row,
neighbour and kernel, every time. Zero differing bits, for every model.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu.each_kernel import each_kernel

#: As many rows as the largest batch; every batch is made of some of them.
POOL = 16384
SMALL = range(1, 131)
LARGE = (131, 255, 256, 257, 512, 1000, 1024, 4096, POOL)


def bits(outputs):
    return tuple(output.view(torch.int32) for output in outputs)


class Difference:
    """Counts differing words on the GPU; only reading the count waits for the GPU."""

    def __init__(self):
        self._count = torch.zeros((), dtype=torch.int64, device="cuda")

    def add(self, found, expected, rows=slice(None)):
        for one, other in zip(bits(found), bits(expected), strict=True):
            assert one.shape == other.shape
            self._count += (one[rows] != other[rows]).sum()

    @property
    def count(self):
        return int(self._count)


class Subject:
    """A router, the pool of rows, and what the router makes of the pool in one batch."""

    def __init__(self, router):
        self.router = router
        hidden = router.config.hidden_size
        generator = torch.Generator("cuda").manual_seed(hidden)
        self.pool = torch.randn(POOL, hidden, device="cuda", generator=generator).bfloat16()
        self.expected = router(self.pool)

    def rows(self, where):
        return tuple(output[where] for output in self.expected)

    def kernels(self):
        """Each way of serving in turn."""
        return each_kernel(self.router)


@pytest.fixture(scope="module")
def subjects(models, make_router):
    return [Subject(make_router(model=model)) for model in models]


def starts(size):
    """Where in the pool a batch begins: its ends, and odd places between."""
    last = POOL - size
    return sorted({0, last, *(place for place in (1, 77, 5003) if place <= last)})


def test_every_batch_size_at_several_rows(subjects):
    for subject in subjects:
        for kernel in subject.kernels():
            difference = Difference()
            for size in (*SMALL, *LARGE):
                for start in starts(size):
                    where = slice(start, start + size)
                    difference.add(subject.router(subject.pool[where]), subject.rows(where))
            assert difference.count == 0, kernel


def test_rows_of_a_batch(subjects):
    """Every token of a batch of 300 at 43 of its rows, each time beside the same neighbours."""
    for subject in subjects:
        for kernel in subject.kernels():
            difference = Difference()
            for shift in range(0, 300, 7):
                order = (torch.arange(300, device="cuda") + shift) % 300
                difference.add(subject.router(subject.pool[order]), subject.rows(order))
            assert difference.count == 0, kernel


def test_neighbours_that_are_not_finite(subjects):
    for subject in subjects:
        for kernel in subject.kernels():
            difference = Difference()
            for size in (2, 3, 8, 9, 16, 33, 64, 65, 100, 128, 129, 130, 1024, 4096, POOL):
                for kept in (0, 1):
                    batch = subject.pool[:size].clone()
                    batch[1 - kept :: 4] = math.nan
                    batch[3 - kept :: 4] = math.inf
                    batch[3 - kept :: 8, ::2] = -math.inf
                    rows = slice(kept, None, 2)
                    expected = subject.rows(slice(0, size))
                    difference.add(subject.router(batch), expected, rows)
            assert difference.count == 0, kernel


def test_repeated_runs(subjects):
    for subject in subjects:
        for kernel in subject.kernels():
            difference = Difference()
            for size, times in ((1, 300), (8, 300), (64, 300), (130, 100), (1024, 50), (POOL, 10)):
                for _ in range(times):
                    found = subject.router(subject.pool[:size])
                    difference.add(found, subject.rows(slice(0, size)))
            assert difference.count == 0, kernel


def test_logits(subjects):
    """Canonical logits too, and storing them changes no weight and no id."""
    for subject in subjects:
        *expected, logits = subject.router.forward_with_logits(subject.pool)
        difference = Difference()
        difference.add(expected, subject.expected)
        for size in (*SMALL, *LARGE):
            for start in starts(size):
                where = slice(start, start + size)
                found = subject.router.forward_with_logits(subject.pool[where])
                difference.add(found, (*subject.rows(where), logits[where]))
        batch = subject.pool[:130].clone()
        batch[1::2] = math.nan
        found = subject.router.forward_with_logits(batch)
        assert (found[2][1::2].view(torch.int32) == 0x7FFFFFFF).all()
        difference.add(found, (*subject.rows(slice(0, 130)), logits[:130]), slice(0, None, 2))
        assert difference.count == 0


def test_the_pool_is_right(subjects):
    """The bits that everything above is compared with are those of a correct router."""
    from router_runtime import spec

    for subject in subjects:
        router, config = subject.router, subject.router.config
        rows = slice(0, 512)
        exact = spec.dense_logits64(subject.pool[rows], router.weight)
        allowed = 2.0**-20 * spec.dense_logits64(subject.pool[rows].abs(), router.weight.abs())
        logits = router.forward_with_logits(subject.pool[rows])[2]
        assert ((logits.double() - exact).abs() <= allowed).all()
        # From these very logits the rest is exact in its ids, and near in its weights.
        expected = spec.activation_topk(
            logits, router.bias, config.top_k, config.routed_scaling_factor
        )
        found = subject.rows(rows)
        assert (found[1] == expected[1]).float().mean() > 0.999
        same = (found[1] == expected[1]).all(dim=1)
        torch.testing.assert_close(found[0][same], expected[0][same], rtol=2e-6, atol=0)
