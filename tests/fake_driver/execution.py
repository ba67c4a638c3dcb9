"""The execution of a launch: the oracle on the memory that the arguments point to."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch

from router_runtime import spec
from router_runtime.format.manifest import Entry


def view(address: int, dtype: torch.dtype, *shape: int, stride: int | None = None) -> torch.Tensor:
    """The tensor at an address, as a kernel sees it. ``stride`` is between rows, in elements."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    step = columns if stride is None else stride
    count = (rows - 1) * step + columns
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((rows, columns), (step, 1)).view(*shape)


def _rule(entry: Entry) -> dict[str, Any]:
    """How an entry scores, under the names of ``spec.activation_topk``."""
    names = ("SCORING", "scoring"), ("GATE_TEMPERATURE", "gate_temperature")
    return {name: entry.constants[constant] for constant, name in names}


def _run_hash(a: Any, entry: Entry) -> None:
    assert bool(a.token_ids_i32) != bool(a.token_ids_i64)
    dtype = torch.int32 if a.token_ids_i32 else torch.int64
    token_ids = view(a.token_ids_i32 or a.token_ids_i64, dtype, a.tokens)
    table = view(a.table, torch.int32, a.vocab, a.top_k)
    result = spec.hash_router(token_ids, table, a.top_k, -1, _served(a).get("padding"))
    _store(a, a.tokens, result)


def _run_gate(a: Any, entry: Entry) -> None:
    sizes = entry.constants
    hidden, experts = int(sizes["HIDDEN"]), int(sizes["EXPERTS"])
    a.top_k = int(sizes["TOP_K"])
    assert bool(a.token_ids_i32) != bool(a.token_ids_i64)
    assert a.hidden_states % 16 == 0
    assert a.row_stride % 8 == 0
    dtype = torch.int32 if a.token_ids_i32 else torch.int64
    served = _served(a, experts)
    assert sizes["IMAGES"] or "image_mask" not in served
    result = spec.hash_gate(
        view(a.hidden_states, torch.bfloat16, a.tokens, hidden, stride=a.row_stride),
        view(a.token_ids_i32 or a.token_ids_i64, dtype, a.tokens),
        view(a.packed_weight, torch.bfloat16, hidden, experts).T,
        view(a.table, torch.int32, a.vocab, a.top_k),
        a.scale,
        bool(a.renormalize),
        spec.NO_EXPERT,
        **served,
        **_rule(entry),
    )
    _store(a, a.tokens, result)


def _run_select(a: Any, entry: Entry) -> None:
    scores = view(a.scores, torch.float32, a.rows, a.row_length, stride=a.row_stride)
    a.weights_out = a.values_out
    _store(a, a.rows, spec.topk_select(scores, a.top_k))


def _run_indices(a: Any, entry: Entry) -> None:
    dtype = {4: torch.float32, 2: torch.bfloat16}[int(entry.constants["SCORE_BYTES"])]
    scores = view(a.scores, dtype, a.rows, a.row_length, stride=a.row_stride)

    def vector(address: int) -> torch.Tensor | None:
        return view(address, torch.int32, a.rows) if address else None

    starts = vector(a.row_starts)
    ids = spec.topk_indices(
        scores,
        a.top_k,
        starts,
        vector(a.row_ends),
        in_rank_order=bool(a.sorted),
        nan_first=bool(a.nan_first),
    )
    table = None
    if a.page_table:
        shape = a.page_rows, a.page_columns
        table = view(a.page_table, torch.int32, *shape, stride=a.page_stride)
    slots = spec.slots(ids, table, a.page_size, vector(a.requests), vector(a.offsets))
    values = spec.scores_at(scores, ids, starts)
    for address, result in ((a.values_out, values), (a.ids_out, ids), (a.slots_out, slots)):
        if address:
            view(address, result.dtype, a.rows, a.top_k).copy_(result)


def _run_activation(a: Any, entry: Entry) -> None:
    logits = view(a.logits, torch.float32, a.tokens, a.experts, stride=a.row_stride)
    bias = view(a.bias, torch.float32, a.experts)
    result = spec.activation_topk(
        logits, bias, a.top_k, a.scale, bool(a.renormalize), **_served(a, a.experts), **_rule(entry)
    )
    _store(a, a.tokens, result)


def _run_dense(a: Any, entry: Entry) -> None:
    sizes = entry.constants
    hidden, experts = int(sizes["HIDDEN"]), int(sizes["EXPERTS"])
    a.top_k = int(sizes["TOP_K"])
    if entry.contract.tensor_maps:
        a.hidden_states, columns, count, stride = struct.unpack("<4Q", a.raw["hidden_states"][:32])
        assert (columns, count) == (hidden, a.tokens)
        assert stride >= 2 * columns  # the hardware takes no rows that overlap
        a.row_stride = stride // 2
    assert a.hidden_states % 16 == 0
    assert a.row_stride % 8 == 0
    x = view(a.hidden_states, torch.bfloat16, a.tokens, hidden, stride=a.row_stride)
    recipe = entry.contract.repacks[0]
    packed = view(a.packed_weight, torch.bfloat16, recipe.rows * hidden)
    weight = packed.view(recipe.rows // 16, hidden, 16).permute(0, 2, 1).reshape(-1, hidden)
    assert not weight[experts:].any()
    bias = view(a.bias, torch.float32, experts)
    logits = spec.dense_logits(x, weight[:experts])
    if a.serving and a.table:
        dtype = torch.int32 if a.token_ids_i32 else torch.int64
        result = spec.hash_gate(
            x,
            view(a.token_ids_i32 or a.token_ids_i64, dtype, a.tokens),
            weight[:experts],
            view(a.table, torch.int32, a.vocab, a.top_k),
            a.scale,
            bool(a.renormalize),
            spec.NO_EXPERT,
            **_served(a, experts),
            **_rule(entry),
        )
    else:
        given = {**_served(a, experts), **_rule(entry)}
        result = spec.activation_topk(logits, bias, a.top_k, a.scale, bool(a.renormalize), **given)
    _store(a, a.tokens, result)
    if getattr(a, "logits_out", 0):
        view(a.logits_out, torch.float32, a.tokens, experts).copy_(logits)


def _served(a: Any, experts: int = 0) -> dict[str, Any]:
    """The serving inputs of a launch, under the names of ``spec.activation_topk``."""
    if not a.serving:
        return {}
    inputs: dict[str, Any] = {"padding": _padding(a)}
    if getattr(a, "image_mask", 0):
        inputs["image_mask"] = view(a.image_mask, torch.bool, a.tokens)
        inputs["image_bias"] = view(a.image_bias, torch.float32, experts)
    for name, dtype in (("given_ids_i32", torch.int32), ("given_ids_i64", torch.int64)):
        if address := getattr(a, name, 0):
            inputs["given_ids"] = view(address, dtype, a.tokens, a.top_k)
    if "given_ids" in inputs and a.given_mask:
        inputs["given_mask"] = view(a.given_mask, torch.bool, a.tokens)
    return inputs


def _padding(a: Any) -> torch.Tensor:
    """Which rows of a launch with serving inputs are padding."""
    rows = torch.arange(a.first_row, a.first_row + a.tokens)
    marks = view(a.is_padding, torch.bool, a.tokens) if a.is_padding else None
    count = view(a.num_valid_tokens, torch.int32, 1) if a.num_valid_tokens else None
    return spec.padding_rows(rows, marks, count)


def _store(a: Any, count: int, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write weights and ids ``[count, k]`` where the launch wants them, and what else it wants."""
    weights, ids = result
    if not getattr(a, "serving", 0):
        view(a.weights_out, torch.float32, count, a.top_k).copy_(weights)
        stored = spec.with_sentinel(ids, getattr(a, "sentinel", -1))
        view(a.ids_out, torch.int32, count, a.top_k).copy_(stored)
        return
    logical = physical = spec.with_sentinel(ids, a.sentinel)
    if a.expert_map:
        entries = max(int(ids.max()) + 1, 1)
        counts = view(a.replica_counts, torch.int32, entries)
        expert_map = view(a.expert_map, torch.int32, entries, a.replicas)
        rows = torch.arange(a.first_row, a.first_row + count)
        order = a.replica_start % 2**32, a.replica_step % 2**32
        physical = spec.physical_ids(ids, rows, expert_map, counts, a.sentinel, *order)
    _put(a.logical_ids_out, a.logical_ids_out_i64, logical, a.top_k)
    strides = a.top_k, a.top_k
    if a.serving == 2:
        _record(a, ids, logical, physical)
        weights, physical = spec.with_shared_experts(
            *(weights, physical, _padding(a)),
            *(a.shared_id, a.shared_weight, a.shared_experts, a.sentinel),
        )
        strides = a.weights_stride, a.ids_stride
        if a.packed_out:
            assert a.weights_out == a.ids_out == a.ids_out_i64 == 0
            _put(a.packed_out, 0, spec.packed(weights, physical), a.ids_stride)
            return
    else:
        assert a.serving == 1
    columns = weights.shape[1]
    view(a.weights_out, torch.float32, count, columns, stride=strides[0]).copy_(weights)
    _put(a.ids_out, a.ids_out_i64, physical, strides[1])


def _record(a: Any, ids: torch.Tensor, logical: torch.Tensor, physical: torch.Tensor) -> None:
    """Do what a launch's options say about loads and captured ids."""
    if a.expert_load and (not a.record_load or bool(view(a.record_load, torch.bool, 1))):
        load = view(a.expert_load, torch.int32, a.load_experts)
        load += spec.expert_load(physical, ids, a.load_experts)
    for address, dtype in (
        (a.captured_ids_i16, torch.int16),
        (a.captured_ids_i32, torch.int32),
    ):
        if address:
            view(address, dtype, *logical.shape, stride=a.captured_stride).copy_(logical)


def _put(narrow: int, wide: int, ids: torch.Tensor, stride: int) -> None:
    """Write ids to the address that is not null, if one is not."""
    if address := wide or narrow:
        dtype = torch.int64 if wide else torch.int32
        view(address, dtype, *ids.shape, stride=stride).copy_(ids)


#: Kernel -> executes a launch: the arguments by name, ``raw`` bytes among them, and the entry.
EXECUTE: dict[str, Callable[[Any, Entry], None]] = {
    "hash_router": _run_hash,
    "hash_gate": _run_gate,
    "topk_select": _run_select,
    "topk_indices": _run_indices,
    "activation_topk": _run_activation,
    "dense_router_decode": _run_dense,
    "dense_router_prefill": _run_dense,
}
