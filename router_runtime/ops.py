"""The registry of routers and the custom ops ``torch.ops.dsv4.*``.

Results are ``(weights or values fp32, ids int32)``. Each op has an implementation for CUDA tensors
(the prebuilt kernels), one for CPU tensors (``spec.py``), and a fake one for tracing. A router is
named by an integer because an op's schema can carry nothing else; it is a ``SymInt`` so that a
layer compiled once serves every router (a plain int would compile again for each).

dense_router(hidden_states, router_id, num_experts, top_k)   bf16 [tokens, hidden]
dense_router_logits(...)                                     the same, and the fp32 logits
hash_router(token_ids, router_id, top_k)                     int32 or int64 [tokens]
topk_select(scores, k)                                       fp32 [rows, columns]
activation_topk(logits, bias, k, scale, renormalize)         fp32 [tokens, experts], fp32 [experts]
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from router_runtime import rows
from router_runtime.checks import check_logits, check_scores, refuse_grad, wrong_tensor
from router_runtime.errors import InputError, explain

if TYPE_CHECKING:
    from router_runtime.router import Router

NAMESPACE = "dsv4"

_registry_lock = threading.Lock()
_routers: dict[int, Router] = {}
# From 2 up: torch.compile gives the integers 0 and 1 graphs of their own, all others share one.
_next_id = itertools.count(2)


def register_router(router: Router) -> int:
    """Make ``router`` known to the ops and return its id. Ids are never reused.

    The registry keeps the router alive until ``unregister_router``. Registering it again while it
    is registered returns the same id.
    """
    with _registry_lock:
        if router._router_id is None:
            router._router_id = next(_next_id)
            _routers[router._router_id] = router
        return router._router_id


def get_router(router_id: int) -> Router:
    """The registered router of that id."""
    router = _routers.get(router_id)
    if router is None:
        raise InputError(
            explain(
                "router_id",
                expected=f"the id of a registered router ({len(_routers)} are registered)",
                found=router_id,
                remedy="call register_router(router); ids of unregistered routers are not reused",
            )
        )
    return router


def unregister_router(router_id: int) -> None:
    """Forget the router of that id. Its memory comes back once the caller drops it too.

    A captured CUDA graph that launches this router holds addresses into that memory: keep the
    Router object for as long as the graph is replayed.
    """
    with _registry_lock:
        router = get_router(router_id)
        del _routers[router_id]
        router._router_id = None


def _dense_router(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return _dense(router_id, num_experts, top_k)._backend.route(hidden_states)


def _dense_router_logits(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(router_id, num_experts, top_k).forward_with_logits(hidden_states)


def _dense(router_id: int, num_experts: int, top_k: int) -> Router:
    """The dense router of that id, if it has those numbers."""
    router = _routers.get(router_id) or get_router(router_id)
    config = router.config
    if config.num_experts != num_experts or config.top_k != top_k or config.mode != "dense":
        raise _disagreement(router, {"mode": "dense", "num_experts": num_experts, "top_k": top_k})
    return router


def _hash_router(token_ids: Tensor, router_id: int, top_k: int) -> tuple[Tensor, Tensor]:
    router = _routers.get(router_id) or get_router(router_id)
    config = router.config
    if config.top_k != top_k or config.mode != "hash":
        raise _disagreement(router, {"mode": "hash", "top_k": top_k})
    return router._backend.route(token_ids)


def _disagreement(router: Router, called: dict[str, object]) -> InputError:
    own = {name: getattr(router.config, name) for name in called}
    return InputError(
        explain(
            f"router {router._router_id}",
            expected=f"a call that agrees with its configuration {own}",
            found=called,
            remedy="pass the id of the right router, and its own numbers",
        )
    )


def _dense_router_fake(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    if hidden_states.dtype is not torch.bfloat16 or hidden_states.dim() != 2:
        raise wrong_tensor("hidden_states", "torch.bfloat16 [tokens, hidden_size]", hidden_states)
    refuse_grad("hidden_states", hidden_states)
    return _outputs_like(hidden_states, top_k)


def _dense_router_logits_fake(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _dense_router_fake(hidden_states, router_id, num_experts, top_k)
    logits = hidden_states.new_empty((hidden_states.shape[0], num_experts), dtype=torch.float32)
    return *outputs, logits


def _hash_router_fake(token_ids: Tensor, router_id: int, top_k: int) -> tuple[Tensor, Tensor]:
    if token_ids.dtype not in (torch.int32, torch.int64) or token_ids.dim() != 1:
        raise wrong_tensor("token_ids", "torch.int32 or torch.int64 [tokens]", token_ids)
    return _outputs_like(token_ids, top_k)


def _topk_select_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_scores(scores)
    return _outputs_like(scores, k)


def _activation_topk_fake(
    logits: Tensor, bias: Tensor, k: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    check_logits(logits, bias)
    return _outputs_like(logits, k)


def _outputs_like(tensor: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (tensor.shape[0], k)
    return tensor.new_empty(shape, dtype=torch.float32), tensor.new_empty(shape, dtype=torch.int32)


# FRAGMENT, not DEF: an engine may add ops of its own to the namespace.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

for _schema, _cpu, _cuda, _fake in (
    (
        "dense_router(Tensor hidden_states, SymInt router_id, int num_experts, int top_k)"
        " -> (Tensor, Tensor)",
        _dense_router,
        _dense_router,
        _dense_router_fake,
    ),
    (
        "dense_router_logits(Tensor hidden_states, SymInt router_id, int num_experts, int top_k)"
        " -> (Tensor, Tensor, Tensor)",
        _dense_router_logits,
        _dense_router_logits,
        _dense_router_logits_fake,
    ),
    (
        "hash_router(Tensor token_ids, SymInt router_id, int top_k) -> (Tensor, Tensor)",
        _hash_router,
        _hash_router,
        _hash_router_fake,
    ),
    (
        "topk_select(Tensor scores, int k) -> (Tensor, Tensor)",
        rows.topk_select_cpu,
        rows.topk_select_cuda,
        _topk_select_fake,
    ),
    (
        "activation_topk(Tensor logits, Tensor bias, int k, float scale, bool renormalize)"
        " -> (Tensor, Tensor)",
        rows.activation_topk_cpu,
        rows.activation_topk_cuda,
        _activation_topk_fake,
    ),
):
    _name = _schema.partition("(")[0]
    # Fixed stride order: the kernels take rows with a stride, so a copy into another layout is
    # waste.
    _library.define(  # type: ignore[no-untyped-call]
        _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    )
    _library.impl(_name, _cpu, "CPU")  # type: ignore[no-untyped-call]
    _library.impl(_name, _cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

_Op = Callable[..., tuple[Tensor, Tensor]]

dense_router: _Op = torch.ops.dsv4.dense_router.default
dense_router_logits: Callable[..., tuple[Tensor, Tensor, Tensor]]
dense_router_logits = torch.ops.dsv4.dense_router_logits.default
hash_router: _Op = torch.ops.dsv4.hash_router.default
topk_select: _Op = torch.ops.dsv4.topk_select.default
activation_topk: _Op = torch.ops.dsv4.activation_topk.default
