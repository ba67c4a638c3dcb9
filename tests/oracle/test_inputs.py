"""The inputs of the suite are the same bits everywhere: evidence stores their digests."""

from __future__ import annotations

import hashlib

import torch

from router_runtime.evidence.suite import cases_of
from router_runtime.verification import inputs
from router_runtime.verification.prng import Random

MASK = 2**64 - 1


def splitmix64(seed: int, stream: int, index: int) -> int:
    """The generator in Python's own integers, which do not overflow."""
    gamma, first, second = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    z = (seed * gamma + stream * first + (index + 1) * gamma) & MASK
    z = ((z ^ (z >> 30)) * first) & MASK
    z = ((z ^ (z >> 27)) * second) & MASK
    return z ^ (z >> 31)


def test_words_are_splitmix64():
    for seed in (0, 1, 2**47 + 12345):
        random = Random(seed)
        for stream in (1, 2, 3):
            words = random.words(3, 100).flatten().tolist()
            assert [word & MASK for word in words] == [
                splitmix64(seed, stream, index) for index in range(300)
            ]


def test_numbers_are_exact_functions_of_words():
    words = [splitmix64(5, 1, index) for index in range(50)]
    fields = [sum((word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)) for word in words]
    assert Random(5).normal(50).tolist() == [(f - 2 * 0xFFFF) / 2**15 for f in fields]
    assert Random(5).integers(-3, 4, 50).tolist() == [(w >> 24) % 7 - 3 for w in words]
    bits = Random(5).bits(50).view(torch.int32).tolist()
    assert [b & 0xFFFFFFFF for b in bits] == [w & 0xFFFFFFFF for w in words]


def test_normal_is_near_normal():
    sample = Random(9).normal(100_000).double()
    assert abs(float(sample.mean())) < 0.02
    assert abs(float(sample.std()) - 1.1547) < 0.01


def test_every_case_is_reproducible_and_different(subject):
    kernel = subject[0]
    digests = {}
    for case in cases_of(*subject):
        made = inputs.make_inputs(case)
        assert set(made) == set(inputs.make_inputs(case))
        digests[case.name] = inputs.digest(made)
    for case in cases_of(*subject)[::7]:
        assert inputs.digest(inputs.make_inputs(case)) == digests[case.name]
    # Constant patterns aside, no two cases draw the same numbers.
    drawn = [d for n, d in digests.items() if not n.startswith(("equal", "all_nan"))]
    if kernel != "topk_select":
        assert len(set(drawn)) == len(drawn)


def test_inputs_are_pinned():
    """One digest over all small inputs. If this fails on your machine, evidence from elsewhere
    cannot be checked on it; if you changed the inputs on purpose, put the new digest here.
    """
    state = hashlib.sha256()
    shape = {"HIDDEN": 128, "EXPERTS": 16, "TOP_K": 4}
    for subject in (
        ("hash_router", {}, {"top_k": (1, 8)}),
        ("topk_select", {}, {"row_length": (1, 128), "top_k": (1, 8)}),
        ("activation_topk", {}, {"experts": (1, 64), "top_k": (1, 8)}),
        ("dense_router_decode", shape, {"tokens": (1, 4)}),
        ("hash_gate", {**shape, "IMAGES": 1}, {"tokens": (1, 4)}),
    ):
        for case in cases_of(*subject):
            state.update(inputs.digest(inputs.make_inputs(case)).encode())
    assert state.hexdigest() == PINNED


PINNED = "052058f6b57667536999a61f033453bc554075f4e920503abc88cc25f1fc41f5"


def test_digest_sees_values_names_shapes_and_strides():
    base = torch.arange(6, dtype=torch.int32)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.flip(0)},
        {"a": base.reshape(2, 3)},
        {"a": base.long()},
        {"a": base, "n": 1},
        {"a": base, "n": 1.0},
        {"a": torch.arange(8, dtype=torch.int32).reshape(2, 4)[:, :3]},
    ]
    assert len({inputs.digest(variant) for variant in variants}) == len(variants)
