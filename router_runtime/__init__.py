"""Prebuilt DeepSeek-V4 MoE router kernels for torch. Nothing is compiled at run time.

Names are imported on first use: ``import router_runtime`` itself needs neither torch nor a driver,
so that the builder can read ``router_runtime.manifest`` in an environment that has neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

#: The version of the runtime, and of the release whose artifacts it may load.
__version__ = "0.1.0"

if TYPE_CHECKING:
    from router_runtime.errors import (
        ArtifactError,
        DriverError,
        InputError,
        ResolutionError,
        RouterRuntimeError,
        TrustError,
    )
    from router_runtime.ops import (
        activation_topk,
        dense_router,
        dense_router_logits,
        get_router,
        hash_router,
        register_router,
        topk_select,
        unregister_router,
    )
    from router_runtime.router import Router, RouterConfig, warmup_router_compilation
    from router_runtime.trust import require_signature

_HOME = {
    "ArtifactError": "errors",
    "DriverError": "errors",
    "InputError": "errors",
    "ResolutionError": "errors",
    "Router": "router",
    "RouterConfig": "router",
    "RouterRuntimeError": "errors",
    "TrustError": "errors",
    "activation_topk": "ops",
    "dense_router": "ops",
    "dense_router_logits": "ops",
    "get_router": "ops",
    "hash_router": "ops",
    "register_router": "ops",
    "require_signature": "trust",
    "topk_select": "ops",
    "unregister_router": "ops",
    "warmup_router_compilation": "router",
}

__all__ = [
    "ArtifactError",
    "DriverError",
    "InputError",
    "ResolutionError",
    "Router",
    "RouterConfig",
    "RouterRuntimeError",
    "TrustError",
    "activation_topk",
    "dense_router",
    "dense_router_logits",
    "get_router",
    "hash_router",
    "register_router",
    "require_signature",
    "topk_select",
    "unregister_router",
    "warmup_router_compilation",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
