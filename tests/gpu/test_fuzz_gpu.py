"""Any bits into every op on the GPU. ``python -m tests.fuzz --rows 10000000`` is the long run."""

from __future__ import annotations

from tests.fuzz.suite import run


def test_any_bits(all_models):
    for seed, constants in enumerate(all_models):
        rows, model = 300_000, tuple(constants[name] for name in ("HIDDEN", "EXPERTS", "TOP_K"))
        rule = {"scoring": constants["SCORING"], "gate_temperature": constants["GATE_TEMPERATURE"]}
        counts = run("cuda", rows, model=model, rule=rule, seed=seed)
        print(model, counts)
        assert min(counts.values()) * len(counts) >= rows
