"""The forms of each custom op: their schemas, and what they return, for tracing.

An op that routes has four forms. ``name`` returns weights and ids (and logits). ``name.mapped``
applies the expert map: its ids are physical ones, and the logical ones follow after the other
results. ``name.packed`` returns one tensor, with id and weight in each word. ``name.out`` returns
nothing and writes ``weights_out`` and ``ids_out`` (and ``logits_out``), and what a call records is
written by this form only. The latter two apply the expert map if they are called with
``mapped=True`` or, where an op takes no Router, with an ``expert_map``; ``name.out`` also if it is
called with ``logical_ids_out``.

An op of a Router has each form three times: for callers, with the number ``router_id``; for
``torch.compile``, with ``buffer``, the router's weight (or its table in mode ``hash``), under the
name of the form and ``by_buffer``; and for ``torch.export``, with all tensors of the gate and its
configuration, under the name of the form and ``exported``. Routers use the latter two when they are
traced; they are no public interface.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from router_runtime.format.scoring import SQRT_SOFTPLUS
from router_runtime.routing.checks import (
    check_logits,
    check_logits_bias,
    check_score_rows,
    check_scores,
    refuse_grad,
    wrong_tensor,
)

NAMESPACE = "dsv4"

#: The forms of an op that routes, and what all of them take for experts that every token has.
FORMS = ("", "mapped", "packed", "out")
_SHARED = ", int? shared_experts=None, int? shared_id=None, float? shared_weight=None"

#: What the form ``out`` records beside its results.
_RECORDS = ", Tensor(e!)? expert_load=None, Tensor? record_load=None, Tensor(f!)? captured_ids=None"

#: The argument of an op that says which router -> how the names of those forms end.
ROUTER_ARGUMENTS = {
    "SymInt router_id": "",
    "Tensor buffer": "by_buffer",
    "Tensor?[] gate, str config": "exported",
}


class Shape(NamedTuple):
    """What the sizes of an op's results follow from: its input rows, experts and k."""

    rows: Tensor
    experts: int
    top_k: int


class RoutingOp(NamedTuple):
    """A custom op that routes.

    Attributes:
        name: its name in the namespace.
        rows: the tensors that it takes first, in the language of schemas.
        numbers: the numbers that it takes last.
        shape: called with its positional arguments, checks them as far as tracing can and returns
            their ``Shape``.
        takes_router: whether it takes a router between ``rows`` and ``numbers``. An op that does
            not is called with what a router would own, such as the expert map.
        inputs: keyword arguments beyond those that every op has.
        logits: whether it returns logits.

    """

    name: str
    rows: str
    numbers: str
    shape: Callable[..., Shape]
    takes_router: bool = True
    inputs: str = ""
    logits: bool = False

    def forms(self) -> dict[tuple[str, str], str]:
        """The schema of each form, by (one of ``FORMS``, how its name ends)."""
        serving = f"Tensor? is_padding=None, Tensor? num_valid_tokens=None{self.inputs}{_SHARED}"
        results = "Tensor, Tensor" + ", Tensor" * self.logits
        given = if_wanted = ""
        if not self.takes_router:
            order = ", int replica_start=0, int replica_step=1"
            given = f", Tensor expert_map, Tensor replica_counts{order}"
            if_wanted = f", Tensor? expert_map=None, Tensor? replica_counts=None{order}"
        else:
            if_wanted = ", bool mapped=False"
        outputs = "Tensor(a!) weights_out, Tensor(b!) ids_out" + (
            ", Tensor(c!) logits_out" * self.logits + ", Tensor(d!)? logical_ids_out=None"
        )
        dtype = "ScalarType? ids_dtype=None"
        schemas: dict[tuple[str, str], str] = {}
        for router, end in (ROUTER_ARGUMENTS if self.takes_router else {"": ""}).items():
            positional = ", ".join(filter(None, (self.rows, router, self.numbers)))
            schemas |= {
                ("", end): f"({positional}, *, {dtype}, {serving}) -> ({results})",
                ("mapped", end): f"({positional}, *, {dtype}, {serving}{given})"
                f" -> ({results}, Tensor)",
                ("packed", end): f"({positional}, *, {serving}{if_wanted}) -> Tensor",
                ("out", end): f"({positional}, *, {serving}{if_wanted}, {outputs}{_RECORDS}) -> ()",
            }
        return schemas

    def one_router(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which takes a router as one argument, for the form ``exported``, which has
        it as two.
        """
        place = self.rows.count("Tensor ")

        def call(*arguments: Any, **inputs: Any) -> Any:
            router = arguments[place : place + 2]
            return function(*arguments[:place], router, *arguments[place + 2 :], **inputs)

        return call

    def overload(self, form: str, end: str) -> str:
        """The name of a form: ``dense_router.mapped_by_buffer``."""
        overload = "_".join(filter(None, (form, end)))
        return f"{self.name}.{overload}" if overload else self.name

    def fakes(self) -> dict[str, Callable[..., Any]]:
        """What each form returns, without values; by form."""
        logits, names = self.logits, tuple(inspect.signature(self.shape).parameters)

        def shape(*arguments: Any, **inputs: Any) -> Shape:
            refuse_several_devices({**dict(zip(names, arguments, strict=True)), **inputs})
            return self.shape(*arguments)

        def columns(top_k: int, shared_experts: int | None = None, **_: Any) -> int:
            return top_k + (shared_experts or 0)

        def default(*arguments: Any, ids_dtype: Any = None, **inputs: Any) -> tuple[Tensor, ...]:
            rows, experts, top_k = shape(*arguments, **inputs)
            results = outputs_like(rows, columns(top_k, **inputs), ids_dtype or torch.int32)
            if not logits:
                return results
            return *results, rows.new_empty((rows.shape[0], experts), dtype=torch.float32)

        def mapped(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
            results = default(*arguments, **inputs)
            rows, _, top_k = self.shape(*arguments)
            return *results, results[1].new_empty((rows.shape[0], top_k))

        def packed(*arguments: Any, **inputs: Any) -> Tensor:
            rows, _, top_k = shape(*arguments, **inputs)
            return outputs_like(rows, columns(top_k, **inputs), torch.int32)[1]

        def out(*arguments: Any, **inputs: Any) -> None:
            shape(*arguments, **inputs)

        return {"": default, "mapped": mapped, "packed": packed, "out": out}


def refuse_several_devices(arguments: Mapping[str, Any]) -> None:
    """Raise InputError unless all tensors of a call are on one device.

    torch calls the form without values for one meta tensor among others that have values, and
    takes its results, which nothing has written, for those of the call.
    """
    tensors = [(name, each) for name, value in arguments.items() for each in _tensors(value)]
    for name, tensor in tensors:
        first, other = tensors[0]
        if tensor.device != other.device:
            expected = f"a tensor on {other.device}, where {first} is"
            raise wrong_tensor(name, expected, tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of one argument, which for a form ``exported`` are in a list in a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def outputs_like(tensor: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised fp32 and ``dtype``, each ``[rows, k]``, where ``tensor`` is."""
    shape = (tensor.shape[0], k)
    return tensor.new_empty(shape, dtype=torch.float32), tensor.new_empty(shape, dtype=dtype)


def topk_select_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``topk_select`` returns, without values."""
    check_scores(scores)
    return outputs_like(scores, k, torch.int32)


def topk_indices_fakes() -> dict[str, Callable[..., Any]]:
    """What each form of ``topk_indices`` returns, without values; by its overload."""

    def indices(scores: Tensor, k: int, **given: Any) -> Tensor:
        check_score_rows(scores)
        refuse_several_devices({"scores": scores, **given})
        return scores.new_empty((scores.shape[0], k), dtype=torch.int32)

    def with_ids(scores: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor]:
        slots = indices(scores, k, **given)
        return slots, torch.empty_like(slots)

    def out(scores: Tensor, k: int, **given: Any) -> None:
        indices(scores, k, **given)

    return {"": indices, "with_ids": with_ids, "out": out}


def _dense_router(hidden_states: Tensor, router: Any, num_experts: int, top_k: int) -> Shape:
    if hidden_states.dtype is not torch.bfloat16 or hidden_states.dim() != 2:
        raise wrong_tensor("hidden_states", "torch.bfloat16 [tokens, hidden_size]", hidden_states)
    refuse_grad("hidden_states", hidden_states)
    return Shape(hidden_states, num_experts, top_k)


def _dense_router_replay(
    hidden_states: Tensor, given_ids: Tensor, router: Any, num_experts: int, top_k: int
) -> Shape:
    return _dense_router(hidden_states, router, num_experts, top_k)


def _hash_router(token_ids: Tensor, router: Any, top_k: int) -> Shape:
    if token_ids.dtype not in (torch.int32, torch.int64) or token_ids.dim() != 1:
        raise wrong_tensor("token_ids", "torch.int32 or torch.int64 [tokens]", token_ids)
    return Shape(token_ids, 0, top_k)


def _hash_gate(
    hidden_states: Tensor, token_ids: Tensor, router: Any, num_experts: int, top_k: int
) -> Shape:
    _hash_router(token_ids, router, top_k)
    return _dense_router(hidden_states, router, num_experts, top_k)


def _activation_topk(
    logits: Tensor, bias: Tensor, k: int, scale: float, renormalize: bool
) -> Shape:
    check_logits(logits)
    check_logits_bias("bias", bias, logits)
    return Shape(logits, logits.shape[1], k)


def _activation_topk_replay(
    logits: Tensor, given_ids: Tensor, scale: float, renormalize: bool
) -> Shape:
    check_logits(logits)
    return Shape(logits, logits.shape[1], given_ids.shape[1])


_STATES, _SIZES = "Tensor hidden_states", "int num_experts, int top_k"
_IMAGES = ", Tensor? image_mask=None"
_GIVEN = ", Tensor? given_ids=None, Tensor? given_mask=None"
_SCORED = _IMAGES + _GIVEN
_SCORING = f", str scoring='{SQRT_SOFTPLUS}'"

ROUTING_OPS = (
    RoutingOp("dense_router", _STATES, _SIZES, _dense_router, inputs=_SCORED),
    RoutingOp("dense_router_logits", _STATES, _SIZES, _dense_router, inputs=_SCORED, logits=True),
    RoutingOp("dense_router_replay", f"{_STATES}, Tensor given_ids", _SIZES, _dense_router_replay),
    RoutingOp("hash_router", "Tensor token_ids", "int top_k", _hash_router),
    RoutingOp("hash_gate", f"{_STATES}, Tensor token_ids", _SIZES, _hash_gate, inputs=_SCORED),
    RoutingOp(
        "activation_topk",
        "Tensor logits, Tensor bias",
        "int k, float scale, bool renormalize",
        _activation_topk,
        takes_router=False,
        inputs=f"{_IMAGES}, Tensor? image_bias=None{_GIVEN}, int sentinel=-1{_SCORING}",
    ),
    RoutingOp(
        "activation_topk_replay",
        "Tensor logits, Tensor given_ids",
        "float scale, bool renormalize",
        _activation_topk_replay,
        takes_router=False,
        inputs=f", int sentinel=-1{_SCORING}",
    ),
)

TOPK_SELECT = "(Tensor scores, int k) -> (Tensor, Tensor)"

_INDICES = (
    "Tensor scores, int k, *, Tensor? row_starts=None, Tensor? row_ends=None, "
    "Tensor? page_table=None, int page_size=1, Tensor? requests=None, Tensor? offsets=None, "
    "bool sorted=False, bool nan_first=False"
)

#: The schema of each form of ``topk_indices``, by its overload.
TOPK_INDICES = {
    "": f"({_INDICES}) -> Tensor",
    "with_ids": f"({_INDICES}) -> (Tensor, Tensor)",
    "out": f"({_INDICES}, Tensor(a!)? slots_out=None, Tensor(b!)? ids_out=None) -> ()",
}
