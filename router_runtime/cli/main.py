"""The command line: ``router-runtime doctor``, ``verify-release`` and, where torch is installed,
``verify``.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from router_runtime.cli.doctor import doctor
from router_runtime.cli.verify_release import verify_release
from router_runtime.format import system_errors
from router_runtime.format.output import guarded_output
from router_runtime.version import __version__


class _Commands(click.Group):
    """A group of commands that ends in words where the operating system refuses something."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with guarded_output():
            return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise click.ClickException(system_errors.explained(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="router-runtime %(version)s")
def main() -> None:
    """Prebuilt DeepSeek-V4 router kernels: what this machine can serve, and whether it is right."""


main.add_command(doctor)
main.add_command(verify_release)

if importlib.util.find_spec("torch") is not None:
    from router_runtime.cli.verify import verify

    main.add_command(verify)
