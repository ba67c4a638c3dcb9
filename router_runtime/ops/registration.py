"""The registry of routers and the custom ops ``torch.ops.dsv4.*``.

Results are ``(weights or values fp32, ids int32)``. Each op has an implementation for CUDA tensors
(the prebuilt kernels), one for CPU tensors (``spec.py``), and a fake one for tracing. A router is
named by an integer because an op's schema can carry nothing else; it is a ``SymInt`` so that a
layer compiled once serves every router (a plain int would compile again for each).

dense_router(hidden_states, router_id, num_experts, top_k)   bf16 [tokens, hidden]
dense_router_logits(...)                                     the same, and the fp32 logits
dense_router_replay(hidden_states, given_ids, router_id, num_experts, top_k)
hash_router(token_ids, router_id, top_k)                     int32 or int64 [tokens]
hash_gate(hidden_states, token_ids, router_id, num_experts, top_k)      both of these
activation_topk(logits, bias, k, scale, renormalize)         fp32 [tokens, experts], fp32 [experts]
activation_topk_replay(logits, given_ids, scale, renormalize)
topk_select(scores, k)                                       fp32 [rows, columns]

All but the last take serving inputs (``serving.py``) as keywords, and have two more forms:
``name.mapped`` applies the router's expert map, returns physical ids and, after the other results,
the logical ones; ``name.out`` returns nothing and writes ``weights_out``, ``ids_out``
(``logits_out``), and with ``logical_ids_out`` maps too. activation_topk is given what a router
would own: ``image_bias``, ``sentinel``, ``expert_map`` and ``replica_counts``. What stands in a map
that it is given is returned as it stands there, whatever it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from router_runtime.errors import InputError, explain
from router_runtime.routing import row_ops as rows
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import check_logits, check_scores, refuse_grad, wrong_tensor

if TYPE_CHECKING:
    from router_runtime.routing.router import Router

NAMESPACE = "dsv4"
_KEYS = ("CPU", "CUDA")

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


def unregister_router(router_id: int, *, force: bool = False) -> None:
    """Forget the router of that id. Its memory comes back once the caller drops it too.

    A captured CUDA graph that launches a router holds addresses into that memory, so a router that
    was captured stays registered (it is registered then, if it was not) and is refused here.
    ``force`` forgets it all the same: for when no such graph will be replayed again.
    """
    with _registry_lock:
        router = get_router(router_id)
        if router._captured and not force:
            raise InputError(
                explain(
                    f"unregister_router({router_id})",
                    expected="a router that no CUDA graph has captured",
                    found="one that was captured: a replay would read its memory",
                    remedy="drop the graphs, then call unregister_router(router_id, force=True)",
                )
            )
        del _routers[router_id]
        router._router_id = None
        router._watch_captures()


# Each op in the shape ``(its positional arguments, a call) -> results``: what all forms share.


def _dense_router(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int, call: Call
) -> Results:
    return _dense(router_id, num_experts, top_k)._serve(hidden_states, call)


def _dense_router_replay(
    hidden_states: Tensor,
    given_ids: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    call: Call,
) -> Results:
    call.given_ids = given_ids
    return _dense(router_id, num_experts, top_k)._serve(hidden_states, call)


def _hash_router(token_ids: Tensor, router_id: int, top_k: int, call: Call) -> Results:
    return _hash(router_id, top_k)._serve(token_ids, call)


def _hash_gate(
    hidden_states: Tensor,
    token_ids: Tensor,
    router_id: int,
    num_experts: int,
    top_k: int,
    call: Call,
) -> Results:
    call.token_ids = token_ids
    return _gate(router_id, num_experts, top_k)._serve(hidden_states, call)


# The plain forms: what a call without serving inputs takes, at the least cost.


def _plain_dense_router(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return _dense(router_id, num_experts, top_k)._backend.route(hidden_states)


def _plain_dense_router_logits(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(router_id, num_experts, top_k).forward_with_logits(hidden_states)


def _plain_hash_router(token_ids: Tensor, router_id: int, top_k: int) -> tuple[Tensor, Tensor]:
    return _hash(router_id, top_k)._backend.route(token_ids)


def _plain_hash_gate(
    hidden_states: Tensor, token_ids: Tensor, router_id: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return _gate(router_id, num_experts, top_k)._backend.route(hidden_states, token_ids)


def _dense(router_id: int, num_experts: int, top_k: int) -> Router:
    """The dense router of that id, if it has those numbers."""
    return _scoring("dense", router_id, num_experts, top_k)


def _gate(router_id: int, num_experts: int, top_k: int) -> Router:
    """The hash_gate router of that id, if it has those numbers."""
    return _scoring("hash_gate", router_id, num_experts, top_k)


def _scoring(mode: str, router_id: int, num_experts: int, top_k: int) -> Router:
    router = _routers.get(router_id) or get_router(router_id)
    config = router.config
    if config.num_experts != num_experts or config.top_k != top_k or config.mode != mode:
        raise _disagreement(router, {"mode": mode, "num_experts": num_experts, "top_k": top_k})
    return router


def _hash(router_id: int, top_k: int) -> Router:
    """The hash router of that id, if it has that number."""
    router = _routers.get(router_id) or get_router(router_id)
    config = router.config
    if config.top_k != top_k or config.mode != "hash":
        raise _disagreement(router, {"mode": "hash", "top_k": top_k})
    return router


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


# What each op returns, by shape: its inputs checked, the number of tokens, experts and k.


class _Shape(NamedTuple):
    rows: Tensor
    experts: int
    top_k: int


def _dense_router_shape(
    hidden_states: Tensor, router_id: int, num_experts: int, top_k: int
) -> _Shape:
    if hidden_states.dtype is not torch.bfloat16 or hidden_states.dim() != 2:
        raise wrong_tensor("hidden_states", "torch.bfloat16 [tokens, hidden_size]", hidden_states)
    refuse_grad("hidden_states", hidden_states)
    return _Shape(hidden_states, num_experts, top_k)


def _dense_router_replay_shape(
    hidden_states: Tensor, given_ids: Tensor, router_id: int, num_experts: int, top_k: int
) -> _Shape:
    return _dense_router_shape(hidden_states, router_id, num_experts, top_k)


def _hash_router_shape(token_ids: Tensor, router_id: int, top_k: int) -> _Shape:
    if token_ids.dtype not in (torch.int32, torch.int64) or token_ids.dim() != 1:
        raise wrong_tensor("token_ids", "torch.int32 or torch.int64 [tokens]", token_ids)
    return _Shape(token_ids, 0, top_k)


def _hash_gate_shape(
    hidden_states: Tensor, token_ids: Tensor, router_id: int, num_experts: int, top_k: int
) -> _Shape:
    _hash_router_shape(token_ids, router_id, top_k)
    return _dense_router_shape(hidden_states, router_id, num_experts, top_k)


def _activation_topk_shape(
    logits: Tensor, bias: Tensor, k: int, scale: float, renormalize: bool
) -> _Shape:
    check_logits(logits, bias)
    return _Shape(logits, logits.shape[1], k)


def _activation_topk_replay_shape(
    logits: Tensor, given_ids: Tensor, scale: float, renormalize: bool
) -> _Shape:
    if logits.dtype is not torch.float32 or logits.dim() != 2:
        raise wrong_tensor("logits", "torch.float32 [tokens, experts]", logits)
    return _Shape(logits, logits.shape[1], given_ids.shape[1])


def _topk_select_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_scores(scores)
    return _outputs_like(scores, k, torch.int32)


def _outputs_like(tensor: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (tensor.shape[0], k)
    return tensor.new_empty(shape, dtype=torch.float32), tensor.new_empty(shape, dtype=dtype)


# FRAGMENT, not DEF: an engine may add ops of its own to the namespace.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


class _RoutingOp(NamedTuple):
    """A routing op in its three forms: ``name``, ``name.mapped`` and ``name.out``.

    ``serve`` has an implementation for each of the keys CPU and CUDA, ``plain`` a faster one for
    calls without serving inputs. ``inputs`` are those beyond what every op has; with ``owns_map``
    no router has the expert map, and the call brings it.
    """

    name: str
    positional: str
    serve: Mapping[str, Callable[..., Results]]
    shape: Callable[..., _Shape]
    plain: Mapping[str, Callable[..., Any]] = {}
    inputs: str = ""
    logits: bool = False
    owns_map: bool = False

    def schemas(self) -> dict[str, str]:
        serving = "Tensor? is_padding=None, Tensor? num_valid_tokens=None" + self.inputs
        results = "Tensor, Tensor" + ", Tensor" * self.logits
        brought = ", Tensor expert_map, Tensor replica_counts" * self.owns_map
        if_any = ", Tensor? expert_map=None, Tensor? replica_counts=None" * self.owns_map
        outputs = "Tensor(a!) weights_out, Tensor(b!) ids_out" + (
            ", Tensor(c!) logits_out" * self.logits + ", Tensor(d!)? logical_ids_out=None"
        )
        dtype = "ScalarType? ids_dtype=None"
        return {
            "": f"({self.positional}, *, {dtype}, {serving}) -> ({results})",
            "mapped": f"({self.positional}, *, {dtype}, {serving}{brought}) -> ({results}, Tensor)",
            "out": f"({self.positional}, *, {serving}{if_any}, {outputs}) -> ()",
        }

    def implementations(self, key: str) -> dict[str, Callable[..., Any]]:
        """Of every form, on devices of that dispatch key."""
        plain, serve, logits = self.plain.get(key), self.serve[key], self.logits

        # The dispatcher leaves out what has its default.
        def default(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
            if not inputs and plain is not None:
                return plain(*arguments)  # type: ignore[no-any-return]
            return serve(*arguments, call=Call.taking(inputs, logits=logits), **inputs).given()

        def mapped(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
            call = Call.taking(inputs, logits=logits, mapped=True)
            return serve(*arguments, call=call, **inputs).given()

        def out(
            *arguments: Any,
            weights_out: Tensor,
            ids_out: Tensor,
            logits_out: Tensor | None = None,
            logical_ids_out: Tensor | None = None,
            **inputs: Any,
        ) -> None:
            outputs = Results(weights_out, ids_out, logits_out, logical_ids_out)
            serve(*arguments, call=Call.taking(inputs, outputs=outputs), **inputs)

        return {"": default, "mapped": mapped, "out": out}

    def fakes(self) -> dict[str, Callable[..., Any]]:
        """The fake implementation of every form."""
        shape, logits = self.shape, self.logits

        def default(*arguments: Any, ids_dtype: Any = None, **_: Any) -> tuple[Tensor, ...]:
            rows, experts, top_k = shape(*arguments)
            results = _outputs_like(rows, top_k, ids_dtype or torch.int32)
            if not logits:
                return results
            return *results, rows.new_empty((rows.shape[0], experts), dtype=torch.float32)

        def mapped(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
            results = default(*arguments, **inputs)
            return *results, torch.empty_like(results[1])

        def out(*arguments: Any, **_: Any) -> None:
            shape(*arguments)

        return {"": default, "mapped": mapped, "out": out}


_DENSE_NUMBERS = "SymInt router_id, int num_experts, int top_k"
_IMAGES = ", Tensor? image_mask=None"

ROUTING_OPS = (
    _RoutingOp(
        "dense_router",
        f"Tensor hidden_states, {_DENSE_NUMBERS}",
        dict.fromkeys(_KEYS, _dense_router),
        _dense_router_shape,
        dict.fromkeys(_KEYS, _plain_dense_router),
        inputs=_IMAGES,
    ),
    _RoutingOp(
        "dense_router_logits",
        f"Tensor hidden_states, {_DENSE_NUMBERS}",
        dict.fromkeys(_KEYS, _dense_router),
        _dense_router_shape,
        dict.fromkeys(_KEYS, _plain_dense_router_logits),
        inputs=_IMAGES,
        logits=True,
    ),
    _RoutingOp(
        "dense_router_replay",
        f"Tensor hidden_states, Tensor given_ids, {_DENSE_NUMBERS}",
        dict.fromkeys(_KEYS, _dense_router_replay),
        _dense_router_replay_shape,
    ),
    _RoutingOp(
        "hash_router",
        "Tensor token_ids, SymInt router_id, int top_k",
        dict.fromkeys(_KEYS, _hash_router),
        _hash_router_shape,
        dict.fromkeys(_KEYS, _plain_hash_router),
    ),
    _RoutingOp(
        "hash_gate",
        f"Tensor hidden_states, Tensor token_ids, {_DENSE_NUMBERS}",
        dict.fromkeys(_KEYS, _hash_gate),
        _hash_gate_shape,
        dict.fromkeys(_KEYS, _plain_hash_gate),
        inputs=_IMAGES,
    ),
    _RoutingOp(
        "activation_topk",
        "Tensor logits, Tensor bias, int k, float scale, bool renormalize",
        {"CPU": rows.serve_activation_cpu, "CUDA": rows.serve_activation_cuda},
        _activation_topk_shape,
        {"CPU": rows.activation_topk_cpu, "CUDA": rows.activation_topk_cuda},
        inputs=f"{_IMAGES}, Tensor? image_bias=None, int sentinel=-1",
        owns_map=True,
    ),
    _RoutingOp(
        "activation_topk_replay",
        "Tensor logits, Tensor given_ids, float scale, bool renormalize",
        {"CPU": rows.replay_activation_cpu, "CUDA": rows.replay_activation_cuda},
        _activation_topk_replay_shape,
        inputs=", int sentinel=-1",
        owns_map=True,
    ),
)


def _register(
    name: str, schema: str, implementations: Mapping[str, Callable[..., Any]], fake: Any
) -> None:
    # Fixed stride order: the kernels take rows with a stride, so a copy into another layout is
    # waste.
    _library.define(  # type: ignore[no-untyped-call]
        name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    )
    for key, implementation in implementations.items():
        _library.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


for _op in ROUTING_OPS:
    _by_key = {key: _op.implementations(key) for key in _KEYS}
    _fakes = _op.fakes()
    for _form, _schema in _op.schemas().items():
        _register(
            f"{_op.name}.{_form}" if _form else _op.name,
            _schema,
            {key: forms[_form] for key, forms in _by_key.items()},
            _fakes[_form],
        )
_register(
    "topk_select",
    "(Tensor scores, int k) -> (Tensor, Tensor)",
    {"CPU": rows.topk_select_cpu, "CUDA": rows.topk_select_cuda},
    _topk_select_fake,
)

_Op = Callable[..., tuple[Tensor, Tensor]]

dense_router: _Op = torch.ops.dsv4.dense_router.default
dense_router_logits: Callable[..., tuple[Tensor, Tensor, Tensor]]
dense_router_logits = torch.ops.dsv4.dense_router_logits.default
dense_router_replay: _Op = torch.ops.dsv4.dense_router_replay.default
hash_router: _Op = torch.ops.dsv4.hash_router.default
hash_gate: _Op = torch.ops.dsv4.hash_gate.default
topk_select: _Op = torch.ops.dsv4.topk_select.default
activation_topk: _Op = torch.ops.dsv4.activation_topk.default
activation_topk_replay: _Op = torch.ops.dsv4.activation_topk_replay.default
