"""The environment variables of the vLLM plug-in. This module imports neither vLLM nor torch, so
that the doctor knows them too.
"""

#: ``1``: the plug-in does nothing.
DISABLE_VARIABLE = "DSV4_ROUTER_DISABLE"

#: Names a status that may serve beside those that do by default: ``accept`` of the Routers.
ACCEPT_VARIABLE = "DSV4_ROUTER_ACCEPT"
