"""The ops inside torch: opcheck, torch.compile, CUDA graphs, streams, memory."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch._dynamo.utils import counters

from router_runtime import (
    Router,
    RouterConfig,
    register_router,
    unregister_router,
    warmup_router_compilation,
)
from router_runtime.verification.prng import Random
from tests.gpu.graphs import captured

#: A deep model: one router a layer.
LAYERS = 61

# torch's own tools warn about themselves; what they check is asserted.
ignore_warnings = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def registered(make_router):
    """Registered dense routers, unregistered afterwards."""
    ids = []

    def make(count, **options):
        routers = [make_router(seed, **options) for seed in range(10, 10 + count)]
        ids.extend(register_router(router) for router in routers)
        return routers

    yield make
    for router_id in ids:
        unregister_router(router_id)


def lookup_router(seed=1, vocab=100, top_k=6):
    table = Random(seed).integers(0, 32, vocab, top_k).int()
    config = RouterConfig(64, 32, top_k, 1.0, mode="hash", vocab_size=vocab)
    return Router(config, table=table, device="cuda")


@ignore_warnings
@pytest.mark.parametrize("tokens", [0, 3, 70])
def test_opcheck(tokens, registered, draw):
    (router,) = registered(1)
    config = router.config
    x = draw(tokens, config.hidden_size)
    lookup = lookup_router()
    lookup_id = register_router(lookup)
    scores, bias = Random(3).normal(tokens, 256).cuda(), Random(4).normal(256).cuda()
    token_ids = Random(5).integers(-5, 105, tokens).cuda()
    ops = torch.ops.dsv4
    arguments = (router.router_id, config.num_experts, config.top_k)
    torch.library.opcheck(ops.dense_router.default, (x, *arguments))
    torch.library.opcheck(ops.dense_router_logits.default, (x, *arguments))
    torch.library.opcheck(ops.hash_router.default, (token_ids, lookup_id, 6))
    torch.library.opcheck(ops.hash_router.default, (token_ids.int(), lookup_id, 6))
    torch.library.opcheck(ops.topk_select.default, (scores, 6))
    torch.library.opcheck(ops.activation_topk.default, (scores, bias, 6, 1.5, True))
    unregister_router(lookup_id)


@ignore_warnings
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_compiled_layer_serves_every_router(backend, registered, draw, same):
    from torch._dynamo.testing import CompileCounterWithBackend

    if backend == "inductor":
        pytest.importorskip("triton", reason="inductor needs triton")
    torch._dynamo.reset()
    routers = registered(LAYERS)
    config = routers[0].config
    experts, top_k = config.num_experts, config.top_k
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def layer(x, router_id):
        weights, ids = torch.ops.dsv4.dense_router(x, router_id, experts, top_k)
        return weights, ids

    x = draw(4, config.hidden_size)
    for router in routers:
        same(layer(x, router.router_id), router(x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def replayed(graph, outputs):
    for output in outputs:
        output.fill_(-12345)
    graph.replay()
    torch.cuda.synchronize()
    return outputs


class Layer(torch.nn.Module):
    """A layer that holds its router. What it adds is exact, so that nothing but routing can differ
    between eager and compiled.
    """

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        weights, ids = self.router(x)
        x = torch.where(ids[:, :1] % 2 == 0, x.flip(1), -x)
        return torch.where(weights[:, :1] > 2 * weights[:, 1:2], -x, x), weights, ids


class Model(torch.nn.Module):
    """Layers that are alike, each of which reads what the one before it returned."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x, weights, ids = layer(x)
        return x, weights, ids


@pytest.fixture
def make_layers(models):
    """Layers of the largest model, whose decode kernel needs a workspace. What a graph captures
    stays registered, so it is unregistered at the end.
    """
    torch._dynamo.reset()
    made = []

    def make(count):
        hidden, experts, top_k = models[-1]
        config = RouterConfig(hidden, experts, top_k, 1.5)
        for seed in range(count):
            generator = torch.Generator("cuda").manual_seed(seed)
            weight = torch.randn(experts, hidden, generator=generator, device="cuda") * 2.0**-6
            bias = torch.randn(experts, generator=generator, device="cuda") * 0.125
            made.append(Layer(Router(config, weight=weight.bfloat16(), bias=bias, device="cuda")))
        return made[-count:]

    yield make
    torch._dynamo.reset()
    for layer in made:
        if layer.router.is_registered:
            unregister_router(layer.router.router_id, force=True)
    made.clear()
    gc.collect()


def per_layer(mode):
    """A step of a model whose layers are called through one compiled function."""

    @torch.compile(fullgraph=True, mode=mode)
    def call(layer, x):
        return layer(x)

    def step(model, x):
        torch.compiler.cudagraph_mark_step_begin()
        for layer in model.layers:
            x, weights, ids = call(layer, x)
        return [result.clone() for result in (x, weights, ids)]

    return step


def whole(mode):
    """A step of a model that is compiled as a whole."""
    compiled = {}

    def step(model, x):
        if model not in compiled:
            compiled[model] = torch.compile(model, fullgraph=True, mode=mode)
        torch.compiler.cudagraph_mark_step_begin()
        return [result.clone() for result in compiled[model](x)]

    return step


WAYS = pytest.mark.parametrize("way", [per_layer, whole])


@ignore_warnings
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@WAYS
def test_compiled_models_are_right(way, mode, make_layers, draw, same):
    """In two graphs at most; with other weights and with another batch too."""
    pytest.importorskip("triton", reason="inductor needs triton")
    counters.clear()
    model, step = Model(make_layers(LAYERS)), way(mode)
    hidden = model.layers[0].router.config.hidden_size
    for tokens in (4, 9):
        for seed in (5, 6, 7, 8):
            x = draw(tokens, hidden, seed)
            expected, found = model(x), step(model, x)
            same(found[1:], expected[1:])
            assert torch.equal(found[0], expected[0])
        other = model.layers[3].router
        other.update_weights(weight=model.layers[4].router.weight.roll(1, 0))
        x = draw(tokens, hidden, 9)
        same(step(model, x)[1:], model(x)[1:])
    assert counters["stats"]["unique_graphs"] <= 2


class PlainRouter(torch.nn.Module):
    """A stand-in without any kernel of ours: it has a buffer of its own, as a Router has, and its
    results have the shapes and dtypes of a Router's.
    """

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x):
        weights = x[:, :6].float() * self.scale
        return weights, weights.int()


def growth(model, step, x):
    """Bytes that torch's allocator has reserved for five steps, after an eager call."""
    model(x)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(5):
        step(model, x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - before


@ignore_warnings
@WAYS
def test_memory_of_cuda_graphs_does_not_grow_with_the_routers(way, make_layers, draw):
    """Beyond their weights, which are there before, and beyond what torch itself takes: it records
    a CUDA graph for each layer that is called through one compiled function, as for any module
    with tensors of its own.
    """
    pytest.importorskip("triton", reason="inductor needs triton")
    grown = {}
    for count in (2, 8, LAYERS):  # the first also takes what torch allocates once a process
        torch._dynamo.reset()
        model, step = Model(make_layers(count)), way("reduce-overhead")
        x = draw(4, model.layers[0].router.config.hidden_size)
        routers = growth(model, step, x)
        # Or else no CUDA graph was made, and nothing was measured.
        assert all(layer.router.is_captured for layer in model.layers)
        torch._dynamo.reset()
        scales = torch.ones(count, 6, device="cuda").unbind()
        plain = Model([Layer(PlainRouter(scale.clone())) for scale in scales])
        grown[count] = routers, growth(plain, way("reduce-overhead"), x)
    print(f"bytes for routers and for stand-ins, by the number of layers: {grown}")
    for count in (8, LAYERS):
        routers, stand_ins = grown[count]
        assert routers <= stand_ins + 4 * 2**20


@ignore_warnings
def test_export(make_layers, draw, same):
    model = Model(make_layers(3))
    hidden = model.layers[0].router.config.hidden_size
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, (draw(4, hidden),), dynamic_shapes=({0: tokens},))
    run = program.module()
    for count in (4, 9, 300):
        x = draw(count, hidden, count)
        same(run(x)[1:], model(x)[1:])


@pytest.mark.parametrize("tokens", [4, 70])
def test_a_copy_and_a_loaded_state_are_right(tokens, make_router, draw, same):
    """Also in a graph that was captured before."""
    router, other = make_router(1), make_router(99)
    x = draw(tokens, router.config.hidden_size)
    graph, outputs = captured(lambda: router(x))
    copied, expected = copy.deepcopy(router), router(x)
    same(copied(x), expected)
    router.load_state_dict(other.state_dict())
    same(replayed(graph, outputs), other(x))
    same(copied(x), expected)
    router.load_state_dict(copied.state_dict())
    same(replayed(graph, outputs), expected)
    unregister_router(router.router_id, force=True)


@pytest.mark.parametrize("streams", [1, 2])
def test_graphs_of_many_routers_share_workspaces(streams, models, make_router, draw, same):
    """One capture of several routers, on one stream or forked to two; replayed beside another."""
    routers = [make_router(seed, models[-1]) for seed in range(40, 44)]
    x = draw(4, models[-1][0])
    expected = [router(x) for router in routers]

    def call():
        others = [torch.cuda.Stream() for _ in range(streams - 1)]
        here = torch.cuda.current_stream()
        for other in others:
            other.wait_stream(here)
        results = []
        for index, router in enumerate(routers):
            with torch.cuda.stream([here, *others][index % streams]):
                results.append(router(x))
        for other in others:
            here.wait_stream(other)
        return results

    graphs = [captured(call) for _ in range(2)]
    sides = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(200):
        for side, (graph, _) in zip(sides, graphs, strict=True):
            with torch.cuda.stream(side):
                graph.replay()
    torch.cuda.synchronize()
    for _, results in graphs:
        for found, wanted in zip(results, expected, strict=True):
            same(found, wanted)
    for router in routers:
        unregister_router(router.router_id, force=True)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 300])
def test_graph_of_a_dense_router(tokens, make_router, draw, same):
    router = make_router()
    warmup_router_compilation(router)
    hidden = router.config.hidden_size
    x = draw(tokens, hidden)
    graph, outputs = captured(lambda: router(x), warmups=2)
    for seed in (5, 6, 7):
        x.copy_(draw(tokens, hidden, seed))
        expected = router(x)
        same(replayed(graph, outputs), expected)
        same(replayed(graph, outputs), expected)


def test_graph_of_the_other_ops(make_router, draw, same):
    lookup = lookup_router()
    scores, bias = Random(3).normal(33, 256).cuda(), Random(4).normal(256).cuda()
    token_ids = Random(5).integers(-5, 105, 33).cuda()

    def select():
        return torch.ops.dsv4.topk_select(scores, 6)

    def activate():
        return torch.ops.dsv4.activation_topk(scores, bias, 6, 1.5, True)

    router = make_router()
    x = draw(70, router.config.hidden_size)

    def with_logits():
        weights, ids, logits = router.forward_with_logits(x)
        return weights, ids, logits

    for call in (select, activate, lambda: lookup(token_ids), with_logits):
        graph, outputs = captured(call, warmups=2)
        scores.copy_(scores.flip(0))
        token_ids.copy_(token_ids.flip(0))
        x.copy_(x.flip(0))
        same(replayed(graph, outputs), call())


@pytest.mark.parametrize("tokens", [3, 100])
def test_update_weights_under_a_captured_graph(tokens, make_router, draw, same):
    router, other = make_router(1), make_router(99)
    hidden, experts = router.config.hidden_size, router.config.num_experts
    x = draw(tokens, hidden)
    graph, outputs = captured(lambda: router(x), warmups=2)
    before = [output.clone() for output in replayed(graph, outputs)]
    random = Random(99)  # the weights of ``other``
    weight = (random.normal(experts, hidden) * 2.0**-6).bfloat16()
    bias = random.normal(experts) * 0.125
    router.update_weights(weight=weight, bias=bias)
    after = [output.clone() for output in replayed(graph, outputs)]
    same(after, other(x))
    assert not torch.equal(before[1], after[1])
    # A bias alone: large for one expert, so it must come first for every token.
    bias[7] = 50.0
    router.update_weights(bias=bias)
    assert (replayed(graph, outputs)[1][:, 0] == 7).all()


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_one_router_on_two_streams(tokens, make_router, draw, same):
    router = make_router()
    inputs = [draw(tokens, router.config.hidden_size, seed) for seed in (5, 6)]
    expected = [router(x) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = ([], [])
    for _ in range(200):
        for stream, x, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(router(x))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected, strict=True):
        for result in results:
            same(result, wanted)


def test_two_graphs_of_one_router_at_once(make_router, draw, same):
    router = make_router()
    inputs = [draw(8, router.config.hidden_size, seed) for seed in (5, 6)]
    expected = [router(x) for x in inputs]
    graphs = [captured(lambda x=x: router(x), warmups=2) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (graph, _outputs) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outputs), wanted in zip(graphs, expected, strict=True):
        same(outputs, wanted)


def test_a_chain_of_routers(make_router, draw, same):
    """Back-to-back launches that may overlap (programmatic dependent launch), each reading what the
    previous one wrote.
    """
    routers = [make_router(seed) for seed in range(20, 28)]
    hidden = routers[0].config.hidden_size

    def chain(x, settle):
        results = []
        for router in routers:
            weights, ids = router(x)
            settle()
            x = x.clone()
            x[:, 0] = weights[:, 0].bfloat16()
            x[:, 1] = ids[:, 0].bfloat16()
            settle()
            results.append((weights, ids))
        return results

    for tokens in (1, 7, 64):
        x = draw(tokens, hidden)
        expected = chain(x, torch.cuda.synchronize)
        for _ in range(20):
            for found, wanted in zip(chain(x, lambda: None), expected, strict=True):
                same(found, wanted)


def test_unregistering_gives_the_memory_back(make_router, draw):
    x = draw(2, make_router().config.hidden_size)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    router = make_router(31)
    router_id = register_router(router)
    router(x)
    assert torch.cuda.memory_allocated() > before
    unregister_router(router_id)
    del router
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_refusals(make_router, draw):
    """Never wrong results: what cannot be served is refused."""
    router = make_router()
    x = draw(4, router.config.hidden_size)
    for wrong in (x.float(), x[:, :-64], x[0], x.cpu()):
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            router(wrong)
    with pytest.raises((ValueError, RuntimeError), match="gradient"):
        router(x.clone().requires_grad_())
    with pytest.raises((ValueError, RuntimeError), match="registered"):
        torch.ops.dsv4.dense_router(x, 10**9, router.config.num_experts, router.config.top_k)
