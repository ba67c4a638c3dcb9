"""spec.py against the definition evaluated by other means: exact fractions, 130-digit decimals,
Python's own sort. Nothing here calls torch to compute an expected value.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from router_runtime import spec
from tests.oracle.fp32 import fl32

INF, NAN = math.inf, math.nan
FLT_MAX: float = struct.unpack("f", struct.pack("I", 0x7F7FFFFF))[0]
EPSILON = 1e-20


def fl32_exact(number: Fraction) -> float:
    """The fp32 number nearest to an exact one: any error of float() would be far below half an
    ulp.
    """
    return fl32(float(number))


def score_by_definition(z: float) -> float:
    """sqrt(ln(1 + e^z)) with enough digits that 1 + e^z loses nothing."""
    if math.isnan(z):
        return 0.0
    z = min(max(z, -FLT_MAX), FLT_MAX)
    if z < -1000:
        return 0.0
    if z > 1000:
        return fl32(math.sqrt(z))
    context = Context(prec=130 + int(abs(z)))
    one_plus = context.add(Decimal(1), context.exp(Decimal(z)))
    return fl32(float(context.sqrt(context.ln(one_plus))))


def sigmoid_by_definition(z: float) -> float:
    """1 / (1 + e^-z) with enough digits that nothing is lost."""
    if math.isnan(z) or z < -1000:
        return 0.0
    if z > 1000:
        return 1.0
    context = Context(prec=130 + int(abs(z)))
    return fl32(float(context.divide(1, context.add(1, context.exp(Decimal(-z))))))


def tempered_by_definition(z: float, temperature: float) -> float:
    """fl32(z * fl32(1 / T)), with T in fp32."""
    if temperature == 1 or math.isnan(z) or math.isinf(z):
        return z
    inverse = fl32_exact(1 / Fraction(fl32(temperature)))
    product = Fraction(z) * Fraction(inverse)
    if abs(product) > Fraction(FLT_MAX):  # far enough above it in these tests to round to infinity
        return math.copysign(INF, z)
    return fl32_exact(product)


def route_by_definition(logits, bias, k, scale, renormalize, scoring="sqrtsoftplus", temperature=1):
    """One token, in Python floats rounded to fp32 after every operation."""
    function = sigmoid_by_definition if scoring == "sigmoid" else score_by_definition
    scores = [function(tempered_by_definition(z, temperature)) for z in logits]
    keys = []
    for z, s, b in zip(logits, scores, bias, strict=True):
        key = fl32(s + b)
        keys.append(-INF if math.isnan(z) or math.isnan(key) else key)
    # Python's sort is stable and takes -0.0 == 0.0: equal keys keep the order of their ids.
    ids = sorted(range(len(keys)), key=lambda e: -keys[e])[:k]
    r, chosen = fl32(scale), [scores[e] for e in ids]
    if not renormalize:
        return [fl32(s * r) for s in chosen], ids
    total = chosen[0]
    for s in chosen[1:]:
        total = fl32(total + s)
    total = fl32(total + fl32(EPSILON))
    return [fl32(fl32(s / total) * r) for s in chosen], ids


def number(rng: random.Random) -> float:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([INF, -INF, NAN, 0.0, -0.0, FLT_MAX, -FLT_MAX, 2.0**-149, -(2.0**-149)])
    if kind == 1:
        bits: float = struct.unpack("f", struct.pack("I", rng.getrandbits(32)))[0]
        return bits
    if kind == 2:
        return float(rng.randrange(-3, 3))
    return fl32(rng.gauss(0, 1) * rng.choice([0.5, 4.0, 40.0]))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_activation_topk(renormalize, scoring, temperature):
    rng = random.Random(20)
    for _ in range(60):
        experts = rng.randrange(1, 24)
        k, scale = rng.randrange(1, experts + 1), rng.choice([1.0, 1.5, 2.5, 0.0, 1e18])
        rows = [[number(rng) for _ in range(experts)] for _ in range(4)]
        bias = [number(rng) for _ in range(experts)]
        weights, ids = spec.activation_topk(
            torch.tensor(rows),
            torch.tensor(bias),
            k,
            scale,
            renormalize,
            scoring=scoring,
            gate_temperature=temperature,
        )
        for row, found_weights, found_ids in zip(rows, weights.tolist(), ids.tolist(), strict=True):
            expected_weights, expected_ids = route_by_definition(
                row, bias, k, scale, renormalize, scoring, temperature
            )
            assert found_ids == expected_ids
            assert found_weights == expected_weights


def test_scores_are_rounded_once():
    rng = random.Random(21)
    z = [fl32(rng.uniform(-100, 100)) for _ in range(400)]
    z += [-16.0, -16.6, -17.0, 16.6, 80.0, -80.0, -104.0, 0.0, -0.0, 2.0**-149, 88.8, -88.8, -200.0]
    z += [INF, -INF, NAN, FLT_MAX, -FLT_MAX, 1e30, -1e30]
    z = [fl32(v) for v in z]
    assert spec.expert_scores(torch.tensor(z)).tolist() == [score_by_definition(v) for v in z]


def test_sigmoids_are_rounded_once():
    rng = random.Random(22)
    z = [fl32(rng.uniform(-110, 30)) for _ in range(400)]
    z += [-16.6, 16.6, -87.0, -88.0, -103.0, -104.0, 0.0, -0.0, 2.0**-149, 1.2e-7, -1.2e-7]
    z = [fl32(v) for v in z] + [INF, -INF, NAN, FLT_MAX, -FLT_MAX]
    found = spec.expert_scores(torch.tensor(z), "sigmoid").tolist()
    assert found == [sigmoid_by_definition(v) for v in z]


def test_a_temperature_divides_before_the_clamp():
    scores = spec.expert_scores(torch.tensor([INF, FLT_MAX, NAN]), gate_temperature=4.0)
    assert scores.tolist() == [fl32(math.sqrt(FLT_MAX)), fl32(math.sqrt(FLT_MAX / 4)), 0.0]
    scores = spec.expert_scores(torch.tensor([FLT_MAX, -FLT_MAX]), gate_temperature=0.5)
    assert scores.tolist() == [fl32(math.sqrt(FLT_MAX)), 0.0]


def test_subnormal_scores_are_not_flushed():
    z = torch.tensor([-180.0, -190.0, -200.0])
    scores = spec.expert_scores(z)
    assert 0 < scores[2] < 2.0**-126
    assert scores.tolist() == [score_by_definition(v) for v in z.tolist()]


def test_all_zero_scores_give_zero_weights():
    weights, ids = spec.activation_topk(torch.full((1, 8), -INF), torch.zeros(8), 3, 2.5)
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    assert ids.tolist() == [[0, 1, 2]]


def test_bias_selects_and_does_not_weigh():
    logits = torch.tensor([[0.0, 0.0, 5.0]])
    weights, ids = spec.activation_topk(logits, torch.tensor([9.0, 8.0, 0.0]), 2, 1.0)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_nan_logit_ranks_last_whatever_its_bias():
    logits = torch.tensor([[NAN, -50.0, -60.0]])
    weights, ids = spec.activation_topk(logits, torch.tensor([INF, 0.0, 0.0]), 3, 1.0)
    assert ids.tolist() == [[1, 2, 0]]
    assert weights[0, 2] == 0


@pytest.mark.parametrize(
    ("k_chunk", "slices"), [(None, 1), (16, 1), (48, 1), (64, 1), (16, 2), (8, 4), (16, 8), (8, 3)]
)
def test_dense_logits(k_chunk, slices):
    rng = random.Random(22)
    tokens, hidden, experts = 3, 64, 5
    draw = lambda rows: torch.tensor(  # noqa: E731
        [
            [rng.gauss(0, 1) * 2.0 ** rng.randrange(-8, 8) for _ in range(hidden)]
            for _ in range(rows)
        ]
    ).bfloat16()
    x, weight = draw(tokens), draw(experts)
    logits = spec.dense_logits(x, weight, k_chunk, slices).tolist()
    step = k_chunk or hidden
    for n in range(tokens):
        for e in range(experts):
            products = [
                Fraction(a) * Fraction(b)
                for a, b in zip(x[n].tolist(), weight[e].tolist(), strict=True)
            ]
            parts = [
                fl32_exact(sum(products[start : start + step], Fraction(0)))
                for start in range(0, hidden, step)
            ]
            ends = [number * len(parts) // slices for number in range(slices + 1)]
            total = 0.0
            for first, end in itertools.pairwise(ends):
                own = 0.0
                for part in parts[first:end]:
                    own = fl32(own + part)
                total = fl32(total + own)
            assert logits[n][e] == total


def test_chunks_are_added_in_ascending_order():
    x = torch.ones(1, 6).bfloat16()
    weight = torch.tensor([[2.0**24, 0, 1, 0, -(2.0**24), 0]]).bfloat16()
    assert spec.dense_logits(x, weight).item() == 1
    assert spec.dense_logits(x, weight, 2).item() == 0  # (2^24 + 1) - 2^24, rounded in between


def test_a_nan_logit_has_one_bit_pattern():
    x = torch.full((1, 64), NAN).bfloat16()
    stored = spec.dense_logits(x, torch.ones(2, 64).bfloat16(), 32)
    assert stored.view(torch.int32).tolist() == [[0x7FFFFFFF, 0x7FFFFFFF]]


@pytest.mark.parametrize("width", [1, 5, 33])
def test_topk_select(width):
    rng = random.Random(23)
    for _ in range(50):
        row, k = [number(rng) for _ in range(width)], rng.randrange(1, width + 1)
        values, ids = spec.topk_select(torch.tensor([row]), k)
        expected = sorted(range(width), key=lambda e: INF if math.isnan(row[e]) else -row[e])[:k]
        assert ids[0].tolist() == expected
        bits = torch.tensor([row]).view(torch.int32)[0, expected]
        assert values.view(torch.int32)[0].tolist() == bits.tolist()


def by_rank(row, nan_first):
    """Places of a row by rank: Python's own sort of (key, place)."""

    def key(place):
        value = row[place]
        if math.isnan(value):
            return (math.inf, 1) if nan_first else (-math.inf, 0)
        return value, 0

    return sorted(range(len(row)), key=lambda place: (key(place), -place), reverse=True)


@pytest.mark.parametrize("nan_first", [False, True])
@pytest.mark.parametrize("in_rank_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_indices(dtype, in_rank_order, nan_first):
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5, -1.5, 2.0**-140, -(2.0**-140), 3e38)
    generator = torch.Generator().manual_seed(7)
    chosen = torch.randint(0, len(values), (60, 23), generator=generator)
    scores = torch.tensor(values)[chosen].to(dtype)
    starts = torch.randint(-3, 26, (60,), generator=generator).int()
    ends = torch.randint(-3, 30, (60,), generator=generator).int()
    starts[:9], ends[:9] = -1, 30
    for k in (1, 2, 7, 23, 40):
        found = spec.topk_indices(
            scores, k, starts, ends, in_rank_order=in_rank_order, nan_first=nan_first
        )
        assert found.shape == (60, k)
        assert found.dtype == torch.int32
        for row in range(60):
            first, end = max(int(starts[row]), 0), min(max(int(ends[row]), 0), 23)
            wanted = by_rank(scores[row, first:end].tolist(), nan_first)[:k]
            wanted = wanted if in_rank_order else sorted(wanted)
            assert found[row].tolist() == wanted + [-1] * (k - len(wanted))
        stored = spec.scores_at(scores, found, starts).view(torch.int32)
        for row in range(60):
            bits = scores[row].float().view(torch.int32)
            for place, bit in zip(found[row].tolist(), stored[row].tolist(), strict=True):
                column = max(int(starts[row]), 0) + place
                assert bit == (int(bits[column]) if place >= 0 else -0x800000)
    plain = spec.topk_indices(scores, 5)
    assert torch.equal(plain, spec.topk_select(scores, 5)[1].sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_keep_their_bits(dtype):
    size = dtype.itemsize
    integers = {4: torch.int32, 2: torch.int16}[size]
    generator = torch.Generator().manual_seed(8)
    low, high = -(2 ** (8 * size - 1)), 2 ** (8 * size - 1)
    bits = torch.randint(low, high, (40, 3000), generator=generator).to(integers)
    bits[0] |= 0x7F81 << 8 * (size - 2)  # NaNs, half of them signalling
    ids = torch.randint(0, 3000, (40, 3000), generator=generator).int()
    found = spec.scores_at(bits.view(dtype), ids).view(torch.int32)
    assert torch.equal(found, bits.gather(1, ids.long()).int() << 8 * (4 - size))


def test_slots():
    ids = torch.tensor([[0, 3, 4, 9, -1], [0, 3, 4, 9, -1], [1, 2, 5, 7, 8], [1, 2, 5, 7, 8]])
    ids = ids.int()
    table = torch.tensor([[7, 5, 2**30], [-1, 0, 3]]).int()
    requests = torch.tensor([1, 0, 2, -1]).int()
    offsets = torch.tensor([100, -100, 5, 5]).int()
    # Pages of 4: place 9 is in page 2.
    assert spec.slots(ids, table, 4, requests).tolist() == [
        [-4, -1, 0, 13, -1],
        [28, 31, 20, 1, -1],  # 2^30 times 4 wraps to 0
        [-1] * 5,
        [-1] * 5,
    ]
    # Pages of 2: place 9 would be in page 4, place 7 in page 3.
    assert spec.slots(ids[:2], table, 2, requests[:2], offsets[:2]).tolist() == [
        [98, 101, 106, -1, -1],
        [-86, -89, -2147483648 - 100 + 2**32, -1, -1],
    ]
    assert spec.slots(ids[:2], table, 4).tolist() == [[28, 31, 20, 1, -1], [-4, -1, 0, 13, -1]]
    assert spec.slots(ids, offsets=offsets)[2].tolist() == [6, 7, 10, 12, 13]
    assert torch.equal(spec.slots(ids), ids)
    for shape in ((0, 3), (2, 0)):
        assert (spec.slots(ids[:2], torch.zeros(shape).int(), 4, requests[:2]) == -1).all()


def test_topk_select_edge_rules():
    row = torch.tensor([[NAN, -0.0, 0.0, -INF, -0.0]])
    values, ids = spec.topk_select(row, 5)
    assert ids.tolist() == [[1, 2, 4, 0, 3]]  # zeros tie, NaN and -inf tie: the lower id first
    assert torch.equal(values.view(torch.int32), row[:, [1, 2, 4, 0, 3]].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_router(dtype):
    table = torch.tensor([[3, 1], [2, 2], [0, 3]], dtype=torch.int32)
    token_ids = torch.tensor([2, -1, 3, 0, 2**31 - 1, -(2**31), 1], dtype=dtype)
    weights, ids = spec.hash_router(token_ids, table, 2, sentinel=-7)
    assert ids.tolist() == [[0, 3], [-7, -7], [-7, -7], [3, 1], [-7, -7], [-7, -7], [2, 2]]
    assert weights.tolist() == [[0.5, 0.5], [0, 0], [0, 0], [0.5, 0.5], [0, 0], [0, 0], [0.5, 0.5]]


def test_hash_router_does_not_truncate_ids():
    weights, ids = spec.hash_router(torch.tensor([2**32, 2**63 - 1]), torch.zeros(4, 6).int(), 6)
    assert (ids == -1).all()
    assert (weights == 0).all()


def test_hash_weights_are_fl32_of_one_over_k():
    for k in range(1, 33):
        weights, _ = spec.hash_router(torch.tensor([0]), torch.zeros(1, k).int(), k)
        assert weights.tolist() == [[fl32(1 / k)] * k]


def test_dtypes_and_empty_batches():
    empty = torch.empty(0, 64).bfloat16(), torch.ones(8, 64).bfloat16(), torch.zeros(8)
    for weights, ids in (
        spec.dense_router(*empty, 6, 1.5),
        spec.activation_topk(torch.empty(0, 8), torch.zeros(8), 6, 1.5),
        spec.topk_select(torch.empty(0, 8), 6),
        spec.hash_router(torch.empty(0, dtype=torch.int64), torch.zeros(4, 6).int(), 6),
    ):
        assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
        assert weights.shape == ids.shape == (0, 6)


def test_spec_imports_nothing_of_this_package():
    source = Path(spec.__file__).read_text(encoding="utf-8")
    assert "router_runtime" not in source
    assert "build_kernels" not in source


def test_kernels_and_oracle_share_their_constants():
    """build_kernels/numerics.py hands these to every kernel as compile-time constants."""
    numerics = pytest.importorskip(
        "build_kernels.kernels.common.numerics", reason="the builder is not here"
    )
    assert fl32(numerics.CONSTANTS["RENORM_EPSILON"]) == fl32(spec.RENORM_EPSILON)
    assert numerics.CONSTANTS["LOGIT_MAX"] == spec.LOGIT_MAX == FLT_MAX
    assert numerics.CONSTANTS["NAN_LOGIT_BITS"] == spec.NAN_LOGIT_BITS
