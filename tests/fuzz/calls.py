"""A random call of each op that has a form with the caller's outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fuzz.call import Call
from tests.fuzz.draw import Draw
from tests.fuzz.routers import Routers


def dense_router(routers: Routers, draw: Draw, rows: int) -> Call:
    router = draw.choose.choice(routers.dense)
    keywords, padding = routers.serving(draw, rows, images=True)
    logits = draw.choose.random() < 0.3
    return Call(
        "dense_router_logits" if logits else "dense_router",
        [draw.bf16(rows, routers.hidden), router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        logits,
        routers.maybe_mapped(draw),
        draw.ids_dtype(),
    )


def dense_router_replay(routers: Routers, draw: Draw, rows: int) -> Call:
    router = draw.choose.choice(routers.dense)
    keywords, padding = routers.serving(draw, rows, images=False)
    given = draw.ids(routers.experts, rows, routers.k)
    exists = (given >= 0) & (given < routers.experts)
    exact = torch.where(exists, given, router.config.sentinel)
    if padding is not None:
        exact = torch.where(padding.unsqueeze(1), router.config.sentinel, exact)
    return Call(
        "dense_router_replay",
        [draw.bf16(rows, routers.hidden), given, router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        distinct=False,
        exact=exact,
    )


def hash_router(routers: Routers, draw: Draw, rows: int) -> Call:
    router, table = draw.choose.choice(routers.hashed)
    keywords, padding = routers.serving(draw, rows, images=False)
    token_ids = draw.ids(routers.vocab, rows)
    known = (token_ids >= 0) & (token_ids < routers.vocab)
    if padding is not None:
        known = known & ~padding
    looked_up = table[torch.where(known, token_ids, 0).long()]
    return Call(
        "hash_router",
        [token_ids, router.router_id, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        mapped=routers.maybe_mapped(draw),
        ids_dtype=draw.ids_dtype(),
        distinct=False,
        exact=torch.where(known.unsqueeze(1), looked_up, router.config.sentinel),
    )


def hash_gate(routers: Routers, draw: Draw, rows: int) -> Call:
    router, table = draw.choose.choice(routers.gated)
    keywords, padding = routers.serving(draw, rows, images=True)
    token_ids = draw.ids(routers.vocab, rows)
    known = (token_ids >= 0) & (token_ids < routers.vocab)
    exact = None
    if "image_mask" not in keywords:
        looked_up = table[torch.where(known, token_ids, 0).long()]
        if padding is not None:
            known = known & ~padding
        exact = torch.where(known.unsqueeze(1), looked_up, router.config.sentinel)
    return Call(
        "hash_gate",
        [draw.bf16(rows, routers.hidden), token_ids, router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        mapped=routers.maybe_mapped(draw),
        ids_dtype=draw.ids_dtype(),
        distinct=False,
        exact=exact,
    )


def activation_topk(routers: Routers, draw: Draw, rows: int) -> Call:
    experts = draw.choose.choice((routers.experts, 7, 33, 300, 1000))
    k = draw.choose.randint(1, min(32, experts))
    keywords, padding = routers.serving(draw, rows, images=True)
    sentinel = draw.choose.choice((-1, experts, -(2**31)))
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
    logits, bias, image_bias = (
        draw.floats(count, experts).to(draw.choose.choice(dtypes)) for count in (rows, 1, 1)
    )
    keywords |= {"image_bias": image_bias[0], "sentinel": sentinel}
    mapped = None
    if draw.choose.random() < 0.3:
        # The op does not check these: a count out of range is taken for the nearest in range.
        width = draw.choose.randint(1, 4)
        table = draw.integers(-(2**31), 2**31, experts, width).int()
        counts = draw.ids(width, experts).clamp(-(2**31), 2**31 - 1).int()
        keywords |= {"expert_map": table, "replica_counts": counts}
        mapped = table, counts
    scale = draw.choose.choice((0.0, 1e-30, 1.0, 1.5, 1e18))
    return Call(
        "activation_topk",
        [
            logits,
            bias[0],
            k,
            scale,
            draw.choose.random() < 0.5,
        ],
        keywords,
        rows,
        k,
        experts,
        sentinel,
        padding,
        mapped=mapped,
        ids_dtype=draw.ids_dtype(),
    )


#: Op -> a random call of it with a number of rows.
CALLS: dict[str, Callable[[Routers, Draw, int], Call]] = {
    "dense_router": dense_router,
    "dense_router_replay": dense_router_replay,
    "hash_router": hash_router,
    "hash_gate": hash_gate,
    "activation_topk": activation_topk,
}
