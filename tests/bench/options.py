"""``python -m tests.bench.options``: what a Router takes with each option, beside a plain call.

The chain and the method are those of ``make bench``, with programmatic dependent launch. Each row
of the table is one launch. To compare with an engine, add the launches in which it does the same to
``plain``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
from torch import Tensor

from build_kernels.catalog.models import MODELS
from router_runtime import Router
from tests.bench.chain import Layers, Output
from tests.bench.contenders import Contender, DenseRouters, Mode, Settings
from tests.bench.latency import Latencies
from tests.bench.machine import Cpu, Gpu

#: Copies of each expert, and shared experts.
_COPIES, _SHARED = 2, 1

#: Makes the keyword arguments of ``forward_out`` for batches of that many tokens.
_Options = Callable[[Router, int], dict[str, Any]]


def _padding(router: Router, tokens: int) -> dict[str, Any]:
    return {"is_padding": torch.zeros(tokens, dtype=torch.bool, device=router.device)}


def _load(router: Router, tokens: int) -> dict[str, Any]:
    counts = _COPIES * router.config.num_experts
    load = torch.zeros(counts, dtype=torch.int32, device=router.device)
    flag = torch.ones((), dtype=torch.bool, device=router.device)
    return {"expert_load": load, "record_load": flag}


def _capture(router: Router, tokens: int) -> dict[str, Any]:
    shape = (tokens, router.config.top_k)
    return {"captured_ids": torch.empty(shape, dtype=torch.int16, device=router.device)}


def _shared(router: Router, tokens: int) -> dict[str, Any]:
    return {"shared_experts": _SHARED}


def _mapped(router: Router, tokens: int) -> dict[str, Any]:
    """A map in which each copy of an expert has its logical id, so the chain's check holds."""
    if router.expert_map is None:
        experts = router.config.num_experts
        copies = torch.arange(experts).unsqueeze(1).repeat(1, _COPIES)
        counts = torch.full((experts,), _COPIES)
        router.set_expert_map(copies, counts, replica_step=2654435769)
    return {"mapped": True}


def _together(router: Router, tokens: int) -> dict[str, Any]:
    return {
        name: value
        for make in (_padding, _mapped, _load, _capture, _shared)
        for name, value in make(router, tokens).items()
    }


_OPTIONS: dict[str, _Options | None] = {
    "plain": None,
    "padding": _padding,
    "expert map": _mapped,
    "load": _load,
    "capture": _capture,
    "shared expert": _shared,
    "all of these": _together,
}


class RoutersWithOptions(DenseRouters):
    """The product, called with options."""

    def __init__(self, options: _Options, layers: Layers, mode: Mode, settings: Settings) -> None:
        super().__init__(layers, mode, settings)
        self._options = options
        self._given: dict[tuple[int, int], dict[str, Any]] = {}

    def __call__(self, layer: int, x: Tensor) -> Output:
        router, tokens = self._routers[layer], x.shape[0]
        if (layer, tokens) not in self._given:
            self._given[layer, tokens] = self._options(router, tokens)
        given = self._given[layer, tokens]
        k = router.config.top_k
        columns = k + given.get("shared_experts", 0)
        weights = torch.empty(tokens, columns, device=x.device)
        ids = torch.empty(tokens, columns, dtype=torch.int32, device=x.device)
        router.forward_out(x, weights_out=weights, ids_out=ids, **given)
        return Output(weights[:, :k], ids[:, :k])


def _contenders() -> Sequence[Contender]:
    return [
        Contender(
            name,
            DenseRouters if options is None else functools.partial(RoutersWithOptions, options),
        )
        for name, options in _OPTIONS.items()
    ]


@click.command()
@click.option("--model", default="dsv4-flash", show_default=True)
@click.option("--tokens", multiple=True, default=(1, 16, 64, 1024, 4096), show_default=True)
@click.option("--replays", default=50, show_default=True)
@click.option("--dry-run", is_flag=True, help="On a CPU; the figures mean nothing.")
def main(model: str, tokens: Sequence[int], replays: int, dry_run: bool) -> None:
    """Print microseconds per router for each option and number of tokens; exit with 1 for a result
    that is wrong.
    """
    shape = next(each for each in MODELS if each.name == model)
    machine = Cpu() if dry_run else Gpu()
    cells = Latencies(machine, shape, _contenders(), ["pdl"], replays, 1 if dry_run else 8)
    click.echo(f"{model:<16}" + "".join(f"{name:>15}" for name in _OPTIONS))
    failed = False
    for count in tokens:
        found = list(cells.cells(count))
        figures = [f"{each.median_us:15.2f}" if each.error is None else "wrong" for each in found]
        click.echo(f"{count:<16}" + "".join(f"{figure:>15}" for figure in figures))
        for each in found:
            if each.error is not None:
                failed = True
                click.echo(f"{each.contender}: {each.error}")
    cells.close()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
