"""The verdict on a kernel's outputs: exact where the mathematics is exact, by interval elsewhere.

The digest of the ids of the clear rows is the same for every correct kernel; evidence records it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from router_runtime.verification.checks import (
    check_ids,
    check_logits,
    check_physical_ids,
    check_weights,
    report,
)
from router_runtime.verification.inputs import Inputs, digest
from router_runtime.verification.reference import Oracle, Reference


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison found; ``problems`` is empty for correct outputs.

    ``rows`` and ``clear`` count all rows and the clear ones; ``reordered`` counts the rows whose
    ids differ from the oracle's where the bounds allow it. ``ids_sha256`` is over the ids of the
    clear rows, ``bits_sha256`` over every bit of weights and ids.

    ``worst`` has the worst errors: ``weight`` and, where they were stored, ``logit`` as fractions
    of the allowed error; ``weight_relative`` relative to the float64 weight; for kernels that round
    nothing, ``value_bits``, the number of values with a wrong bit.
    """

    problems: tuple[str, ...]
    rows: int
    clear: int
    reordered: int
    ids_sha256: str
    bits_sha256: str
    worst: Mapping[str, float]


@dataclass(slots=True)
class _Findings:
    """What was found so far: the fields of ``Verdict`` that depend on the kernel."""

    problems: list[str] = dataclasses.field(default_factory=list)
    reordered: int = 0
    worst: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"weight": 0.0, "weight_relative": 0.0}
    )

    def verdict(self, clear: Tensor, values: Tensor, ids: Tensor) -> Verdict:
        return Verdict(
            problems=tuple(self.problems),
            rows=ids.shape[0],
            clear=int(clear.sum()),
            reordered=self.reordered,
            ids_sha256=clear_ids_sha256(ids, clear),
            bits_sha256=digest({"values": values, "ids": ids}),
            worst=self.worst,
        )


def judge(
    oracle: Oracle,
    values: Tensor,
    ids: Tensor,
    logits: Tensor | None = None,
    logical_ids: Tensor | None = None,
    slots: Tensor | None = None,
) -> Verdict:
    """Judge the outputs of a kernel.

    Args:
        oracle: The expected results of the case.
        values: Weights, or of the kernels that select from scores the selected ones: fp32
            ``[N, k]`` on the CPU.
        ids: int32 or int64 ``[N, k]`` on the CPU.
        logits: What a dense kernel stored, fp32 ``[N, E]``, if it stored them.
        logical_ids: ``[N, k]`` where the inputs have an expert map; ``ids`` are then physical.
        slots: Of ``topk_indices``, int32 ``[N, k]``.

    Returns:
        The verdict on all of them.

    """
    logical = ids if logical_ids is None else logical_ids
    kernel = oracle.case.kernel
    if kernel == "hash_router":
        verdict = _judge_exact(*oracle.looked_up, values, logical)
    elif kernel in ("topk_select", "topk_indices"):
        verdict = _judge_exact(*oracle.selected, values, logical)
    elif oracle.looks_up:
        verdict = _judge_gate(oracle, values, logical)
    else:
        verdict = _judge_scored(oracle, values, logical)
    if logits is not None:
        problems, worst = check_logits(oracle, logits)
        verdict = dataclasses.replace(
            verdict,
            problems=(*verdict.problems, *problems),
            worst={**verdict.worst, "logit": worst},
        )
    if slots is not None:
        wrong = (slots != oracle.slots).any(dim=1)
        problems = [report(wrong, "wrong slots", slots, oracle.slots)] if wrong.any() else []
        verdict = dataclasses.replace(
            verdict,
            problems=(*verdict.problems, *problems),
            bits_sha256=digest({"values": values, "ids": ids, "slots": slots}),
        )
    if not oracle.case.serving:
        return verdict
    if logical_ids is not None:
        problems = check_physical_ids(oracle.inputs, ids, logical_ids)
        verdict = dataclasses.replace(verdict, problems=(*verdict.problems, *problems))
    bits = digest({"values": values, "ids": ids, "logical_ids": logical})
    return dataclasses.replace(verdict, bits_sha256=bits)


def clear_ids_sha256(ids: Tensor, clear: Tensor) -> str:
    """Digest of the ids ``[N, k]`` of the rows marked in ``clear``, bool ``[N]``, with their row
    numbers.
    """
    rows = clear.nonzero().flatten()
    text = ";".join(
        f"{row}:{','.join(map(str, chosen))}"
        for row, chosen in zip(rows.tolist(), ids[rows].tolist(), strict=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _judge_exact(
    expected_values: Tensor, expected_ids: Tensor, values: Tensor, ids: Tensor
) -> Verdict:
    """Judge a kernel that rounds nothing: every bit of both outputs must be right."""
    differs = values.view(torch.int32) != expected_values.view(torch.int32)
    findings = _Findings(worst={"value_bits": float(differs.sum())})
    wrong = (ids != expected_ids).any(dim=1)
    if wrong.any():
        findings.problems.append(report(wrong, "wrong ids", ids, expected_ids))
    wrong = differs.any(dim=1)
    if wrong.any():
        findings.problems.append(report(wrong, "wrong value bits", values, expected_values))
    return findings.verdict(torch.ones(ids.shape[0], dtype=torch.bool), values, ids)


def _judge_scored(oracle: Oracle, weights: Tensor, ids: Tensor) -> Verdict:
    """Judge weights and logical ids of a kernel that scores experts."""
    inputs, (expected, clear) = oracle.inputs, oracle.expected_ids
    if "given_ids" in inputs:
        findings = _replay_findings(oracle, expected, weights, ids)
    elif oracle.case.serving:
        # Padding rows are exact; the others are judged as if they were all.
        wrong = (ids != expected).any(dim=1) | (weights.view(torch.int32) != 0).any(dim=1)
        wrong &= oracle.padding
        routed = (~oracle.padding).nonzero().flatten()
        findings = _findings(oracle.reference.rows(routed), inputs, weights[routed], ids[routed])
        if wrong.any():
            problem = report(wrong, "padding is not the sentinel and zeros", ids, expected)
            findings.problems.insert(0, problem)
    else:
        findings = _findings(oracle.reference, inputs, weights, ids)
    return findings.verdict(clear, weights, ids)


def _findings(reference: Reference, inputs: Inputs, weights: Tensor, ids: Tensor) -> _Findings:
    """The findings on rows that select their experts. Weights are checked only if the ids are
    right: they are compared with the weights of these experts.
    """
    findings = _Findings()
    findings.problems, findings.reordered = check_ids(reference, ids)
    if not findings.problems:
        findings.problems, findings.worst = check_weights(reference, inputs, weights, ids)
    return findings


def _replay_findings(oracle: Oracle, expected: Tensor, weights: Tensor, ids: Tensor) -> _Findings:
    """The findings on rows whose experts were given."""
    findings = _Findings()
    wrong = (ids != expected).any(dim=1)
    if wrong.any():
        findings.problems.append(report(wrong, "wrong ids", ids, expected))
        return findings
    missing = expected == int(oracle.inputs["sentinel"])
    findings.problems, findings.worst = check_weights(
        oracle.reference, oracle.inputs, weights, expected, missing
    )
    return findings


def _judge_gate(oracle: Oracle, weights: Tensor, ids: Tensor) -> Verdict:
    """Judge weights and logical ids of a kernel that looks experts up and weighs them."""
    inputs, (expected, clear) = oracle.inputs, oracle.expected_ids
    if "given_ids" in inputs:
        return _replay_findings(oracle, expected, weights, ids).verdict(clear, weights, ids)
    ranked, reference = oracle.ranked, oracle.reference
    # The look-up's own weights are zero where there is no expert.
    routed = ranked | (oracle.looked_up[0] > 0).any(dim=1)
    findings = _Findings()
    wrong = (ids != expected).any(dim=1) & ~ranked
    if wrong.any():
        findings.problems.append(report(wrong, "wrong ids", ids, expected))
    wrong = weights.view(torch.int32).any(dim=1) & ~routed
    if wrong.any():
        findings.problems.append(report(wrong, "expected zero weights", weights))
    if not findings.problems:
        findings.problems, findings.reordered = check_ids(reference.rows(ranked), ids[ranked])
    if not findings.problems:
        findings.problems, findings.worst = check_weights(
            reference.rows(routed), inputs, weights[routed], ids[routed]
        )
    return findings.verdict(clear, weights, ids)
