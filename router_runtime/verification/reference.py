"""What the mathematics of ``spec.py`` says about the inputs of one case.

The ids of a table look-up are exact, and so are the results of ``topk_select`` and
``topk_indices``. For kernels that compute scores, ``Reference`` holds the intervals of scores and
keys:

* logits: z64 +- LOGIT * sum |x W| for dense kernels; exact for kernels that take logits;
* scores and keys: ``bounds.py``;
* ids: those of the exact scores, and which rows are clear (``ranking.py``).

``hash_gate`` does both, and a dense router with a table: the ids of looked-up tokens are exact,
those of image tokens are ranked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.evidence.cases import Case
from router_runtime.verification.bounds import (
    TOLERANCES,
    Interval,
    key_interval,
    rounded_key,
    score_interval,
)
from router_runtime.verification.inputs import ROW_INPUT, Inputs
from router_runtime.verification.ranking import clear_rows, first_twins, value_bits


@dataclass(frozen=True, slots=True)
class Reference:
    """The intervals and the ids of a case that scores experts; every tensor has one row per token.

    ``ids`` ``[N, k]`` are those of the exact scores, ``clear`` ``[N]`` says which rows of them are
    the same for every correct kernel, ``exact`` are the float64 scores ``[N, E]``, and
    ``same_inputs`` labels the experts of a row: equal labels mean bit-identical inputs.
    """

    ids: Tensor
    clear: Tensor
    keys: Interval
    scores: Interval
    exact: Tensor
    same_inputs: Tensor

    def rows(self, rows: Tensor) -> Reference:
        """The reference of some rows: indices ``[M]`` or a bool mask ``[N]``."""
        return Reference(
            self.ids[rows],
            self.clear[rows],
            self.keys.rows(rows),
            self.scores.rows(rows),
            self.exact[rows],
            self.same_inputs[rows],
        )


class Oracle:
    """The expected results of one case. Every part is computed on first use and then kept, because
    it is the same for every kernel that gets these inputs. All tensors are on the CPU.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs

    def tensor(self, name: str) -> Tensor:
        """The input ``name``, which must be a tensor."""
        value = self.inputs[name]
        assert isinstance(value, Tensor)
        return value

    def _tensor_if_any(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.inputs else None

    @functools.cached_property
    def reference(self) -> Reference:
        """The intervals and the ids of a case that scores experts."""
        inputs = self.inputs
        if self.case.kernel == "hash_gate":
            # Only image tokens are ranked.
            bias = inputs.get("image_bias")
            experts = self.case.sizes["experts"]
            return _reference(self, bias if isinstance(bias, Tensor) else torch.zeros(experts))
        reference = _reference(self, self.tensor("bias"))
        if "image_mask" not in inputs:
            return reference
        of_images = _reference(self, self.tensor("image_bias"))
        return _where(self.tensor("image_mask"), of_images, reference)

    @functools.cached_property
    def logits(self) -> Tensor:
        """The logits of a dense router, float64 ``[N, E]``."""
        return spec.dense_logits64(self.tensor("hidden_states"), self.tensor("weight"))

    @functools.cached_property
    def logit_slack(self) -> Tensor:
        """The largest allowed error of each of ``logits``, float64 ``[N, E]``."""
        x, weight = self.tensor("hidden_states"), self.tensor("weight")
        return TOLERANCES["LOGIT"] * spec.dense_logits64(x.abs(), weight.abs())

    @functools.cached_property
    def weight_rows(self) -> Tensor:
        """A label for each expert, int64 ``[E]``: equal labels mean equal rows of the weight."""
        bits = self.tensor("weight").view(torch.int16)
        labels: Tensor = torch.unique(bits, dim=0, return_inverse=True)[1]
        return labels

    @functools.cached_property
    def padding(self) -> Tensor:
        """Which tokens are padding, bool ``[N]``, by the mask and the count among the inputs."""
        marks, count = self.inputs.get("is_padding"), self.inputs.get("num_valid_tokens")
        assert not isinstance(marks, int | float)
        assert not isinstance(count, int | float)
        tokens = self.tensor(ROW_INPUT[self.case.kernel]).shape[0]
        return spec.padding_rows(torch.arange(tokens), marks, count)

    @property
    def looks_up(self) -> bool:
        """Whether experts are looked up in a table and weighed by their scores."""
        return "table" in self.inputs and self.case.kernel != "hash_router"

    @functools.cached_property
    def looked_up(self) -> tuple[Tensor, Tensor]:
        """The weights of hash_router and the ids of the table, both ``[N, k]``."""
        token_ids, table = self.tensor("token_ids"), self.tensor("table")
        sentinel = int(self.inputs["sentinel"])
        return spec.hash_router(token_ids, table, table.shape[1], sentinel, self.padding)

    @functools.cached_property
    def selected(self) -> tuple[Tensor, Tensor]:
        """The values and ids of topk_select and topk_indices, both ``[N, k]``."""
        scores, top_k = self.tensor("scores"), int(self.inputs["top_k"])
        if self.case.kernel == "topk_select":
            return spec.topk_select(scores, top_k)
        starts = self._tensor_if_any("row_starts")
        ids = spec.topk_indices(
            scores,
            top_k,
            starts,
            self._tensor_if_any("row_ends"),
            in_rank_order=bool(self.inputs["sorted"]),
            nan_first=bool(self.inputs["nan_first"]),
        )
        return spec.scores_at(scores, ids, starts), ids

    @functools.cached_property
    def slots(self) -> Tensor:
        """The slots of topk_indices, ``[N, k]``."""
        return spec.slots(
            self.selected[1],
            self._tensor_if_any("page_table"),
            int(self.inputs.get("page_size", 1)),
            self._tensor_if_any("requests"),
            self._tensor_if_any("offsets"),
        )

    @functools.cached_property
    def ranked(self) -> Tensor:
        """Which tokens select their experts by key although there is a table, bool ``[N]``: the
        images that are no padding, unless experts are given.
        """
        images = self.inputs.get("image_mask", self.padding.new_zeros(1))
        assert isinstance(images, Tensor)
        return images & ~self.padding & ("given_ids" not in self.inputs)

    @functools.cached_property
    def given(self) -> Tensor:
        """The given ids as they are returned, ``[N, k]``: the sentinel for no expert."""
        ids = self.tensor("given_ids")
        exists = (ids >= 0) & (ids < self.case.sizes["experts"]) & ~self.padding.unsqueeze(1)
        return torch.where(exists, ids, int(self.inputs["sentinel"])).int()

    @functools.cached_property
    def expected_ids(self) -> tuple[Tensor, Tensor]:
        """The logical ids ``[N, k]``, and which rows of them are clear, bool ``[N]``.

        Evidence records the digest of the clear rows.
        """
        kernel = self.case.kernel
        if self.looks_up:
            return _gate_ids(self)
        if kernel in ("hash_router", "topk_select", "topk_indices"):
            ids = (self.looked_up if kernel == "hash_router" else self.selected)[1]
            return ids, torch.ones(ids.shape[0], dtype=torch.bool)
        if self.case.serving:
            return _serving_ids(self)
        return self.reference.ids, self.reference.clear


def _reference(oracle: Oracle, bias: Tensor) -> Reference:
    """The reference of all tokens with one bias, fp32 ``[E]``."""
    if oracle.case.kernel == "activation_topk":
        given = oracle.tensor("logits")
        top_k = int(oracle.inputs["top_k"])
        logits, slack = given.double(), torch.zeros(given.shape, dtype=torch.float64)
        clamped = given.clamp(-spec.LOGIT_MAX, spec.LOGIT_MAX)
        same = value_bits(clamped) << 32 | value_bits(bias)
    else:
        top_k = oracle.case.sizes["top_k"]
        twin, same_bias = first_twins(oracle.weight_rows, bias)
        # Twins are experts with the same weight row and the same bias. A kernel gives them equal
        # logits. The product above may round their columns differently, so all twins take the
        # logit of the one with the lowest id.
        logits, slack = oracle.logits[:, twin], oracle.logit_slack[:, twin]
        slack = torch.where(logits.isfinite(), slack, torch.zeros_like(slack))
        # All infinite logits of one sign are clamped to one number, so their keys are equal where
        # their biases are, whatever their weight rows.
        experts = len(bias)
        same = torch.where(logits == torch.inf, experts + same_bias, twin)
        same = torch.where(logits == -torch.inf, 2 * experts + same_bias, same)
    rule = oracle.case.scoring, oracle.case.gate_temperature
    scores = score_interval(logits, slack, *rule)
    keys = key_interval(scores, bias, logits)
    exact = spec.SCORINGS[rule[0]](spec.tempered(logits, rule[1]))
    ids = spec.topk_select(rounded_key(exact.float().double(), bias, logits), top_k)[1]
    return Reference(ids, clear_rows(ids, keys, same), keys, scores, exact, same)


def _where(chosen: Tensor, first: Reference, second: Reference) -> Reference:
    """The rows of ``first`` where ``chosen``, bool ``[N]``, and those of ``second`` elsewhere."""
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


def _serving_ids(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """``expected_ids`` of a scoring case with serving inputs: the sentinel for no expert."""
    inputs, padding = oracle.inputs, oracle.padding
    if "given_ids" in inputs:
        return oracle.given, torch.ones_like(padding)
    ids, clear = oracle.reference.ids, oracle.reference.clear | padding
    ids = torch.where(padding.unsqueeze(1), torch.full_like(ids, spec.NO_EXPERT), ids)
    return spec.with_sentinel(ids, int(inputs["sentinel"])), clear


def _gate_ids(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """``expected_ids`` of a kernel that looks up: the given ids, or the rows of the table and the
    ranked ids of images.
    """
    if "given_ids" in oracle.inputs:
        return oracle.given, torch.ones_like(oracle.padding)
    ranked, ids = oracle.ranked, oracle.looked_up[1]
    if not bool(ranked.any()):
        return ids, torch.ones_like(ranked)
    reference = oracle.reference
    ids = torch.where(ranked.unsqueeze(1), reference.ids, ids)
    return ids, reference.clear | ~ranked
