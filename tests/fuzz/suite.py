"""Random calls of every op until enough rows have been routed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fuzz.calls import CALLS
from tests.fuzz.draw import Draw
from tests.fuzz.guarded import PATTERNS
from tests.fuzz.promises import same, violations
from tests.fuzz.routers import PLAIN, Routers, Rule
from tests.fuzz.selections import indices_violations, select_violations

#: The ops that select from rows of scores, with the promises of each.
SELECTIONS = {"topk_select": select_violations, "topk_indices": indices_violations}

#: Batches: those at which another kernel or another tile takes over, and large ones.
BATCHES = (1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096, 8192)


def run(
    device: str,
    rows: int,
    *,
    model: tuple[int, int, int],
    rule: Rule = PLAIN,
    seed: int = 0,
    ops: Any = None,
    largest: int = BATCHES[-1],
) -> dict[str, int]:
    """Send at least ``rows`` rows through the ops, the same number of batches through each.

    Args:
        device: Where the tensors are.
        rows: Over all ops and both runs of each call.
        model: hidden, experts, k.
        rule: How it scores.
        seed: Decides everything that is random.
        ops: In place of ``torch.ops.dsv4``.
        largest: The largest batch.

    Returns:
        The number of rows that each op routed.

    Raises:
        AssertionError: A call breaks a promise; the message has its seed.

    """
    ops = torch.ops.dsv4 if ops is None else ops
    draw = Draw(seed, device)
    routers = Routers.build(device, model, draw, rule)
    counts = dict.fromkeys((*CALLS, *SELECTIONS), 0)
    canaries = [draw.normal(tokens, routers.hidden).bfloat16() for tokens in (5, 70)]
    tokens = draw.integers(0, routers.vocab, 9)

    def canary() -> list[Tensor]:
        results: list[Tensor] = []
        for router in routers.dense:
            for x in canaries:
                numbers = (router.router_id, routers.experts, routers.k)
                results += ops.dense_router(x, *numbers)
        results += ops.hash_router(tokens, routers.hashed[0][0].router_id, routers.k)
        return results

    expected = canary()
    try:
        turn = 0
        while sum(counts.values()) < rows:
            turn += 1
            own = Draw(seed * 1_000_003 + turn, device)
            size = own.choose.choice([batch for batch in BATCHES if batch <= largest])
            for name, make in CALLS.items():
                call = make(routers, own, size)
                where = f"seed {seed}, turn {turn}, {call.op}, {size} rows"
                first, problems = call.run(ops, PATTERNS[0], device)
                second, more = call.run(ops, PATTERNS[1], device)
                problems += more
                problems += [f"{call.op}: {text}" for text in violations(call, second)]
                if not same(vars(first).values(), vars(second).values()):
                    problems.append(
                        f"{call.op}: depends on memory outside its inputs or on old outputs"
                    )
                assert not problems, f"{where}: {problems}"
                counts[name] += 2 * size
            for name, broken in SELECTIONS.items():
                problems = broken(ops, own, size, device)
                assert not problems, f"seed {seed}, turn {turn}, {size} rows: {problems}"
                counts[name] += 2 * size
            assert same(canary(), expected), f"seed {seed}, turn {turn}: a later call is affected"
    finally:
        routers.close()
    return counts
