"""The command ``router-runtime verify``. It runs the oracle, so it needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.cli.options import artifacts_option
from router_runtime.device.artifact_store import find_artifacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.store import ENVIRONMENT_VARIABLE
from router_runtime.verification.verify import run


@click.command()
@artifacts_option
@click.option("--record", is_flag=True, help="Write evidence for every entry that passes.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where --record writes. Default: ${ENVIRONMENT_VARIABLE}, then beside the manifest. The "
    f"runtime reads the folder that ${ENVIRONMENT_VARIABLE} names.",
)
def verify(artifacts: Path | None, record: bool, evidence: Path | None) -> None:
    """Run the oracle suite on this machine's GPU against every cubin that loads on it."""
    if evidence is not None and not record:
        raise click.UsageError("expected --evidence with --record, found it alone; add --record")
    try:
        passed = run(find_artifacts(artifacts), record, click.echo, evidence)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise SystemExit(1)
