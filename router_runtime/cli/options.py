"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from router_runtime.format.advice import ARTIFACTS_VARIABLE

artifacts_option = click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    help=f"The artifacts folder. Default: ${ARTIFACTS_VARIABLE}, then the installed one.",
)
