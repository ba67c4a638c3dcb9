"""What the log says of the layers: each reason against one once, and which are served."""

from __future__ import annotations

import logging

#: Other loggers below ``router_runtime`` have a line for each Router: too many for an engine.
LOG = logging.getLogger("router_runtime.integrations.vllm")


def share_handlers() -> None:
    """Have our log go where vLLM's goes, unless the application has given it a place.

    vLLM configures its own logger only: without this, nothing below a warning would be seen.
    """
    if _has_a_place():
        return
    engine = logging.getLogger("vllm")
    for handler in engine.handlers:
        LOG.addHandler(handler)
    if LOG.level == logging.NOTSET:
        LOG.setLevel(engine.level)


def _has_a_place() -> bool:
    """Whether a handler gets what is logged; the one of a library that writes nothing is none."""
    logger: logging.Logger | None = LOG
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


class Report:
    """What was decided of the layers of this process, and what the log has said of it."""

    def __init__(self) -> None:
        """Of no layer yet."""
        self._waiting: set[str] = set()
        self._served: dict[str, list[str]] = {}
        self._left: list[str] = []
        self._said: set[str] = set()

    def wait(self, name: str) -> None:
        """A layer that can be served, as far as is known before its first batch."""
        self._waiting.add(name)

    def leave(self, name: str, reason: str, level: int) -> None:
        """A layer that vLLM routes by itself. The reason is logged unless it was before."""
        if reason not in self._said:
            self._said.add(reason)
            LOG.log(level, "vLLM routes %s, and layers like it, by itself: %s", name, reason)
        if name in self._waiting:
            self._left.append(name)
            self._decided(name)

    def serve(self, name: str, kind: str) -> None:
        """A layer that is served from now on."""
        self._served.setdefault(kind, []).append(name)
        self._decided(name)

    def _decided(self, name: str) -> None:
        self._waiting.discard(name)
        if self._waiting:
            return
        parts = [f"{kind}: {_names(names)}" for kind, names in self._served.items()]
        left = f"; left to vLLM: {_names(self._left)}" if self._left else ""
        if parts:
            LOG.info("MoE layers routed by router_runtime: %s%s", ", ".join(parts), left)
        # A draft model is built later, and has a line of its own.
        self._served, self._left = {}, []


def _names(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{len(names)} ({names[0]} to {names[-1]})"
