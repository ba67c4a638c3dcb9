"""The held form of ``topk_indices``, step by step as arrays over CTAs, threads and scores: rows
that selections get wrong come out exact, in a bounded number of counts.

Names are those of ``held.cuh``, whose constants are read from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.catalog.targets import TARGETS
from build_kernels.compile.sources import KERNELS
from build_kernels.plan import plan

Array = NDArray[np.uint32]
WARP, BINS, ALL = 32, 256, 0xFFFFFFFF
SOURCE = (KERNELS / "topk_indices" / "held.cuh").read_text()


def stated(name: str) -> int:
    """A constant of the source that is a number."""
    (found,) = re.findall(rf"constexpr unsigned {name} = (\w+?)u?;", SOURCE)
    return int(found, 0)


ROUNDS, GROUPS, WIDEST = (stated(name) for name in ("ROUNDS", "GROUPS", "WIDEST"))
NEAR = 2 * WARP


def bits(scores: NDArray[np.float32]) -> Array:
    return scores.astype(np.float32).view(np.uint32)


def held_key(given: Array, score_bytes: int, nan_first: bool) -> NDArray[np.int64]:
    score = given.view(np.float32)
    none = np.float32(np.nan if nan_first else -np.inf)
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        canonical = bits(np.fmax(score, none) + np.float32(0))
    canonical = np.where(np.isnan(canonical.view(np.float32)), np.uint32(0x7FFFFFFF), canonical)
    sign = (canonical.view(np.int32) >> 31).view(np.uint32)
    key: NDArray[np.int64] = (canonical ^ (sign | np.uint32(0x80000000))).astype(np.int64)
    return key >> (16 if score_bytes == 2 else 0)


@dataclass
class Range:
    low: int
    upper: int
    high: int
    span: int = field(init=False)
    shift: int = field(init=False)

    def __post_init__(self) -> None:
        self.span = min(min(self.high, self.upper) - self.low, WIDEST)
        assert self.span >= 0
        self.shift = max(self.span.bit_length() - 8, 0)
        self.shift += self.span > 255 << self.shift
        self.high = self.low + self.span

    def bin(self, key: NDArray[np.int64]) -> NDArray[np.int64]:
        summed = np.minimum(key, self.high) + (1 << self.shift) - 1 - self.low
        assert summed.max(initial=0) <= ALL  # 32 bits
        return summed >> self.shift

    @property
    def last_bin(self) -> int:
        return (self.span + (1 << self.shift) - 1) >> self.shift

    def is_exact(self, number: int) -> bool:
        return (number == 0 or self.shift == 0) and (
            number != self.last_bin or self.high == self.upper
        )

    def least_of(self, number: int) -> int:
        return self.low if number == 0 else self.low + ((number - 1) << self.shift) + 1

    def most_of(self, number: int) -> int:
        return self.upper if number == self.last_bin else self.low + (number << self.shift)


def in_order_of_positions(marks: Array, values: int) -> Array:
    """``marks``: [..., 32 lanes]."""
    fields = WARP // values
    lane = np.arange(WARP)
    half = fields // 2
    while half:
        lower = np.uint32(sum(1 << bit for bit in range(WARP) if not bit // values & half))
        other = marks[..., lane ^ half]
        move = np.uint32(half * values)
        marks = np.where(
            lane & half,
            (marks & ~lower) | ((other & ~lower) >> move),
            (marks & lower) | ((other & lower) << move),
        ).astype(np.uint32)
        half //= 2
    return marks[..., lane % values * fields + lane // values]


class Walk:
    """One row of a variant with these constants. ``rounds``: how often keys were counted."""

    def __init__(self, constants: dict[str, int], given: Array, k: int, nan_first: bool) -> None:
        self.blocks, self.threads = constants["BLOCKS_PER_ROW"], constants["THREADS"]
        self.held, self.sampled = constants["HELD"], constants["SAMPLES"] > 0
        self.score_bytes = constants["SCORE_BYTES"]
        self.values = 16 // self.score_bytes
        self.length, self.k = len(given), k
        self.least = 0x7FFFFF >> (16 if self.score_bytes == 2 else 0)
        self.most = ALL >> (16 if self.score_bytes == 2 else 0)
        self.rounds = 0
        vectors = -(-self.length // (self.blocks * self.values))
        self.share = vectors * self.values
        per_cta = self.held * self.threads * self.values
        assert self.share <= per_cta
        own = held_key(given, self.score_bytes, nan_first)
        cells = np.arange(self.blocks)[:, None] * self.share + np.arange(per_cta)
        end = np.minimum((np.arange(self.blocks)[:, None] + 1) * self.share, self.length)
        inside = cells < end
        # Scores that are not there: -inf within the last vector and in a CTA of its own, else none.
        keys = np.where(inside, own[np.minimum(cells, self.length - 1)], self.least)
        if self.blocks > 1:
            keys[cells // self.values * self.values >= end] = 0
        shape = (self.blocks, self.held, self.threads, self.values)
        self.keys = keys.reshape(shape).transpose(0, 2, 1, 3)  # CTA, thread, vector, score
        self.row = own

    def ids(self) -> NDArray[np.int64]:
        if self.k >= self.length:
            return np.arange(self.length)
        return self.emitted(*self.cut())

    def first_range(self) -> Range:
        if not self.sampled:
            keys = self.keys[0].reshape(self.threads, -1)
            maxima = keys.reshape(self.threads, -1, GROUPS).max(axis=1)
            groups, low = GROUPS, int(maxima.min())
            while groups:
                if self.k <= groups * self.threads:
                    low = int(maxima.min())
                groups //= 2
                if groups:
                    maxima = np.maximum(maxima[:, :groups], maxima[:, groups : 2 * groups])
            most = int(maxima.max())
            if self.k <= self.threads // WARP:
                low = int(maxima.reshape(-1, WARP).max(axis=1).min())
            if self.k > GROUPS * self.threads:
                low = self.least
            return Range(low, most, most)
        if self.length < 4 * self.threads:
            return Range(self.least, self.most, self.most)
        sample = self.row[sampled_positions(self.length)]
        maxima = np.sort(sample.reshape(WARP, -1).max(axis=1))[::-1]
        mean = self.k * self.threads / self.length
        rank = int(mean + 4 * mean**0.5 + 4)
        low = int(maxima[rank - 1]) if rank <= WARP else self.least
        spread = max(2 * min(int(maxima[0]) - low, 1 << 30), 254)
        return Range(low, self.most, low + min(spread, self.most - low))

    def cut(self) -> tuple[int, int]:
        """The key above which scores are selected, and how many with this key."""
        found = self.first_range()
        wanted, keys = self.k, self.keys
        while True:
            self.rounds += 1
            assert self.rounds <= ROUNDS
            counted = keys[(keys >= found.low) & (keys <= found.upper)]
            counts = np.bincount(found.bin(counted), minlength=BINS)
            assert len(counts) == BINS
            reached = np.cumsum(counts[::-1])
            if reached[-1] < wanted:
                assert self.sampled
                wanted -= int(reached[-1])
                found = Range(self.least, found.low - 1, found.low - 1)
                continue
            place = int(np.argmax(reached >= wanted))
            number, size = BINS - 1 - place, int(counts[BINS - 1 - place])
            wanted -= int(reached[place]) - size
            least, most = found.least_of(number), found.most_of(number)
            assert size == ((keys >= least) & (keys <= most)).sum()
            if size == wanted:
                return least - 1, 0
            if found.is_exact(number):
                return least, wanted
            if size <= NEAR:
                return self.near_cut(least, most, size, wanted)
            found = Range(least, most, most)

    def near_cut(self, least: int, most: int, size: int, wanted: int) -> tuple[int, int]:
        """Of the keys in [least, most]. Each CTA has the places of the list behind those of the
        CTAs before it, so that a place says whether a key is of an earlier CTA.
        """
        near = np.zeros(NEAR, np.int64)
        inside = [own[(own >= least) & (own <= most)] for own in self.keys.reshape(self.blocks, -1)]
        starts = np.cumsum([0, *map(len, inside)])
        for start, own in zip(starts, inside, strict=False):
            near[start : start + len(own)] = own
        assert starts[-1] == size
        assert near[size:].max(initial=0) == 0
        above = (near[:, None] < near).sum(axis=1)
        key = int(near[(near != 0) & (above < wanted)].min())
        ties = wanted - int((near > key).sum())
        for cta, start in enumerate(starts[:-1]):
            earlier = self.keys[:cta]
            over = int((near[:start] > key).sum()) + int((earlier > most).sum())
            assert over == (earlier > key).sum()
            assert (near[:start] == key).sum() == (earlier == key).sum()
        return (key - 1, 0) if ties == (near == key).sum() else (key, ties)

    def emitted(self, key: int, ties: int) -> NDArray[np.int64]:
        above = self.words(self.keys > key)
        equal = self.words(self.keys == key) if ties else np.zeros_like(above)
        equal &= np.cumsum(equal).reshape(equal.shape) <= ties
        cta, stripe, warp, part, bit = np.nonzero(above | equal)
        position = (stripe * self.threads + warp * WARP) * self.values + part * WARP + bit
        return cta * self.share + position

    def words(self, marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[CTA, stripe, warp, part of the stripe, bit of a word], in the order of positions."""
        warps, per_mask = self.threads // WARP, WARP // self.values
        flat = marks.reshape(self.blocks, warps, WARP, -1)
        padded = np.zeros((*flat.shape[:3], -(-flat.shape[3] // WARP) * WARP), np.uint32)
        padded[..., : flat.shape[3]] = flat
        weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        masks = (padded.reshape(*flat.shape[:3], -1, WARP) * weights).sum(axis=-1, dtype=np.uint32)
        found = in_order_of_positions(masks.swapaxes(2, 3), self.values)
        # A lane has a part of the stripe lane // values of its mask's.
        parts = found.reshape(self.blocks, warps, -1, per_mask, self.values)
        stripes = parts.transpose(0, 2, 3, 1, 4).reshape(self.blocks, -1, warps, self.values)
        marked: NDArray[np.bool_] = (stripes[:, : self.held, ..., None] & weights) != 0
        return marked


def sampled_positions(length: int) -> NDArray[np.int64]:
    number = np.arange(512, dtype=np.uint64)
    fraction = (number * np.uint64(2654435761) & np.uint64(ALL)) >> np.uint64(16)
    scaled = (number << np.uint64(16) | fraction) * np.uint64(length)
    return (scaled >> np.uint64(25)).astype(np.int64)


def oracle(given: Array, k: int, nan_first: bool) -> NDArray[np.int64]:
    """The k largest by a stable sort, ascending."""
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        score = given.view(np.float32).astype(np.float64)
    rank = np.where(np.isnan(score), np.inf if nan_first else -np.inf, score)
    last = np.isnan(score).astype(int) if nan_first else np.zeros(len(score))
    order = np.lexsort((np.arange(len(score)), -rank, -last))
    return np.sort(order[:k])


def _raised(scores: NDArray[np.float32], places: object, by: float) -> NDArray[np.float32]:
    scores[places] += np.float32(by)  # type: ignore[call-overload]
    return scores


def _normal(length: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


_SPECIALS = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-40], np.float32
)
PATTERNS: dict[str, Callable[[int], Array]] = {
    "normal": lambda n: bits(_normal(n, 1)),
    "equal": lambda n: bits(np.full(n, 0.75, np.float32)),
    "minus_infinity": lambda n: bits(np.full(n, -np.inf, np.float32)),
    "all_nan": lambda n: np.full(n, 0xFFC00000, np.uint32),
    "two_values": lambda n: bits((_normal(n, 2) > 0).astype(np.float32)),
    "descending": lambda n: bits(np.arange(n, 0, -1).astype(np.float32)),
    "ascending": lambda n: bits(np.arange(n).astype(np.float32)),
    "relu": lambda n: bits(np.maximum(_normal(n, 3) - 3.2, 0).astype(np.float32)),
    "signed_zeros": lambda n: bits(np.where(_normal(n, 4) > 0, -0.0, 0.0).astype(np.float32)),
    "nan_runs": lambda n: bits(_raised(_normal(n, 5), slice(n // 7, None), np.nan)),
    "specials": lambda n: bits(_SPECIALS[np.random.default_rng(6).integers(0, 10, n)]),
    "subnormals": lambda n: np.random.default_rng(7).integers(0, 4096, n).astype(np.uint32),
    "outlier": lambda n: bits(_raised(_normal(n, 8), n // 3, 1e38)),
    "infinities": lambda n: bits(_raised(_normal(n, 9), slice(0, n, 9), np.inf)),
    "any_bits": lambda n: np.random.default_rng(10).integers(0, 2**32, n).astype(np.uint32),
    "clustered": lambda n: bits(_raised(_normal(n, 11), slice(n // 2, n // 2 + 6000), 10)),
    "beats_sample": lambda n: bits(_raised(_normal(n, 12), sampled_positions(n), 100)),
    "neighbours": lambda n: (0x3F800000 + np.random.default_rng(13).integers(0, 300, n)).astype(
        np.uint32
    ),
}
VARIANTS = {
    job.variant: {name: int(value) for name, value in job.constants.items()}
    for job in plan(targets=[next(iter(TARGETS))], kernels=["topk_indices"])
    if job.constants["HELD"]
}


def lengths(constants: dict[str, int]) -> list[int]:
    most = constants["BLOCKS_PER_ROW"] * constants["THREADS"] * constants["HELD"]
    most *= 16 // constants["SCORE_BYTES"]
    return [most, most - 1, most // 3 + 1, 3001]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_is_selected_exactly(variant: str, pattern: str) -> None:
    constants = VARIANTS[variant]
    turn = list(PATTERNS).index(pattern) + list(VARIANTS).index(variant)
    for length in lengths(constants)[turn % 4 :: 4]:
        given = PATTERNS[pattern](length)
        if constants["SCORE_BYTES"] == 2:
            given &= np.uint32(0xFFFF0000)
        for k, nan_first in ((512, False), (2048, True), (1, False)):
            walk = Walk(constants, given, k, nan_first)
            assert np.array_equal(walk.ids(), oracle(given, k, nan_first)), (length, k)


def test_a_random_row_takes_one_count() -> None:
    """The bin of the cut is small enough at once: that is what the speed rests on."""
    for variant, constants in VARIANTS.items():
        for seed in range(3):
            given = bits(_normal(lengths(constants)[0], seed))
            if constants["SCORE_BYTES"] == 2:
                given &= np.uint32(0xFFFF0000)
            walk = Walk(constants, given, 512, nan_first=False)
            walk.cut()
            assert walk.rounds == 1, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_keys_take_few_counts(variant: str) -> None:
    """Rows made of two keys with any distance, of which the wrong one is in the sample: the ranges
    shrink as slowly as they can, and every width of a bin occurs."""
    constants = VARIANTS[variant]
    length = min(lengths(constants)[0], 2**16)
    random = np.random.default_rng(14)
    most = 0
    for distance in (0, 1, 7, 8, 13, 20, 24, 31):
        for base in (0x3F800000, 0xFF7FFFFF - (1 << distance)):
            spread = random.integers(0, 1 << distance, length, endpoint=True).astype(np.uint64)
            given = ((base + spread) & ALL).astype(np.uint32)
            given[sampled_positions(length)] = np.uint32(0x7F000000)
            if constants["SCORE_BYTES"] == 2:
                given &= np.uint32(0xFFFF0000)
            walk = Walk(constants, given, 600, nan_first=distance % 2 == 0)
            assert np.array_equal(walk.ids(), oracle(given, 600, distance % 2 == 0))
            most = max(most, walk.rounds)
    assert 1 < most <= ROUNDS
