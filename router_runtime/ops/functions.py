"""The custom ops ``torch.ops.dsv4.*`` as Python functions with signatures and documentation.

A function costs no measurable time over its op (keyword arguments, which torch takes long to parse,
are passed on only if there are any) and works under ``torch.compile``. The ops have further forms
without a function: ``torch.ops.dsv4.NAME.mapped`` applies an expert map and returns ``(weights,
physical ids, ..., logical ids)``; ``torch.ops.dsv4.NAME.packed`` returns ``(id << 16) | bf16
weight``, int32; ``torch.ops.dsv4.NAME.out`` writes ``weights_out``, ``ids_out`` and
``logical_ids_out`` (and ``logits_out``), tensors of the caller, and records in ``expert_load`` and
``captured_ids``. ``Router.forward_mapped``, ``forward_packed`` and ``forward_out`` say what these
arguments mean.

All functions take ``shared_experts`` (1 or 2), for so many experts that every token has: they
follow the k own ones in each row, have the ids ``shared_id`` (without it the number of experts) and
the one after it, and each has the weight ``shared_weight`` (without it 1); padding has the sentinel
and 0 there.

Steps are those of ``router_runtime/spec.py``. No op has a backward: inputs that require grad in
grad mode are refused. Rows may have any stride between them; the elements of a row are copied
together first if they are not adjacent.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import Tensor

from router_runtime.arguments import explain_failure, explains_arguments
from router_runtime.format.scoring import SQRT_SOFTPLUS

# Registers the ops.
from router_runtime.ops import registration as registration
from router_runtime.routing.checks import check_scoring, wrong_value

_dense_router = torch.ops.dsv4.dense_router.default
_dense_router_logits = torch.ops.dsv4.dense_router_logits.default
_dense_router_replay = torch.ops.dsv4.dense_router_replay.default
_hash_router = torch.ops.dsv4.hash_router.default
_hash_gate = torch.ops.dsv4.hash_gate.default
_topk_select = torch.ops.dsv4.topk_select.default
_topk_indices = torch.ops.dsv4.topk_indices.default
_activation_topk = torch.ops.dsv4.activation_topk.default
_activation_topk_replay = torch.ops.dsv4.activation_topk_replay.default

#: The arguments of functions that count something or number something.
_NUMBERS = frozenset({"router_id", "num_experts", "top_k", "k", "sentinel", "page_size"})
#: The same, for those that may be None.
_OPTIONAL_NUMBERS = frozenset({"shared_experts", "shared_id"})
#: An int, or what may stand for one: the int of a traced function, of NumPy or of a tensor.
_AS_INT = (int, torch.SymInt, SupportsIndex)

P = ParamSpec("P")
R = TypeVar("R")


def _calls(op: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that a call without keyword arguments goes straight to ``op``, which
    takes the same ones, and an argument of the wrong kind ends in our InputError. What torch would
    take for a number is looked at before the call.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)
        # The numbers of an op follow its tensors.
        first = next(place for place, name in enumerate(names) if name in _NUMBERS)

        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                for number in arguments[first:]:
                    if type(number) is not int:
                        _refuse_as_numbers(dict(zip(names, arguments, strict=False)))
                if not keywords:
                    return op(*arguments)  # type: ignore[no-any-return]
                _refuse_as_numbers(keywords)
                return function(*arguments, **keywords)
            except Exception as error:
                explain_failure(error, function, arguments, keywords)
                raise

        return call

    return decorate


def _refuse_as_numbers(arguments: Mapping[str, Any]) -> None:
    """Raise InputError for what torch would take for a number: True for 1, a dtype for its own
    number, and a number for a dtype.
    """
    for name, value in arguments.items():
        if type(value) is int and name in _NUMBERS:
            continue
        if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, _AS_INT)):
            raise wrong_value(name, "an int", value)
        if name in _OPTIONAL_NUMBERS and value is not None and type(value) is not int:
            raise wrong_value(name, "an int or None", value)
        if name in ("scale", "shared_weight") and isinstance(value, bool):
            raise wrong_value(name, "a float", value)
        if name == "ids_dtype" and not (value is None or isinstance(value, torch.dtype)):
            raise wrong_value(name, "torch.int32 or torch.int64", value)


def _used(**inputs: Any) -> dict[str, Any]:
    """Those of ``inputs`` that are not None: torch takes long to read keyword arguments."""
    return {name: value for name, value in inputs.items() if value is not None}


def _refuse_other_than_bool(**values: object) -> None:
    """Raise InputError: torch would take None for False, which gives other results."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise wrong_value(name, "True or False", value)


@_calls(_dense_router)
def dense_router(
    hidden_states: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    image_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Route hidden states by the gate of a registered Router of mode ``dense`` (steps 1 to 7).

    Per token: ``logit = x @ W.T``, ``score = sqrt(softplus(logit))``, the k experts of largest
    ``score + bias``, and as their weights ``score / (sum of the k scores + 1e-20) * r``.

    Args:
        hidden_states: bf16 ``[tokens, hidden_size]`` on the router's device; 0 tokens are allowed.
        router_id: what ``register_router`` returned.
        num_experts: E, as the router has it.
        top_k: k, as the router has it.
        ids_dtype: ``torch.int32`` (as without it) or ``torch.int64``, of the ids.
        is_padding: bool ``[tokens]``; those rows get the sentinel and zero weights.
        num_valid_tokens: int32, one element on the device; the rows from that number on are
            padding. The kernel reads it, at each replay of a captured graph again.
        image_mask: bool ``[tokens]``; those rows are selected by the router's ``image_bias``.
        given_ids: int32 or int64 ``[tokens, k]``: experts to weigh, in their order, instead of
            selecting; of all rows, or of those in ``given_mask``. An id outside [0, E) becomes the
            sentinel, with weight 0, and is left out of the sum.
        given_mask: bool ``[tokens]``, beside ``given_ids``.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])`` in rank order: k distinct ids in [0, E).
        Equal keys rank the lower id first. A token's bits depend on no other token of the batch.

    Raises:
        InputError: no router has that id, it has another mode or other sizes, or a tensor does not
            fit.
        DriverError: the launch failed.

    """
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        image_mask=image_mask,
        given_ids=given_ids,
        given_mask=given_mask,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
    )
    return _dense_router(hidden_states, router_id, num_experts, top_k, **inputs)  # type: ignore[no-any-return]


@_calls(_dense_router_logits)
def dense_router_logits(
    hidden_states: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    image_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route as ``dense_router`` does, and return the logits that it routed by.

    Arguments and errors are those of ``dense_router``, and ResolutionError where no kernel of this
    configuration stores logits.

    Returns:
        ``(weights, ids, logits)``: the first two as of ``dense_router``, bit for bit; logits fp32
        ``[tokens, E]``, a NaN stored as 0x7fffffff (step 1), also for padding tokens.

    """
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        image_mask=image_mask,
        given_ids=given_ids,
        given_mask=given_mask,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
    )
    return _dense_router_logits(hidden_states, router_id, num_experts, top_k, **inputs)  # type: ignore[no-any-return]


@_calls(_dense_router_replay)
def dense_router_replay(
    hidden_states: Tensor,
    given_ids: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weigh experts that were chosen before, by the gate of a registered dense Router: steps 1 to 3
    and 6, at the given experts.

    Args:
        hidden_states: bf16 ``[tokens, hidden_size]``.
        given_ids: int32 or int64 ``[tokens, k]``: logical ids, whose order is kept. One outside
            [0, E) becomes the sentinel, with weight 0, and is left out of the sum.
        router_id: what ``register_router`` returned.
        num_experts: E, as the router has it.
        top_k: k, as the router has it.
        ids_dtype: as of ``dense_router``.
        is_padding: as of ``dense_router``.
        num_valid_tokens: as of ``dense_router``.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])``. Given the ids of ``dense_router``, its
        weights, bit for bit.

    Raises:
        InputError: as of ``dense_router``.
        DriverError: the launch failed.

    """
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
    )
    return _dense_router_replay(hidden_states, given_ids, router_id, num_experts, top_k, **inputs)  # type: ignore[no-any-return]


@_calls(_hash_router)
def hash_router(
    token_ids: Tensor,
    router_id: int,
    top_k: int,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Look the experts of tokens up in the table of a registered Router of mode ``hash``:
    ``ids = table[token]``, each with the weight 1/k.

    Args:
        token_ids: int32 or int64 ``[tokens]``. One outside [0, vocab_size) gets sentinel ids and
            zero weights; the table is not read for it.
        router_id: what ``register_router`` returned.
        top_k: k, as the router has it.
        ids_dtype: as of ``dense_router``.
        is_padding: as of ``dense_router``.
        num_valid_tokens: as of ``dense_router``.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])``, in the table's order.

    Raises:
        InputError: as of ``dense_router``.
        DriverError: the launch failed.

    """
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
    )
    return _hash_router(token_ids, router_id, top_k, **inputs)  # type: ignore[no-any-return]


@_calls(_hash_gate)
def hash_gate(
    hidden_states: Tensor,
    token_ids: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    image_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Look the experts of tokens up in the table of a registered Router of mode ``hash_gate``, and
    weigh them by its gate's scores (steps 1 to 3 and 6 at those experts).

    Args:
        hidden_states: bf16 ``[tokens, hidden_size]``.
        token_ids: int32 or int64 ``[tokens]``. One outside [0, vocab_size) gets sentinel ids and
            zero weights; the table is not read for it.
        router_id: what ``register_router`` returned.
        num_experts: E, as the router has it.
        top_k: k, as the router has it.
        ids_dtype: as of ``dense_router``.
        is_padding: as of ``dense_router``.
        num_valid_tokens: as of ``dense_router``.
        image_mask: bool ``[tokens]``; those tokens are not looked up: they get the k experts of
            largest key (steps 4 and 5) by the router's ``image_bias``.
        given_ids: int32 or int64 ``[tokens, k]``: experts to weigh, in their order, instead of
            looking up; of all rows, or of those in ``given_mask``. An id outside [0, E) becomes the
            sentinel, with weight 0, and is left out of the sum.
        given_mask: bool ``[tokens]``, beside ``given_ids``.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])``, in the table's order (image tokens: in rank
        order).

    Raises:
        InputError: as of ``dense_router``.
        DriverError: the launch failed.

    """
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        image_mask=image_mask,
        given_ids=given_ids,
        given_mask=given_mask,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
    )
    return _hash_gate(hidden_states, token_ids, router_id, num_experts, top_k, **inputs)  # type: ignore[no-any-return]


@_calls(_topk_select)
def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order (the ranking of step 5, of any fp32 rows).

    Equal scores rank the lower id first, and +0 equals -0. A NaN ranks as -inf and is returned
    unchanged.

    Args:
        scores: fp32 ``[rows, columns]`` with 1 to 2^21 columns; 0 rows are allowed.
        k: from 1 to 4096 and at most ``columns``.

    Returns:
        ``(values fp32 [rows, k], ids int32 [rows, k])``.

    Raises:
        InputError: a dtype, a shape or k does not fit, or the first call on a device, which loads
            its kernels, is made while a graph is being captured.
        ArtifactError: a file of the artifacts is missing or altered.
        DriverError: the driver failed.
        ResolutionError: no kernel serves rows of this length on this device.

    """
    return _topk_select(scores, k)  # type: ignore[no-any-return]


@_calls(_topk_indices)
def topk_indices(
    scores: Tensor,
    k: int,
    *,
    row_starts: Tensor | None = None,
    row_ends: Tensor | None = None,
    page_table: Tensor | None = None,
    page_size: int = 1,
    requests: Tensor | None = None,
    offsets: Tensor | None = None,
    sorted: bool = False,
    nan_first: bool = False,
) -> Tensor:
    """Where the k largest of each row are: what a sparse-attention indexer needs of its scores.

    Exact for any scores: the k largest, equal ones the lower position first, however many are
    equal; +0 equals -0, a NaN ranks as -inf. A row's result depends on nothing but the row. Lengths
    are read on the device, at each replay of a captured graph again.

    Without ``page_table`` and ``offsets`` the results are ids: positions that count from the row's
    start. With either they are slots: ``page_table[request, id // page_size] * page_size + id %
    page_size + offset``, or ``id + offset``. ``torch.ops.dsv4.topk_indices.with_ids`` returns
    ``(slots, ids)``; ``torch.ops.dsv4.topk_indices.out`` writes ``slots_out``, ``ids_out`` or both.

    Args:
        scores: fp32 or bf16 ``[rows, columns]`` with 1 to 2^21 columns, any stride between rows; 0
            rows are allowed. Those outside of a row's bounds are not read, and none is written.
        k: from 1 to 4096; it may be more than ``columns``.
        row_starts: int32 ``[rows]``, the first column of each row; without it 0. Less than 0 counts
            as 0.
        row_ends: int32 ``[rows]``, the column behind the last of each row; without it ``columns``.
            More than ``columns`` counts as ``columns``; a row whose end is not above its start is
            empty.
        page_table: int32 ``[requests, pages]``, the page of the cache that has the positions from
            ``page * page_size`` on, any stride between requests.
        page_size: positions of a page, from 1.
        requests: int32 ``[rows]``, the row of ``page_table`` of each row of scores; without it, row
            i has row i. The slots of a request that the table does not have are -1, and so is that
            of a page beyond its columns; neither is read.
        offsets: int32 ``[rows]``, added to each slot that is not -1.
        sorted: True orders a row by rank, the largest first, in place of ascending positions.
        nan_first: True ranks a NaN above +inf.

    Returns:
        int32 ``[rows, k]``: distinct ids, or their slots, then -1 where a row has fewer than k.

    Raises:
        InputError: a dtype, a shape, a device or a number does not fit, ``scores`` requires grad in
            grad mode, or the first call on a device, which loads its kernels, is made while a graph
            is being captured.
        ArtifactError: a file of the artifacts is missing or altered.
        DriverError: the driver failed.
        ResolutionError: no kernel serves rows of this length on this device.

    """
    _refuse_other_than_bool(sorted=sorted, nan_first=nan_first)
    return _topk_indices(  # type: ignore[no-any-return]
        scores,
        k,
        row_starts=row_starts,
        row_ends=row_ends,
        page_table=page_table,
        page_size=page_size,
        requests=requests,
        offsets=offsets,
        sorted=sorted,
        nan_first=nan_first,
    )


@explains_arguments
def activation_topk(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    renormalize: bool,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    image_mask: Tensor | None = None,
    image_bias: Tensor | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    sentinel: int = -1,
    scoring: str = SQRT_SOFTPLUS,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Route by logits that are there already: steps 2 to 7, without a Router.

    Per token: ``score = sqrt(softplus(logit))``, or ``sigmoid(logit)`` (0 for a NaN logit), ``key =
    score + bias`` (-inf for a NaN logit or a NaN key), the k experts of largest key, equal keys the
    lower id first, and ``weight_j = score_j / (score_0 + ... + score_(k-1) + 1e-20) * scale``. The
    bias selects and never enters the weights.

    Args:
        logits: fp32, bf16 or fp16 ``[tokens, E]`` with E from 1 to 1024; any values; 0 tokens are
            allowed. The kernels read fp32: others are converted first, by torch.
        bias: fp32, bf16 or fp16 ``[E]``; any values.
        k: from 1 to 32 and at most E.
        scale: r, finite, from 0 to 1e18.
        renormalize: False leaves the division out: ``weight_j = score_j * scale``.
        ids_dtype: ``torch.int32`` (as without it) or ``torch.int64``, of the ids.
        is_padding: bool ``[tokens]``; those rows get the sentinel and zero weights (step 7).
        num_valid_tokens: int32, one element on the device; the rows from that number on are
            padding. The kernel reads it, at each replay of a captured graph again.
        image_mask: bool ``[tokens]``; those rows are selected by ``image_bias``, which is required
            with it.
        image_bias: as ``bias``.
        given_ids: int32 or int64 ``[tokens, k]``: experts to weigh, in their order, instead of
            selecting; of all rows, or of those in ``given_mask``. An id outside [0, E) becomes the
            sentinel, with weight 0, and is left out of the sum.
        given_mask: bool ``[tokens]``, beside ``given_ids``.
        sentinel: the id of padding, an int32.
        scoring: ``sqrtsoftplus`` or ``sigmoid``. A gate temperature T is the caller's: multiply the
            logits by 1 / T before.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])`` in rank order: k distinct ids in [0, E),
        weights finite and not negative. All-zero scores give zero weights, never NaN.

    Raises:
        InputError: a dtype, a shape, a device or a number does not fit, a tensor requires grad in
            grad mode, or the first call on a device, which loads its kernels, is made while a graph
            is being captured.
        ArtifactError: a file of the artifacts is missing or altered.
        DriverError: the driver failed.
        ResolutionError: no kernel serves these sizes on this device.

    """
    if (
        sentinel == -1
        and is_padding is num_valid_tokens is image_mask is image_bias is given_ids is None
        and ids_dtype is None
        and given_mask is None
        and shared_experts is shared_id is None
        and shared_weight is None
        and scoring == SQRT_SOFTPLUS
        and type(k) is int
        and type(scale) is float
        and type(sentinel) is int
    ):
        _refuse_other_than_bool(renormalize=renormalize)
        return _activation_topk(logits, bias, k, scale, renormalize)  # type: ignore[no-any-return]
    check_scoring("scoring", scoring)
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        image_mask=image_mask,
        image_bias=image_bias,
        given_ids=given_ids,
        given_mask=given_mask,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
        sentinel=None if sentinel == -1 else sentinel,
        scoring=None if scoring == SQRT_SOFTPLUS else scoring,
    )
    _refuse_as_numbers({"k": k, "scale": scale, "sentinel": sentinel, **inputs})
    _refuse_other_than_bool(renormalize=renormalize)
    return _activation_topk(logits, bias, k, scale, renormalize, **inputs)  # type: ignore[no-any-return]


@explains_arguments
def activation_topk_replay(
    logits: Tensor,
    given_ids: Tensor,
    scale: float,
    renormalize: bool,
    *,
    ids_dtype: torch.dtype | None = None,
    is_padding: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    sentinel: int = -1,
    scoring: str = SQRT_SOFTPLUS,
    shared_experts: int | None = None,
    shared_id: int | None = None,
    shared_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weigh experts that were chosen before, by logits: steps 2, 3 and 6 at the given experts.

    Args:
        logits: fp32, bf16 or fp16 ``[tokens, E]``.
        given_ids: int32 or int64 ``[tokens, k]``, whose order is kept. An id outside [0, E) becomes
            the sentinel, with weight 0, and is left out of the sum.
        scale: as of ``activation_topk``.
        renormalize: as of ``activation_topk``.
        ids_dtype: as of ``activation_topk``.
        is_padding: as of ``activation_topk``.
        num_valid_tokens: as of ``activation_topk``.
        sentinel: as of ``activation_topk``.
        scoring: as of ``activation_topk``.
        shared_experts: see this module.
        shared_id: see this module.
        shared_weight: see this module.

    Returns:
        ``(weights fp32 [tokens, k], ids [tokens, k])``. Given the ids of ``activation_topk``, its
        weights, bit for bit.

    Raises:
        The errors of ``activation_topk``.

    """
    check_scoring("scoring", scoring)
    inputs = _used(
        ids_dtype=ids_dtype,
        is_padding=is_padding,
        num_valid_tokens=num_valid_tokens,
        shared_experts=shared_experts,
        shared_id=shared_id,
        shared_weight=shared_weight,
        sentinel=None if sentinel == -1 else sentinel,
        scoring=None if scoring == SQRT_SOFTPLUS else scoring,
    )
    _refuse_as_numbers({"scale": scale, "sentinel": sentinel, **inputs})
    _refuse_other_than_bool(renormalize=renormalize)
    return _activation_topk_replay(logits, given_ids, scale, renormalize, **inputs)  # type: ignore[no-any-return]
