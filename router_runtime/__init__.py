"""Prebuilt DeepSeek-V4 MoE router kernels for torch. Nothing is compiled at run time.

Importing this package registers the custom ops ``torch.ops.dsv4.*`` wherever torch is installed. It
touches neither the driver nor the artifacts. Without torch only ``__version__`` and the errors are
here, which is what the builder needs.

What the runtime does is logged under the logger ``router_runtime``: at INFO, once for each Router,
which kernels serve it and by which evidence; at DEBUG what was read, decided and loaded. Nothing is
written unless the program configures logging.
"""

from __future__ import annotations

import importlib.util
import logging

from router_runtime.errors import (
    ArtifactError,
    DriverError,
    InputError,
    ResolutionError,
    RouterRuntimeError,
    TrustError,
)
from router_runtime.trust.policy import require_signature
from router_runtime.version import __version__ as __version__

__all__ = [
    "ArtifactError",
    "DriverError",
    "InputError",
    "ResolutionError",
    "RouterRuntimeError",
    "TrustError",
    "require_signature",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

if importlib.util.find_spec("torch") is not None:
    from router_runtime.ops.functions import (
        activation_topk,
        activation_topk_replay,
        dense_router,
        dense_router_logits,
        dense_router_replay,
        hash_gate,
        hash_router,
        topk_indices,
        topk_select,
    )
    from router_runtime.routing.config import RouterConfig
    from router_runtime.routing.router import (
        Router,
        get_router,
        register_router,
        unregister_router,
        warmup_router_compilation,
    )

    __all__ += [
        "Router",
        "RouterConfig",
        "activation_topk",
        "activation_topk_replay",
        "dense_router",
        "dense_router_logits",
        "dense_router_replay",
        "get_router",
        "hash_gate",
        "hash_router",
        "register_router",
        "topk_indices",
        "topk_select",
        "unregister_router",
        "warmup_router_compilation",
    ]
