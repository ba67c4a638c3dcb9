"""Clock and power of a GPU under the router and torch.mm: whether a time is bound by the limit.

``python -m tests.bench.power --model dsv4-flash --tokens 4096,16384``. A chain of ``make bench``
runs without a pause for ``--seconds``, while nvidia-smi reports clock and power; the second half
counts. Where the power is that of the limit, the time of a call is its energy divided by the limit:
fewer waits make it shorter only as far as they cost energy. The same with hidden states of zeros,
which switch few transistors, shows how fast the same instructions are without that limit.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch

from build_kernels.catalog.models import MODELS, Model
from router_runtime.errors import DriverError, RouterRuntimeError, explain
from tests.bench.chain import Chain, make_chain, make_layers, plan
from tests.bench.contenders import CONTENDERS, MM, OURS, Contender, DenseRouters
from tests.bench.machine import Gpu, Machine

#: What nvidia-smi is asked for: MHz and watts.
_QUERY = ("clocks.sm", "power.draw")
_EVERY_MS = 50


@dataclass(frozen=True, slots=True)
class Reading:
    """Medians under load: microseconds of a call, MHz, watts."""

    microseconds: float
    clock: float
    power: float

    @property
    def energy(self) -> float:
        """Millijoules of a call."""
        return self.power * self.microseconds / 1e3


def samples(lines: Iterable[str]) -> list[tuple[float, float]]:
    """(MHz, watts) of each line of nvidia-smi; lines that are no pair of numbers are left out."""
    found = []
    for line in lines:
        try:
            clock, power = (float(word) for word in line.split(","))
        except ValueError:
            continue
        found.append((clock, power))
    return found


def reading(times: list[float], lines: Iterable[str]) -> Reading:
    """Medians of the second half of the times, in microseconds, and of the samples."""
    found = samples(lines)
    if not found or not times:
        raise DriverError(
            explain(
                "nvidia-smi",
                expected=f"lines of {', '.join(_QUERY)}",
                found="none",
                remedy=f"try nvidia-smi --query-gpu={','.join(_QUERY)} --format=csv",
            )
        )
    clocks, powers = zip(*found[len(found) // 2 :], strict=True)
    return Reading(
        statistics.median(times[len(times) // 2 :]),
        statistics.median(clocks),
        statistics.median(powers),
    )


@contextmanager
def sampled(device: torch.device) -> Iterator[list[str]]:
    """Collect nvidia-smi's lines about a GPU until the block ends."""
    lines: list[str] = []
    # By its UUID: nvidia-smi counts GPUs that CUDA_VISIBLE_DEVICES hides.
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_QUERY)}"]
    command += ["--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield lines
        finally:
            process.terminate()
            lines += process.communicate()[0].splitlines()


def under_load(machine: Machine, chain: Chain, contender: Contender, seconds: float) -> Reading:
    """Run a contender through the chain for that long and return what was read."""
    route = contender.make(chain.layers, "pdl", contender.settings)
    run = functools.partial(chain.routed, route, True)
    trial_times, _ = machine.timed(run, 3)
    with sampled(machine.device) as lines:
        times, _ = machine.timed(run, max(3, round(seconds * 1e6 / statistics.median(trial_times))))
    if isinstance(route, DenseRouters):
        route.release()
    return reading([each / len(chain.layers.weights) for each in times], lines)


def rows(machine: Machine, model: Model, tokens: int, seconds: float) -> Iterator[str]:
    """A line of the table for each contender, with random hidden states, then with zeros."""
    planned = plan(model, tokens, machine.l2_bytes, 2)
    layers = make_layers(dataclasses.replace(model, vocab=1), planned.routers, machine.device)
    chain = make_chain(machine, layers, tokens, planned.inputs)
    for hidden_states in ("random", "zeros"):
        if hidden_states == "zeros":
            for x in chain.inputs:
                x.zero_()
        for contender in (CONTENDERS[OURS], CONTENDERS[MM]):
            found = under_load(machine, chain, contender, seconds)
            yield (
                f"{model.name:13}{tokens:7}  {contender.name:13}{hidden_states:14}"
                f"{found.microseconds:8.1f}{found.clock:7.0f}{found.power:6.0f}{found.energy:7.1f}"
            )


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS])
)
@click.option("--tokens", default="4096,16384", show_default=True)
@click.option("--seconds", type=float, default=1.5, show_default=True, help="For each figure.")
def main(names: tuple[str, ...], tokens: str, seconds: float) -> None:
    machine = Gpu()
    click.echo(
        f"{'model':13}{'tokens':>7}  {'contender':13}{'hidden states':14}"
        f"{'us':>8}{'MHz':>7}{'W':>6}{'mJ':>7}"
    )
    for model in MODELS:
        if model.name in (names or {MODELS[0].name}):
            for count in tokens.split(","):
                for row in rows(machine, model, int(count), seconds):
                    click.echo(row)


if __name__ == "__main__":
    try:
        main()
    except (RouterRuntimeError, OSError) as error:
        sys.exit(f"Error: {error}")
