"""hash_gate in spec.py against its definition in exact fractions; and the suite against kernels
that look up or weigh in a wrong way.
"""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from router_runtime import spec
from router_runtime.evidence import cases as suite
from router_runtime.verification import inputs
from router_runtime.verification.examine import examine
from router_runtime.verification.trial import Trial
from tests.oracle.fp32 import fl32
from tests.oracle.writing import write

CONSTANTS = {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4, "IMAGES": 1}


def test_by_definition():
    rng = random.Random(30)
    hidden, experts, k, vocab, tokens = 64, 7, 3, 5, 12

    def draw(rows):
        numbers = [[rng.gauss(0, 1) * 2.0 ** rng.randrange(-6, 3) for _ in range(hidden)]]
        numbers += [[rng.gauss(0, 0.5) for _ in range(hidden)] for _ in range(rows - 1)]
        return torch.tensor(numbers).bfloat16()

    x, weight = draw(tokens), draw(experts)
    table = torch.tensor([[rng.randrange(experts) for _ in range(k)] for _ in range(vocab)])
    token_ids = torch.tensor([0, 4, 5, -1, 2**40, 3, 3, 1, 2, 0, -(2**63), 4])
    image_bias = torch.tensor([fl32(rng.gauss(0, 1)) for _ in range(experts)])
    images = torch.arange(tokens) % 4 == 1
    padding = torch.arange(tokens) == 5
    weights, ids = spec.hash_gate(
        *(x, token_ids, weight, table, 2.5, True, -9),
        **{"image_mask": images, "image_bias": image_bias, "padding": padding},
    )
    for n, token in enumerate(token_ids.tolist()):
        scores = []
        for row in weight.tolist():
            exact = sum(
                (Fraction(a) * Fraction(b) for a, b in zip(x[n].tolist(), row, strict=True))
            )
            scores.append(spec.expert_scores(torch.tensor(fl32(float(exact)))).item())
        if padding[n]:
            chosen = None
        elif images[n]:
            keys = [fl32(s + b) for s, b in zip(scores, image_bias.tolist(), strict=True)]
            chosen = sorted(range(experts), key=lambda e, keys=keys: (-keys[e], e))[:k]
        else:
            chosen = table[token].tolist() if 0 <= token < vocab else None
        if chosen is None:
            assert ids[n].tolist() == [-9] * k
            assert weights[n].tolist() == [0.0] * k
            continue
        assert ids[n].tolist() == chosen
        total = 0.0
        for e in chosen:
            total = fl32(total + scores[e])
        total = fl32(total + fl32(1e-20))
        assert weights[n].tolist() == [fl32(fl32(scores[e] / total) * 2.5) for e in chosen]


def test_a_repeated_expert_counts_each_time():
    x, weight = torch.ones(1, 64).bfloat16(), torch.ones(4, 64).bfloat16()
    table = torch.tensor([[2, 2, 2, 2]])
    weights, ids = spec.hash_gate(x, torch.tensor([0]), weight, table, 1.0)
    assert ids.tolist() == [[2, 2, 2, 2]]
    assert weights.tolist() == [[0.25] * 4]


def test_a_nan_logit_weighs_nothing():
    x, weight = torch.ones(1, 64).bfloat16(), torch.ones(3, 64).bfloat16()
    x[0, 0], weight[1, 0] = torch.inf, 0  # inf * 0
    weights, _ = spec.hash_gate(x, torch.tensor([0]), weight, torch.tensor([[1, 0]]), 1.0)
    assert weights.tolist() == [[0.0, 1.0]]


def correct(given, **changes):
    given = {**given, **changes}
    rows = torch.arange(len(given["hidden_states"]))
    return spec.hash_gate(
        *(given["hidden_states"], given["token_ids"], given["weight"], given["table"]),
        *(given["scale"], bool(given["renormalize"]), given["sentinel"]),
        image_mask=given.get("image_mask"),
        image_bias=given.get("image_bias"),
        given_ids=given.get("given_ids"),
        given_mask=given.get("given_mask"),
        padding=spec.padding_rows(rows, given.get("is_padding"), given.get("num_valid_tokens")),
    )


def uniform(given):
    weights, ids = correct(given)
    return torch.where(weights > 0, weights.sum(dim=1, keepdim=True) / 4, weights), ids


def shifted_rows(given):
    return correct(given, weight=given["weight"].roll(1, dims=0))


def sorted_rows(given):
    return correct(given, table=given["table"].sort(dim=1).values)


def truncated(given):
    return correct(given, token_ids=given["token_ids"].int())


def clamped(given):
    return correct(given, token_ids=given["token_ids"].clamp(0, len(given["table"]) - 1))


def sentinel_ignored(given):
    return correct(given, sentinel=-1)


def weights_of_strangers(given):
    """Weights left as they are where there is no expert."""
    weights, ids = correct(given)
    return torch.where((ids == given["sentinel"]) & (weights == 0), 0.25, weights), ids


def images_looked_up(given):
    return correct(given, image_mask=None)


def image_bias_in_the_weights(given):
    weights, ids = correct(given)
    if "image_mask" not in given:
        return weights, ids
    bias = given["image_bias"][ids.clamp(min=0).long()].nan_to_num().abs()
    return torch.where(given["image_mask"].unsqueeze(1), weights + bias, weights), ids


def text_selected_too(given):
    if "image_mask" not in given:
        return correct(given)
    return correct(given, image_mask=torch.ones_like(given["image_mask"]))


def bf16_logits(given):
    return correct(given, hidden_states=given["hidden_states"] * 1.01)


def unscaled(given):
    return correct(given, scale=1.0)


def never_renormalised(given):
    return correct(given, renormalize=0)


def problems(outputs):
    for case in suite.cases("hash_gate", CONSTANTS, {"tokens": (1, 64)}):
        given = inputs.make_inputs(case)

        def run(given, values, ids, **more):
            weights, chosen = outputs(given)
            found = [weights, chosen]
            if "expert_map" in given:
                none = chosen == given["sentinel"]
                known = torch.where(none, torch.full_like(chosen, -1), chosen)
                rows = torch.arange(len(chosen))
                maps = given["expert_map"], given["replica_counts"]
                order = given["replica_start"], given["replica_step"]
                found[1:] = spec.physical_ids(known, rows, *maps, given["sentinel"], *order), chosen
            write(given, found, values, ids, **more)

        found = examine(Trial(case, given, "cpu"), run, 64).problems
        if found:
            return found
    return ()


@pytest.mark.parametrize(
    "mutant",
    [
        *(uniform, shifted_rows, sorted_rows, truncated, clamped, sentinel_ignored),
        *(weights_of_strangers, images_looked_up, image_bias_in_the_weights, text_selected_too),
        *(bf16_logits, unscaled, never_renormalised),
    ],
)
def test_wrong_kernels_are_caught(mutant):
    assert problems(mutant)


def test_a_correct_kernel_passes():
    assert problems(correct) == ()


def padding_ignored(given):
    return correct(given, is_padding=None, num_valid_tokens=None)


def test_ignored_padding_is_caught():
    assert problems(padding_ignored)


def test_dependence_on_neighbours_is_caught():
    def outputs(given):
        weights, ids = correct(given)
        if given["hidden_states"].isnan().any():
            weights.view(torch.int32)[:, 0] ^= 1
        return weights, ids

    assert any("depend on its batch" in problem for problem in problems(outputs))


def test_images_are_asked_only_of_what_declares_them():
    plain = suite.cases("hash_gate", CONSTANTS | {"IMAGES": 0}, {})
    assert not any(case.sizes["images"] for case in plain)
    assert any(case.sizes["images"] for case in suite.cases("hash_gate", CONSTANTS, {}))
