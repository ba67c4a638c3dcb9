"""The command ``router-runtime verify-release``: who made a release, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.release import description, verify


@click.command("verify-release")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="The releaser's ed25519 public key, PEM. Without it no signature is checked.",
)
def verify_release(files: tuple[Path, ...], key: Path | None) -> None:
    """Check a release before it is installed: signature, digests, contents.

    FILES are its folder, its wheel with what lies beside it, or some of its files. Nothing of them
    is run. To build the release again from its commit and compare every byte, use the builder in a
    checkout: build-kernels verify-release FILES --rebuild
    """
    try:
        found = verify(files, key)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    for line in description(found):
        click.echo(line)
