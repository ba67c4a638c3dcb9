"""``router-runtime doctor --why REQUEST``: how one request is decided, entry by entry.

A request is a kernel and what it is to serve, separated by ``/``:

    dense_router/dsv4-pro/1024            a dense router of a model, a batch of 1024 tokens
    dense_router/dsv4-pro                 the same for every batch size
    hash_gate/dsv4-flash/64/IMAGES=1
    dense_router_decode/dsv4-pro/8        one of the two dense kernels alone
    topk_select/row_length=4096/top_k=8   a row op, by the quantities that its kernels limit
    dense_router/HIDDEN=7168/EXPERTS=384/TOP_K=6/variant=portable
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from router_runtime.cli.decisions import DENSE_ROUTER, router_requests, shape_of
from router_runtime.cli.diagnosis import Contents, Place
from router_runtime.cli.report import SCHEMA
from router_runtime.device.dispatch import Dispatch, dispatch
from router_runtime.device.facts import DeviceFacts
from router_runtime.device.resolve import Candidate, Request, Resolution, next_step, resolve
from router_runtime.errors import InputError, explain
from router_runtime.evidence.choice import DENSE, microseconds
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants
from router_runtime.format.target import Target

SYNTAX = "KERNEL[/MODEL][/TOKENS][/NAME=VALUE...], such as dense_router/dsv4-pro/1024"

#: Said of figures, which a reader would else take for those of the device.
_EXPECTED = (
    "expected: by the manifest, whose figures were measured on another device or are predicted; "
    "nothing was timed here"
)

#: What a router states for what the request leaves open: text tokens only, and the scores of a
#: RouterConfig that does not say how it scores.
_DEFAULTS = {"IMAGES": 0, **scoring_constants(SQRT_SOFTPLUS, 1.0)}


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed request. ``divided``: batch sizes are divided among the entries, as a Router does;
    then ``tokens`` is the batch size, or None for all of them.
    """

    text: str
    requests: tuple[Request, ...]
    divided: bool
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One entry of a requested kernel. ``microseconds`` is what the requested number of tokens is
    expected to take, by the figures of the manifest; None where it has none. No figure is of the
    device of the answer: they were measured elsewhere, or are predicted.
    """

    entry: str
    status: str
    verdict: Literal["chosen", "could serve", "refused"]
    reasons: tuple[str, ...]
    microseconds: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What serves a request on one device: ``chosen`` are the keys of the entries, in the order of
    their token ranges. ``next`` is what to do if there are none.
    """

    device: str
    indices: tuple[int, ...]
    chosen: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    verdicts: tuple[Verdict, ...]
    elsewhere: int
    next: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answers for every device. ``accept`` is that of the Router. ``elsewhere`` of an answer
    counts entries for other targets and other shapes, which are left out of ``verdicts``.
    """

    schema: int
    request: str
    accept: str | None
    answers: tuple[Answer, ...]


def parse(text: str, manifest: Manifest, accept: str | None = None) -> Question:
    """The request that ``text`` names, of a Router with this ``accept``. Raises InputError, with
    the nearest name that exists.
    """
    kernel, *parts = text.split("/")
    kernels = sorted({DENSE_ROUTER, *(entry.kernel for entry in manifest.entries)})
    if kernel not in kernels:
        raise _unknown(text, "a kernel", kernel, kernels)
    members = DENSE if kernel == DENSE_ROUTER else (kernel,)
    entries = [entry for entry in manifest.entries if entry.kernel in members]
    shape: dict[str, int | float | str] = {}
    quantities: dict[str, int] = {}
    limits = {name for entry in entries for name in entry.contract.limits}
    stated: set[str] = set()
    variant = None
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            name, value = ("tokens", part) if _is_number(part) else ("model", part)
        if name in stated:
            raise _unreadable(text, f"one value of {name}", f"another, {part!r}")
        stated.add(name)
        if name == "model" and not equals:
            shape |= _shape_of_model(text, part, entries)
        elif name == "variant":
            _one_of(text, "a variant", value, {entry.variant for entry in entries})
            variant = value
        elif any(name in entry.constants for entry in entries):
            shape[name] = _value(value)
        elif name in limits:
            if not _is_number(value) or int(value) == 0:
                raise _unreadable(text, f"a whole number from 1 for {name}", repr(value))
            quantities[name] = int(value)
        else:
            raise _unknown(text, "a name", name, _names(entries))
    per_model = any(entry.model is not None for entry in entries)
    divided = kernel == DENSE_ROUTER or (per_model and kernel not in DENSE)
    if not divided:
        # A row op, which no Router chooses, takes what serves by default.
        accepted = accept if per_model else None
        request = Request(kernel, shape, quantities, (), variant, accepted)
        return Question(text, (request,), False, None)
    for name, value_ in _DEFAULTS.items():
        if any(name in entry.constants for entry in entries):
            shape.setdefault(name, value_)
    requests = router_requests(kernel, shape, accept)
    if variant is not None:
        requests = tuple(
            dataclasses.replace(each, variant=variant) for each in requests if each.leads
        )
    return Question(text, requests, True, quantities.get("tokens"))


def explain_request(question: Question, contents: Contents, places: Iterable[Place]) -> Explanation:
    """The answers to ``question`` for each of the devices."""
    answers = (_answer(question, contents, place) for place in places)
    accept = question.requests[0].accept
    return Explanation(SCHEMA, question.text, accept, tuple(answers))


def lines(found: Explanation, tokens: int | None) -> Iterator[str]:
    """The explanation as text: the choice, then every entry with its reasons. Devices that follow
    each other and have the same answer have it once. ``tokens`` are those of the question.
    """
    accepting = "" if found.accept is None else f", accept={found.accept!r},"
    for _, group in itertools.groupby(found.answers, _without_device):
        alike = tuple(group)
        answer = alike[0]
        yield from (f"{found.request}{accepting} on {_device(member)}" for member in alike)
        for entry, (low, high) in zip(answer.chosen, answer.ranges, strict=False):
            yield f"  {_batches(low, high, tokens)}: {entry}"
        if not answer.ranges:
            yield f"  {answer.chosen[0] if answer.chosen else 'nothing serves it'}"
        for each in answer.verdicts:
            facts: list[str] = [each.verdict]
            facts += (
                [f"{each.microseconds:.2f} us expected"] if each.microseconds is not None else []
            )
            yield f"  {each.entry} [{each.status}]: {', '.join(facts)}"
            for reason in each.reasons:
                yield f"    {reason}"
        if any(each.microseconds is not None for each in answer.verdicts):
            yield f"  ({_EXPECTED})"
        if answer.elsewhere:
            yield f"  ({answer.elsewhere} entries for other targets or shapes are left out)"
        if answer.next:
            yield f"  next: {answer.next}"


def _answer(question: Question, contents: Contents, place: Place) -> Answer:
    manifest, facts = contents.manifest, place.facts
    status_of = contents.status_on(facts.capability)
    chosen: tuple[str, ...]
    advice: Callable[[], str]
    if not question.divided:
        resolution = resolve(question.requests[0], facts, manifest, status_of, contents.folder)
        choice = resolution.choice
        chosen = () if choice is None else (choice.key,)
        ranges: tuple[tuple[int, int], ...] = ()
        resolutions: tuple[Resolution, ...] = (resolution,)
        advice = functools.partial(next_step, resolution)
    else:
        found = dispatch(question.requests, facts, manifest, status_of, contents.folder)
        served = [each for each in found.token_ranges if _serves(each.low, each.high, question)]
        if found.token_ranges and not served:
            served = [found.token_ranges[-1]]  # a larger batch is split into launches of this range
        chosen = tuple(each.entry.key for each in served)
        ranges = tuple((each.low, each.high) for each in served)
        resolutions, advice = found.resolutions, functools.partial(Dispatch.next_step, found)
    tokens = question.tokens or question.requests[0].quantities.get("tokens")
    weighed = [candidate for each in resolutions for candidate in each.candidates]
    shown = [each for each in weighed if _belongs(each.entry, question.requests[0], facts)]
    return Answer(
        device=place.name if place.indices else f"{place.name} ({facts.major}.{facts.minor})",
        indices=place.indices,
        chosen=chosen,
        ranges=ranges,
        verdicts=tuple(_verdict(each, chosen, tokens) for each in shown),
        elsewhere=len(weighed) - len(shown),
        next=None if chosen else advice(),
    )


def _serves(low: int, high: int, question: Question) -> bool:
    return question.tokens is None or low <= question.tokens <= high


def _belongs(entry: Entry, request: Request, device: DeviceFacts) -> bool:
    """Whether an entry is for this device and this shape, so that its reasons are of interest."""
    return Target.parse(entry.target).runs_on(device.major, device.minor) and all(
        entry.constants.get(name) == value for name, value in request.constants.items()
    )


def _verdict(candidate: Candidate, chosen: tuple[str, ...], tokens: int | None) -> Verdict:
    entry = candidate.entry
    known = tokens is not None and entry.latency
    return Verdict(
        entry.key,
        candidate.status,
        "chosen" if entry.key in chosen else "could serve" if candidate.accepted else "refused",
        candidate.reasons,
        microseconds(entry, tokens) if known and tokens is not None else None,
    )


def _batches(low: int, high: int, tokens: int | None) -> str:
    """The batches that a range serves. A larger one is divided into launches of the last range."""
    if tokens is not None and tokens > high:
        return f"{tokens} tokens, in pieces of {high}"
    return f"{low} to {high} tokens"


def _without_device(answer: Answer) -> Answer:
    return dataclasses.replace(answer, device="", indices=())


def _device(answer: Answer) -> str:
    where = ", ".join(f"cuda:{index}" for index in answer.indices)
    return f"{where} {answer.device}" if where else answer.device


def _shape_of_model(text: str, model: str, entries: list[Entry]) -> dict[str, int | float | str]:
    models = {entry.model for entry in entries if entry.model is not None}
    if not models:
        expected = f"a kernel that depends on a model, or names of {_names(entries)}"
        raise _unreadable(text, expected, f"the model {model!r}")
    _one_of(text, "a model", model, models)
    (shape, *_) = (shape_of(entry) for entry in entries if entry.model == model)
    return {name: value for name, value in shape.items() if name != "IMAGES"}


def _names(entries: list[Entry]) -> list[str]:
    found = {"variant"}
    for entry in entries:
        found |= {*shape_of(entry), *entry.contract.limits}
    return sorted(found)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _one_of(text: str, what: str, found: str, known: Iterable[str]) -> None:
    if found not in known:
        raise _unknown(text, what, found, sorted(known))


def _unknown(text: str, what: str, found: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return _unreadable(text, f"{what} of {', '.join(known)}", repr(found), hint)


def _unreadable(text: str, expected: str, found: str, hint: str = "") -> InputError:
    return InputError(
        explain(f"request {text}", expected=expected, found=found, remedy=f"{hint}write {SYNTAX}")
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20
