"""Registers the custom ops ``torch.ops.dsv4.*`` with torch: importing this module does it.

Each op has an implementation for CUDA tensors (the prebuilt kernels), one for CPU tensors
(``spec.py``), and a fake one for tracing. An op of a Router is called with the router's number,
because that is all that a schema can carry; the number is a ``SymInt``, so that a function that is
compiled with it serves every router (a plain int would compile again for each).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from router_runtime.errors import InputError, explain
from router_runtime.ops.exported import exported_router
from router_runtime.ops.schemas import (
    NAMESPACE,
    ROUTING_OPS,
    TOPK_INDICES,
    TOPK_SELECT,
    topk_indices_fakes,
    topk_select_fake,
)
from router_runtime.ops.transforms import KEY, transformed
from router_runtime.routing import row_ops, topk_indices
from router_runtime.routing.backend import DenseBackend
from router_runtime.routing.call import Call, Results
from router_runtime.routing.checks import wrong_value
from router_runtime.routing.router import ROUTERS, Router

KEYS = ("CPU", "CUDA")

#: Returns the router of an id, or of a buffer.
_Find = Callable[[Any], Router]

#: The router that is meant by each kind of argument, by how the names of those forms end.
_FIND: dict[str, _Find] = {
    "": ROUTERS.get,
    "by_buffer": ROUTERS.owner,
    "exported": exported_router,
}

#: Called with the positional arguments of an op, and ``call``.
_Serve = Callable[..., Results]
#: Called with the positional arguments of an op, of calls without serving inputs.
_Plain = Callable[..., tuple[Tensor, ...]]


def _agreeing(router: Router, mode: str, num_experts: int | None, top_k: int) -> Router:
    """``router`` if it has that mode and those sizes; InputError otherwise."""
    config = router.config
    if (
        config.mode != mode
        or config.top_k != top_k
        or (num_experts is not None and config.num_experts != num_experts)
    ):
        called: dict[str, object] = {"mode": mode, "num_experts": num_experts, "top_k": top_k}
        if num_experts is None:
            del called["num_experts"]
        own = {name: getattr(config, name) for name in called}
        which = f"router {router.router_id}" if router.is_registered else "router of that buffer"
        raise InputError(
            explain(
                which,
                expected=f"a call that agrees with its configuration {own}",
                found=called,
                remedy="pass the id of the right router, and its own numbers",
            )
        )
    return router


def _dense_router(find: _Find) -> tuple[_Serve, _Plain | None]:
    def serve(states: Tensor, key: Any, num_experts: int, top_k: int, call: Call) -> Results:
        return _agreeing(find(key), "dense", num_experts, top_k).serve(states, call)

    def plain_dense_router(
        states: Tensor, key: Any, num_experts: int, top_k: int
    ) -> tuple[Tensor, ...]:
        return _agreeing(find(key), "dense", num_experts, top_k).backend.route(states)

    return serve, plain_dense_router


def _dense_router_logits(find: _Find) -> tuple[_Serve, _Plain | None]:
    def plain(states: Tensor, key: Any, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
        router = _agreeing(find(key), "dense", num_experts, top_k)
        backend: DenseBackend = router.backend  # type: ignore[assignment]  # by its mode
        return backend.route_with_logits(states)

    return _dense_router(find)[0], plain


def _dense_router_replay(find: _Find) -> tuple[_Serve, _Plain | None]:
    def serve(
        states: Tensor, given_ids: Tensor, key: Any, num_experts: int, top_k: int, call: Call
    ) -> Results:
        if given_ids is None:  # torch passes it on
            raise wrong_value("given_ids", "a torch.Tensor", None)
        call.given_ids = given_ids
        return _agreeing(find(key), "dense", num_experts, top_k).serve(states, call)

    return serve, None


def _hash_router(find: _Find) -> tuple[_Serve, _Plain | None]:
    def serve(token_ids: Tensor, key: Any, top_k: int, call: Call) -> Results:
        return _agreeing(find(key), "hash", None, top_k).serve(token_ids, call)

    def plain(token_ids: Tensor, key: Any, top_k: int) -> tuple[Tensor, ...]:
        return _agreeing(find(key), "hash", None, top_k).backend.route(token_ids)

    return serve, plain


def _hash_gate(find: _Find) -> tuple[_Serve, _Plain | None]:
    def serve(
        states: Tensor, token_ids: Tensor, key: Any, num_experts: int, top_k: int, call: Call
    ) -> Results:
        call.token_ids = token_ids
        return _agreeing(find(key), "hash_gate", num_experts, top_k).serve(states, call)

    def plain(
        states: Tensor, token_ids: Tensor, key: Any, num_experts: int, top_k: int
    ) -> tuple[Tensor, ...]:
        router = _agreeing(find(key), "hash_gate", num_experts, top_k)
        return router.backend.route(states, token_ids)

    return serve, plain


_OF_ROUTERS: dict[str, Callable[[_Find], tuple[_Serve, _Plain | None]]] = {
    "dense_router": _dense_router,
    "dense_router_logits": _dense_router_logits,
    "dense_router_replay": _dense_router_replay,
    "hash_router": _hash_router,
    "hash_gate": _hash_gate,
}

_OF_ROWS: dict[str, dict[str, tuple[_Serve, _Plain | None]]] = {
    "activation_topk": {
        "CPU": (row_ops.serve_activation_cpu, row_ops.activation_topk_cpu),
        "CUDA": (row_ops.serve_activation_cuda, row_ops.activation_topk_cuda),
    },
    "activation_topk_replay": {
        "CPU": (row_ops.replay_activation_cpu, None),
        "CUDA": (row_ops.replay_activation_cuda, None),
    },
}

#: The implementations of each form of ``topk_indices``, by its overload.
_OF_INDICES: dict[str, dict[str, Callable[..., Any]]] = {
    "": {"CPU": topk_indices.indices_cpu, "CUDA": topk_indices.indices_cuda},
    "with_ids": {
        "CPU": topk_indices.indices_with_ids_cpu,
        "CUDA": topk_indices.indices_with_ids_cuda,
    },
    "out": {"CPU": topk_indices.indices_out_cpu, "CUDA": topk_indices.indices_out_cuda},
}


def _refuse_none(names: Iterable[str], arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Raise InputError for None in the place of a tensor, which torch passes on to an op."""
    for name, value in {**dict(zip(names, arguments, strict=True)), **inputs}.items():
        if value is None:
            raise wrong_value(name, "a torch.Tensor", None)


def _forms(
    serve: _Serve, plain: _Plain | None, logits: bool, names: Sequence[str]
) -> dict[str, Callable[..., Any]]:
    """The implementation of each form of an op. ``names`` are those of its positional arguments."""

    # The dispatcher leaves out what has its default.
    def default(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
        try:
            if not inputs and plain is not None:
                return plain(*arguments)
            return serve(*arguments, call=Call.taking(inputs, logits=logits), **inputs).given()
        except AttributeError:
            _refuse_none(names, arguments, inputs)
            raise

    def mapped(*arguments: Any, **inputs: Any) -> tuple[Tensor, ...]:
        _refuse_none(names, arguments, inputs)
        call = Call.taking(inputs, logits=logits, mapped=True)
        return serve(*arguments, call=call, **inputs).given()

    def packed(*arguments: Any, mapped: bool = False, **inputs: Any) -> Tensor:
        _refuse_none(names, arguments, inputs)
        call = Call.taking(inputs, mapped=mapped, packed=True)
        (words,) = serve(*arguments, call=call, **inputs).given()
        return words

    def out(
        *arguments: Any,
        weights_out: Tensor,
        ids_out: Tensor,
        logits_out: Tensor | None = None,
        logical_ids_out: Tensor | None = None,
        mapped: bool = False,
        **inputs: Any,
    ) -> None:
        _refuse_none(names, arguments, {"weights_out": weights_out, "ids_out": ids_out, **inputs})
        outputs = Results(weights_out, ids_out, logits_out, logical_ids_out)
        call = Call.taking(inputs, mapped=mapped, outputs=outputs)
        serve(*arguments, call=call, **inputs)

    return {"": default, "mapped": mapped, "packed": packed, "out": out}


# FRAGMENT, not DEF: an engine may add ops of its own to the namespace.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


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
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.dsv4, packet), overload or "default")
    _library.impl(name, transformed(op), KEY)  # type: ignore[no-untyped-call]


def _register_all() -> None:
    for op in ROUTING_OPS:
        fakes = op.fakes()
        for (form, end), schema in op.forms().items():
            by_key = {}
            for key in KEYS:
                made = (
                    _OF_ROUTERS[op.name](_FIND[end]) if op.takes_router else _OF_ROWS[op.name][key]
                )
                names = list(inspect.signature(op.shape).parameters)
                by_key[key] = _forms(*made, op.logits, names)[form]
            fake = fakes[form]
            if end == "exported":
                by_key = {key: op.one_router(each) for key, each in by_key.items()}
                fake = op.one_router(fake)
            _register(op.overload(form, end), schema, by_key, fake)
    _register(
        "topk_select",
        TOPK_SELECT,
        {"CPU": row_ops.topk_select_cpu, "CUDA": row_ops.topk_select_cuda},
        topk_select_fake,
    )
    fakes = topk_indices_fakes()
    for overload, schema in TOPK_INDICES.items():
        name = ".".join(filter(None, ("topk_indices", overload)))
        _register(name, schema, _OF_INDICES[overload], fakes[overload])


_register_all()
