"""hash_gate: the oracle through Router and op, one reduction order, tables, capture, updates."""

from __future__ import annotations

import math

import pytest
import torch

from router_runtime import Router, RouterConfig, register_router, spec, unregister_router
from router_runtime.evidence import cases as suite
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.judge import judge
from router_runtime.verification.prng import Random
from router_runtime.verification.reference import Oracle

#: As many rows as the largest batch; every batch is made of some of them.
POOL = 16384
SIZES = (*range(1, 131), 1024, 4096, POOL)
VOCAB = 5003


def draw_weight(model, seed=1):
    hidden, experts, _ = model
    return (Random(seed).normal(experts, hidden) * 2.0**-6).bfloat16()


def draw_table(model, seed=2, vocab=VOCAB):
    _, experts, top_k = model
    return Random(seed).integers(0, experts, vocab, top_k)


def make_gate(model, seed=1, table=None, variants=None, **options):
    hidden, experts, top_k = model
    table = draw_table(model) if table is None else table
    config = RouterConfig(
        hidden, experts, top_k, 1.5, mode="hash_gate", vocab_size=len(table), **options
    )
    weight = draw_weight(model, seed)
    return Router(config, weight=weight, table=table, device="cuda", variants=variants)


@pytest.fixture(scope="module")
def pool(gate_models):
    """By hidden size: rows, a token id for each, drawn once."""
    made = {}
    for hidden, *_ in gate_models:
        generator = torch.Generator("cuda").manual_seed(hidden)
        x = torch.randn(POOL, hidden, device="cuda", generator=generator).bfloat16()
        token_ids = torch.randint(VOCAB, (POOL,), device="cuda", generator=generator)
        token_ids[::97] = -1
        token_ids[5::97] = VOCAB
        made[hidden] = x, token_ids
    return made


def routers(model):
    """The product, and every entry that serves in it alone, dense ones included."""
    product = make_gate(model)
    yield product
    for kernel, variant in sorted(
        {(e.entry.kernel, e.entry.variant) for e in product.token_ranges}
    ):
        yield make_gate(model, variants={kernel: variant})


def differing(found, expected):
    return sum(
        (a.view(torch.int32) != b.view(torch.int32)).sum()
        for a, b in zip(found, expected, strict=True)
    )


def test_oracle(gate_models):
    """Every case of the suite, with and without serving inputs, through Router and op."""
    for hidden, experts, top_k in gate_models:
        constants = {"HIDDEN": hidden, "EXPERTS": experts, "TOP_K": top_k, "IMAGES": 1}
        for case in suite.cases("hash_gate", constants, {"tokens": (1, 1000)}):
            given = make_inputs(case)
            image_bias = given.get("image_bias")
            if image_bias is not None and not image_bias.isfinite().all():
                continue  # a Router refuses such a bias; the kernels are verified with it
            config = RouterConfig(
                *(hidden, experts, top_k, case.scale),
                mode="hash_gate",
                vocab_size=case.sizes["vocab"],
                renormalize=bool(given["renormalize"]),
                sentinel=given["sentinel"],
            )
            router = Router(
                config,
                **{name: given.get(name) for name in ("weight", "table", "image_bias")},
                device="cuda",
            )
            router_id = register_router(router)
            rows = given["hidden_states"]
            wide = rows.new_empty(rows.shape[0], max(rows.stride(0), hidden)).cuda()
            x = wide[:, :hidden].copy_(rows)
            inputs = {
                name: given[name].cuda()
                for name in ("is_padding", "num_valid_tokens", "image_mask", "given_ids")
                if name in given
            }
            if given.get("wide_ids"):
                inputs["ids_dtype"] = torch.int64
            routed, form = router.forward, torch.ops.dsv4.hash_gate.default
            if "expert_map" in given:
                order = {name: given[name] for name in ("replica_start", "replica_step")}
                router.set_expert_map(given["expert_map"], given["replica_counts"], **order)
                routed, form = router.forward_mapped, torch.ops.dsv4.hash_gate.mapped
            token_ids = given["token_ids"].cuda()
            for found in (
                routed(x, token_ids, **inputs),
                form(x, token_ids, router_id, experts, top_k, **inputs),
            ):
                weights, ids, *logical = (output.cpu() for output in found)
                logical_ids = logical[0] if logical else None
                verdict = judge(Oracle(case, given), weights, ids, logical_ids=logical_ids)
                assert not verdict.problems, f"{case.name}: {verdict.problems}"
            unregister_router(router_id)


def test_every_batch_size(gate_models, pool):
    """Zero differing bits, at the ends of the pool and at odd places in it."""
    for model in gate_models:
        x, token_ids = pool[model[0]]
        expected = make_gate(model)(x, token_ids)
        for router in routers(model):
            count = torch.zeros((), dtype=torch.int64, device="cuda")
            for size in SIZES:
                last = POOL - size
                for start in sorted({0, last, *(at for at in (1, 77, 5003) if at <= last)}):
                    rows = slice(start, start + size)
                    found = router(x[rows], token_ids[rows])
                    count += differing(found, [output[rows] for output in expected])
            assert int(count) == 0, router.token_ranges


def test_dense_router_with_the_given_experts_has_the_same_bits(gate_models, pool):
    """Both add a logit in one order, so which kernel weighs the experts changes no bit."""
    for model in gate_models:
        hidden, experts, top_k = model
        x, token_ids = pool[hidden]
        dense = Router(
            RouterConfig(hidden, experts, top_k, 1.5),
            weight=draw_weight(model),
            bias=torch.zeros(experts),
            device="cuda",
        )
        for gate in routers(model):
            for size in (1, 5, 64, 200, 1024, 4096):
                found = gate(x[:size], token_ids[:size])
                assert (found[1] == -1).any() or size < 98
                expected = dense(x[:size], given_ids=found[1])
                assert int(differing(found, expected)) == 0, (gate.token_ranges, size)


def test_neighbours_that_are_not_finite(gate_models, pool):
    for model in gate_models:
        x, token_ids = pool[model[0]]
        for router in routers(model):
            expected = router(x, token_ids)
            count = torch.zeros((), dtype=torch.int64, device="cuda")
            for size in (2, 3, 8, 64, 130, 1024, POOL):
                batch = x[:size].clone()
                batch[1::4] = math.nan
                batch[3::4] = math.inf
                batch[3::8, ::2] = -math.inf
                found = router(batch, token_ids[:size])
                count += differing(
                    [output[::2] for output in found], [output[:size:2] for output in expected]
                )
                assert found[0].isfinite().all()
                assert (found[0] >= 0).all()
            assert int(count) == 0


def test_the_pool_is_right(gate_models, pool):
    """The bits that everything is compared with are those of a correct router."""
    for model in gate_models:
        x, token_ids = (part[:2000] for part in pool[model[0]])
        found = make_gate(model)(x, token_ids)
        weight, table = draw_weight(model).cuda(), draw_table(model).cuda()
        expected = spec.hash_gate(x, token_ids, weight, table, 1.5)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
        outside = (token_ids < 0) | (token_ids >= VOCAB)
        assert outside.any()
        assert (found[1][outside] == -1).all()
        assert (found[0].view(torch.int32)[outside] == 0).all()


def test_tables_of_both_widths_and_all_token_ids(gate_models):
    model = gate_models[0]
    hidden, _, top_k = model
    for vocab in (1, 7, 129280):
        table = draw_table(model, 3, vocab)
        narrow, wide = make_gate(model, table=table.int()), make_gate(model, table=table)
        edges = [0, vocab - 1, vocab, -1, 2**31 - 1, -(2**31)]
        token_ids = torch.tensor(edges * 5, dtype=torch.int32, device="cuda")
        x = Random(4).normal(len(token_ids), hidden).bfloat16().cuda()
        expected = narrow(x, token_ids)
        assert int(differing(wide(x, token_ids.long()), expected)) == 0
        assert int(differing(wide(x.repeat_interleave(2, 0)[::2], token_ids), expected)) == 0
        assert torch.equal(expected[1][:2].cpu(), table[[0, vocab - 1]].int())
        assert (expected[1].view(5, 6, top_k)[:, 2:] == -1).all()
        # Their low words are ids of the vocabulary.
        beyond = token_ids.long() + 2**32
        beyond[3::6], beyond[5::6] = 2**63 - 1, -(2**63)
        assert (wide(x, beyond)[1] == -1).all()


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_capture_and_new_weights(tokens, gate_models, pool):
    """A replay reads what its inputs and the router's weights hold by then."""
    for model in gate_models:
        x, token_ids = (part[:tokens].clone() for part in pool[model[0]])
        router, other = make_gate(model), make_gate(model, seed=9)
        router.warmup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = router(x, token_ids)
        for new_x, new_ids in ((x, token_ids), (-x, token_ids), (-x, token_ids + 1)):
            x.copy_(new_x)
            token_ids.copy_(new_ids)
            for output in outputs:
                output.fill_(-12345)
            graph.replay()
            torch.cuda.synchronize()
            assert int(differing(outputs, router(x, token_ids))) == 0
        router.update_weights(weight=draw_weight(model, 9))
        graph.replay()
        torch.cuda.synchronize()
        assert int(differing(outputs, other(x, token_ids))) == 0


@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile(gate_models, pool):
    model = gate_models[0]
    _, experts, top_k = model
    gates = [make_gate(model, seed) for seed in range(1, 13)]
    ids = [register_router(router) for router in gates]
    x, token_ids = (part[:5] for part in pool[model[0]])
    op = torch.ops.dsv4.hash_gate.default
    torch.library.opcheck(op, (x, token_ids, ids[0], experts, top_k))
    torch.library.opcheck(op, (x[:0], token_ids[:0].int(), ids[0], experts, top_k))
    torch._dynamo.reset()
    layer = torch.compile(
        lambda x, token_ids, number: op(x, token_ids, number, experts, top_k),
        fullgraph=True,
        backend="aot_eager",
    )
    for number, router in zip(ids, gates, strict=True):
        found = layer(x, token_ids, number)
        assert int(differing(found, router(x, token_ids))) == 0
        unregister_router(number)
