"""Where the runtime remembers what it has loaded, for tests that begin with nothing loaded."""

from __future__ import annotations

from router_runtime.device import kernels, loader
from router_runtime.routing import row_kernels

#: Module -> the names of its caches.
CACHES = {
    loader: ("_loaded",),
    kernels: ("_cache",),
    row_kernels: ("_loaded", "_prepared"),
}


def clear() -> None:
    """Empty all of them."""
    for module, names in CACHES.items():
        for name in names:
            getattr(module, name).clear()
