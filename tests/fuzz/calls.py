"""A random call of each op that has a form with the caller's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.call import Call
from tests.fuzz.draw import Draw
from tests.fuzz.options import Options
from tests.fuzz.routers import Routers


@dataclass
class Given:
    """Experts that a call gives for some of its rows, ``mask``, or for all.

    ``ids`` are what is returned there, int64 ``[rows, k]``; ``none`` marks those that are no
    expert.
    """

    mask: Tensor
    ids: Tensor
    none: Tensor

    @classmethod
    def draw(
        cls,
        draw: Draw,
        keywords: dict[str, Any],
        sizes: tuple[int, int, int],
        padding: Tensor | None,
        sentinel: int,
    ) -> Given | None:
        """For a third of the calls, whose ``keywords`` get the tensors. ``sizes`` are rows, k and
        experts.
        """
        rows, k, experts = sizes
        if draw.choose.random() < 2 / 3:
            return None
        ids, mask = draw.ids(experts, rows, k), draw.maybe(lambda: draw.mask(rows))
        keywords["given_ids"] = ids
        if mask is None:
            mask = torch.ones(rows, dtype=torch.bool, device=ids.device)
        else:
            keywords["given_mask"] = mask
        none = (ids < 0) | (ids >= experts)
        if padding is not None:
            none = none | padding.unsqueeze(1)
        return cls(mask, torch.where(none, sentinel, ids.long()), none & mask.unsqueeze(1))

    def known(self) -> dict[str, Any]:
        """What a ``Call`` is told of them."""
        return {"exact": self.ids, "known": self.mask, "none": self.none}


def dense_router(routers: Routers, draw: Draw, rows: int) -> Call:
    router = draw.choose.choice(routers.dense)
    keywords, padding = routers.serving(draw, rows, images=True)
    sizes, sentinel = (rows, routers.k, routers.experts), router.config.sentinel
    given = Given.draw(draw, keywords, sizes, padding, sentinel)
    logits = draw.choose.random() < 0.3
    return Call(
        "dense_router_logits" if logits else "dense_router",
        [draw.bf16(rows, routers.hidden), router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        logits,
        routers.maybe_mapped(draw),
        draw.ids_dtype(),
        options=Options.draw(draw, routers.k, routers.experts, sentinel),
        **({} if given is None else given.known()),
    )


def dense_router_replay(routers: Routers, draw: Draw, rows: int) -> Call:
    router = draw.choose.choice(routers.dense)
    keywords, padding = routers.serving(draw, rows, images=False)
    given = draw.ids(routers.experts, rows, routers.k)
    exists = (given >= 0) & (given < routers.experts)
    if padding is not None:
        exists = exists & ~padding.unsqueeze(1)
    exact = torch.where(exists, given, router.config.sentinel)
    return Call(
        "dense_router_replay",
        [draw.bf16(rows, routers.hidden), given, router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, router.config.sentinel, padding),
        distinct=False,
        exact=exact,
        none=~exists,
        options=Options.draw(draw, routers.k, routers.experts, router.config.sentinel),
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
        none=~known.unsqueeze(1).expand(rows, routers.k),
        options=Options.draw(draw, routers.k, routers.experts, router.config.sentinel),
    )


def hash_gate(routers: Routers, draw: Draw, rows: int) -> Call:
    router, table = draw.choose.choice(routers.gated)
    keywords, padding = routers.serving(draw, rows, images=True)
    token_ids = draw.ids(routers.vocab, rows)
    known = (token_ids >= 0) & (token_ids < routers.vocab)
    looked_up = table[torch.where(known, token_ids, 0).long()]
    if padding is not None:
        known = known & ~padding
    sizes, sentinel = (rows, routers.k, routers.experts), router.config.sentinel
    exact = torch.where(known.unsqueeze(1), looked_up, sentinel)
    none = ~known.unsqueeze(1).expand_as(exact)
    # Nothing is known of image tokens.
    sure = None if (images := keywords.get("image_mask")) is None else ~images
    given = Given.draw(draw, keywords, sizes, padding, sentinel)
    if given is not None:
        rows_given = given.mask.unsqueeze(1)
        exact = torch.where(rows_given, given.ids, exact)
        none = torch.where(rows_given, given.none, none)
        sure = None if sure is None else sure | given.mask
    if sure is not None:
        none = none & sure.unsqueeze(1)
    return Call(
        "hash_gate",
        [draw.bf16(rows, routers.hidden), token_ids, router.router_id, routers.experts, routers.k],
        keywords,
        *(rows, routers.k, routers.experts, sentinel, padding),
        mapped=routers.maybe_mapped(draw),
        ids_dtype=draw.ids_dtype(),
        distinct=False,
        exact=exact,
        known=sure,
        none=none,
        options=Options.draw(draw, routers.k, routers.experts, sentinel),
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
        start, step = (draw.choose.choice((0, 1, 23333, 2654435769, 2**32 - 1)) for _ in range(2))
        keywords |= {"expert_map": table, "replica_counts": counts}
        keywords |= {"replica_start": start, "replica_step": step}
        mapped = table, counts, start, step
    given = Given.draw(draw, keywords, (rows, k, experts), padding, sentinel)
    scale = draw.choose.choice((0.0, 1e-30, 1.0, 1.5, 1e18))
    if draw.choose.random() < 0.5:
        keywords["scoring"] = "sigmoid"
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
        options=Options.draw(draw, k, experts, sentinel),
        **({} if given is None else given.known()),
    )


#: Op -> a random call of it with a number of rows.
CALLS: dict[str, Callable[[Routers, Draw, int], Call]] = {
    "dense_router": dense_router,
    "dense_router_replay": dense_router_replay,
    "hash_router": hash_router,
    "hash_gate": hash_gate,
    "activation_topk": activation_topk,
}
