"""Latency by cell: one model, one number of tokens, one contender, one mode."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from build_kernels.catalog.models import Model
from tests.bench.chain import ALLOWED_ROWS, Chain, Route, make_chain, make_layers, plan
from tests.bench.contenders import Contender, DenseRouters, Mode
from tests.bench.host import percentile
from tests.bench.machine import Machine, attempt


@dataclass(frozen=True, slots=True)
class Cell:
    """Microseconds a router, the links' share taken off. ``low_us`` and ``high_us`` are the 10th
    and the 90th percentile of the replays; ``link_us`` is what was taken off.
    """

    model: str
    tokens: int
    contender: str
    mode: Mode
    routers: int
    inputs: int
    link_us: float
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    wrong_rows: int | None = None
    served_by: str | None = None
    error: str | None = None


class Latencies:
    """Measures the cells of one model. The weights, and the contenders' own, are made once."""

    def __init__(
        self,
        machine: Machine,
        model: Model,
        contenders: Sequence[Contender],
        modes: Sequence[Mode],
        replays: int,
        least_routers: int,
    ) -> None:
        self._machine, self._model = machine, model
        self._modes, self._replays = modes, replays
        # The number of routers does not depend on the tokens.
        self.routers = plan(model, 1, machine.l2_bytes, least_routers).routers
        self._layers = make_layers(model, self.routers, machine.device)
        self._contenders = contenders
        self._routes: dict[tuple[str, Mode], Route | str] = {}

    def cells(self, tokens: int) -> Iterator[Cell]:
        """Every cell of that many tokens. Raises Broken after the cell that broke the device."""
        machine = self._machine
        inputs = plan(self._model, tokens, machine.l2_bytes, self.routers).inputs
        chain = make_chain(machine, self._layers, tokens, inputs)
        for mode in self._modes:
            dependent = mode == "pdl"
            times, _ = machine.timed(functools.partial(chain.links, dependent), self._replays)
            link = statistics.median(times) / self.routers
            for contender in self._contenders:
                route = self._route(contender, mode)
                if isinstance(route, DenseRouters) and route.declines(tokens):
                    continue
                blank = Cell(
                    self._model.name, tokens, contender.name, mode, self.routers, inputs, link
                )
                yield self._measure(chain, route, blank)

    def close(self) -> None:
        """Let the memory of the contenders' routers go."""
        for route in self._routes.values():
            if isinstance(route, DenseRouters):
                route.release()
        self._routes.clear()

    def _route(self, contender: Contender, mode: Mode) -> Route | str:
        """The contender's route, made when first used, or why there is none."""
        own: Mode = mode if contender.launches_dependent else "pdl"
        key = (contender.name, own)
        if key not in self._routes:
            self._routes[key] = attempt(
                lambda: contender.make(self._layers, own, contender.settings), self._machine
            )
        return self._routes[key]

    def _measure(self, chain: Chain, route: Route | str, blank: Cell) -> Cell:
        if isinstance(route, str):
            return replace(blank, error=route)
        served_by = route.served_by(blank.tokens) if isinstance(route, DenseRouters) else None

        def timed() -> Cell:
            dependent = blank.mode == "pdl"
            routed = functools.partial(chain.routed, route, dependent)
            times, output = self._machine.timed(routed, self._replays)
            share = [time / self.routers - blank.link_us for time in times]
            wrong = chain.wrong_rows(output)
            error = None
            if wrong > ALLOWED_ROWS:
                error = f"wrong: {wrong} of the rows checked differ from the oracle"
            return replace(
                blank,
                median_us=statistics.median(share),
                low_us=percentile(share, 0.1),
                high_us=percentile(share, 0.9),
                wrong_rows=wrong,
                served_by=served_by,
                error=error,
            )

        found = attempt(timed, self._machine)
        return replace(blank, error=found, served_by=served_by) if isinstance(found, str) else found
