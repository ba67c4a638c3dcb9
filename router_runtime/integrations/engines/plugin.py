"""What registering with an engine, and taking that back, has in common for every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from router_runtime.errors import install_extra
from router_runtime.integrations.engines.contract import UnknownEngine
from router_runtime.integrations.engines.layer import EngineLayer
from router_runtime.integrations.engines.variables import DISABLE_VARIABLE, is_disabled

Engine = TypeVar("Engine")


def find_engine(
    name: str, an_engine: str, log: logging.Logger, load: Callable[[], Engine]
) -> Engine | None:
    """Return the engine that ``load`` finds.

    None, and the log says why: the plug-ins are disabled, or ``load`` raised UnknownEngine.

    Args:
        name: The engine's name. In lower case it is the extra that installs it.
        an_engine: The name with its article.
        log: The plug-in's logger.
        load: Returns the engine, or raises UnknownEngine.

    """
    if is_disabled():
        log.info("%s routes by itself: %s is set", name, DISABLE_VARIABLE)
        return None
    try:
        return load()
    except UnknownEngine as reason:
        log.warning(
            "%s routes by itself: %s; for %s that this release knows, %s (a newer release may know "
            "a newer one; %s=1 silences this)",
            *(name, reason, an_engine, install_extra(name.lower()), DISABLE_VARIABLE),
        )
        return None


def say_registered(name: str, version: str, log: logging.Logger) -> None:
    """Say in the log that layers will be served, and what follows."""
    log.info(
        "%s %s: DeepSeek-V4 routers will be served; after the first batch follows which layers are",
        *(name, version),
    )


def restore(layers: Iterable[EngineLayer]) -> list[str]:
    """Give the layers their own routing back. Return the names of those that were served."""
    known = list(layers)
    names = [layer.name for layer in known if layer.is_serving]
    for layer in known:
        layer.restore()
    return names
