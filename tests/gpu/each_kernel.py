"""A dense router served by each kernel that can, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from router_runtime import Router
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.cuda_dense import Plan


def each_kernel(router: Router) -> Iterator[str]:
    """Have each kernel serve ``router`` in turn: first every batch as it is dispatched, then each
    kernel that takes single tokens alone, with larger batches split. Yields a name for each
    arrangement.
    """
    backend: Any = router.backend
    own, token_ranges = backend.plan, backend.token_ranges
    launchers = dict(zip((each.entry.key for each in token_ranges), own.launchers, strict=True))
    try:
        yield "as dispatched"
        for entry in {each.entry.key: each.entry for each in token_ranges}.values():
            low, high = entry.contract.limits["tokens"]
            if low == 1:
                backend.plan = Plan([TokenRange(low, high, entry)], launchers)
                yield entry.key
    finally:
        backend.plan = own
