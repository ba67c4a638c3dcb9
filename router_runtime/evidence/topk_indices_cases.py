"""The cases of the oracle suite for ``topk_indices``; see ``cases.py``. This module imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from router_runtime.evidence.cases import Case, Limits
from router_runtime.format.contract import Constants

#: Lengths of rows: shorter than a vector; powers of two, which divide evenly among vectors, threads
#: and CTAs; and others, which do not.
_LENGTHS = (1, 5, 31, 33, 129, 1000, 4097, 8192, 20000, 65537, 131072, 262144)
_LONGEST = (2**20, 2**21)
_TOP_KS = (1, 33, 512, 1024, 2048, 4096)
#: Patterns of scores that a kernel could get wrong. From some of a row's scores a kernel estimates
#: how large the k-th largest is; the last two patterns make just those scores large, so that the
#: estimate is too high.
_PATTERNS = (
    *("ties", "equal", "two_values", "ascending", "descending", "specials", "signed_zeros"),
    *("mostly_nan", "all_nan", "any_bits", "relu", "subnormals", "outlier", "clustered"),
    *("beats_sample", "beats_groups"),
)
_ROWS, _LONG_ROWS = 9, 2
#: The sample of "beats_sample" for kernels that take none.
_SAMPLE = 512
#: The columns from which there are only ``_LONG_ROWS`` rows.
_LONG = 60000
#: Batches around a warp's row, a CTA's and a wave.
_BATCHES = (1, 2, 63, 300)


def topk_indices(constants: Constants, limits: Limits) -> Iterator[Case]:
    """Every case of an entry.

    The sizes of a case: ``rows``, ``row_length`` and ``top_k``; ``padding``, the elements between
    rows; ``score_bytes``; ``sample``, the largest sample that the kernel takes of a row, where the
    pattern depends on it; ``bounded`` (1: rows have starts and ends), ``page_size`` (0: there is no
    page table), ``requests`` and ``offsets`` (1: there are some), ``sorted`` and ``nan_first``.
    """
    score_bytes = int(constants["SCORE_BYTES"])
    # A kernel that takes no sample has to select from such rows too.
    sample = int(constants.get("SAMPLES", 0)) or _SAMPLE
    longest, most = limits["row_length"][1], limits["top_k"][1]

    def case(pattern: str, length: int, k: int, *, variations: bool = False, **more: int) -> Case:
        rows = more.pop("rows", _LONG_ROWS if length >= _LONG else _ROWS)
        name = f"{pattern}-{rows}x{length}-k{k}" + "".join(
            f"-{name.replace('_', '-')}{value}" for name, value in more.items()
        )
        if pattern == "beats_sample":
            name += f"-of{sample}"
        name += "-bf16" if score_bytes == 2 else ""
        sizes = {
            **{"rows": rows, "row_length": length, "top_k": k, "padding": 0},
            **{"score_bytes": score_bytes, "sample": sample if pattern == "beats_sample" else 0},
            **dict.fromkeys(("bounded", "page_size", "requests", "offsets"), 0),
            **dict.fromkeys(("sorted", "nan_first"), 0),
            **more,
        }
        return Case("topk_indices", name, pattern, sizes, variations=variations)

    lengths = sorted({min(length, longest) for length in _LENGTHS})
    top_ks = sorted({min(k, most) for k in _TOP_KS})
    turn = 0
    for length in lengths:
        for k in top_ks:
            turn += 1
            yield case("random", length, k, sorted=turn % 2, bounded=turn // 2 % 2)
    for length in sorted({min(length, longest) for length in (5003, 70001)}):
        for pattern in _PATTERNS:
            turn += 1
            k = top_ks[-1] if turn % 3 == 0 else min(512, most)
            # "beats_sample" raises the columns that are sampled of a whole row, so no bounds.
            bounded = int(pattern != "beats_sample" and turn % 2)
            yield case(pattern, length, k, bounded=bounded, sorted=int(turn % 3 == 1))
        # top_k exceeds the number of large scores from which the kernel makes its first estimate,
        # so the kernel has to search the row a second time.
        yield case("beats_groups", length, top_ks[-1])
        for pattern in ("specials", "mostly_nan", "any_bits"):
            yield case(pattern, length, min(512, most), nan_first=1, sorted=1)
    middle = min(1000, longest)
    k = min(64, most)
    for rows in _BATCHES:
        yield case("random", middle, k, rows=rows, bounded=1)
    for padding in (1, 2, 3, 4, 8):
        yield case("random", middle, k, padding=padding)
    for page_size in (1, 3, 64):
        for requests in (0, 1):
            yield case("random", middle, k, page_size=page_size, requests=requests, bounded=1)
    yield case("ties", middle, k, page_size=64, requests=1, offsets=1, bounded=1, sorted=1)
    yield case("random", middle, k, offsets=1, bounded=1)
    yield case("equal", min(20000, longest), most, page_size=64, offsets=1)
    yield case(
        "ties", middle, k, rows=33, bounded=1, page_size=16, requests=1, offsets=1, variations=True
    )
    for length in _LONGEST:
        if length <= longest:
            for pattern in ("random", "relu", "equal", "beats_sample"):
                yield case(pattern, length, min(512, most), rows=1)
            yield case("beats_groups", length, min(2048, most), rows=1)
