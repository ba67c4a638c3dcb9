"""The streamed form of ``topk_indices``, step by step over CTAs, warps and chunks: rows that
selections get wrong come out exact, and what makes a random row fast holds.

Names are those of ``streamed.cuh`` and the files that it includes, whose constants are read from
them. Chunks of different warps arrive in a random order.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from build_kernels.catalog.targets import TARGETS
from build_kernels.compile.sources import KERNELS
from build_kernels.plan import plan
from tests.kernels.test_held_walk import NEAR, PATTERNS, bits, held_key, oracle

Integers = NDArray[np.int64]
WARP, BINS, LEAST_KEY, INFINITE_KEY, ALL = 32, 256, 0x007FFFFF, 0xFF800000, 0xFFFFFFFF
SOURCE = "".join(
    path.read_text() for path in sorted((KERNELS / "topk_indices").glob("streamed*.cuh"))
)


def stated(name: str) -> str:
    """The value of a constant of the source."""
    (found,) = re.findall(rf"constexpr unsigned {name} = ([^;]+);", SOURCE)
    return str(found)


#: The CTA whose chunks tell whether each warp of the cluster has one.
(ASKED,) = re.findall(r"row\.of_block\(([^()]*)\)\.chunks\(\) >= WARPS", SOURCE)
ROUNDS, ATTEMPTS = int(stated("ROUNDS")), int(stated("ATTEMPTS"))


def bitmap_vectors(ring_bytes: int) -> int:
    (divisor, group, again) = re.fullmatch(
        r"RING_BYTES / (\d+) / (\d+) \* (\d+)", stated("BITMAP_VECTORS")
    ).groups()  # type: ignore[union-attr]
    assert group == again
    return ring_bytes // int(divisor) // int(group) * int(group)


@dataclass(frozen=True)
class Cut:
    key: int
    ties: int
    equal: int


def find_cut(
    keys: Integers, wanted: int, least: int, largest: int, spare: int = 0, listed: bool = False
) -> Cut:
    assert ((keys >= least) & (keys <= largest)).sum() >= wanted
    for _ in range(ROUNDS):
        span = largest - least
        shift = max(span.bit_length() - 8, 0)
        inside = keys[(keys >= least) & (keys <= largest)]
        counts = np.bincount((inside - least) >> shift, minlength=BINS)
        assert len(counts) == BINS
        above = counts[::-1].cumsum()[::-1] - counts  # in the bins above each
        number = int(np.flatnonzero(above + counts >= wanted)[-1])
        wanted -= int(above[number])
        size = int(counts[number])
        least += number << shift
        if size - wanted <= spare:
            return Cut(least - 1, 0, 0)
        if shift == 0:
            return Cut(least, wanted, size)
        largest = least + min(largest - least, (1 << shift) - 1)
        if listed and size <= NEAR:
            near = keys[(keys >= least) & (keys <= largest)]
            above = (near[:, None] < near).sum(axis=1)
            key = int(near[above < wanted].min())
            ties, equal = wanted - int((near > key).sum()), int((near == key).sum())
            return Cut(key - 1, 0, 0) if ties == equal else Cut(key, ties, equal)
    raise AssertionError("a search ends in so many rounds")


class Walk:
    """One row of a variant with these constants.

    ``attempts`` counts bounds that were too high, ``reductions`` full lists, ``entered`` the
    candidates that were to enter a list; ``listed`` is the number of candidates of all CTAs at the
    end.
    """

    def __init__(self, constants: dict[str, int], given: NDArray[np.uint32], k: int, nan: bool):
        self.ctas, self.threads = constants["BLOCKS_PER_ROW"], constants["THREADS"]
        self.loads, self.capacity = constants["LOADS"], constants["CAPACITY"]
        self.values = 16 // constants["SCORE_BYTES"]
        self.warps = self.threads // WARP
        self.chunk = WARP * self.loads  # vectors
        self.groups = 2 * self.threads * self.ctas
        self.ring_bytes = self.warps * constants["STAGES"] * 16 * self.chunk
        self.keys = held_key(given, 4, nan)
        self.scores = given.view(np.float32)
        self.nan_key = ALL if nan else LEAST_KEY
        self.candidates = self.keys << 31 | (2**31 - 1 - np.arange(len(given)))
        self.length, self.k = len(given), k
        self.wanted = min(k, self.length)
        self.vectors = self.length // self.values
        self.random = np.random.default_rng(len(given) + k)
        self.attempts = self.reductions = self.entered = self.listed = 0

    def of_block(self, cta: int) -> tuple[int, int]:
        share = -(-self.vectors // self.ctas)
        return min(cta * share, self.vectors), min((cta + 1) * share, self.vectors)

    def of_warp(self, block: tuple[int, int], warp: int) -> tuple[int, int]:
        first, last = block
        chunks = -(-(last - first) // self.chunk)
        return (
            first + chunks * warp // self.warps * self.chunk,
            min(first + chunks * (warp + 1) // self.warps * self.chunk, last),
        )

    def first_chunks(self) -> list[tuple[int, int]]:
        """Vectors of each warp's first chunk, in the order of positions."""
        parts = [
            self.of_warp(self.of_block(cta), warp)
            for cta in range(self.ctas)
            for warp in range(self.warps)
        ]
        return [(first, min(first + self.chunk, last)) for first, last in parts]

    def groups_to_reach(self, attempt: int) -> int:
        read = self.ctas * self.warps * self.chunk * self.values
        mean = self.k * min(read / self.length, 1.0)
        most = mean + 4 * math.sqrt(mean) + 4
        if attempt > 0:
            most = 4 * most + 16
        if most > self.groups or attempt + 1 == ATTEMPTS:
            return 0
        return int(self.groups * (1 - math.exp(-most / self.groups))) + 1

    def bound(self, attempt: int) -> int:
        rank = self.groups_to_reach(attempt)
        first, last = self.of_block({"0": 0, "BLOCKS_PER_ROW - 1": self.ctas - 1}[ASKED])
        if rank == 0 or -(-(last - first) // self.chunk) < self.warps:
            return 0
        chunks = self.first_chunks()
        assert all(first < last for first, last in chunks), "a warp waits for a chunk it has not"
        maxima = np.zeros((len(chunks), 2 * WARP), np.int64)
        for own, (first, last) in zip(maxima, chunks, strict=True):
            keys = self.keys[first * self.values : last * self.values]
            place = np.arange(len(keys)) // self.values
            group = place % WARP + WARP * (place // WARP >= self.loads // 2)
            np.maximum.at(own, group, keys)
        present = maxima[maxima != 0]
        least, largest = LEAST_KEY, ALL
        if self.ctas == 1:
            least, largest = int(present.min()), int(present.max())
        cut = find_cut(present, rank, least, largest, rank // 4)
        if cut.ties == 0:
            return (cut.key + 1) << 31
        return self.bound_of_ties(cut.key, chunks)

    def bound_of_ties(self, key: int, chunks: list[tuple[int, int]]) -> int:
        parts = [self.keys[first * self.values : last * self.values] for first, last in chunks]
        wanted = max(self.k - sum(int((part > key).sum()) for part in parts), 1)
        for part, (_, last) in zip(parts, chunks, strict=True):
            wanted -= int((part == key).sum())
            if wanted <= 0:
                return key << 31 | (2**31 - 1 - (last * self.values - 1))
        return key << 31

    def turns(self, part: tuple[int, int]) -> list[int]:
        """The chunks of a warp's part in the order in which it reads them: by the steps of
        ``Turns``.
        """
        chunk, last = part
        left = -(-(last - chunk) // self.chunk) * self.chunk
        step, inward = left - self.chunk, self.chunk
        found = []
        while left:
            found.append(chunk)
            chunk, left, step, inward = chunk + step, left - self.chunk, inward - step, -inward
        return found

    def stream(self, cta: int, bound: int) -> Integers:
        """The list of a CTA."""
        block = self.of_block(cta)
        waiting = [self.turns(self.of_warp(block, warp)) for warp in range(self.warps)]
        entries: list[int] = []
        if cta == self.ctas - 1:
            edge = self.candidates[self.vectors * self.values :]
            entries = edge[edge >= bound].tolist()
        while any(waiting):
            warp = int(self.random.choice([w for w, own in enumerate(waiting) if own]))
            first = waiting[warp].pop(0)
            last = min(first + self.chunk, self.of_warp(block, warp)[1])
            rest = self.entering(first * self.values, last * self.values, bound)
            self.entered += len(rest)
            while rest:
                room = self.capacity - len(entries)
                entries, rest = entries + rest[:room], rest[room:]
                if rest:
                    self.reductions += 1
                    entries, bound = self.reduced(np.array(entries, np.int64), bound)
                    rest = [candidate for candidate in rest if candidate >= bound]
        return np.array(entries, np.int64)

    def entering(self, begin: int, end: int, bound: int) -> list[int]:
        """The candidates of a chunk that are appended: by a comparison of scores, which is made
        exact where it lets others enter.
        """
        key, index = bound >> 31, 2**31 - 1 - (bound & (2**31 - 1))
        if begin > index:
            if key == ALL:
                return []
            key += 1
        if key > max(INFINITE_KEY, self.nan_key):
            return []
        finite = min(max(key, LEAST_KEY), INFINITE_KEY)
        least = np.uint32(finite ^ 0x80000000 if finite >> 31 else ~finite & ALL)
        scores = self.scores[begin:end]
        with np.errstate(invalid="ignore"):  # of a signalling NaN
            enters = scores >= least.view(np.float32)
        if self.nan_key >= key:
            enters |= np.isnan(scores)
        found = self.candidates[begin:end][enters]
        if bound >> 31 >= INFINITE_KEY or 0 <= index - begin < self.chunk * self.values:
            found = found[found >= bound]
        assert (found >= bound).all()
        return [int(candidate) for candidate in found]

    def reduced(self, entries: Integers, bound: int) -> tuple[list[int], int]:
        """The k largest of a full list, and the least of them."""
        keys = entries >> 31
        cut = find_cut(keys, self.k, max(bound >> 31, LEAST_KEY), int(keys.max()))
        equal = np.sort(entries[keys == cut.key])
        kept = np.concatenate((equal[len(equal) - cut.ties :], np.sort(entries[keys > cut.key])))
        assert np.array_equal(kept, np.sort(entries)[-self.k :])
        return kept.tolist(), int(kept[0])

    def ids(self) -> Integers:
        for attempt in range(ATTEMPTS):
            bound = self.bound(attempt)
            lists = [self.stream(cta, bound) for cta in range(self.ctas)]
            self.listed = sum(len(entries) for entries in lists)
            if self.listed >= self.wanted:
                break
            self.attempts += 1
        found = np.full(self.wanted, -1, np.int64)
        keys = [entries >> 31 for entries in lists]
        every = np.concatenate(keys)
        cut = Cut(0, 0, 0)
        if self.listed > self.wanted:
            least = max(bound >> 31, LEAST_KEY)
            cut = find_cut(every, self.wanted, least, int(every.max()), listed=True)
        for cta, entries in enumerate(lists):
            earlier = np.concatenate([every[:0], *keys[:cta]])
            ties_before = min(int((earlier == cut.key).sum()), cut.ties)
            place = int((earlier > cut.key).sum()) + ties_before
            equal = np.sort(entries[keys[cta] == cut.key])
            ties = min(cut.ties - ties_before, len(equal))
            taken = np.concatenate((entries[keys[cta] > cut.key], equal[len(equal) - ties :]))
            begin = self.of_block(cta)[0] * self.values
            self.emit(2**31 - 1 - (taken & (2**31 - 1)), begin, place, found)
        return found

    def emit(self, positions: Integers, begin: int, place: int, found: Integers) -> None:
        """Each position goes to the place after all marks before its own: those of the warps
        before, of the warp's vectors before, and within the vector.
        """
        size = 128 * bitmap_vectors(self.ring_bytes)
        window = begin
        while len(positions):
            here = positions[(positions >= window) & (positions < window + size)]
            marks = np.zeros(size, bool)
            marks[here - window] = True
            vectors = int(here.max(initial=window) - window) // 128 + 1
            share = 1 << ((vectors - 1) // self.threads).bit_length()  # of a thread
            assert share * self.threads >= vectors
            per_vector = np.zeros(share * self.threads, np.int64)
            per_vector[:vectors] = marks[: 128 * vectors].reshape(-1, 128).sum(axis=1)
            by_warp = per_vector.reshape(self.warps, -1)
            places = (by_warp.cumsum(axis=1) - by_warp).ravel()
            warps = by_warp.sum(axis=1).cumsum() - by_warp.sum(axis=1)
            for position in here.tolist():
                bit = position - window
                vector = bit // 128
                to = place + warps[vector // share // WARP] + places[vector]
                to += int(marks[128 * vector : bit].sum())
                assert found[to] == -1
                found[to] = position
            place += len(here)
            positions = positions[positions >= window + size]
            window += size


VARIANTS = {
    job.variant: {name: int(value) for name, value in job.constants.items()}
    for job in plan(targets=[next(iter(TARGETS))], kernels=["topk_indices"])
    if not job.constants["HELD"]
}


def least_bounded(constants: dict[str, int]) -> int:
    """The scores of a row of which each warp has a chunk."""
    vectors = constants["THREADS"] * constants["LOADS"] * constants["BLOCKS_PER_ROW"]
    return vectors * 16 // constants["SCORE_BYTES"]


def row(constants: dict[str, int], pattern: str, length: int) -> NDArray[np.uint32]:
    given = PATTERNS[pattern](length)
    if constants["SCORE_BYTES"] == 2:
        given &= np.uint32(0xFFFF0000)
    return given


def first_of_parts(length: int) -> Integers:
    columns = np.arange(32)[:, None] * length // 32 + np.arange(0, 1020, 20)
    return columns.ravel()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_is_selected_exactly(variant: str, pattern: str) -> None:
    constants = VARIANTS[variant]
    turn = list(PATTERNS).index(pattern) + list(VARIANTS).index(variant)
    least = least_bounded(constants)
    for length in (least + 5, 3 * least // 2 + 1, 9001)[turn % 3 :: 3]:
        given = row(constants, pattern, length)
        for k, nan_first in ((512, False), (constants["MAX_TOP_K"], True)):
            walk = Walk(constants, given, k, nan_first)
            assert np.array_equal(walk.ids(), oracle(given, k, nan_first)), (length, k)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_row_is_read_once_and_its_list_is_short(variant: str) -> None:
    constants = VARIANTS[variant]
    length = max(2 * least_bounded(constants), 2**18)
    walk = Walk(constants, row(constants, "normal", length), 512, nan=False)
    walk.ids()
    assert (walk.attempts, walk.reductions) == (0, 0)
    assert walk.listed < 4 * 512


@pytest.mark.parametrize("chunks", range(12))
def test_a_warp_reads_each_chunk_once_from_both_ends_by_turns(chunks: int) -> None:
    walk = Walk(VARIANTS["pair"], np.zeros(1, np.uint32), 1, nan=False)
    part = (7, 7 + max(chunks * walk.chunk - 3, 0))  # the last chunk is not whole
    turns = [(first - 7) // walk.chunk for first in walk.turns(part)]
    ends = [(turn, chunks - 1 - turn) for turn in range(chunks)]
    assert turns == [place for both in ends for place in both][:chunks]


@pytest.mark.parametrize("k", [512, 2048])
@pytest.mark.parametrize("pattern", ["ascending", "descending"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bf16" not in name])
def test_of_a_row_in_order_few_chunks_enter(variant: str, pattern: str, k: int) -> None:
    """Of a sorted row one warp has the largest scores. To append a chunk of them takes longer
    than to read one, and the other warps wait. So that warp must not append its whole part, which
    has 65,536 scores in ``block``.
    """
    constants = VARIANTS[variant]
    given = row(constants, pattern, 2**20)
    walk = Walk(constants, given, k, nan=False)
    assert np.array_equal(walk.ids(), oracle(given, k, False))
    assert walk.reductions <= 3
    assert walk.entered <= 16384


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_warp_waits_only_for_a_chunk_that_it_has(variant: str) -> None:
    """Rows about as long as those of which each warp has a chunk: in some, the first CTA has one
    chunk more than the last one.
    """
    constants = VARIANTS[variant]
    chunk = WARP * constants["LOADS"] * 16 // constants["SCORE_BYTES"]
    shortest = least_bounded(constants) - constants["BLOCKS_PER_ROW"] * chunk
    values = 16 // constants["SCORE_BYTES"]
    for vectors in range(2 * constants["BLOCKS_PER_ROW"] + 1):
        length = shortest + vectors * values
        given = row(constants, "normal", length)
        walk = Walk(constants, given, 512, nan=False)
        assert np.array_equal(walk.ids(), oracle(given, 512, False)), length


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_equal_scores_those_up_to_the_end_of_a_chunk_enter(variant: str) -> None:
    constants = VARIANTS[variant]
    walk = Walk(constants, row(constants, "equal", least_bounded(constants)), 512, nan=False)
    walk.ids()
    assert walk.listed <= 512 + walk.chunk * walk.values
    assert (walk.attempts, walk.reductions) == (0, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_infinities_do_not_enter_where_nan_ranks_first(variant: str) -> None:
    constants = VARIANTS[variant]
    random = np.random.default_rng(15)
    length = max(70_001, least_bounded(constants))
    given = bits(random.standard_normal(length).astype(np.float32))
    drawn = random.integers(0, 10, length)
    given[drawn == 0], given[drawn == 1] = 0x7FC00000, 0x7F800000
    walk = Walk(constants, given, 2048, nan=True)
    assert np.array_equal(walk.ids(), oracle(given, 2048, True))


def test_a_bound_that_is_too_high_is_found_out() -> None:
    constants = VARIANTS["block"]
    scores = np.random.default_rng(3).standard_normal(2**18).astype(np.float32)
    scores[first_of_parts(2**18)] += 100
    walk = Walk(constants, bits(scores), 2048, nan=False)
    assert np.array_equal(walk.ids(), oracle(bits(scores), 2048, False))
    assert walk.attempts > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_marks_and_places_have_slots_of_their_own(variant: str) -> None:
    constants = VARIANTS[variant]
    ring_bytes = 16 * constants["THREADS"] * constants["LOADS"] * constants["STAGES"]
    vector = np.arange(bitmap_vectors(ring_bytes))
    marks, places = vector + vector // 8, vector + vector // 32
    words = np.concatenate((4 * marks, 4 * marks + 3, 4 * (marks[-1] + 1) + places))
    assert len(np.unique(words)) == 3 * len(vector)
    assert 4 * words.max() < ring_bytes
    # Eight lanes read their vectors at a time: from different banks.
    for apart in (1, 2, 4, 8):
        lanes = apart * np.arange(8)
        assert len(np.unique(4 * (lanes + lanes // 8) % 32)) == 8
