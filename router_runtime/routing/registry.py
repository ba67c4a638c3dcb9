"""Finding a Router from inside a custom op, whose arguments can only be numbers and tensors.

There are two ways. An op is called with the id that ``register_router`` returned, or with a buffer
of the Router: its weight, or the table of mode ``hash``. The second is what ``torch.compile`` and
``torch.export`` record: a number that is read from a module becomes a constant of the compiled
graph, so every router would need a graph of its own, while a tensor becomes an input of the graph,
which all routers of one shape then share.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from router_runtime.errors import InputError, explain


class Registrable(Protocol):
    """What the registry needs of a router, which it also uses as a key of dictionaries."""

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Call ``captured`` once, when the next CUDA graph captures a launch of this router."""


R = TypeVar("R", bound=Registrable)


class Registry(Generic[R]):
    """Routers by id and by the address of a buffer, and which of them a CUDA graph has captured.

    A registered router is kept alive. Of one that is only known by its buffer the registry holds a
    weak reference. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        # Reentrant: a garbage collection inside a locked block may end a router.
        self._lock = threading.RLock()
        # From 2 up: torch.compile gives the integers 0 and 1 graphs of their own.
        self._next_id = itertools.count(2)
        self._by_id: dict[int, R] = {}
        self._ids: dict[R, int] = {}
        self._captured: set[R] = set()
        self._by_address: dict[int, weakref.ref[R]] = {}

    def __len__(self) -> int:
        """The number of buffers by which routers can be found."""
        return len(self._by_address)

    def adopt(self, router: R, buffer: Tensor) -> None:
        """Make a router that was just built findable by ``buffer``, and watch for its capture.

        The buffer must keep its address for as long as the router lives.
        """
        address = buffer.data_ptr()

        def forget(reference: weakref.ref[R]) -> None:
            with self._lock:
                if self._by_address.get(address) is reference:
                    del self._by_address[address]

        with self._lock:
            self._by_address[address] = weakref.ref(router, forget)
        self._watch(router)

    def _watch(self, router: R) -> None:
        reference = weakref.ref(router)  # a cycle would keep the memory until the next collection

        def captured() -> None:
            router = reference()
            if router is not None:
                self.mark_captured(router)

        router.watch_captures(captured)

    def mark_captured(self, router: R) -> None:
        """Register ``router``, and let only ``force`` unregister it: a CUDA graph launches it."""
        with self._lock:
            self.register(router)
            self._captured.add(router)

    def register(self, router: R) -> int:
        """The id of ``router``: a new one, or the one that it has."""
        with self._lock:
            router_id = self._ids.get(router)
            if router_id is None:
                router_id = self._ids[router] = next(self._next_id)
                self._by_id[router_id] = router
            return router_id

    def get(self, router_id: int) -> R:
        """The router of that id. Raises InputError if there is none."""
        try:
            return self._by_id[router_id]
        except KeyError:
            raise InputError(
                explain(
                    "router_id",
                    expected=f"the id of a registered router ({len(self._by_id)} are registered)",
                    found=router_id,
                    remedy="call register_router(router); "
                    "ids of unregistered routers are not reused",
                )
            ) from None

    def find(self, buffer: Tensor) -> R | None:
        """The router that ``buffer`` belongs to, or None."""
        reference = self._by_address.get(buffer.data_ptr())
        return None if reference is None else reference()

    def owner(self, buffer: Tensor) -> R:
        """The router that ``buffer`` belongs to. Raises InputError if there is none."""
        router = self.find(buffer)
        if router is None:
            raise InputError(
                explain(
                    "weight or table that this op was called with",
                    expected="a buffer of a Router that is alive in this process "
                    f"({len(self._by_address)} are)",
                    found=f"another tensor, {buffer.dtype} {list(buffer.shape)} on "
                    f"{buffer.device}: a copy, or that of a Router that is gone",
                    remedy="a compiled function runs only beside the Routers that it was made "
                    "with: build the model in this process with Router(config, ...), call "
                    "load_state_dict with the saved tensors, compile it here, and keep the model; "
                    "or export it, which saves the tensors too",
                )
            )
        return router

    def id_of(self, router: R) -> int | None:
        """The id of ``router``, or None if it is not registered."""
        return self._ids.get(router)

    def ids(self) -> frozenset[int]:
        """The ids of all registered routers."""
        with self._lock:
            return frozenset(self._by_id)

    def is_captured(self, router: R) -> bool:
        """Whether a CUDA graph has captured a launch of ``router`` since it was registered."""
        return router in self._captured

    def unregister(self, router_id: int, *, force: bool = False) -> None:
        """Forget the router of that id; see ``unregister_router``."""
        with self._lock:
            router = self.get(router_id)
            if router in self._captured and not force:
                raise InputError(
                    explain(
                        f"unregister_router({router_id})",
                        expected="a router that no CUDA graph has captured",
                        found="one that was captured: a replay would read its memory",
                        remedy="drop the graphs, then call "
                        "unregister_router(router_id, force=True)",
                    )
                )
            del self._by_id[router_id], self._ids[router]
            self._captured.discard(router)
            self._watch(router)
