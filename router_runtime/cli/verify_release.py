"""The command ``router-runtime verify-release``: who made a release, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.errors import RouterRuntimeError, explain
from router_runtime.evidence.release import description, verify
from router_runtime.format.advice import archive


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
    zipped = archive()
    if zipped is not None:
        raise click.ClickException(
            explain(
                "verify-release",
                expected="to run from a folder, where the files of the suite can be read",
                found=f"the zip file {zipped}",
                remedy=f"run: pip install {zipped}, and take the file off the path (PYTHONPATH)",
            )
        )
    try:
        found = verify(files, key)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    for line in description(found):
        click.echo(line)
