"""What engines pass in: the suite's serving cases through the Router and the ops, and what only a
whole router shows: replay bit for bit, invariance, graphs, the caller's own outputs.
"""

from __future__ import annotations

import pytest
import torch

from router_runtime import Router, RouterConfig, register_router, unregister_router
from router_runtime.evidence import cases as suite
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.judge import judge
from router_runtime.verification.prng import Random
from router_runtime.verification.reference import Oracle
from tests.gpu.each_kernel import each_kernel
from tests.gpu.graphs import captured

#: Around every boundary between the kernels and their tiles.
SIZES = (1, 2, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256, 257, 1024, 1025, 4096)
POOL = max(SIZES)
ignore_warnings = pytest.mark.filterwarnings("ignore")


def inputs_of(given):
    """The keyword arguments of a call for a case's inputs, on the GPU."""
    names = ("is_padding", "num_valid_tokens", "image_mask")
    inputs = {name: given[name].cuda() for name in names if name in given}
    return inputs | {"ids_dtype": torch.int64 if given["wide_ids"] else torch.int32}


def order_of(given):
    """The order in which rows take the copies of an expert, in a case with an expert map."""
    return {name: given[name] for name in ("replica_start", "replica_step")}


def outputs_of(given, tokens, k):
    """The caller's own tensors for a case, poisoned."""
    integers = torch.int64 if given["wide_ids"] else torch.int32
    outputs = {
        "weights_out": torch.full((tokens, k), torch.nan, device="cuda"),
        "ids_out": torch.full((tokens, k), -99, dtype=integers, device="cuda"),
    }
    if "expert_map" in given:
        outputs["logical_ids_out"] = torch.full_like(outputs["ids_out"], -99)
    return outputs


def check(case, given, weights, ids, logical=None):
    more = {} if logical is None else {"logical_ids": logical.cpu()}
    verdict = judge(Oracle(case, given), weights.cpu(), ids.cpu(), **more)
    assert not verdict.problems, f"{case.name}: {verdict.problems}"


def served(cases):
    found = [case for case in cases if case.serving]
    assert {name for case in found for name in case.serving} >= {"padding", "count", "map", "wide"}
    return found


def test_dense_router(models):
    for hidden, experts, top_k in models:
        constants = {"HIDDEN": hidden, "EXPERTS": experts, "TOP_K": top_k}
        for case in served(suite.cases("dense_router_decode", constants, {"tokens": (1, 1000)})):
            if "table" in case.serving:
                continue  # of a hash layer, whose Router has another mode: test_hash_gate_gpu.py
            given = make_inputs(case)
            renormalize = bool(given["renormalize"])
            config = RouterConfig(
                hidden, experts, top_k, case.scale, renormalize=renormalize, sentinel=-7
            )
            tensors = {
                name: given[name] for name in ("weight", "bias", "image_bias") if name in given
            }
            router = Router(config, **tensors, device="cuda")
            if "expert_map" in given:
                router.set_expert_map(
                    given["expert_map"], given["replica_counts"], **order_of(given)
                )
            x, inputs = given["hidden_states"].cuda(), inputs_of(given)
            if "given_ids" in given:
                replayed = given["given_ids"].cuda()
                if "expert_map" not in given:
                    check(case, given, *router.replay(x, replayed, **inputs))
            else:
                replayed = None
                call = router.forward_mapped if "expert_map" in given else router
                check(case, given, *call(x, **inputs))
            outputs = outputs_of(given, case.sizes["tokens"], top_k)
            inputs.pop("ids_dtype")
            router.forward_out(x, **outputs, given_ids=replayed, **inputs)
            check(case, given, *outputs.values())


def test_hash_router():
    for case in served(suite.cases("hash_router", {}, {"top_k": (1, 32)})):
        given = make_inputs(case)
        experts, top_k, vocab = (case.sizes[name] for name in ("experts", "top_k", "vocab"))
        config = RouterConfig(
            64, experts, top_k, 1.5, mode="hash", vocab_size=vocab, sentinel=given["sentinel"]
        )
        router = Router(config, table=given["table"], device="cuda")
        token_ids = given["token_ids"].cuda()
        call = router
        if "expert_map" in given:
            router.set_expert_map(given["expert_map"], given["replica_counts"], **order_of(given))
            call = router.forward_mapped
        check(case, given, *call(token_ids, **inputs_of(given)))


def test_activation_topk():
    limits = {"experts": (1, 1024), "top_k": (1, 32)}
    for case in served(suite.cases("activation_topk", {}, limits)):
        given = make_inputs(case)
        inputs = inputs_of(given) | {"sentinel": given["sentinel"]}
        names = ("image_bias", "expert_map", "replica_counts")
        inputs |= {name: given[name].cuda() for name in names if name in given}
        inputs |= order_of(given) if "expert_map" in given else {}
        packet, chosen = torch.ops.dsv4.activation_topk, (given["bias"].cuda(), given["top_k"])
        if "given_ids" in given:
            packet, chosen = torch.ops.dsv4.activation_topk_replay, (given["given_ids"].cuda(),)
        op = packet.mapped if "expert_map" in given else packet.default
        last = given["scale"], bool(given["renormalize"])
        check(case, given, *op(given["logits"].cuda(), *chosen, *last, **inputs))


# --- one router, every kernel that can serve it ---------------------------------------------------


class Subject:
    def __init__(self, router):
        self.router = router
        config = router.config
        random = Random(config.hidden_size)
        self.pool = random.normal(POOL, config.hidden_size).bfloat16().cuda()
        self.images = (random.integers(0, 3, POOL) == 0).cuda()
        self.padding = (random.integers(0, 5, POOL) == 0).cuda()
        self.plain = router(self.pool)
        self.mixed = router(self.pool, image_mask=self.images)


@pytest.fixture(scope="module")
def subjects(models, make_router):
    found = []
    for model in models:
        experts = model[1]
        image_bias = Random(7).normal(experts) * 0.5
        router = make_router(model=model, image_bias=image_bias)
        random = Random(8)
        expert_map = random.integers(0, 1000, experts, 4)
        router.set_expert_map(expert_map, random.integers(1, 5, experts))
        found.append(Subject(router))
    return found


def test_image_tokens_alone_change(subjects):
    for subject in subjects:
        weights, ids = subject.mixed
        others = ~subject.images
        assert torch.equal(ids[others], subject.plain[1][others])
        assert torch.equal(weights[others], subject.plain[0][others])
        assert (ids != subject.plain[1]).any(dim=1)[subject.images].float().mean() > 0.5


def test_replay_is_the_selection_bit_for_bit(subjects, same):
    for subject in subjects:
        weights, ids = subject.plain
        for kernel in each_kernel(subject.router):
            for size in SIZES:
                rows = slice(POOL - size, POOL)
                for given in (ids[rows], ids[rows].long()):
                    found = subject.router.replay(subject.pool[rows], given)
                    same(found, (weights[rows], ids[rows]))
            assert kernel
        # In another order the same scores, summed in that order.
        found = subject.router.replay(subject.pool, ids.flip(1))
        torch.testing.assert_close(found[0].flip(1), weights, rtol=1e-6, atol=0)


def test_invariance_among_images_and_padding(subjects, same):
    for subject in subjects:
        weights, ids = subject.mixed
        for _kernel in each_kernel(subject.router):
            for size in SIZES:
                for start in {0, (POOL - size) // 2, POOL - size}:
                    rows = slice(start, start + size)
                    padding = subject.padding[rows]
                    found = subject.router(
                        subject.pool[rows], image_mask=subject.images[rows], is_padding=padding
                    )
                    assert (found[1][padding] == -1).all()
                    assert not found[0].view(torch.int32)[padding].any()
                    kept = (weights[rows][~padding], ids[rows][~padding])
                    same((found[0][~padding], found[1][~padding]), kept)


def test_served_and_plain_calls_in_turn(subjects, same):
    """No call leaves anything behind for the next: tickets and candidates are zero again."""
    for subject in subjects:
        padding = torch.ones(POOL, dtype=torch.bool, device="cuda")
        for _kernel in each_kernel(subject.router):
            for size in (1, 8, 64, 129):
                rows = slice(0, size)
                x, expected = subject.pool[rows], (subject.plain[0][rows], subject.plain[1][rows])
                for _ in range(3):
                    subject.router(x, is_padding=padding[rows])
                    subject.router.replay(x, subject.plain[1][rows])
                    subject.router(x, image_mask=subject.images[rows])
                    same(subject.router(x), expected)


def test_mapped_ids_follow_the_logical_ones(subjects, same):
    for subject in subjects:
        router = subject.router
        expert_map, counts = router.expert_map[:2]
        for _kernel in each_kernel(subject.router):
            for size in SIZES:
                x = subject.pool[:size]
                weights, physical, logical = router.forward_mapped(x)
                same((weights, logical), (subject.plain[0][:size], subject.plain[1][:size]))
                chosen = logical.long()
                row = torch.arange(size, device="cuda").unsqueeze(1)
                replica = row % counts[chosen]
                assert torch.equal(physical, expert_map[chosen, replica])


def test_layouts(subjects, same):
    """Strided masks, ids and hidden states."""
    for subject in subjects:
        router = subject.router
        for size in (5, 64, 200):
            rows = slice(0, size)
            x, images = subject.pool[rows], subject.images[rows]
            wide = torch.full((size, x.shape[1] + 8), torch.nan, dtype=x.dtype, device="cuda")
            wide[:, 8:] = x
            twice = images.repeat_interleave(2)[::2]
            expected = (subject.mixed[0][rows], subject.mixed[1][rows])
            same(router(wide[:, 8:], image_mask=twice), expected)
            ids = subject.plain[1][rows]
            expected = (subject.plain[0][rows], ids)
            same(router.replay(wide[:, 8:], ids.T.contiguous().T), expected)


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
def test_a_graph_replayed_with_another_count(tokens, subjects, same):
    for subject in subjects:
        x, images = subject.pool[:tokens], subject.images[:tokens]
        count = torch.tensor([tokens], dtype=torch.int32, device="cuda")

        def call(router=subject.router, x=x, images=images, count=count):
            return router.forward_mapped(x, num_valid_tokens=count, image_mask=images)

        graph, (weights, physical, logical) = captured(call)
        for valid in sorted({0, 1, tokens // 2, tokens, tokens + 5, -1}):
            count.fill_(valid)
            for output in (weights, physical, logical):
                output.fill_(-12345)
            graph.replay()
            kept = max(0, min(valid, tokens))
            same(
                (weights[:kept], logical[:kept]),
                (subject.mixed[0][:kept], subject.mixed[1][:kept]),
            )
            assert (physical[kept:] == -1).all()
            assert (logical[kept:] == -1).all()
            assert not weights[kept:].any()


@pytest.mark.parametrize("tokens", [3, 300])
def test_an_expert_map_updated_under_a_captured_graph(tokens, make_router, draw, models):
    router = make_router()
    experts = models[0][1]
    first = torch.arange(experts).unsqueeze(1).repeat(1, 2)
    counts = torch.full((experts,), 2)
    router.set_expert_map(first, counts)
    x = draw(tokens, router.config.hidden_size)
    graph, (_, physical, logical) = captured(lambda: router.forward_mapped(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(physical, logical)
    router.update_expert_map(first + 1000, counts)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(physical, logical + 1000)
    with pytest.raises(ValueError, match="expected"):
        router.update_expert_map(first, counts + 1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(physical, logical + 1000)


# --- the caller's outputs, and torch's own checks -------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_out(tokens, integers, subjects, same):
    for subject in subjects:
        router, config = subject.router, subject.router.config
        k, experts = config.top_k, config.num_experts
        x = subject.pool[:tokens]
        router_id = register_router(router)
        # The memory around them must not change.
        words = torch.full((tokens + 2, k), torch.nan, device="cuda")
        numbers = torch.full((tokens + 2, k), -99, dtype=integers, device="cuda")
        outputs = {"weights_out": words[1:-1], "ids_out": numbers[1:-1]}
        numbers_of = (router_id, experts, k)
        result = torch.ops.dsv4.dense_router.out(x, *numbers_of, **outputs)
        assert result is None
        rows = slice(0, tokens)
        same((words[1:-1], numbers[1:-1].int()), (subject.plain[0][rows], subject.plain[1][rows]))
        assert words[[0, -1]].isnan().all()
        assert (numbers[[0, -1]] == -99).all()
        logits = torch.full((tokens, experts), torch.nan, device="cuda")
        torch.ops.dsv4.dense_router_logits.out(x, *numbers_of, **outputs, logits_out=logits)
        same((logits, numbers[1:-1]), (router.forward_with_logits(x)[2], numbers[1:-1]))
        words.fill_(torch.nan)
        ids = subject.plain[1][rows].to(integers)
        torch.ops.dsv4.dense_router_replay.out(x, ids, *numbers_of, **outputs)
        same((words[1:-1], numbers[1:-1].int()), (subject.plain[0][rows], subject.plain[1][rows]))
        # The subjects were captured by tests before this one; those graphs are gone.
        unregister_router(router_id, force=True)


@ignore_warnings
@pytest.mark.parametrize("tokens", [3, 70])
def test_opcheck(tokens, subjects):
    subject = subjects[0]
    router, config = subject.router, subject.router.config
    router_id = register_router(router)
    x, images, padding = (t[:tokens] for t in (subject.pool, subject.images, subject.padding))
    inputs = {"is_padding": padding, "ids_dtype": torch.int64}
    numbers = (router_id, config.num_experts, config.top_k)
    ops = torch.ops.dsv4
    for op in (ops.dense_router, ops.dense_router_logits):
        for form in (op.default, op.mapped):
            torch.library.opcheck(form, (x, *numbers), {**inputs, "image_mask": images})
    ids = subject.plain[1][:tokens]
    torch.library.opcheck(ops.dense_router_replay.default, (x, ids, *numbers), inputs)
    outputs = outputs_of({"wide_ids": 1, "expert_map": 1}, tokens, config.top_k)
    outputs = {name: torch.zeros_like(output) for name, output in outputs.items()}
    torch.library.opcheck(ops.dense_router.out, (x, *numbers), {"is_padding": padding, **outputs})
    unregister_router(router_id, force=True)
