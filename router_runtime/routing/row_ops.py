"""``topk_select`` and ``activation_topk``: the ops on rows of fp32, without a Router.

``topk_select`` has two kernels: ``topk_select`` for few of a row of some length, ``topk_indices``
for more of them and longer rows. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.format.scoring import SCORINGS, SQRT_SOFTPLUS, scoring_constants
from router_runtime.routing import topk_indices
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import (
    MAX_EXPERTS,
    MAX_ROW_LENGTH,
    MAX_SELECTED,
    MAX_TOP_K,
    check_int,
    check_logits,
    check_logits_bias,
    check_scale,
    check_scores,
    check_scoring,
    wrong_tensor,
    wrong_value,
)
from router_runtime.routing.expert_map import ExpertMap, check_order
from router_runtime.routing.launches import narrow_ids, served
from router_runtime.routing.options import Sizes
from router_runtime.routing.placement import CPU
from router_runtime.routing.row_kernels import RowKernel, RowKernelUse, one_of, row_kernel

#: The longest row of the kernel ``topk_select``, which selects at most MAX_TOP_K of one.
_SHORT_ROW = 65536

_SELECT = RowKernelUse(
    "topk_select",
    ("scores", "values_out", "ids_out", "rows", "row_length", "row_stride", "top_k"),
    quantities=("row_length", "top_k"),
)
_OF_SELECT = (_SELECT, topk_indices.USE)
#: By scoring function. A process loads the entries of those that it uses.
_ACTIVATION = {
    function: RowKernelUse(
        "activation_topk",
        (
            *("logits", "bias", "weights_out", "ids_out", "tokens"),
            *("experts", "row_stride", "top_k", "scale", "renormalize", "sentinel", "image_bias"),
        ),
        quantities=("experts", "top_k"),
        fixed=scoring_constants(function, 1.0),
        key=f"activation_topk/{function}",
    )
    for function in SCORINGS
}


def check_select(scores: Tensor, k: int) -> None:
    """Raise InputError for scores or k that ``topk_select`` does not serve."""
    check_scores(scores)
    columns = scores.shape[1]
    check_int("columns of scores", columns, 1, MAX_ROW_LENGTH)
    check_int("k", k, 1, min(MAX_SELECTED, columns))


def check_activate(logits: Tensor, bias: Tensor, k: int, scale: float) -> None:
    """Raise InputError for arguments that ``activation_topk`` does not serve."""
    check_logits(logits)
    check_logits_bias("bias", bias, logits)
    experts = logits.shape[1]
    check_int("experts", experts, 1, MAX_EXPERTS)
    check_int("k", k, 1, min(MAX_TOP_K, experts))
    check_scale("scale", scale)


def topk_select_cpu(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk_select`` of CPU tensors, by ``spec.py``."""
    check_select(scores, k)
    return CPU.stored(*spec.topk_select(scores, k))


def topk_select_cuda(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk_select`` of CUDA tensors: one launch."""
    check_select(scores, k)
    count, columns = scores.shape
    device = scores.device
    if k > MAX_TOP_K or columns > _SHORT_ROW:
        kernel = one_of(_OF_SELECT, topk_indices.USE, device)
        return topk_indices.select_cuda(kernel, scores, k)
    kernel = one_of(_OF_SELECT, _SELECT, device)
    placement = kernel.placement
    if placement.several and placement.elsewhere():
        with placement.current():
            return topk_select_cuda(scores, k)
    values, ids = placement.outputs(count, k)
    if count:
        if scores.stride()[1] != 1:
            scores = scores.contiguous()
        kernel.launcher(columns, k).plain(
            placement.stream(),
            scores.data_ptr(),
            values.data_ptr(),
            ids.data_ptr(),
            count,
            columns,
            scores.stride()[0],
            k,
        )
    return values, ids


def activation_topk_cpu(
    logits: Tensor, bias: Tensor, k: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """``activation_topk`` of CPU tensors without serving inputs, by ``spec.py``."""
    return serve_activation_cpu(logits, bias, k, scale, renormalize, call=Call())[:2]


def activation_topk_cuda(
    logits: Tensor, bias: Tensor, k: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """``activation_topk`` of CUDA tensors without serving inputs: one launch."""
    kernel = _activation_kernel(logits, bias, k, scale)
    placement = kernel.placement
    if placement.several and placement.elsewhere():
        with placement.current():
            return activation_topk_cuda(logits, bias, k, scale, renormalize)
    tokens, experts = logits.shape
    weights, ids = placement.outputs(tokens, k)
    if tokens:
        logits, bias = _readable(logits), _fp32(bias)
        kernel.launcher(experts, k).plain(
            placement.stream(),
            logits.data_ptr(),
            bias.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            tokens,
            experts,
            logits.stride()[0],
            k,
            scale,
            int(renormalize),
            -1,
            0,
        )
    return weights, ids


def serve_activation_cpu(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    renormalize: bool,
    call: Call,
    scoring: str = SQRT_SOFTPLUS,
    **rules: Any,
) -> Results:
    """``activation_topk`` of CPU tensors. ``rules`` are the keywords of ``_check_rules``."""
    check_activate(logits, bias, k, scale)
    check_scoring("scoring", scoring)
    image_bias, sentinel, expert_map = _check_rules(logits, call, **rules)
    tokens, experts = logits.shape
    results = call.prepare(CPU, tokens, Sizes(k, experts, sentinel, image_bias is not None))
    result = spec.activation_topk(
        logits.float(),
        bias.float(),
        k,
        scale,
        renormalize,
        image_mask=call.image_mask,
        image_bias=image_bias,
        given_ids=call.given_ids,
        given_mask=call.given_mask,
        padding=call.padding(torch.arange(tokens)),
        scoring=scoring,
    )
    return call.store(results, *result, sentinel, expert_map)


def serve_activation_cuda(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    renormalize: bool,
    call: Call,
    scoring: str = SQRT_SOFTPLUS,
    **rules: Any,
) -> Results:
    """``activation_topk`` of CUDA tensors. ``rules`` are the keywords of ``_check_rules``."""
    kernel = _activation_kernel(logits, bias, k, scale, scoring)
    placement = kernel.placement
    if placement.several and placement.elsewhere():
        with placement.current():
            return serve_activation_cuda(
                logits, bias, k, scale, renormalize, call=call, scoring=scoring, **rules
            )
    image_bias, sentinel, expert_map = _check_rules(logits, call, **rules)
    tokens, experts = logits.shape
    results = call.prepare(placement, tokens, Sizes(k, experts, sentinel, image_bias is not None))
    if tokens:
        logits, bias = _readable(logits), _fp32(bias)
        given = (
            logits.data_ptr(),
            bias.data_ptr(),
            results.weights.data_ptr(),
            narrow_ids(results.ids),
            tokens,
            experts,
            logits.stride()[0],
            k,
            scale,
            int(renormalize),
            sentinel,
            0 if image_bias is None else image_bias.data_ptr(),
        )
        beside = served(call, slice(0, tokens), results, expert_map)
        kernel.launcher(experts, k).serve(placement.stream(), given, beside)
    return results


def replay_activation_cpu(
    logits: Tensor, given_ids: Tensor, scale: float, renormalize: bool, *, call: Call, **rules: Any
) -> Results:
    """``activation_topk_replay`` of CPU tensors; otherwise as ``serve_activation_cpu``."""
    return serve_activation_cpu(*_replayed(logits, given_ids, scale, renormalize, call), **rules)


def replay_activation_cuda(
    logits: Tensor, given_ids: Tensor, scale: float, renormalize: bool, *, call: Call, **rules: Any
) -> Results:
    """``activation_topk_replay`` of CUDA tensors; otherwise as ``serve_activation_cuda``."""
    return serve_activation_cuda(*_replayed(logits, given_ids, scale, renormalize, call), **rules)


def _replayed(
    logits: Tensor, given_ids: Tensor, scale: float, renormalize: bool, call: Call
) -> tuple[Tensor, Tensor, int, float, bool, Call]:
    """The arguments of ``serve_activation`` that weigh given experts."""
    if logits.dim() != 2 or given_ids.dim() != 2:
        raise wrong_tensor("given_ids", "torch.int32 or torch.int64 [tokens, top_k]", given_ids)
    call.given_ids = given_ids
    # Nothing is selected, so it is never read.
    bias = logits.new_empty(logits.shape[1], dtype=torch.float32)
    return logits, bias, given_ids.shape[1], scale, renormalize, call


def _check_rules(
    logits: Tensor,
    call: Call,
    image_bias: Tensor | None = None,
    sentinel: int = -1,
    expert_map: Tensor | None = None,
    replica_counts: Tensor | None = None,
    replica_start: int = 0,
    replica_step: int = 1,
) -> tuple[Tensor | None, int, ExpertMap | None]:
    """The bias for image tokens, the sentinel and the expert map of a call, which a Router would
    own. A call with an expert map is a mapped one. Raises InputError for one that does not fit
    ``logits``, or for none where the call is mapped already.

    The values of an expert map are not checked: that would wait for the device. A count outside
    [1, replicas] counts as the nearest in it. An entry is returned as it is, also a negative one,
    which a Router refuses.
    """
    experts, device = logits.shape[1], logits.device
    check_int("sentinel", sentinel, -(2**31), 2**31 - 1)
    if image_bias is not None:
        check_logits_bias("image_bias", image_bias, logits)
        image_bias = _fp32(image_bias)
    if expert_map is None or replica_counts is None:
        if call.mapped or expert_map is not None or replica_counts is not None:
            raise wrong_value("expert_map", "expert_map and replica_counts", "not both of them")
        return image_bias, sentinel, None
    check_order(replica_start, replica_step)
    for name, tensor, shape in (
        ("expert_map", expert_map, (experts, expert_map.shape[-1])),
        ("replica_counts", replica_counts, (experts,)),
    ):
        if (
            tensor.dtype is not torch.int32
            or tensor.shape != shape
            or not tensor.numel()
            or tensor.device != device
        ):
            raise wrong_tensor(name, f"torch.int32 {list(shape)} on {device}", tensor)
    call.mapped = True
    order = replica_start, replica_step
    mapped = ExpertMap(expert_map.contiguous(), replica_counts.contiguous(), *order)
    return image_bias, sentinel, mapped


def _readable(logits: Tensor) -> Tensor:
    """fp32 logits, whose elements of a row are adjacent."""
    if logits.dtype is not torch.float32:
        return logits.to(torch.float32, memory_format=torch.contiguous_format)
    return logits if logits.stride()[1] == 1 else logits.contiguous()


def _fp32(bias: Tensor) -> Tensor:
    return (bias if bias.dtype is torch.float32 else bias.float()).contiguous()


def _activation_kernel(
    logits: Tensor, bias: Tensor, k: int, scale: float, function: str = SQRT_SOFTPLUS
) -> RowKernel:
    """The kernel for arguments that it serves."""
    check_activate(logits, bias, k, scale)
    use = _ACTIVATION.get(function)
    if use is None:
        raise wrong_value("scoring", f"one of {list(SCORINGS)}", function)
    return row_kernel(use, logits.device)
