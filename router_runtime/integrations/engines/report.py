"""What the log says of the layers: each reason against one once, and which are served."""

from __future__ import annotations

import logging


class Report:
    """What was decided of the layers of this process, and what the log has said of it."""

    def __init__(self, engine: str, log: logging.Logger) -> None:
        """Of no layer yet. ``engine`` is the name that the sentences have for it."""
        self.log = log
        self._engine = engine
        self._waiting: set[str] = set()
        self._served: dict[str, list[str]] = {}
        self._left: list[str] = []
        self._said: set[str] = set()

    def wait(self, name: str) -> None:
        """A layer that can be served, as far as is known before its first batch."""
        self._waiting.add(name)

    def leave(self, name: str, reason: str, level: int) -> None:
        """A layer that the engine routes by itself. The reason is logged unless it was before."""
        if reason not in self._said:
            self._said.add(reason)
            self.log.log(
                level,
                "%s routes %s, and layers like it, by itself: %s",
                *(self._engine, name, reason),
            )
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
        left = f"; left to {self._engine}: {_names(self._left)}" if self._left else ""
        if parts:
            self.log.info("MoE layers routed by router_runtime: %s%s", ", ".join(parts), left)
        # A draft model is built later, and has a line of its own.
        self._served, self._left = {}, []


def share_handlers(log: logging.Logger, engine: logging.Logger) -> None:
    """Have ``log`` go where the log of ``engine`` goes, unless the application has given it a
    place: an engine that configures its own logger only would show nothing below a warning.
    """
    if _has_a_place(log):
        return
    for handler in engine.handlers:
        log.addHandler(handler)
    if log.level == logging.NOTSET:
        log.setLevel(engine.level)


def _has_a_place(log: logging.Logger) -> bool:
    """Whether a handler gets what is logged; the one of a library that writes nothing is none."""
    logger: logging.Logger | None = log
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _names(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{len(names)} ({names[0]} to {names[-1]})"
