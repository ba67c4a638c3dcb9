"""The command ``router-runtime doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import click

from router_runtime.cli import screen, why
from router_runtime.cli.diagnosis import diagnose, open_contents, places, present_places
from router_runtime.cli.options import artifacts_option
from router_runtime.errors import DriverError, RouterRuntimeError
from router_runtime.evidence.ladder import ACCEPTABLE
from router_runtime.format.codec import encode
from router_runtime.format.target import BUILDABLE

#: Said first, because a driver in disorder may take long to answer, or never do.
_ASKING = "asking the NVIDIA driver for its version and GPUs: cuInit, no context, no memory"


@click.command()
@artifacts_option
@click.option(
    "--target", type=click.Choice(BUILDABLE), help="Decide for a device of this target instead."
)
@click.option(
    "--accept",
    type=click.Choice(ACCEPTABLE),
    help="Decide for Routers that accept kernels of this status too.",
)
@click.option("--why", "request", metavar="REQUEST", help=f"Explain one decision: {why.SYNTAX}.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(
    artifacts: Path | None,
    target: str | None,
    accept: str | None,
    request: str | None,
    as_json: bool,
) -> None:
    """Show what this machine can serve: device, driver, artifacts, evidence, kernels, problems.

    Without a GPU the decisions are those for a device of each target. Exits with 1 if artifacts are
    missing or altered, or if a GPU is present and something is not served on it; with --why, if
    nothing serves the request; with 74 if the report cannot be written, with 141 if its reader has
    ended. The keys of --json are those of the dataclasses in
    router_runtime/cli: Diagnosis in report.py, Explanation in why.py.

    It asks the NVIDIA driver for its version and for names and attributes of the GPUs (cuInit), and
    says so on standard error before it does. It makes no context and uses no memory of a GPU.
    """
    click.echo(_ASKING, err=True)
    if request is not None:
        explanation, tokens = _explain(request, artifacts, target, accept)
        _print(explanation, why.lines(explanation, tokens), as_json)
        usable = all(answer.chosen for answer in explanation.answers)
    else:
        diagnosis = diagnose(artifacts, target, accept)
        _print(diagnosis, screen.lines(diagnosis), as_json)
        usable = diagnosis.usable
    if not usable:
        raise SystemExit(1)


def _explain(
    request: str, artifacts: Path | None, target: str | None, accept: str | None
) -> tuple[why.Explanation, int | None]:
    """The explanation, and the number of tokens that the request names."""
    try:
        contents = open_contents(artifacts)
        question = why.parse(request, contents.manifest, accept)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    try:
        present = present_places()
    except DriverError:
        present = ()
    devices = places(contents.manifest, present, target)
    return why.explain_request(question, contents, devices), question.tokens


def _print(data: object, text: Iterable[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(encode(data), indent=1))
    else:
        for line in text:
            click.echo(line)
