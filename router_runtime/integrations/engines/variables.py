"""The environment variables of the plug-ins. This module imports neither an engine nor torch, so
that the doctor knows them too.
"""

from __future__ import annotations

import os

#: ``1``: the plug-ins do nothing.
DISABLE_VARIABLE = "DSV4_ROUTER_DISABLE"

#: Names a status that may serve beside those that do by default: ``accept`` of the Routers.
ACCEPT_VARIABLE = "DSV4_ROUTER_ACCEPT"


def is_disabled() -> bool:
    """Whether the plug-ins are turned off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")
