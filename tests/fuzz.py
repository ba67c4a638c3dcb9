"""Any bits into every op, and what router_runtime/PROMISES.md says about what comes out.

``python -m tests.fuzz --rows 10000000`` on a GPU (``--rows 3000`` under compute-sanitizer). The
tests run the same with fewer rows, on the CPU too, where the ops are the oracle.

Every tensor that an op is given stands between two guard bands, whose bytes differ between two runs
with the same content: a write outside changes a band, and a read outside that matters changes the
result. Outputs start poisoned, so an element that was not written shows. After each call a canary,
one call with known results, shows whether the next launch is affected.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor

from router_runtime import Router, RouterConfig, register_router, unregister_router

GUARD = 1024
#: Bytes of the bands, and of outputs before the call: as fp32 negative, as ids far out of range.
PATTERNS = (0xA5, 0xFF)

#: fp32 patterns at which something changes: zeros, subnormals, infinities, NaNs, edges of exp.
EDGES = (
    *(0x0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x00800000),
    *(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xC2A00000, 0x42A00000, 0xC2FE0000),
)
#: Batches: those at which another kernel or another tile takes over, and large ones.
BATCHES = (1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096, 8192)


class Guarded:
    """A tensor between two bands of ``pattern``: a copy of ``content``, or poisoned."""

    def __init__(
        self,
        content: Tensor | None,
        pattern: int,
        *,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> None:
        if content is not None:
            shape, dtype, device = tuple(content.shape), content.dtype, content.device
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        self._content = None if content is None else content.contiguous().view(-1)
        self._pattern, self._end = pattern, GUARD + count
        padded = GUARD + count + GUARD
        self._buffer = torch.full((padded,), pattern, dtype=torch.uint8, device=device)
        inner = self._buffer[GUARD : self._end]
        self.tensor = (
            inner.view(dtype).view(shape)
            if count
            else torch.empty(shape, dtype=dtype, device=device)
        )
        if self._content is not None and count:
            inner.copy_(self._content.view(torch.uint8))

    def bands_intact(self) -> Tensor:
        bands = torch.cat((self._buffer[:GUARD], self._buffer[self._end :]))
        return (bands == self._pattern).all()

    def unchanged(self) -> Tensor:
        """The bands, and the content if there was any."""
        if self._content is None or not self._content.numel():
            return self.bands_intact()
        inner = self._buffer[GUARD : self._end]
        return self.bands_intact() & (inner == self._content.view(torch.uint8)).all()


class Draw:
    """Random bits of one seed on one device."""

    def __init__(self, seed: int, device: str) -> None:
        self.choose = random.Random(seed)
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """From low up to, not including, high."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=dtype
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def floats(self, rows: int, columns: int) -> Tensor:
        """fp32 ``[rows, columns]`` of any bits; the kind of bits changes from row to row."""
        words = self.integers(-(2**31), 2**31, rows, columns).int()
        edges = torch.tensor(EDGES, device=self.device)[self.integers(0, len(EDGES), rows, columns)]
        edges = (edges - (edges >= 2**31) * 2**32).int()
        normal = self.normal(rows, columns) * 4
        kinds = (
            words,
            edges,
            normal.view(torch.int32),
            (normal * 30 - 100).view(torch.int32),  # scores that underflow
            words & -0x7F800001,  # subnormals and zeros of both signs
            edges[:, :1].expand(rows, columns),  # all keys equal
            words[:, :1].expand(rows, columns),
            torch.where(self.integers(0, 8, rows, columns) == 0, edges, normal.view(torch.int32)),
        )
        kind = self.integers(0, len(kinds), rows)
        mixed = words
        for number, bits in enumerate(kinds):
            mixed = torch.where((kind == number).unsqueeze(1), bits, mixed)
        return mixed.contiguous().view(torch.float32)

    def bf16(self, rows: int, columns: int) -> Tensor:
        """As ``floats``: their upper halves."""
        upper = self.floats(rows, columns).view(torch.int32) >> 16
        return upper.to(torch.int16).view(torch.bfloat16)

    def ids(self, limit: int, *shape: int) -> Tensor:
        """int32 or int64 of any bits, half of them in [0, limit)."""
        if self.choose.random() < 0.5:
            wide = self.integers(-(2**31), 2**31, *shape).int()
        else:
            wide = self.integers(-(2**63), 2**63 - 1, *shape)
        near = self.integers(-2, limit + 2, *shape).to(wide.dtype)
        return torch.where(self.integers(0, 4, *shape) == 0, wide, near)

    def mask(self, rows: int) -> Tensor:
        """One in four."""
        return self.integers(0, 4, rows) == 0

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.choose.random() < 0.5 else None


@dataclass
class Outcome:
    """What a call left, and what it was given, for ``violations``."""

    weights: Tensor
    ids: Tensor
    logical: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Case:
    """One call: its op, its tensors, the rest of its arguments, and what must hold beside the
    common promises.
    """

    op: str
    positional: list[Any]
    keywords: dict[str, Any]
    rows: int
    k: int
    experts: int
    sentinel: int = -1
    padding: Tensor | None = None
    logits: bool = False
    mapped: tuple[Tensor, Tensor] | None = None
    ids_dtype: torch.dtype = torch.int32
    distinct: bool = True
    #: The ids, where they are known before the call.
    exact: Tensor | None = None

    def run(self, ops: Any, pattern: int, device: str) -> tuple[Outcome, list[str]]:
        """Call the op once. Returns what it wrote, and what it should not have touched."""
        guarded: dict[str, Guarded] = {}

        def guard(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dtype is torch.bool:  # whatever is not zero is true
                value = value.to(torch.uint8).mul(0xFE).view(torch.bool)
            guarded[name] = Guarded(value, pattern)
            return guarded[name].tensor

        positional = [guard(str(place), value) for place, value in enumerate(self.positional)]
        keywords = {name: guard(name, value) for name, value in self.keywords.items()}
        wanted = {"weights_out": (self.k, torch.float32), "ids_out": (self.k, self.ids_dtype)}
        if self.logits:
            wanted["logits_out"] = (self.experts, torch.float32)
        if self.mapped is not None:
            wanted["logical_ids_out"] = (self.k, self.ids_dtype)
        for name, (columns, dtype) in wanted.items():
            guarded[name] = Guarded(
                None, pattern, shape=(self.rows, columns), dtype=dtype, device=device
            )
            keywords[name] = guarded[name].tensor
        getattr(ops, self.op).out(*positional, **keywords)
        problems = [
            f"{self.op}: touched what it should not: {name}"
            for name, tensor in guarded.items()
            if not bool(tensor.unchanged())
        ]
        outcome = Outcome(
            keywords["weights_out"],
            keywords["ids_out"],
            keywords.get("logical_ids_out"),
            keywords.get("logits_out"),
        )
        return outcome, problems

    def violations(self, found: Outcome) -> Iterator[str]:
        """What the promises say, of one call's outputs."""
        weights, ids = found.weights, found.ids
        if not bool(torch.isfinite(weights).all()):
            yield "a weight is not finite"
        if not bool((weights >= 0).all()):
            yield "a weight is negative, or was not written"
        logical = ids if found.logical is None else found.logical
        in_range = (logical >= 0) & (logical < self.experts)
        if not bool((in_range | (logical == self.sentinel)).all()):
            yield "an id is neither in range nor the sentinel"
        # The sentinel may be an expert's number too: then only padding tells them apart.
        real = in_range if self.padding is None else in_range & ~self.padding.unsqueeze(1)
        none = (logical == self.sentinel) & ~real
        if not bool((weights[none] == 0).all()):
            yield "a sentinel has a weight"
        if self.padding is not None:
            rows = self.padding.unsqueeze(1)
            if not bool(((logical == self.sentinel) & (weights == 0) | ~rows).all()):
                yield "a padding row has an expert or a weight"
        if self.distinct:
            routed = real if self.padding is None else real | self.padding.unsqueeze(1)
            if not bool(routed.all()):
                yield "a dense row has no expert somewhere"
            ordered = logical.sort(dim=1).values
            twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
            if self.padding is not None:
                twice &= ~self.padding
            if bool(twice.any()):
                yield "an expert comes twice in a dense row"
        if self.exact is not None and not bool((logical == self.exact).all()):
            yield "an id is not the one that was looked up or given"
        if self.mapped is not None:
            table, counts = self.mapped
            chosen = logical.clamp(0, self.experts - 1).long()
            number = torch.arange(self.rows, device=ids.device).unsqueeze(1)
            replica = number % counts[chosen].clamp(1, table.shape[1])
            physical = table[chosen, replica.long()].to(ids.dtype)
            physical = torch.where(real, physical, self.sentinel)
            if not bool((ids == physical).all()):
                yield "a physical id is not the map's"
        if found.logits is not None:
            bits = found.logits.view(torch.int32)
            if not bool(((bits == 0x7FFFFFFF) | ~found.logits.isnan()).all()):
                yield "a NaN logit is stored under other bits"


@dataclass
class Bench:
    """The routers under test, registered, with what their tensors are."""

    device: str
    experts: int
    k: int
    hidden: int
    vocab: int
    dense: list[Router]
    maps: tuple[Tensor, Tensor]
    hashed: list[tuple[Router, Tensor]]
    gated: list[tuple[Router, Tensor]]

    @classmethod
    def build(cls, device: str, model: tuple[int, int, int], draw: Draw) -> Bench:
        hidden, experts, k = model
        vocab = 977
        counts = draw.integers(1, 4, experts).int()
        table = draw.integers(0, 2**31 - 1, experts, 3).int()
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
                RouterConfig(hidden, experts, k, (1.5, 1e18, 0.0)[number], sentinel=sentinel),
                weight=weight.bfloat16(),
                bias=biases[0],
                image_bias=biases[1],
                device=device,
            )
            router.set_expert_map(table, counts)
            register_router(router)
            dense.append(router)
        hashed = []
        for sentinel in (-1, -77):
            ids = draw.integers(0, experts, vocab, k)
            config = RouterConfig(
                hidden, experts, k, 1.5, mode="hash", vocab_size=vocab, sentinel=sentinel
            )
            router = Router(config, table=ids, device=device)
            router.set_expert_map(table, counts)
            register_router(router)
            hashed.append((router, ids))
        gated = []
        for sentinel, bias in ((-1, draw.normal(experts)), (-77, draw.floats(1, experts)[0])):
            ids = draw.integers(0, experts, vocab, k)
            router = Router(
                RouterConfig(
                    hidden, experts, k, 2.5, mode="hash_gate", vocab_size=vocab, sentinel=sentinel
                ),
                weight=(draw.normal(experts, hidden) * hidden**-0.5).bfloat16(),
                table=ids,
                image_bias=bias.nan_to_num(0.0, 3e38, -3e38),
                device=device,
            )
            router.set_expert_map(table, counts)
            register_router(router)
            gated.append((router, ids))
        return cls(device, experts, k, hidden, vocab, dense, (table, counts), hashed, gated)

    def close(self) -> None:
        for router in (*self.dense, *(router for router, _ in (*self.hashed, *self.gated))):
            unregister_router(router.router_id, force=True)

    def serving(self, draw: Draw, rows: int, images: bool) -> tuple[dict[str, Any], Tensor | None]:
        """Serving inputs drawn at random, and which rows they make padding."""
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

    # --- one method for each op ---

    def dense_router(self, draw: Draw, rows: int) -> Case:
        router = draw.choose.choice(self.dense)
        keywords, padding = self.serving(draw, rows, images=True)
        logits = draw.choose.random() < 0.3
        return Case(
            "dense_router_logits" if logits else "dense_router",
            [draw.bf16(rows, self.hidden), router.router_id, self.experts, self.k],
            keywords,
            rows,
            self.k,
            self.experts,
            router.config.sentinel,
            padding,
            logits,
            self.maps if draw.choose.random() < 0.3 else None,
            draw.choose.choice((torch.int32, torch.int64)),
        )

    def dense_router_replay(self, draw: Draw, rows: int) -> Case:
        router = draw.choose.choice(self.dense)
        keywords, padding = self.serving(draw, rows, images=False)
        given = draw.ids(self.experts, rows, self.k)
        exists = (given >= 0) & (given < self.experts)
        exact = torch.where(exists, given, router.config.sentinel)
        if padding is not None:
            exact = torch.where(padding.unsqueeze(1), router.config.sentinel, exact)
        return Case(
            "dense_router_replay",
            [draw.bf16(rows, self.hidden), given, router.router_id, self.experts, self.k],
            keywords,
            rows,
            self.k,
            self.experts,
            router.config.sentinel,
            padding,
            distinct=False,
            exact=exact,
        )

    def hash_router(self, draw: Draw, rows: int) -> Case:
        router, table = draw.choose.choice(self.hashed)
        keywords, padding = self.serving(draw, rows, images=False)
        token_ids = draw.ids(self.vocab, rows)
        known = (token_ids >= 0) & (token_ids < self.vocab)
        if padding is not None:
            known = known & ~padding
        looked_up = table[torch.where(known, token_ids, 0).long()]
        return Case(
            "hash_router",
            [token_ids, router.router_id, self.k],
            keywords,
            rows,
            self.k,
            self.experts,
            router.config.sentinel,
            padding,
            mapped=self.maps if draw.choose.random() < 0.3 else None,
            ids_dtype=draw.choose.choice((torch.int32, torch.int64)),
            distinct=False,
            exact=torch.where(known.unsqueeze(1), looked_up, router.config.sentinel),
        )

    def hash_gate(self, draw: Draw, rows: int) -> Case:
        router, table = draw.choose.choice(self.gated)
        keywords, padding = self.serving(draw, rows, images=True)
        token_ids = draw.ids(self.vocab, rows)
        known = (token_ids >= 0) & (token_ids < self.vocab)
        exact = None
        if "image_mask" not in keywords:
            looked_up = table[torch.where(known, token_ids, 0).long()]
            if padding is not None:
                known = known & ~padding
            exact = torch.where(known.unsqueeze(1), looked_up, router.config.sentinel)
        return Case(
            "hash_gate",
            [draw.bf16(rows, self.hidden), token_ids, router.router_id, self.experts, self.k],
            keywords,
            rows,
            self.k,
            self.experts,
            router.config.sentinel,
            padding,
            mapped=self.maps if draw.choose.random() < 0.3 else None,
            ids_dtype=draw.choose.choice((torch.int32, torch.int64)),
            distinct=False,
            exact=exact,
        )

    def activation_topk(self, draw: Draw, rows: int) -> Case:
        experts = draw.choose.choice((self.experts, 7, 33, 300, 1000))
        k = draw.choose.randint(1, min(32, experts))
        keywords, padding = self.serving(draw, rows, images=True)
        sentinel = draw.choose.choice((-1, experts, -(2**31)))
        keywords |= {"image_bias": draw.floats(1, experts)[0], "sentinel": sentinel}
        mapped = None
        if draw.choose.random() < 0.3:
            # Nobody looked at these: counts of any bits are taken for the nearest that exists.
            width = draw.choose.randint(1, 4)
            table = draw.integers(-(2**31), 2**31, experts, width).int()
            counts = draw.ids(width, experts).clamp(-(2**31), 2**31 - 1).int()
            keywords |= {"expert_map": table, "replica_counts": counts}
            mapped = table, counts
        scale = draw.choose.choice((0.0, 1e-30, 1.0, 1.5, 1e18))
        return Case(
            "activation_topk",
            [
                draw.floats(rows, experts),
                draw.floats(1, experts)[0],
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
            ids_dtype=draw.choose.choice((torch.int32, torch.int64)),
        )


OPS = ("dense_router", "dense_router_replay", "hash_router", "hash_gate", "activation_topk")


def select_violations(ops: Any, draw: Draw, rows: int, device: str) -> list[str]:
    """``topk_select`` has no form with the caller's outputs: its input is guarded, its results are
    what was given, in order.
    """
    columns = draw.choose.choice((1, 9, 256, 1024, 1500, 8192) if rows < 2000 else (9, 256, 1024))
    k = draw.choose.randint(1, min(32, columns))
    scores = draw.floats(rows, columns)
    results, problems = [], []
    for pattern in PATTERNS:
        given = Guarded(scores, pattern)
        values, ids = ops.topk_select(given.tensor, k)
        if not bool(given.unchanged()):
            problems.append("topk_select: changed its input")
        results.append((values, ids))
    (values, ids), other = results
    if not same(results[0], other):
        problems.append("topk_select: depends on what it was not given")
    if not bool(((ids >= 0) & (ids < columns)).all()):
        return [*problems, "topk_select: an id is out of range"]
    ordered = ids.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        problems.append("topk_select: an id comes twice")
    picked = scores.view(torch.int32).gather(1, ids.long())
    if not torch.equal(picked, values.view(torch.int32)):
        problems.append("topk_select: a value is not the one at its id")
    ranks = torch.where(values.isnan(), -torch.inf, values)
    if not bool((ranks[:, 1:] <= ranks[:, :-1]).all()):
        problems.append("topk_select: values out of order")
    return problems


def same(found: Any, expected: Any) -> bool:
    """The same bits, of however many tensors."""
    return all(
        (one is None and other is None)
        or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(found, expected, strict=True)
    )


def run(
    device: str,
    rows: int,
    *,
    model: tuple[int, int, int],
    seed: int = 0,
    ops: Any = None,
    largest: int = BATCHES[-1],
) -> dict[str, int]:
    """At least ``rows`` rows through the ops, the same number of batches for each. Returns how many
    each saw. Raises AssertionError for the first call that breaks a promise, with the seed of it.
    """
    ops = torch.ops.dsv4 if ops is None else ops
    draw = Draw(seed, device)
    bench = Bench.build(device, model, draw)
    counts = dict.fromkeys((*OPS, "topk_select"), 0)
    canaries = [draw.normal(5, bench.hidden).bfloat16(), draw.normal(70, bench.hidden).bfloat16()]
    tokens = draw.integers(0, bench.vocab, 9)

    def canary() -> list[Tensor]:
        results: list[Tensor] = []
        for router in bench.dense:
            for x in canaries:
                numbers = (router.router_id, bench.experts, bench.k)
                results += ops.dense_router(x, *numbers)
        results += ops.hash_router(tokens, bench.hashed[0][0].router_id, bench.k)
        return results

    expected = canary()
    try:
        turn = 0
        while sum(counts.values()) < rows:
            turn += 1
            own = Draw(seed * 1_000_003 + turn, device)
            size = own.choose.choice([batch for batch in BATCHES if batch <= largest])
            for name in OPS:
                case = getattr(bench, name)(own, size)
                where = f"seed {seed}, turn {turn}, {case.op}, {size} rows"
                first, problems = case.run(ops, PATTERNS[0], device)
                second, more = case.run(ops, PATTERNS[1], device)
                problems += more
                problems += [f"{case.op}: {text}" for text in case.violations(second)]
                if not same(vars(first).values(), vars(second).values()):
                    problems.append(f"{case.op}: depends on what it was not given, or was before")
                assert not problems, f"{where}: {problems}"
                counts[name] += 2 * size
            problems = select_violations(ops, own, size, device)
            assert not problems, f"seed {seed}, turn {turn}: {problems}"
            counts["topk_select"] += 2 * size
            assert same(canary(), expected), f"seed {seed}, turn {turn}: a later call is affected"
    finally:
        bench.close()
    return counts


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, help="Rows over all ops, at least.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option(
    "--model", nargs=3, default=(4096, 256, 6), show_default=True, help="hidden, experts, k"
)
def main(rows: int, seed: int, device: str, model: tuple[int, int, int]) -> None:
    """Any bits into every op; exits with an AssertionError if a promise is broken."""
    largest = BATCHES[-1] if rows > 100_000 else 129
    counts = run(device, rows, model=model, seed=seed, largest=largest)
    for name, count in counts.items():
        click.echo(f"{name:<24}{count:>12} rows")
    click.echo(f"{'all':<24}{sum(counts.values()):>12} rows, every promise kept")


if __name__ == "__main__":
    main()
