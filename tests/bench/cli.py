"""``make bench``: time the routers on this machine's GPU.

Latency: one CUDA graph holds a chain of routers with weights of their own, three times the L2
cache in all, so that weights come from memory. Before each router a tiny kernel reads one number
per token of the previous router's output and writes one element per token of the next one's input,
so the chain is truly dependent. The figure is the median of the replays divided by the number of
routers, minus the same for the tiny kernels alone; with programmatic dependent launch and without.
After the replays, the last router's result is compared with the oracle.

Startup: the checks on one model's files before its first token, each in fresh processes.

Host: the time for which an eager call occupies its caller, with the GPU's queue never full; and the
first call of a router, just built or warmed up, against its hundredth and one after the same pause,
beside what torch takes for the first tensors of those sizes. And what the plug-ins of vLLM and
SGLang add to an eager call, which needs no GPU: ``--dry-run --parts host --replays 300`` measures
it too.

Topk: topk_indices on the shapes of a sparse-attention indexer, beside torch.topk and the time that
reading the scores takes, and on rows that are hard to select from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from build_kernels.catalog.model_file import read_model
from build_kernels.catalog.models import MODELS, Model
from build_kernels.errors import BuildError
from router_runtime.errors import RouterRuntimeError
from tests.bench.contenders import CONTENDERS, GATE, MODES, OURS
from tests.bench.machine import Cpu, Gpu
from tests.bench.run import Options, run

#: What a dry run routes.
TINY = Model("tiny", 128, 24, 4, 1.5, 0, 100)

PARTS = ("startup", "host", "latency", "topk")

#: Numbers of tokens that are timed by default; those with a figure of a peer among them.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)


class Several(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated selection, in the order given, without repetition."""

    name = "a,b,..."

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = allowed

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        chosen = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        wrong = [part for part in chosen if part not in self._allowed]
        if wrong:
            self.fail(f"expected some of {', '.join(self._allowed)}, found {', '.join(wrong)}")
        return chosen


class Counts(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated numbers of tokens, ascending."""

    name = "1,2,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(sorted({int(part) for part in value.split(",")}))
        except ValueError:
            counts = (0,)
        if counts[0] < 1:
            self.fail(f"expected numbers of tokens such as 1,64,1024, found {value}")
        return counts


class Choice(click.ParamType):  # type: ignore[type-arg]
    """``kernel=variant``."""

    name = "kernel=variant"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        kernel, equals, variant = value.partition("=")
        if not (kernel and equals and variant):
            self.fail(
                f"expected kernel=variant, such as dense_router_decode=portable, found {value}"
            )
        return kernel, variant


def _models(names: tuple[str, ...] | None, files: tuple[Path, ...]) -> list[Model]:
    """The models to time: those of the files, and those named, or all if there is neither."""
    try:
        own = [read_model(path) for path in files]
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    named = MODELS if names is None and not files else names or ()
    known = [model for model in MODELS if model in named or model.name in named]
    return [*known, *own]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", type=Several(tuple(model.name for model in MODELS)), help="Default: all.")
@click.option(
    "--model-file",
    "model_files",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="Only a model of your own, whose kernels are in --artifacts; with --models, those too.",
)
@click.option("--tokens", type=Counts(), help="Default: some from 1 to 16384.")
@click.option(
    "--contenders",
    type=Several(tuple(CONTENDERS)),
    default=tuple(CONTENDERS),
    help=f"Default: all, {','.join(CONTENDERS)}.",
)
@click.option("--modes", type=Several(MODES), default=MODES, help="Default: pdl,plain.")
@click.option(
    "--parts", type=Several(PARTS), default=PARTS, help="Default: startup,host,latency,topk."
)
@click.option("--replays", type=click.IntRange(1), help="Of each graph. Default: 60.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    help="The artifacts folder to time. Default: the one the runtime finds.",
)
@click.option(
    "--variant",
    "variants",
    type=Choice(),
    multiple=True,
    help="Use this variant, proven or not. Several of one kernel are timed side by side.",
)
@click.option(
    "--alone",
    is_flag=True,
    help=f"Time each kernel by itself in place of {OURS} and {GATE}, and write latency.toml; "
    "beside topk_indices each of its variants.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/bench"),
    help="Where bench.json and the plot go. Default: build/bench.",
)
@click.option("--dry-run", is_flag=True, help="Tiny routers on the CPU: every step, no figures.")
def main(
    models: tuple[str, ...] | None,
    model_files: tuple[Path, ...],
    tokens: tuple[int, ...] | None,
    contenders: tuple[str, ...],
    modes: Any,
    parts: tuple[str, ...],
    replays: int | None,
    artifacts: Path | None,
    variants: tuple[tuple[str, str], ...],
    alone: bool,
    out: Path,
    dry_run: bool,
) -> None:
    by_kernel: dict[str, list[str]] = {}
    for kernel, variant in variants:
        by_kernel.setdefault(kernel, []).append(variant)
    if dry_run:
        if models or model_files or artifacts or variants or alone:
            raise click.UsageError(
                "expected --dry-run without --models, --model-file, --artifacts, --variant and "
                "--alone: it has a model of its own and no kernels; leave them out"
            )
        chosen, tokens, replays = [TINY], tokens or (1, 3), replays or 2
    else:
        chosen = _models(models, model_files)
        tokens, replays = tokens or TOKENS, replays or 60
    options = Options(
        models=chosen,
        tokens=tokens,
        contenders=contenders,
        modes=modes,
        replays=replays,
        parts=parts,
        artifacts=artifacts,
        variants=by_kernel,
        alone=alone,
        out=out,
    )
    try:
        right = run(options, Cpu() if dry_run else Gpu(), click.echo)
    except RouterRuntimeError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if right else 1)
