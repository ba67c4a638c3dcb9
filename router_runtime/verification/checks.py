"""Checks of ids, weights, logits and physical ids against a reference.

Every check returns problems: sentences that name the first wrong row and show what was expected and
found. No problem means that a correct kernel can give these outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.verification.bounds import Interval, weight_interval
from router_runtime.verification.inputs import Inputs
from router_runtime.verification.ranking import out_of_order
from router_runtime.verification.reference import Oracle, Reference

#: Numbers of a row that a problem shows.
_MOST_SHOWN = 32


def check_ids(reference: Reference, ids: Tensor) -> tuple[list[str], int]:
    """Check that ids ``[N, k]`` are distinct experts in an order that the intervals allow.

    Returns:
        The problems, and the number of rows whose ids differ from the reference's.

    """
    experts = reference.same_inputs.shape[1]
    outside = ((ids < 0) | (ids >= experts)).any(dim=1)
    if outside.any():
        return [report(outside, f"expected ids in [0, {experts})", ids)], 0
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if repeated.any():
        return [report(repeated, "expected distinct ids", ids)], 0
    reordered = int((ids != reference.ids).any(dim=1).sum())
    wrong = out_of_order(ids, reference.keys, reference.same_inputs)
    if wrong.any():
        return [report(wrong, "ids out of order", ids, reference.ids)], reordered
    return [], reordered


def check_weights(
    reference: Reference,
    inputs: Inputs,
    weights: Tensor,
    ids: Tensor,
    missing: Tensor | None = None,
) -> tuple[list[str], dict[str, float]]:
    """Check each weight against the interval of the weight of the expert that the kernel chose.

    Args:
        reference: Of the same rows.
        inputs: Where ``scale`` and ``renormalize`` are.
        weights: fp32 ``[N, k]``.
        ids: The chosen experts ``[N, k]``, in any order.
        missing: Marks positions without an expert, bool ``[N, k]``: their score is 0, and their
            weight must be +0.

    Returns:
        The problems, and the worst errors: ``weight`` as a fraction of the allowed error,
        ``weight_relative`` relative to the float64 weight.

    """
    none = torch.zeros_like(ids, dtype=torch.bool) if missing is None else missing
    chosen = torch.where(none, torch.zeros_like(ids), ids).long()

    def picked(scores: Tensor) -> Tensor:
        return scores.gather(1, chosen).masked_fill(none, 0.0)

    scores = Interval(picked(reference.scores.low), picked(reference.scores.high))
    scale = float(torch.tensor(inputs["scale"], dtype=torch.float32))
    renormalize = bool(inputs["renormalize"])
    allowed, exact = weight_interval(scores, picked(reference.exact), scale, renormalize)
    found = weights.double()
    inside = (found >= allowed.low) & (found <= allowed.high) & (found >= 0)
    wrong = ~(inside & ((weights.view(torch.int32) == 0) | ~none)).all(dim=1)
    error = (found - exact).abs()
    bound = torch.where(found < exact, exact - allowed.low, allowed.high - exact)
    # Below this the roundings of subnormals dominate, and a relative error means nothing.
    relative = torch.where(exact > 1e-12 * scale, error / exact, torch.zeros_like(error))
    worst = {"weight": _largest(error / bound), "weight_relative": _largest(relative)}
    problems = [report(wrong, "weights out of bounds", weights, exact)] if wrong.any() else []
    return problems, worst


def check_logits(oracle: Oracle, logits: Tensor) -> tuple[list[str], float]:
    """Check stored logits, fp32 ``[N, E]``: within the bound of the exact ones, infinite where
    those are, and NaN only as ``spec.NAN_LOGIT_BITS``.

    Returns:
        The problems, and the worst error as a fraction of its bound.

    """
    exact, allowed = oracle.logits, oracle.logit_slack
    error = (logits.double() - exact).abs()
    within = torch.where(exact.isfinite(), error <= allowed, logits.double() == exact)
    nan = logits.view(torch.int32) == spec.NAN_LOGIT_BITS
    wrong = ~torch.where(exact.isnan(), nan, within).all(dim=1)
    finite = exact.isfinite() & (allowed > 0)
    problems = [report(wrong, "logits out of bounds", logits, exact)] if wrong.any() else []
    return problems, _largest((error / allowed)[finite])


def check_physical_ids(inputs: Inputs, ids: Tensor, logical_ids: Tensor) -> list[str]:
    """Check physical ids ``[N, k]`` against what the expert map makes of the logical ones."""
    sentinel = int(inputs["sentinel"])
    expert_map, counts = inputs["expert_map"], inputs["replica_counts"]
    assert isinstance(expert_map, Tensor)
    assert isinstance(counts, Tensor)
    none = logical_ids == sentinel
    known = torch.where(none, torch.full_like(logical_ids, spec.NO_EXPERT), logical_ids).int()
    if bool((known >= expert_map.shape[0]).any()):
        return []  # reported as wrong ids
    rows = torch.arange(len(ids))
    order = int(inputs["replica_start"]), int(inputs["replica_step"])
    expected = spec.physical_ids(known, rows, expert_map, counts, sentinel, *order)
    wrong = (ids != expected).any(dim=1)
    return [report(wrong, "wrong physical ids", ids, expected)] if wrong.any() else []


def report(wrong: Tensor, what: str, found: Tensor, expected: Tensor | None = None) -> str:
    """The problem ``what`` of the rows marked in ``wrong``, bool ``[N]``; it shows the first, or of
    a long row the first places that are wrong.
    """
    row = int(wrong.nonzero()[0])
    text = f"{what} in {int(wrong.sum())} of {wrong.numel()} rows; row {row}"
    shown, wanted = found[row], None if expected is None else expected[row]
    if shown.numel() > _MOST_SHOWN:
        places = torch.arange(shown.numel())
        if wanted is not None:
            places = _different(shown, wanted).nonzero().flatten()
            wanted = wanted[places[:_MOST_SHOWN]]
        shown = shown[places[:_MOST_SHOWN]]
        text += f", places {places[:_MOST_SHOWN].tolist()} of {places.numel()}"
    text += ": "
    if wanted is not None:
        text += f"expected {_exactly(wanted)}, "
    return text + f"found {_exactly(shown)}"


def _different(found: Tensor, expected: Tensor) -> Tensor:
    """Where numbers differ; fp32 by their bits, as a NaN differs from itself."""
    if found.dtype is expected.dtype is torch.float32:
        return found.view(torch.int32) != expected.view(torch.int32)
    return found != expected


def _exactly(values: Tensor) -> str:
    """Numbers, and of fp32 the bits of each NaN, whose text is the same for all."""
    listed = values.tolist()
    if values.dtype is not torch.float32 or not values.isnan().any():
        return str(listed)
    patterns = (values.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    texts = (
        f"nan ({pattern:#010x})" if value != value else repr(value)
        for value, pattern in zip(listed, patterns, strict=True)
    )
    return f"[{', '.join(texts)}]"


def _largest(errors: Tensor) -> float:
    """The worst error to two digits; NaN counts as infinite."""
    worst = float(errors.nan_to_num(nan=torch.inf).max()) if errors.numel() else 0.0
    return float(f"{worst:.2g}")
