"""The command line: ``router-runtime doctor`` and ``router-runtime verify``."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.cli import doctor as doctor_
from router_runtime.device.artifact_store import ENVIRONMENT_VARIABLE, find_artifacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.store import ENVIRONMENT_VARIABLE as EVIDENCE_VARIABLE

_artifacts = click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The artifacts folder. Default: ${ENVIRONMENT_VARIABLE}, then the installed one.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Prebuilt DeepSeek-V4 router kernels: what this machine can serve, and whether it is right."""


@main.command()
@_artifacts
def doctor(artifacts: Path | None) -> None:
    """Show device, driver, artifacts and evidence, and which kernel would serve which request.

    Exits with 1 if artifacts are missing or altered, or if a GPU is present and something is not
    served on it.
    """
    if not doctor_.examine(artifacts, click.echo):
        raise SystemExit(1)


@main.command()
@_artifacts
@click.option("--record", is_flag=True, help="Write evidence for every entry that passes.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where --record writes. Default: ${EVIDENCE_VARIABLE}, then beside the manifest. The "
    f"runtime reads the folder that ${EVIDENCE_VARIABLE} names.",
)
def verify(artifacts: Path | None, record: bool, evidence: Path | None) -> None:
    """Run the oracle suite on this machine's GPU against every cubin that loads on it."""
    if evidence is not None and not record:
        raise click.UsageError("expected --evidence with --record, found it alone; add --record")
    from router_runtime.verification.verify import run

    try:
        passed = run(find_artifacts(artifacts), record, click.echo, evidence)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise SystemExit(1)
