"""``python -m router_runtime`` is ``router-runtime``."""

from router_runtime.cli.main import main

main(prog_name="router-runtime")
