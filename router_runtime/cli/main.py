"""The command line: ``router-runtime doctor``, ``verify-release`` and, where torch is installed,
``verify``.
"""

from __future__ import annotations

import importlib.util

import click

from router_runtime.cli.doctor import doctor
from router_runtime.cli.verify_release import verify_release
from router_runtime.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="router-runtime %(version)s")
def main() -> None:
    """Prebuilt DeepSeek-V4 router kernels: what this machine can serve, and whether it is right."""


main.add_command(doctor)
main.add_command(verify_release)

if importlib.util.find_spec("torch") is not None:
    from router_runtime.cli.verify import verify

    main.add_command(verify)
