"""Routers of exported programs: built from the tensors that the program itself has.

A program that ``torch.export`` has recorded calls the form ``exported`` of an op, with all tensors
of the gate and its configuration as text. Where the Router that was exported is alive, it serves.
In another process, the first call of the program builds a Router from its tensors, which serves for
as long as they live and follows writes to them.
"""

from __future__ import annotations

import json
import threading
import weakref
from typing import Any

from torch import Tensor

from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import EXPORTED, ROUTERS, Router
from router_runtime.routing.weights import NAMES

#: The tensors of a gate, in the order of ``EXPORTED``, and what ``Router.exported`` says beside.
Gate = tuple[list[Tensor | None], str]

_lock = threading.RLock()


def exported_router(gate: Gate) -> Router:
    """The router of an exported program's gate. Raises what the constructor of Router raises."""
    tensors, text = gate
    given = {
        name: tensor for name, tensor in zip(EXPORTED, tensors, strict=True) if tensor is not None
    }
    key = given.get("weight", given.get("table"))
    assert key is not None  # every mode has one of them
    with _lock:
        return ROUTERS.find(key) or _built(json.loads(text), given, key)


def _built(described: dict[str, Any], given: dict[str, Tensor], key: Tensor) -> Router:
    """A new router, which is findable by ``key`` for as long as that lives."""
    values: dict[str, Any] = {name: given[name] for name in NAMES if name in given}
    router = Router(RouterConfig(**described["config"]), **values, device=key.device)
    router.weights.watch(values, of_module=True)
    if "expert_map" in given:
        router.set_expert_map(
            given["expert_map"], given["replica_counts"], **described["replica_order"]
        )
    ROUTERS.adopt(router, key)
    weakref.finalize(key, _let_go, router).atexit = False
    return router


def _let_go(router: Router) -> None:
    """Nothing: that ``finalize`` holds ``router`` until then is what keeps it alive."""
