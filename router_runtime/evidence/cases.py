"""The oracle suite as data: which cases each kernel must pass, and under which digest.

A case is a name, a pattern of inputs, sizes and a seed; ``inputs.py`` turns it into tensors and
``judge.py`` compares a kernel's outputs with the mathematics of ``spec.py``. The list depends only
on what an entry declares (its kernel, its constants, its limits), so evidence can be checked for
completeness anywhere. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from router_runtime.format.contract import Constants
from router_runtime.format.scoring import SQRT_SOFTPLUS

Limits = Mapping[str, tuple[int, int]]

#: Token counts around every block, tile and dispatch boundary that a kernel here may have.
TOKENS = (1, 2, 63, 64, 65, 1000)
#: The same for the dense kernels, whose tiles are of 8 to 256 tokens. Their cases also try every
#: size of ``arrangements.BATCHES`` on the same rows.
DENSE_TOKENS = (1, 2, 63, 64, 65, 129, 257, 1000)
#: Rows of the cases whose point is the pattern of the inputs rather than their number.
PATTERN_TOKENS = 33

#: Serving inputs together in one case: ``padding`` by a mask, ``count`` of valid tokens, ``images``
#: with a bias of their own, an expert ``map``, ``wide`` ids out, ``replay`` of given ids, which are
#: wide where the ids out are.
SERVING = (
    ("padding",),
    ("count",),
    ("images",),
    ("map",),
    ("wide",),
    ("replay",),
    ("padding", "images"),
    ("padding", "count", "map", "wide", "replay"),
    ("padding", "count", "images", "map", "wide"),
)

#: More of them, for the dense kernels: a ``table`` that experts are looked up in by token id, as
#: hash_gate does.
LOOKUPS = (
    ("table",),
    ("table", "padding", "images", "map", "wide"),
    ("table", "replay"),
)

#: The version of the oracle suite, that is of what "passes the suite" means. Evidence of another
#: version proves nothing. Raise it by one when a cubin that passed could now fail, or one that
#: failed could now pass: after a change of the mathematics in ``spec.py``, of the inputs that a
#: case draws, of an error bound, or of what is compared. Leave it as it is after a change of
#: comments, names of files, messages or speed. A change of the cases needs no other version:
#: records hold their digest too (``record.cases_sha256``).
SUITE_VERSION = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One launch with drawn inputs.

    Attributes:
        kernel: Its name.
        name: Unique among the cases of an entry. The seed follows from it.
        pattern: Of the inputs, a name that ``verification.inputs`` knows.
        sizes: The integers that determine the shapes, such as tokens, experts and top_k; their
            names depend on the kernel.
        scale: The factor r of the weights.
        renormalize: Whether the weights of a token are divided by their sum.
        variations: Whether launches on rearranged rows follow, which must give each row the same
            bits (batch invariance).
        serving: The serving inputs that the case has, names of ``SERVING`` and ``LOOKUPS``.
        scoring: The scoring function of the kernel.
        gate_temperature: What it divides logits by.

    """

    kernel: str
    name: str
    pattern: str
    sizes: Mapping[str, int]
    scale: float = 1.5
    renormalize: bool = True
    variations: bool = False
    serving: tuple[str, ...] = ()
    scoring: str = SQRT_SOFTPLUS
    gate_temperature: float = 1.0

    @property
    def seed(self) -> int:
        """Return the seed from which the inputs are drawn. It follows from the name, so every
        machine and release draws the same inputs, for all kernels of one family.
        """
        return _seed(f"{family(self.kernel)}/{self.name}")


@functools.cache
def _seed(name: str) -> int:
    """The seed of a name. Cached: variants of a kernel have the same cases."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def family(kernel: str) -> str:
    """Return a name that is the same for kernels that compute the same: those of the dense router
    differ in speed only.
    """
    return "dense_router" if kernel.startswith("dense_router_") else kernel


def cases(kernel: str, constants: Constants, limits: Limits) -> tuple[Case, ...]:
    """Return every case of an entry, in a fixed order.

    Args:
        kernel: The entry's.
        constants: The entry's.
        limits: Of its contract: quantity -> least and largest value.

    Raises:
        ValueError: There are no cases for this kernel.
        KeyError: A constant is missing.

    """
    if kernel not in _CASES:
        raise ValueError(
            f"expected a kernel with oracle cases, one of {sorted(_CASES)}, found {kernel!r}; "
            "add its cases to router_runtime/evidence/cases.py"
        )
    listed = tuple(_scored(_CASES[kernel](constants, limits), constants))
    names = [case.name for case in listed]
    if len(set(names)) != len(names):
        raise ValueError(f"{kernel}: expected distinct case names, found {sorted(names)}")
    return listed


def _scored(cases: Iterable[Case], constants: Constants) -> Iterator[Case]:
    """The cases of an entry that scores as its constants say. Another rule than sqrtsoftplus with
    the temperature 1 is part of their names, and so of the seeds.
    """
    function = str(constants.get("SCORING", SQRT_SOFTPLUS))
    temperature = float(constants.get("GATE_TEMPERATURE", 1.0))
    if (function, temperature) == (SQRT_SOFTPLUS, 1.0):
        yield from cases
        return
    for case in cases:
        yield dataclasses.replace(
            case,
            name=f"{case.name}-{function}-t{temperature:g}",
            scoring=function,
            gate_temperature=temperature,
        )


def _within(limits: Limits, quantity: str, wanted: tuple[int, ...]) -> list[int]:
    """The wanted sizes that the limits allow, and the limits themselves where they are near."""
    low, high = limits.get(quantity, (1, max(wanted)))
    edges = {edge for edge in (low, high) if min(wanted) <= edge <= max(wanted)}
    return sorted({size for size in wanted if low <= size <= high} | edges)


def _clamped(limits: Limits, quantity: str, wanted: int) -> int:
    low, high = limits.get(quantity, (wanted, wanted))
    return min(max(wanted, low), high)


def _served(
    cases: Iterable[Case], images: bool = True, replay: bool = True, table: bool = False
) -> Iterator[Case]:
    """Each case with serving inputs that ``SERVING`` and ``LOOKUPS`` list, as far as the kernel has
    them.
    """
    absent = {name for name, has in (("images", images), ("replay", replay)) if not has}
    for case in cases:
        for inputs in (*SERVING, *(LOOKUPS if table else ())):
            if not absent.intersection(inputs):
                name = f"{case.name}-{'+'.join(inputs)}"
                # What decides by row would not survive a rearrangement of the rows.
                moves = case.variations and not {"count", "map"}.intersection(inputs)
                yield dataclasses.replace(case, name=name, serving=inputs, variations=moves)


def _hash_router(_: Constants, limits: Limits) -> Iterator[Case]:
    top_k = _clamped(limits, "top_k", 6)

    def case(name: str, pattern: str, **sizes: int) -> Case:
        defaults = {"tokens": PATTERN_TOKENS, "vocab": 1009, "top_k": top_k, "index_bits": 64}
        defaults |= {"experts": 256, "sentinel": -1}
        return Case("hash_router", name, pattern, defaults | sizes)

    for tokens in _within(limits, "tokens", TOKENS):
        for bits in (32, 64):
            yield case(f"random-n{tokens}-i{bits}", "random", tokens=tokens, index_bits=bits)
    for bits in (32, 64):
        yield case(f"out-of-range-i{bits}", "out_of_range", tokens=257, index_bits=bits)
    yield case("full-vocabulary", "random", tokens=1000, vocab=129280, experts=384)
    yield case("one-word", "out_of_range", vocab=1)
    yield case("sentinel-zero", "out_of_range", sentinel=0)
    yield case("sentinel-large", "out_of_range", sentinel=2**31 - 1)
    for k in _within(limits, "top_k", (1, 2, 7, 8, 16, 32)):
        yield case(f"random-k{k}", "random", top_k=k)
    yield from _served(
        (case(f"served-i{bits}", "out_of_range", tokens=257, index_bits=bits) for bits in (32, 64)),
        images=False,
        replay=False,
    )


#: Row lengths around powers of two, warp and block sizes, and the limits of topk_select.
_ROW_LENGTHS = (
    *(1, 2, 6, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 384, 1000, 1024, 1025),
    *(4096, 5000, 16384, 32768, 65535, 65536),
)
#: Patterns of rows for the kernels that take fp32 rows of scores or of logits.
_SELECT_PATTERNS = (
    *("ties", "equal", "ascending", "descending", "specials", "signed_zeros", "mostly_nan"),
    *("all_nan", "any_bits"),
)
_LOGIT_PATTERNS = (
    *("ties", "equal", "bias_8", "extremes", "infinities", "nan", "nan_rows", "any_bits"),
    *("underflow", "special_bias"),
)
_DENSE_PATTERNS = (
    *("ties", "equal", "bias_8", "extremes", "infinities", "nan_rows", "zero", "subnormal"),
    *("cancelling", "negative", "special_bias"),
)


def _topk_select(_: Constants, limits: Limits) -> Iterator[Case]:
    def case(pattern: str, rows: int, length: int, k: int, padding: int = 0) -> Case:
        name = f"{pattern}-{rows}x{length}-k{k}" + (f"-stride+{padding}" if padding else "")
        sizes = {"rows": rows, "row_length": length, "top_k": k, "padding": padding}
        return Case("topk_select", name, pattern, sizes)

    lengths = _within(limits, "row_length", _ROW_LENGTHS)
    top_ks = _within(limits, "top_k", (1, 2, 6, 8, 31, 32))
    for length in lengths:
        for k in top_ks:
            if k <= length:
                yield case("random", 3 if length > 4096 else 17, length, k)
    middle = _clamped(limits, "row_length", 256)
    for rows in TOKENS:
        yield case("random", rows, middle, min(6, middle, max(top_ks)))
    for length in sorted({lengths[-1], _clamped(limits, "row_length", 1000), middle}):
        for pattern in _SELECT_PATTERNS:
            for k in sorted({min(top_ks[-1], length), min(6, top_ks[-1], length)}):
                yield case(pattern, 3 if length > 4096 else 17, length, k)
    for padding in (1, 2, 3, 4, 8):
        yield case("random", 65, middle, min(6, middle, max(top_ks)), padding)


def _activation_topk(_: Constants, limits: Limits) -> Iterator[Case]:
    top_k = _clamped(limits, "top_k", 6)

    def case(
        pattern: str,
        tokens: int,
        experts: int,
        k: int,
        *,
        padding: int = 0,
        scale: float = 1.5,
        renormalize: bool = True,
    ) -> Case:
        name = f"{pattern}-{tokens}x{experts}-k{k}" + (f"-stride+{padding}" if padding else "")
        name += f"-r{scale:g}" + ("" if renormalize else "-raw")
        sizes = {"tokens": tokens, "experts": experts, "top_k": k, "padding": padding}
        return Case("activation_topk", name, pattern, sizes, scale, renormalize)

    counts = _within(
        limits, "experts", (1, 6, 31, 32, 33, 64, 144, 160, 256, 257, 384, 512, 1000, 1024)
    )
    top_ks = _within(limits, "top_k", (1, 2, 6, 8, 31, 32))
    for experts in counts:
        for k in top_ks:
            if k <= experts:
                yield case("random", 17, experts, k)
    largest = counts[-1]
    for tokens in TOKENS:
        yield case("random", tokens, largest, min(top_k, largest), scale=2.5)
    for experts in sorted({largest, _clamped(limits, "experts", 250)}):
        for pattern in _LOGIT_PATTERNS:
            yield case(pattern, PATTERN_TOKENS, experts, min(top_k, experts))
    few = min(top_k, largest)
    for pattern in ("random", "extremes", "nan", "underflow", "any_bits"):
        yield case(pattern, PATTERN_TOKENS, largest, few, renormalize=False)
    for scale in (0.0, 1e-30, 1e18):
        yield case("any_bits", PATTERN_TOKENS, largest, few, scale=scale)
        yield case("any_bits", PATTERN_TOKENS, largest, few, scale=scale, renormalize=False)
    for padding in (1, 2, 3, 4, 8):
        yield case("random", 65, largest, few, padding=padding)
    yield from _served(
        (
            case("random", 65, largest, few),
            case("nan_rows", PATTERN_TOKENS, largest, few, renormalize=False),
        )
    )


def _dense_router(kernel: str, constants: Constants, limits: Limits) -> Iterator[Case]:
    shape = {
        "hidden": int(constants["HIDDEN"]),
        "experts": int(constants["EXPERTS"]),
        "top_k": int(constants["TOP_K"]),
    }

    def case(
        pattern: str,
        tokens: int,
        *,
        padding: int = 0,
        scale: float = 1.5,
        renormalize: bool = True,
        variations: bool = False,
    ) -> Case:
        name = f"{pattern}-n{tokens}" + (f"-stride+{padding}" if padding else "")
        name += f"-r{scale:g}" + ("" if renormalize else "-raw")
        # The shape is part of the name and so of the seed: models draw different inputs.
        name += "-{hidden}x{experts}-k{top_k}".format(**shape)
        sizes = shape | {"tokens": tokens, "padding": padding}
        return Case(kernel, name, pattern, sizes, scale, renormalize, variations)

    largest = limits.get("tokens", (1, max(DENSE_TOKENS)))[1]
    for tokens in _within(limits, "tokens", DENSE_TOKENS):
        yield case("random", tokens, scale=2.5, variations=True)
    tokens = min(PATTERN_TOKENS, largest)
    for pattern in _DENSE_PATTERNS:
        yield case(pattern, tokens, variations=pattern in ("infinities", "nan_rows"))
    for pattern in ("random", "extremes"):
        yield case(pattern, tokens, renormalize=False)
    for scale in (0.0, 1e18):
        yield case("random", tokens, scale=scale)
    for padding in (8, 64):
        yield case("random", tokens, padding=padding)
    # Several tiles of every kernel, the last of them short.
    yield from _served(
        (
            case("random", min(299, largest), variations=True),
            case("nan_rows", tokens, renormalize=False),
        ),
        table=True,
    )


#: Sizes that cover every way in which hash_gate's tokens share a multiprocessor; any pattern of
#: hidden states that a dense router is tried with, unless it is about ids.
_GATE_TOKENS = (1, 2, 63, 64, 65, 257, 1000)
_GATE_PATTERNS = (
    *("extremes", "infinities", "nan_rows", "zero", "subnormal", "cancelling", "negative"),
    *("repeated", "out_of_range", "one_expert"),
)


def _hash_gate(constants: Constants, limits: Limits) -> Iterator[Case]:
    shape = {
        "hidden": int(constants["HIDDEN"]),
        "experts": int(constants["EXPERTS"]),
        "top_k": int(constants["TOP_K"]),
    }

    def case(
        pattern: str,
        tokens: int,
        *,
        scale: float = 1.5,
        renormalize: bool = True,
        variations: bool = False,
        **sizes: int,
    ) -> Case:
        defaults = {"padding": 0, "vocab": 1009, "index_bits": 64, "sentinel": -1, "images": 0}
        changed = "".join(f"-{name}{value}" for name, value in sizes.items())
        name = f"{pattern}-n{tokens}{changed}-r{scale:g}" + ("" if renormalize else "-raw")
        name += "-{hidden}x{experts}-k{top_k}".format(**shape)
        sizes = shape | {"tokens": tokens} | defaults | sizes
        return Case("hash_gate", name, pattern, sizes, scale, renormalize, variations)

    largest = limits.get("tokens", (1, max(_GATE_TOKENS)))[1]
    for tokens in _within(limits, "tokens", _GATE_TOKENS):
        yield case("random", tokens, scale=2.5, variations=True)
    for pattern in _GATE_PATTERNS:
        yield case(pattern, PATTERN_TOKENS, variations=pattern in ("infinities", "nan_rows"))
    for bits in (32, 64):
        yield case("out_of_range", min(257, largest), index_bits=bits)
    yield case("random", min(1000, largest), vocab=129280)
    yield case("out_of_range", PATTERN_TOKENS, vocab=1)
    for sentinel in (0, 2**31 - 1):
        yield case("out_of_range", PATTERN_TOKENS, sentinel=sentinel)
    for pattern in ("random", "extremes"):
        yield case(pattern, PATTERN_TOKENS, renormalize=False)
    for scale in (0.0, 1e18):
        yield case("random", PATTERN_TOKENS, scale=scale)
    for padding in (8, 64):
        yield case("random", PATTERN_TOKENS, padding=padding)
    images = bool(constants.get("IMAGES"))
    yield from _served(
        (
            case("random", min(65, largest), variations=True),
            case("out_of_range", min(257, largest)),
        ),
        images=images,
    )
    if not images:
        return
    # Image tokens among the others: the rules of a dense router for what selects by scores.
    yield case("random", min(65, largest), images=1, variations=True)
    for pattern in ("ties", "equal", "bias_8", "infinities", "nan_rows", "special_bias"):
        yield case(pattern, PATTERN_TOKENS, images=1)
    yield case("out_of_range", PATTERN_TOKENS, images=1)


_CASES: Mapping[str, Callable[[Constants, Limits], Iterator[Case]]] = {
    "hash_router": _hash_router,
    "topk_select": _topk_select,
    "activation_topk": _activation_topk,
    "hash_gate": _hash_gate,
    "dense_router_decode": functools.partial(_dense_router, "dense_router_decode"),
    "dense_router_prefill": functools.partial(_dense_router, "dense_router_prefill"),
}
