"""What must hold for any bit pattern, by property-based tests of spec.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given
from hypothesis import strategies as st

from router_runtime import spec

WORDS = st.integers(0, 2**32 - 1)
#: Patterns at which something changes: zeros, subnormals, infinities, NaNs, edges of exp.
EDGES = st.sampled_from(
    (
        *(0x0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xC2A00000, 0x42A00000, 0x3F800000),
    )
)
SCALES = st.sampled_from((0.0, 1e-30, 1.0, 1.5, 2.5, 1e18))


def from_words(words, shape):
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32).reshape(shape)


@st.composite
def routing_inputs(draw):
    tokens, experts = draw(st.integers(0, 4)), draw(st.integers(1, 40))
    k = draw(st.integers(1, min(experts, 32)))
    word = EDGES if draw(st.booleans()) else st.one_of(WORDS, EDGES)
    words = st.lists(word, min_size=tokens * experts, max_size=tokens * experts)
    bias = st.lists(word, min_size=experts, max_size=experts)
    return (
        from_words(draw(words), (tokens, experts)),
        from_words(draw(bias), (experts,)),
        k,
        draw(SCALES),
        draw(st.booleans()),
    )


@given(routing_inputs())
def test_any_bits_route_safely(inputs):
    logits, bias, k, scale, renormalize = inputs
    weights, ids = spec.activation_topk(logits, bias, k, scale, renormalize)
    assert weights.shape == ids.shape == (logits.shape[0], k)
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


@given(routing_inputs())
def test_ranks_are_ordered(inputs):
    logits, bias, k, scale, renormalize = inputs
    _, ids = spec.activation_topk(logits, bias, k, scale, renormalize)
    keys = spec.selection_keys(spec.expert_scores(logits), bias, logits)
    for row_keys, row in zip(keys.tolist(), ids.tolist(), strict=True):
        assert row == sorted(range(len(row_keys)), key=lambda e: (-row_keys[e], e))[:k]


@given(routing_inputs())
def test_a_token_ignores_its_neighbours(inputs):
    logits, bias, k, scale, renormalize = inputs
    weights, ids = spec.activation_topk(logits, bias, k, scale, renormalize)
    for row in range(logits.shape[0]):
        alone = spec.activation_topk(logits[row : row + 1], bias, k, scale, renormalize)
        assert torch.equal(alone[0], weights[row : row + 1])
        assert torch.equal(alone[1], ids[row : row + 1])


@given(routing_inputs(), st.randoms(use_true_random=False))
def test_renaming_experts_renames_ids(inputs, random):
    """Where no keys tie, the order of experts does not matter."""
    logits, bias, k, scale, renormalize = inputs
    keys = spec.selection_keys(spec.expert_scores(logits), bias, logits)
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    permutation = torch.tensor(order)
    ids = spec.activation_topk(logits, bias, k, scale, renormalize)[1]
    renamed = spec.activation_topk(
        logits[:, permutation], bias[permutation], k, scale, renormalize
    )[1]
    for row in range(logits.shape[0]):
        if len(set(keys[row].tolist())) == logits.shape[1]:
            assert permutation[renamed[row].long()].tolist() == ids[row].tolist()


@given(routing_inputs())
def test_keys_are_never_nan_nor_minus_zero(inputs):
    logits, bias, *_ = inputs
    keys = spec.selection_keys(spec.expert_scores(logits), bias, logits)
    assert not keys.isnan().any()
    assert (keys.view(torch.int32) != -(2**31)).all()


@given(routing_inputs())
def test_topk_select_returns_what_it_was_given(inputs):
    scores, _, k, *_ = inputs
    values, ids = spec.topk_select(scores, k)
    picked = scores.view(torch.int32).gather(1, ids.long())
    assert torch.equal(values.view(torch.int32), picked)
    ranks = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    assert (ranks[:, 1:] <= ranks[:, :-1]).all()


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 9)), max_size=20))
def test_any_token_id_is_in_the_table_or_gets_the_sentinel(token_ids):
    table = torch.arange(7 * 3, dtype=torch.int32).reshape(7, 3)
    weights, ids = spec.hash_router(torch.tensor(token_ids, dtype=torch.int64), table, 3)
    for token, row, weight in zip(token_ids, ids.tolist(), weights.tolist(), strict=True):
        known = 0 <= token < 7
        assert row == (table[token].tolist() if known else [-1] * 3)
        assert (weight == [0.0] * 3) is not known
