"""The routers that the calls go to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from router_runtime import Router, RouterConfig, register_router, unregister_router
from tests.fuzz.draw import Draw

#: How the routers of a model score, as fields of RouterConfig.
Rule = Mapping[str, Any]
PLAIN: Rule = {"scoring": "sqrtsoftplus", "gate_temperature": 1.0}


@dataclass
class Routers:
    """The registered routers of one model that are tested, by mode, with the tensors that decide
    their ids: the expert map with its counts and its order, and the table of each hash router.
    """

    device: str
    experts: int
    k: int
    hidden: int
    vocab: int
    dense: list[Router]
    maps: tuple[Tensor, Tensor, int, int]
    hashed: list[tuple[Router, Tensor]]
    gated: list[tuple[Router, Tensor]]

    @classmethod
    def build(
        cls, device: str, model: tuple[int, int, int], draw: Draw, rule: Rule = PLAIN
    ) -> Routers:
        """Routers of random weights. ``model`` is (hidden, experts, k)."""
        hidden, experts, k = model
        vocab = 977
        counts = draw.integers(1, 4, experts).int()
        # Physical experts as engines number them, and any id.
        table = draw.integers(0, 3 * experts, experts, 3).int()
        table = torch.where(draw.mask(experts).unsqueeze(1), table * 1000 + 7, table)
        start, step = draw.choose.choice(((0, 1), (0, 2654435769), (5, 23333)))
        order = {"replica_start": start, "replica_step": step}
        dense = []
        for number, sentinel in enumerate((-1, 2**31 - 1, 3)):
            weight = draw.normal(experts, hidden) * hidden**-0.5
            if number == 1:
                # Any finite bits; number 2 has equal rows, so that all keys tie.
                weight = draw.bf16(experts, hidden).float().nan_to_num(0.0, 1e30, -1e30)
            if number == 2:
                weight = weight[:1].expand(experts, hidden)
            biases = [draw.floats(1, experts)[0] for _ in range(2)]
            biases = [bias.nan_to_num(0.0, 3e38, -3e38) * (number == 1) for bias in biases]
            if number == 0:
                biases = [draw.normal(experts) * 0.1 for _ in range(2)]
            router = Router(
                RouterConfig(
                    hidden, experts, k, (1.5, 1e18, 0.0)[number], sentinel=sentinel, **rule
                ),
                weight=weight.bfloat16(),
                bias=biases[0],
                image_bias=biases[1],
                device=device,
            )
            router.set_expert_map(table, counts, **order)
            register_router(router)
            dense.append(router)
        hashed = []
        for sentinel in (-1, -77):
            ids = draw.integers(0, experts, vocab, k)
            config = RouterConfig(
                hidden, experts, k, 1.5, mode="hash", vocab_size=vocab, sentinel=sentinel
            )
            router = Router(config, table=ids, device=device)
            router.set_expert_map(table, counts, **order)
            register_router(router)
            hashed.append((router, ids))
        gated = []
        for sentinel, bias in ((-1, draw.normal(experts)), (-77, draw.floats(1, experts)[0])):
            ids = draw.integers(0, experts, vocab, k)
            router = Router(
                RouterConfig(
                    *(hidden, experts, k, 2.5),
                    mode="hash_gate",
                    vocab_size=vocab,
                    sentinel=sentinel,
                    **rule,
                ),
                weight=(draw.normal(experts, hidden) * hidden**-0.5).bfloat16(),
                table=ids,
                image_bias=bias.nan_to_num(0.0, 3e38, -3e38),
                device=device,
            )
            router.set_expert_map(table, counts, **order)
            register_router(router)
            gated.append((router, ids))
        maps = table, counts, start, step
        return cls(device, experts, k, hidden, vocab, dense, maps, hashed, gated)

    def close(self) -> None:
        """Unregister all of them."""
        for router in (*self.dense, *(router for router, _ in (*self.hashed, *self.gated))):
            unregister_router(router.router_id, force=True)

    def serving(self, draw: Draw, rows: int, images: bool) -> tuple[dict[str, Any], Tensor | None]:
        """Random serving inputs, and which rows they make padding, bool ``[rows]``."""
        keywords: dict[str, Any] = {}
        padding = None
        if (mask := draw.maybe(lambda: draw.mask(rows))) is not None:
            keywords["is_padding"] = padding = mask
        if draw.choose.random() < 0.5:
            # Any count: negative, beyond the batch, in between.
            count = draw.choose.choice((-(2**31), -1, 0, rows // 2, rows, rows + 1, 2**31 - 1))
            keywords["num_valid_tokens"] = torch.tensor([count], device=self.device).int()
            beyond = torch.arange(rows, device=self.device) >= count
            padding = beyond if padding is None else padding | beyond
        if images and (mask := draw.maybe(lambda: draw.mask(rows))) is not None:
            keywords["image_mask"] = mask
        return keywords, padding

    def maybe_mapped(self, draw: Draw) -> tuple[Tensor, Tensor, int, int] | None:
        """The expert map for three calls in ten, which then store logical ids."""
        return self.maps if draw.choose.random() < 0.3 else None
