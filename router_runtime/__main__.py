"""``python -m router_runtime`` is ``router-runtime``."""

from router_runtime.cli import main

main(prog_name="router-runtime")
