"""The command ``router-runtime verify``. It runs the oracle, so it needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.cli import bundle as bundles
from router_runtime.cli import screen
from router_runtime.cli.diagnosis import diagnose
from router_runtime.cli.options import artifacts_option
from router_runtime.device.artifact_store import find_artifacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.store import ENVIRONMENT_VARIABLE
from router_runtime.verification.report import timing_table
from router_runtime.verification.timing import Gpu, time_models
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
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.zip",
    help="Also write one file with everything that was found, to send to somebody: this report, "
    "the records, doctor's report, digests of the kernels' results, and how long Routers take "
    "beside torch.mm alone.",
)
def verify(
    artifacts: Path | None, record: bool, evidence: Path | None, bundle: Path | None
) -> None:
    """Run the oracle suite on this machine's GPU against every cubin that loads on it.

    It initialises CUDA, and says so before it does: it makes a context on the current GPU, takes
    memory there and launches kernels. With --record it ends with what serves on this GPU from now
    on.
    """
    for name, value in (("evidence", evidence), ("bundle", bundle)):
        if value is not None and not record:
            raise click.UsageError(f"expected --{name} with --record, found it alone; add --record")
    printed: list[str] = []

    def echo(line: str) -> None:
        printed.append(line)
        click.echo(line)

    try:
        if bundle is not None:
            bundles.require_writable(bundle)
        folder = find_artifacts(artifacts)
        outcome = run(folder, record, echo, evidence)
        if record:
            diagnosis = diagnose(folder)
            for line in screen.serving(diagnosis):
                echo(line)
            if bundle is not None:
                click.echo("\ntiming the Routers of every model: some seconds")
                timings = tuple(time_models(folder, Gpu()))
                for line in timing_table(timings):
                    click.echo(line)
                bundles.write(bundle, printed, outcome, diagnosis, timings)
                click.echo(f"everything that was found is in {bundle}")
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    if not outcome.passed:
        raise SystemExit(1)
