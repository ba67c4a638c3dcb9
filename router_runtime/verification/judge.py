"""Compare a kernel's outputs with the mathematics, exactly where it is exact.

Nothing here is a fitted tolerance. ``TOLERANCES`` lists the promises of the kernels' numerics, each
with its reason; from them every score, key and weight gets the interval in which a correct kernel
must be:

* logits: z64 +- LOGIT * sum |x W| (dense kernels; exact for kernels that are given logits);
* scores: sqrt(softplus) of both ends, widened by the promised error of the scoring function;
* keys: both ends plus the bias, rounded to fp32 as the kernel rounds (rounding is monotone);
* weights: the quotient at the ends that make it smallest and largest, widened by its roundings.

The ids of a look-up are exact; of ``hash_gate``, which looks up and scores, the ids of looked-up
tokens are exact, those of image tokens ranked, and the weights of both lie in their intervals.

The order of ids is then decided: expert j must stand before expert i if j's lowest possible key is
above i's highest, or ties with it exactly and j has the lower id, or if both have the same inputs
(and so the same key, whatever it is) and j has the lower id. Where those rules leave one outcome a
row is *clear*; the digest of the ids of the clear rows is the same for every correct kernel, and it
is what evidence records.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.evidence.cases import Case
from router_runtime.verification.inputs import Inputs, digest

TOLERANCES: Mapping[str, float] = MappingProxyType(
    {
        # |z - z64| <= LOGIT * sum |x W|: fp32 accumulation in the canonical chunked order.
        "LOGIT": 2.0**-20,
        # Relative error of a score: one fp32 softplus, one square root, their roundings.
        "SCORE": 4e-7,
        # Below a logit of -80 the softplus itself nears the subnormals: absolute error of a score.
        "SCORE_UNDERFLOW": 4e-23,
        # Relative error of one fp32 rounding.
        "ROUNDING": 2.0**-24,
        # Absolute error of one fp32 rounding among the subnormals.
        "SUBNORMAL": 2.0**-150,
    }
)
_UNDERFLOW_LOGIT = -80.0


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a correct kernel's value lies: float64 (scores, weights) or fp32 (keys)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """What the mathematics says about one case. ``exact`` are the float64 scores; ``same_inputs``
    labels the experts of a row: equal labels have bit-identical inputs.
    """

    ids: Tensor
    clear: Tensor
    keys: Interval
    scores: Interval
    exact: Tensor
    same_inputs: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """``problems`` is empty for correct outputs.

    ``worst`` has the worst errors: ``weight`` and, where they were stored, ``logit`` as fractions
    of the allowed one, ``weight_relative`` relative to the float64 weight; for kernels that round
    nothing, ``value_bits``, the number of values with a wrong bit. ``reordered`` counts rows whose
    ids differ from the oracle's where the bound allows it. ``bits_sha256`` is over every bit of
    weights and ids.
    """

    problems: tuple[str, ...]
    rows: int
    clear: int
    reordered: int
    ids_sha256: str
    bits_sha256: str
    worst: Mapping[str, float]


class Oracle:
    """What the mathematics says about one case's inputs. Every part is worked out when it is first
    asked for, and kept: it is the same for every kernel that is given them.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs

    def tensor(self, name: str) -> Tensor:
        return _tensor(self.inputs, name)

    @functools.cached_property
    def reference(self) -> Reference:
        """The intervals and the ids of a case that scores experts."""
        inputs = self.inputs
        if self.case.kernel == "hash_gate":
            # Only image tokens are ranked.
            bias = inputs.get("image_bias", torch.zeros(self.case.sizes["experts"]))
            return _refer(self, _tensor({"bias": bias}, "bias"))
        reference = _refer(self, self.tensor("bias"))
        if "image_mask" not in inputs:
            return reference
        of_images = _refer(self, self.tensor("image_bias"))
        return _either(self.tensor("image_mask"), of_images, reference)

    @functools.cached_property
    def logits(self) -> Tensor:
        """Of a dense router, in float64."""
        return spec.dense_logits64(self.tensor("hidden_states"), self.tensor("weight"))

    @functools.cached_property
    def logit_slack(self) -> Tensor:
        """How far a correct kernel's logits may be from ``logits``."""
        x, weight = self.tensor("hidden_states"), self.tensor("weight")
        return TOLERANCES["LOGIT"] * spec.dense_logits64(x.abs(), weight.abs())

    @functools.cached_property
    def weight_rows(self) -> Tensor:
        """A label for each expert: equal labels have the same row of weights."""
        bits = self.tensor("weight").view(torch.int16)
        labels: Tensor = torch.unique(bits, dim=0, return_inverse=True)[1]
        return labels

    @functools.cached_property
    def looked_up(self) -> tuple[Tensor, Tensor]:
        """What a table gives: the weights of hash_router, and the ids."""
        token_ids, table = self.tensor("token_ids"), self.tensor("table")
        sentinel, padding = int(self.inputs["sentinel"]), _padding(self.inputs, len(token_ids))
        return spec.hash_router(token_ids, table, table.shape[1], sentinel, padding)

    @functools.cached_property
    def selected(self) -> tuple[Tensor, Tensor]:
        """What topk_select gives."""
        return spec.topk_select(self.tensor("scores"), int(self.inputs["top_k"]))

    @functools.cached_property
    def expected_ids(self) -> tuple[Tensor, Tensor]:
        """The ids, and which rows are clear: what evidence is recomputed from."""
        kernel = self.case.kernel
        if kernel == "hash_gate":
            return _gate_ids(self)
        if self.case.serving:
            return _served_ids(self)
        if kernel not in ("hash_router", "topk_select"):
            return self.reference.ids, self.reference.clear
        ids = (self.looked_up if kernel == "hash_router" else self.selected)[1]
        return ids, torch.ones(ids.shape[0], dtype=torch.bool)

    def judge(
        self,
        values: Tensor,
        ids: Tensor,
        logits: Tensor | None = None,
        logical_ids: Tensor | None = None,
    ) -> Verdict:
        """Judge the outputs of a kernel, on the CPU: weights (or selected values) and ids, the
        logits of a dense one if it stored them, the logical ids where there is an expert map.
        """
        if not self.case.serving:
            return _judge_plain(self, values, ids, logits)
        logical = ids if logical_ids is None else logical_ids
        verdict = _judge_served(self, values, logical, logits)
        problems = verdict.problems
        if logical_ids is not None:
            problems += tuple(_check_map(self.inputs, ids, logical_ids))
        bits = digest({"values": values, "ids": ids, "logical_ids": logical})
        return dataclasses.replace(verdict, problems=problems, bits_sha256=bits)


def _judge_plain(oracle: Oracle, values: Tensor, ids: Tensor, logits: Tensor | None) -> Verdict:
    kernel = oracle.case.kernel
    if kernel == "hash_router":
        return _judge_exact(*oracle.looked_up, values, ids)
    if kernel == "topk_select":
        return _judge_exact(*oracle.selected, values, ids)
    if kernel == "hash_gate":
        return _judge_gate(oracle, values, ids)
    verdict = _judge_scored(oracle.inputs, oracle.reference, values, ids)
    return verdict if logits is None else _with_logits(oracle, logits, verdict)


def _judge_scored(inputs: Inputs, reference: Reference, values: Tensor, ids: Tensor) -> Verdict:
    problems, reordered = _check_ids(reference, ids)
    worst = {"weight": 0.0, "weight_relative": 0.0}
    if not problems:
        found, worst = _check_weights(reference, inputs, values, ids)
        problems += found
    return Verdict(
        problems=tuple(problems),
        rows=ids.shape[0],
        clear=int(reference.clear.sum()),
        reordered=reordered,
        ids_sha256=clear_ids_sha256(ids, reference.clear),
        bits_sha256=digest({"values": values, "ids": ids}),
        worst=worst,
    )


def _with_logits(oracle: Oracle, logits: Tensor, verdict: Verdict) -> Verdict:
    """The verdict on a kernel that has stored these logits too."""
    problems, worst = _check_logits(oracle, logits)
    return dataclasses.replace(
        verdict,
        problems=(*verdict.problems, *problems),
        worst={**verdict.worst, "logit": worst},
    )


def clear_ids_sha256(ids: Tensor, clear: Tensor) -> str:
    """Digest of the ids of the clear rows, with their row numbers."""
    rows = clear.nonzero().flatten()
    text = ";".join(
        f"{row}:{','.join(map(str, chosen))}"
        for row, chosen in zip(rows.tolist(), ids[rows].tolist(), strict=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _refer(oracle: Oracle, bias: Tensor) -> Reference:
    if oracle.case.kernel == "activation_topk":
        logits = oracle.tensor("logits")
        top_k = int(oracle.inputs["top_k"])
        z, slack = logits.double(), torch.zeros(logits.shape, dtype=torch.float64)
        clamped = logits.clamp(-spec.LOGIT_MAX, spec.LOGIT_MAX)
        same = _value_bits(clamped) << 32 | _value_bits(bias)
    else:
        top_k = oracle.case.sizes["top_k"]
        twin, same_bias = _first_twins(oracle.weight_rows, bias)
        # Twins have one logit, also where a matrix product rounds two of its columns differently.
        z, slack = oracle.logits[:, twin], oracle.logit_slack[:, twin]
        slack = torch.where(z.isfinite(), slack, torch.zeros_like(slack))
        # Infinite logits are known exactly after the clamp: only their biases tell them apart.
        experts = len(bias)
        same = torch.where(z == torch.inf, experts + same_bias, twin)
        same = torch.where(z == -torch.inf, 2 * experts + same_bias, same)
    scores = _score_interval(z, slack)
    keys = Interval(_key(scores.low, bias, z), _key(scores.high, bias, z))
    exact = spec.sqrt_softplus64(z)
    ids = spec.topk_select(_key(exact.float().double(), bias, z), top_k)[1]
    return Reference(ids, _clear(ids, keys, same), keys, scores, exact, same)


def _tensor(inputs: Inputs, name: str) -> Tensor:
    value = inputs[name]
    assert isinstance(value, Tensor)
    return value


# --- serving inputs -------------------------------------------------------------------------------


def _padding(inputs: Inputs, tokens: int) -> Tensor:
    marks, count = inputs.get("is_padding"), inputs.get("num_valid_tokens")
    assert not isinstance(marks, int | float)
    assert not isinstance(count, int | float)
    return spec.padding_rows(torch.arange(tokens), marks, count)


def _either(chosen: Tensor, first: Reference, second: Reference) -> Reference:
    """Rows of the first where ``chosen``, else of the second."""
    rows = chosen.unsqueeze(1)

    def between(a: Interval, b: Interval) -> Interval:
        return Interval(torch.where(rows, a.low, b.low), torch.where(rows, a.high, b.high))

    return Reference(
        torch.where(rows, first.ids, second.ids),
        torch.where(chosen, first.clear, second.clear),
        between(first.keys, second.keys),
        between(first.scores, second.scores),
        torch.where(rows, first.exact, second.exact),
        torch.where(rows, first.same_inputs, second.same_inputs),
    )


def _rows_of(reference: Reference, rows: Tensor) -> Reference:
    def of(interval: Interval) -> Interval:
        return Interval(interval.low[rows], interval.high[rows])

    return Reference(
        reference.ids[rows],
        reference.clear[rows],
        of(reference.keys),
        of(reference.scores),
        reference.exact[rows],
        reference.same_inputs[rows],
    )


def _served_ids(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """``expected_ids`` of a case with serving inputs: logical ids, the sentinel for no expert."""
    case, inputs = oracle.case, oracle.inputs
    if case.kernel == "hash_router":
        ids = oracle.looked_up[1]
        return ids, torch.ones(ids.shape[0], dtype=torch.bool)
    padding = _padding(inputs, case.sizes["tokens"])
    if "given_ids" in inputs:
        ids = _tensor(inputs, "given_ids")
        exists = (ids >= 0) & (ids < case.sizes["experts"])
        ids = torch.where(exists, ids, torch.full_like(ids, spec.NO_EXPERT)).int()
        clear = torch.ones_like(padding)
    else:
        ids, clear = oracle.reference.ids, oracle.reference.clear | padding
    ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, spec.NO_EXPERT), ids)
    return spec.with_sentinel(ids, int(inputs["sentinel"])), clear


def _gate_ranked(inputs: Inputs) -> Tensor:
    """Which rows of hash_gate select their experts, bool ``[N]``: images that are no padding."""
    padding = _padding(inputs, _tensor(inputs, "token_ids").shape[0])
    images = _tensor(inputs, "image_mask") if "image_mask" in inputs else padding.new_zeros(1)
    return images & ~padding


def _gate_ids(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """``expected_ids`` of hash_gate: the table's rows, and the ranked ids of images."""
    ranked, ids = _gate_ranked(oracle.inputs), oracle.looked_up[1]
    if not bool(ranked.any()):
        return ids, torch.ones_like(ranked)
    reference = oracle.reference
    ids = torch.where(ranked.unsqueeze(1), reference.ids, ids)
    return ids, reference.clear | ~ranked


def _judge_gate(oracle: Oracle, weights: Tensor, ids: Tensor) -> Verdict:
    """Judge weights and logical ids of hash_gate."""
    inputs, (expected, clear) = oracle.inputs, oracle.expected_ids
    ranked, reference = _gate_ranked(inputs), oracle.reference
    # The look-up's own weights are zero where there is no expert.
    routed = ranked | (oracle.looked_up[0] > 0).any(dim=1)
    problems, reordered, worst = [], 0, {"weight": 0.0, "weight_relative": 0.0}
    wrong = (ids != expected).any(dim=1) & ~ranked
    if wrong.any():
        problems.append(_report(wrong, "wrong ids", ids, expected))
    wrong = weights.view(torch.int32).any(dim=1) & ~routed
    if wrong.any():
        problems.append(_report(wrong, "expected zero weights", weights))
    if not problems:
        problems, reordered = _check_ids(_rows_of(reference, ranked), ids[ranked])
    if not problems:
        problems, worst = _check_weights(
            _rows_of(reference, routed), inputs, weights[routed], ids[routed]
        )
    return Verdict(
        problems=tuple(problems),
        rows=ids.shape[0],
        clear=int(clear.sum()),
        reordered=reordered,
        ids_sha256=clear_ids_sha256(ids, clear),
        bits_sha256=digest({"values": weights, "ids": ids}),
        worst=worst,
    )


def _judge_served(oracle: Oracle, values: Tensor, ids: Tensor, logits: Tensor | None) -> Verdict:
    """Judge weights and logical ids of a case with serving inputs."""
    inputs = oracle.inputs
    if oracle.case.kernel == "hash_router":
        return _judge_exact(*oracle.looked_up, values, ids)
    if oracle.case.kernel == "hash_gate":
        return _judge_gate(oracle, values, ids)
    expected, clear = oracle.expected_ids
    padding = _padding(inputs, ids.shape[0])
    reference = oracle.reference
    problems: list[str] = []
    if "given_ids" in inputs:
        reordered, worst = 0, {"weight": 0.0, "weight_relative": 0.0}
        wrong = (ids != expected).any(dim=1)
        if wrong.any():
            problems.append(_report(wrong, "wrong ids", ids, expected))
        else:
            missing = expected == int(inputs["sentinel"])
            found, worst = _check_weights(reference, inputs, values, expected, missing)
            problems += found
    else:
        # Padding rows are exact; the others are judged as if they were all.
        wrong = (
            (ids != expected).any(dim=1) | (values.view(torch.int32) != 0).any(dim=1)
        ) & padding
        if wrong.any():
            problems.append(_report(wrong, "padding is not the sentinel and zeros", ids, expected))
        others = (~padding).nonzero().flatten()
        rows = {name: inputs[name] for name in ("scale", "renormalize")}
        verdict = _judge_scored(rows, _rows_of(reference, others), values[others], ids[others])
        problems += verdict.problems
        reordered, worst = verdict.reordered, dict(verdict.worst)
    verdict = Verdict(
        problems=tuple(problems),
        rows=ids.shape[0],
        clear=int(clear.sum()),
        reordered=reordered,
        ids_sha256=clear_ids_sha256(ids, clear),
        bits_sha256="",
        worst=worst,
    )
    return verdict if logits is None else _with_logits(oracle, logits, verdict)


def _check_map(inputs: Inputs, ids: Tensor, logical_ids: Tensor) -> list[str]:
    """Physical ids against what the map makes of the logical ones."""
    sentinel = int(inputs["sentinel"])
    expert_map, counts = _tensor(inputs, "expert_map"), _tensor(inputs, "replica_counts")
    none = logical_ids == sentinel
    known = torch.where(none, torch.full_like(logical_ids, spec.NO_EXPERT), logical_ids).int()
    if bool((known >= expert_map.shape[0]).any()):
        return []  # reported as wrong ids
    rows = torch.arange(len(ids))
    expected = spec.physical_ids(known, rows, expert_map, counts, sentinel)
    wrong = (ids != expected).any(dim=1)
    return [_report(wrong, "wrong physical ids", ids, expected)] if wrong.any() else []


def _score_interval(z: Tensor, slack: Tensor) -> Interval:
    low = spec.sqrt_softplus64(z - slack)
    high = spec.sqrt_softplus64(z + slack)
    underflow = torch.where(z - slack < _UNDERFLOW_LOGIT, TOLERANCES["SCORE_UNDERFLOW"], 0.0)
    low = (low * (1 - TOLERANCES["SCORE"]) - underflow).clamp(min=0.0)
    return Interval(low, high * (1 + TOLERANCES["SCORE"]) + underflow)


def _key(scores: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    """The fp32 key of a float64 score. Adding in float64 and rounding to fp32 is the fp32 sum."""
    return spec.selection_keys(scores, bias.double(), z).float()


def _value_bits(numbers: Tensor) -> Tensor:
    """The bits of fp32 numbers as unsigned int64, equal for both zeros and for all NaNs."""
    stored = torch.where(numbers == 0, torch.zeros_like(numbers), numbers).view(torch.int32)
    stored = torch.where(numbers.isnan(), torch.full_like(stored, spec.NAN_LOGIT_BITS), stored)
    return stored.long() & 0xFFFFFFFF


def _first_twins(row: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """For each expert, the first with the same weight row and bias, and the first with the same
    bias. ``row`` labels the rows.
    """
    bits = _value_bits(bias)
    same_bias = bits.unsqueeze(0) == bits.unsqueeze(1)
    same_row = row.unsqueeze(0) == row.unsqueeze(1)
    return (same_bias & same_row).int().argmax(dim=1), same_bias.int().argmax(dim=1)


def _must_precede(keys: Interval, same: Tensor, expert: Tensor) -> Tensor:
    """``[N, E]``: the experts that every correct ranking puts before ``expert[n]``."""
    column = expert.unsqueeze(1)
    highest = keys.high.gather(1, column)
    lower_id = torch.arange(same.shape[1]) < column
    tie = (keys.low == highest) | (same == same.gather(1, column))
    return (keys.low > highest) | (tie & lower_id)


def _may_precede(keys: Interval, same: Tensor, expert: Tensor) -> Tensor:
    """``[N, E]``: the experts that some correct ranking puts before ``expert[n]``."""
    column = expert.unsqueeze(1)
    lowest = keys.low.gather(1, column)
    lower_id = torch.arange(same.shape[1]) < column
    by_key = (keys.high > lowest) | ((keys.high == lowest) & lower_id)
    return torch.where(same == same.gather(1, column), lower_id, by_key)


def _clear(ids: Tensor, keys: Interval, same: Tensor) -> Tensor:
    """Rows in which no expert ranked later, or not at all, may precede a chosen one."""
    clear = torch.ones(ids.shape[0], dtype=torch.bool)
    remaining = torch.ones(same.shape, dtype=torch.bool)
    for expert in ids.long().unbind(1):
        remaining.scatter_(1, expert.unsqueeze(1), False)
        clear &= ~(remaining & _may_precede(keys, same, expert)).any(dim=1)
    return clear


def _check_ids(reference: Reference, ids: Tensor) -> tuple[list[str], int]:
    experts = reference.same_inputs.shape[1]
    outside = ((ids < 0) | (ids >= experts)).any(dim=1)
    if outside.any():
        return [_report(outside, f"expected ids in [0, {experts})", ids)], 0
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if repeated.any():
        return [_report(repeated, "expected distinct ids", ids)], 0
    wrong = torch.zeros(ids.shape[0], dtype=torch.bool)
    remaining = torch.ones(reference.same_inputs.shape, dtype=torch.bool)
    for expert in ids.long().unbind(1):
        remaining.scatter_(1, expert.unsqueeze(1), False)
        must = _must_precede(reference.keys, reference.same_inputs, expert)
        wrong |= (remaining & must).any(dim=1)
    reordered = int((ids != reference.ids).any(dim=1).sum())
    if wrong.any():
        return [_report(wrong, "ids out of order", ids, reference.ids)], reordered
    return [], reordered


def _check_weights(
    reference: Reference,
    inputs: Inputs,
    weights: Tensor,
    ids: Tensor,
    missing: Tensor | None = None,
) -> tuple[list[str], dict[str, float]]:
    """Each weight against the interval of the weight of the expert that the kernel chose.
    ``missing`` marks what is no expert, and has score 0.
    """
    none = torch.zeros_like(ids, dtype=torch.bool) if missing is None else missing
    chosen = torch.where(none, torch.zeros_like(ids), ids).long()

    def picked(scores: Tensor) -> Tensor:
        return scores.gather(1, chosen).masked_fill(none, 0.0)

    low, high = picked(reference.scores.low), picked(reference.scores.high)
    exact = picked(reference.exact)
    r = float(torch.tensor(inputs["scale"], dtype=torch.float32))
    if inputs["renormalize"]:
        # A weight grows with its own score and shrinks with the others'.
        others_low = low.sum(dim=1, keepdim=True) - low
        others_high = high.sum(dim=1, keepdim=True) - high
        low = low / (low + others_high + spec.RENORM_EPSILON)
        high = high / (high + others_low + spec.RENORM_EPSILON)
        exact = exact / (exact.sum(dim=1, keepdim=True) + spec.RENORM_EPSILON)
        # k - 1 additions, the addition of epsilon, epsilon itself, the division, the product.
        roundings = ids.shape[1] + 3
    else:
        roundings = 1
    slack = 1 + roundings * TOLERANCES["ROUNDING"]
    # The quotient may round among the subnormals before the product does.
    subnormal = (r + 1) * TOLERANCES["SUBNORMAL"]
    low, high = low * r / slack - subnormal, high * r * slack + subnormal
    exact = exact * r
    found = weights.double()
    inside = (found >= low) & (found <= high) & (found >= 0)
    wrong = ~(inside & ((weights.view(torch.int32) == 0) | ~none)).all(dim=1)
    error = (found - exact).abs()
    allowed = torch.where(found < exact, exact - low, high - exact)
    # Below this a weight is noise of the subnormals, and its relative error says nothing.
    relative = torch.where(exact > 1e-12 * r, error / exact, torch.zeros_like(error))
    worst = {"weight": _largest(error / allowed), "weight_relative": _largest(relative)}
    problems = [_report(wrong, "weights out of bounds", weights, exact)] if wrong.any() else []
    return problems, worst


def _check_logits(oracle: Oracle, logits: Tensor) -> tuple[list[str], float]:
    """Stored logits: within the bound of the exact ones, infinite where those are, and every NaN
    under its one pattern of bits. What is wrong, and the worst error as a fraction of its bound.
    """
    exact, allowed = oracle.logits, oracle.logit_slack
    error = (logits.double() - exact).abs()
    within = torch.where(exact.isfinite(), error <= allowed, logits.double() == exact)
    nan = logits.view(torch.int32) == spec.NAN_LOGIT_BITS
    wrong = ~torch.where(exact.isnan(), nan, within).all(dim=1)
    finite = exact.isfinite() & (allowed > 0)
    problems = [_report(wrong, "logits out of bounds", logits, exact)] if wrong.any() else []
    return problems, _largest((error / allowed)[finite])


def _judge_exact(
    expected_values: Tensor, expected_ids: Tensor, values: Tensor, ids: Tensor
) -> Verdict:
    """For kernels that round nothing: every bit of both outputs."""
    problems = []
    wrong = (ids != expected_ids).any(dim=1)
    if wrong.any():
        problems.append(_report(wrong, "wrong ids", ids, expected_ids))
    differs = values.view(torch.int32) != expected_values.view(torch.int32)
    wrong = differs.any(dim=1)
    if wrong.any():
        problems.append(_report(wrong, "wrong value bits", values, expected_values))
    clear = torch.ones(ids.shape[0], dtype=torch.bool)
    return Verdict(
        problems=tuple(problems),
        rows=ids.shape[0],
        clear=ids.shape[0],
        reordered=0,
        ids_sha256=clear_ids_sha256(ids, clear),
        bits_sha256=digest({"values": values, "ids": ids}),
        worst={"value_bits": float(differs.sum())},
    )


def _largest(errors: Tensor) -> float:
    """The worst error to two digits; NaN counts as infinite."""
    worst = float(errors.nan_to_num(nan=torch.inf).max()) if errors.numel() else 0.0
    return float(f"{worst:.2g}")


def _report(wrong: Tensor, what: str, found: Tensor, expected: Tensor | None = None) -> str:
    row = int(wrong.nonzero()[0])
    text = f"{what} in {int(wrong.sum())} of {wrong.numel()} rows; row {row}: "
    if expected is not None:
        text += f"expected {expected[row].tolist()}, "
    return text + f"found {found[row].tolist()}"
