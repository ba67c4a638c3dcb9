"""Any bits into every op on the GPU. ``python -m tests.fuzz --rows 10000000`` is the long run."""

from __future__ import annotations

from tests.fuzz.suite import run


def test_any_bits(models):
    for seed, model in enumerate(models):
        rows = 300_000
        counts = run("cuda", rows, model=model, seed=seed)
        print(model, counts)
        assert min(counts.values()) * len(counts) >= rows
