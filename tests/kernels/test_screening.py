"""Screening, the exact root and the exact division, run on the CPU as arrays of FP32, with
approximations that err as much as the hardware's may: no expert of a token's top k is lost, root
and division are correctly rounded, and scores have the bits of numpy's emulation.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.kernels.common import scoring
from build_kernels.kernels.common.numerics import CONSTANTS
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import screening
from build_kernels.kernels.dense.geometry.common import screening_groups
from tests.kernels import emulation

Floats = NDArray[np.float32]

#: What ex2.approx, sqrt.approx, rsqrt.approx and rcp.approx may be off by, relative.
APPROXIMATE = 2.0**-22
LEAST = np.finfo(np.float32).tiny


class Arrays:
    """Stands for modules of kernels/common/ptx: every lane and token at once."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def off(self, value: Floats) -> Floats:
        error = self.generator.choice([-1.0, 0.0, 1.0], value.shape) * APPROXIMATE
        found = (value.astype(np.float64) * (1 + error)).astype(np.float32)
        return np.where(np.abs(found) < LEAST, np.float32(0), found)

    def exp2_approx(self, a: Floats) -> Floats:
        return self.off(np.exp2(a.astype(np.float64)).astype(np.float32))

    def sqrt_approx(self, a: Floats) -> Floats:
        return self.off(np.sqrt(np.where(a < LEAST, np.float32(0), a)))

    def rsqrt_approx(self, a: Floats) -> Floats:
        return self.off((1 / np.sqrt(a.astype(np.float64))).astype(np.float32))

    def rcp_approx(self, a: Floats) -> Floats:
        return self.off((1 / a.astype(np.float64)).astype(np.float32))

    def not_negative(self, a: Floats) -> NDArray[np.bool_]:
        return np.greater_equal(a, 0)

    def fma_rn(self, a: Floats, b: Floats, c: Floats) -> Floats:
        exact = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        return (exact + np.asarray(c, np.float64)).astype(np.float32)

    def mul_rn(self, a: Floats, b: Floats) -> Floats:
        return np.multiply(a, b, dtype=np.float32)

    def add_rn(self, a: Floats, b: Floats) -> Floats:
        return np.add(a, b, dtype=np.float32)

    def max_f32(self, a: Floats, b: Floats) -> Floats:
        return np.fmax(a, b)

    def min_f32(self, a: Floats, b: Floats) -> Floats:
        return np.fmin(a, b)

    def abs_f32(self, a: Floats) -> Floats:
        return np.abs(a)

    def neg_f32(self, a: Floats) -> Floats:
        return -a

    def bits(self, a: Floats) -> NDArray[np.int32]:
        return np.asarray(a, np.float32).view(np.int32)

    def from_bits(self, a: NDArray[np.int32]) -> Floats:
        return a.view(np.float32)

    def equal(self, a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.bool_]:
        return np.equal(a, b)

    def less(self, a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.bool_]:
        return np.less(a, b)

    def select(self, condition: NDArray[np.bool_], a: Floats, b: Floats) -> Floats:
        return np.where(condition, a, b)

    def shuffle_xor(self, a: NDArray[np.int32], lanes: int) -> NDArray[np.int32]:
        """Lanes are the first axis."""
        return a[np.arange(len(a)) ^ lanes]

    def shift_in_sign(self, mask: NDArray[np.int64], a: Floats) -> NDArray[np.int64]:
        # The hardware's NaN is positive.
        sign = np.where(np.isnan(a), 0, self.bits(a) >> 31 & 1)
        return (mask << 1 | sign) & 0xFFFFFFFF


@pytest.fixture(autouse=True)
def _as_arrays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    arrays = Arrays()
    constants = types.SimpleNamespace(
        constant=lambda name: np.float32(CONSTANTS[name]),
        ordered=scoring.ordered,
        from_ordered_key=scoring.from_ordered_key,
    )
    replaced = {"arith": arrays, "warp_ops": arrays, "scoring": constants}
    replaced |= {"Float32": np.float32, "Int32": np.int64}
    for name, value in replaced.items():
        monkeypatch.setattr(screening, name, value)
    monkeypatch.setattr(scoring, "arith", arrays)
    monkeypatch.setattr(scoring, "Float32", np.float32)
    monkeypatch.setattr(scoring, "Int32", np.int32)
    # As on the hardware, infinities and NaN are results like others.
    with np.errstate(over="ignore", invalid="ignore"):
        yield


RULES = [Scoring(), Scoring("sigmoid"), Scoring("sqrtsoftplus", 1.7), Scoring("sigmoid", 0.3)]
rules = pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.function}-{rule.temperature}"
)


def exact_keys(logits: Floats, biases: Floats, off: float, rule: Scoring) -> Floats:
    """The keys, from scores that are off by as much as those of the router may be."""
    if rule.temperature != 1:
        logits = logits * np.float32(1 / rule.temperature)
    clamped = np.clip(logits.astype(np.float64), -CONSTANTS["LOGIT_MAX"], CONSTANTS["LOGIT_MAX"])
    small = np.exp(-np.abs(clamped))
    if rule.function == "sigmoid":
        score = np.where(clamped >= 0, 1, small) / (1 + small)
    else:
        score = np.sqrt(np.maximum(clamped, 0) + np.log1p(small))
    return (score * (1 + off)).astype(np.float32) + biases


@rules
@pytest.mark.parametrize("off", [-4e-7, 0.0, 4e-7])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-3, 1.0, 1e6, 1e25])
def test_every_expert_of_the_top_k_passes(spread: float, off: float, rule: Scoring) -> None:
    """For any low bound as the threshold, every expert whose key is as large passes."""
    generator = np.random.default_rng(5)
    logits = np.concatenate(
        [generator.normal(0, scale, 4000) for scale in (1e-3, 1.0, 30.0, 1e4)]
        + [generator.uniform(-100, -80, 4000), np.linspace(-20, 20, 4001)]
        + [[np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40]]
    ).astype(np.float32)
    biases = (generator.standard_normal(len(logits)) * spread).astype(np.float32)
    keys = exact_keys(logits, biases, off, rule)
    low, high = screening.bounds(screening.screened(logits, rule), biases)
    order = np.argsort(-keys, kind="stable")
    # The least high bound among those with this key or a larger one.
    least = np.minimum.accumulate(high[order])
    last = np.searchsorted(-keys[order], -keys, side="right") - 1
    bounded = ~np.isnan(low)
    assert bounded.sum() >= len(low) - 1
    assert (least[last] >= screening.below(low))[bounded].all()


@rules
def test_bounds_are_close(rule: Scoring) -> None:
    """Tight bounds leave few candidates: their relative width is at most 2^-12 within [-80, 80].

    Below some -87 softplus is subnormal and has fewer bits.
    """
    logits = np.linspace(-80, 80, 100001).astype(np.float32) * np.float32(min(1, rule.temperature))
    low, high = screening.bounds(screening.screened(logits, rule), np.zeros_like(logits))
    assert (high - low <= high * 2.0**-12).all()


@rules
def test_a_nan_passes_and_bounds_nothing(rule: Scoring) -> None:
    score = screening.screened(np.array([np.nan], np.float32), rule)
    low, high = screening.bounds(score, np.zeros(1, np.float32))
    assert np.isnan(low).all()
    assert screening.near([high], np.array([3e38], np.float32))[0] & 0xFFFFFFFF == 1


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64])
def test_a_mask_tells_who_is_not_below(count: int) -> None:
    generator = np.random.default_rng(6)
    special = [np.nan, np.inf, -np.inf, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]
    values = generator.choice(np.array([*special, 1.0, -1.0], np.float32), (count, 500))
    thresholds = generator.choice(np.array([*special, -0.0], np.float32), 500)
    masks = [mask & 0xFFFFFFFF for mask in screening.near(list(values), thresholds)]
    assert len(masks) == -(-count // 32)
    for number, high in enumerate(values):
        bit = masks[number // 32] >> (number % 32) & 1
        assert np.array_equal(bit == 1, ~(high < thresholds))
    for word, mask in enumerate(masks):
        left = count - 32 * word
        assert left >= 32 or not (mask >> left).any()


@pytest.mark.parametrize(("own", "lanes"), [(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)])
@pytest.mark.parametrize("top_k", [1, 6, 8])
def test_the_threshold_is_the_kth_largest_bound(own: int, lanes: int, top_k: int) -> None:
    generator = np.random.default_rng(7)
    best = generator.standard_normal((own, lanes, 100)).astype(np.float32)
    found = screening.threshold(list(best), lanes, top_k, own * lanes)
    expected = screening.below(np.sort(best.reshape(-1, 100), axis=0)[-top_k])
    assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def test_united_groups_give_a_lower_threshold() -> None:
    generator = np.random.default_rng(8)
    best = generator.standard_normal((4, 16, 100)).astype(np.float32)
    found = screening.threshold(list(best), 16, 6, 32)
    every = screening.below(np.sort(best.reshape(-1, 100), axis=0)[-6])
    assert (found <= every).all()
    # Groups are united, not lost: the largest bounds stay.
    assert (found >= np.sort(best.reshape(-1, 100), axis=0)[-32]).all()


@pytest.mark.parametrize(
    ("own", "lanes", "top_k"), [(10, 16, 16), (5, 32, 16), (16, 4, 8), (2, 32, 6)]
)
@pytest.mark.parametrize("values", ["random", "few values", "mostly -inf"])
def test_of_exact_keys_the_best_are_kept(values: str, own: int, lanes: int, top_k: int) -> None:
    generator = np.random.default_rng(10)
    keys = generator.standard_normal((own, lanes, 400)).astype(np.float32)
    if values == "few values":
        keys = np.round(keys)
    elif values == "mostly -inf":
        keys = np.where(generator.random(keys.shape) < 0.97, np.float32(-np.inf), keys)
    # Some places hold no candidate, but at least ``top_k`` do.
    absent = generator.random(keys.shape) < 0.2
    absent.reshape(-1, 400)[:top_k] = False
    patterns = np.where(absent, np.int32(0), scoring.ordered((keys + 0).view(np.int32)))
    groups = screening_groups(top_k)
    least = screening.least_kept(list(patterns.astype(np.int32)), lanes, top_k, groups)
    kept = patterns.view(np.uint32) >= least.view(np.uint32)
    present = np.where(absent, np.float32(np.nan), keys).reshape(-1, 400)
    # NaN sorts last.
    kth = -np.sort(-present, axis=0)[top_k - 1]
    assert not (kept & absent).any()
    assert kept[~absent & (keys >= kth)].all()
    if values == "random":
        assert kept.sum(axis=(0, 1)).mean() < 1.6 * top_k


def roots(values: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    given = np.asarray(values, np.float32)
    with np.errstate(divide="ignore"):
        return scoring.square_root(given), np.sqrt(given)


def test_the_root_is_rounded_correctly() -> None:
    """Of random numbers of every size, subnormal ones too."""
    generator = np.random.default_rng(9)
    patterns = generator.integers(0, 0x7F800000, 1_000_000, dtype=np.int32)
    found, expected = roots(patterns.view(np.float32))
    assert np.array_equal(found, expected)


def test_the_root_of_what_stands_apart() -> None:
    powers = [2.0**power * (1 + share) for power in range(-126, 128) for share in (0, 2**-23)]
    edges = np.nextafter(np.float32(2.0**-100), np.array([0, 1], np.float32))
    found, expected = roots(np.array([0.0, 1e-45, CONSTANTS["LOGIT_MAX"], *powers, *edges]))
    assert np.array_equal(found, expected)


# --- scores ------------------------------------------------------------------------------------


@rules
def test_scores_have_the_bits_of_the_emulation(rule: Scoring, exact: None) -> None:
    """The code of the kernels against the sequence of numerics.py in numpy, edges included."""
    generator = np.random.default_rng(11)
    logits = np.concatenate(
        [
            generator.normal(0, 5, 100_000),
            generator.uniform(-110, 110, 100_000),
            [np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45, -1e-45],
        ]
    ).astype(np.float32)
    of_function = emulation.sigmoid if rule.function == "sigmoid" else emulation.score
    z = logits if rule.temperature == 1 else logits * np.float32(1 / rule.temperature)
    with np.errstate(divide="ignore"):
        found = rule.score(logits)
    assert np.array_equal(found.view(np.int32), of_function(z).view(np.int32))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, _as_arrays: None) -> None:
    """fma rounds once, also where the sum of two float64 would be rounded to a tie."""
    monkeypatch.setattr(Arrays, "fma_rn", lambda self, a, b, c: emulation.fma(*arrays_of(a, b, c)))


def arrays_of(*values: Floats | np.float32) -> list[Floats]:
    return [np.asarray(value, np.float32) for value in np.broadcast_arrays(*values)]


#: Last places by which an inverse may be off: rcp.approx has an error of one.
PLACES = (-2, -1, 0, 1, 2)


def divided(a: Floats, b: Floats, places: int) -> Floats:
    """``scoring.divided`` with an inverse that is off by so many last places."""
    right = (1 / b.astype(np.float64)).astype(np.float32)
    off = (right.view(np.int32) + places).view(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrays, "rcp_approx", lambda self, _: off)
        return scoring.divided(a, b)


@pytest.mark.parametrize("places", PLACES)
def test_the_division_is_rounded_correctly(places: int, exact: None) -> None:
    """Of 1 by a sixteenth of all sums, and of exponentials of every size by theirs.

    The largest sum below 2 is the one whose inverse a step of Newton does not reach from 1/2.
    """
    patterns = np.arange(0x3F800000, 0x40000000, 16, dtype=np.int32) + places + 2
    sums = np.append(patterns, [0x3FFFFFFE, 0x3FFFFFFF, 0x40000000]).astype(np.int32)
    sums = sums.view(np.float32)
    assert np.array_equal(divided(np.ones_like(sums), sums, places), np.float32(1) / sums)
    generator = np.random.default_rng(12)
    tiny = generator.integers(0, 0x33000000, 20_000, dtype=np.int32)
    ordinary = generator.integers(0x33000000, 0x3F800001, 400_000, dtype=np.int32)
    edges = [0, 1, 0x3F7FFFFE, 0x3F7FFFFF, 0x3F800000]
    u = np.concatenate([tiny, ordinary, edges]).astype(np.int32).view(np.float32)
    sums = np.float32(1) + u
    assert np.array_equal(divided(u, sums, places), u / sums)
