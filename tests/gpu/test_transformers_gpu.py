"""The transformers integration on a GPU: a model of few layers with the gates of a real one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from router_runtime import InputError, ResolutionError, spec
from router_runtime.integrations.transformers import _gates, install, uninstall
from router_runtime.routing.router import ROUTERS
from tests import small_models
from tests.gpu.graphs import captured
from tests.small_models import by_id, dense, gates, hashed

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    reason="this transformers has no DeepSeek-V4",
)

VOCAB, LAYERS, HASHED = 512, 4, 1

# torch's own tools warn about themselves; what they check is asserted.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def make_model(models):
    """Models with the narrowest gate that this machine has kernels for."""
    hidden, experts, top_k = models[0]

    def make(dtype, **sizes):
        sizes = {"hidden": hidden, "experts": experts, "top_k": top_k} | sizes
        return small_models.deepseek_v4(
            **sizes, vocab=VOCAB, layers=LAYERS, hashed=HASHED, dtype=dtype, device="cuda"
        )

    return make


@pytest.fixture(scope="module")
def bf16(make_model):
    return make_model(torch.bfloat16)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def installed(bf16):
    install(bf16)
    yield bf16
    uninstall(bf16, force=True)  # no test keeps its graphs


def tokens(*shape):
    generator = torch.Generator("cuda").manual_seed(2)
    return torch.randint(0, VOCAB, shape, generator=generator, device="cuda")


def states(module, *shape, dtype=torch.bfloat16, seed=3):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, module.hidden_dim, generator=generator, device="cuda").to(dtype)


def test_gates_are_the_oracles(installed):
    """Logits within the bound; from these very logits, ids and weights are the oracle's."""
    for module in gates(installed).values():
        x, batch = states(module, 3, 50), tokens(3, 50)
        is_hash = hasattr(module, "tid2eid")
        logits, weights, ids = module(x, batch) if is_hash else module(x)
        flat, experts, k = x.flatten(0, 1), module.num_experts, module.top_k
        assert logits.shape == (150, experts)
        assert weights.shape == ids.shape == (150, k)
        assert ids.dtype == torch.int64
        exact = spec.dense_logits64(flat, module.weight)
        allowed = 2.0**-20 * spec.dense_logits64(flat.abs(), module.weight.abs())
        assert ((logits.double() - exact).abs() <= allowed).all()
        scale = module.routed_scaling_factor
        if is_hash:
            assert torch.equal(ids, module.tid2eid[batch.flatten()])
            scores = spec.expert_scores(logits).gather(1, ids)
            torch.testing.assert_close(
                weights, spec.routing_weights(scores, scale), rtol=2e-6, atol=0
            )
        else:
            bias = module.e_score_correction_bias.float()
            expected = spec.activation_topk(logits, bias, k, scale)
            same = (ids == expected[1]).all(dim=1)
            assert same.float().mean() > 0.99
            torch.testing.assert_close(weights[same], expected[0][same], rtol=2e-6, atol=0)


def test_how_bf16_differs(bf16):
    """The share of tokens whose set of experts changes, each of them explained by bf16's steps."""
    theirs = [(module, states(module, 4000), module) for module in dense(bf16)]
    theirs = [(module, x, module(x)[2]) for module, x, _ in theirs]
    install(bf16)
    differing, total = 0, 0
    for module, x, other in theirs:
        logits, _, ids = module(x)
        bias, scores = module.e_score_correction_bias.float(), spec.expert_scores(logits)
        rows, unexplained = small_models.unexplained(logits, bias, ids, other, scores)
        assert unexplained == 0
        differing, total = differing + rows, total + len(x)
    uninstall(bf16)
    print(f"{differing} of {total} tokens get another set of experts")
    assert 0.001 * total < differing < 0.3 * total


def test_fp32_model_agrees_before_and_after(make_model):
    model = make_model(torch.float32)
    batch = tokens(2, 24)
    before = model(batch, output_router_logits=True)
    own = gates(model)
    x = {name: states(module, 70, dtype=torch.float32) for name, module in own.items()}
    ids = tokens(70)

    def outputs():
        return {
            name: module(x[name], ids) if hasattr(module, "tid2eid") else module(x[name])
            for name, module in own.items()
        }

    expected = outputs()
    assert install(model) == list(own)
    assert all(_gates[module].router is None for module in own.values())
    for name, found in outputs().items():
        assert torch.equal(found[0], expected[name][0])
        (ours, weights), (theirs, others) = by_id(*found[1:]), by_id(*expected[name][1:])
        same = (ours == theirs).all(dim=1)  # their top-k leaves ties open
        assert same.float().mean() > 0.97
        torch.testing.assert_close(weights[same], others[same], rtol=2e-6, atol=0)
    after = model(batch, output_router_logits=True)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-4)
    assert len(after.router_logits) == len(before.router_logits) == LAYERS - HASHED
    uninstall(model)
    assert torch.equal(model(batch).logits, before.logits)


def test_generate(installed):
    batch = tokens(2, 9)
    first = installed.generate(batch, max_new_tokens=12, do_sample=False)
    assert first.shape == (2, 21)
    assert torch.equal(installed.generate(batch, max_new_tokens=12, do_sample=False), first)


def blocks(model):
    """A hash block and a dense one."""
    layers = [layer.mlp for layer in model.model.layers]
    return [next(b for b in layers if b.is_hash), next(b for b in layers if not b.is_hash)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graph_of_a_moe_block(dtype, make_model):
    model = make_model(dtype)
    install(model)
    for block in blocks(model):
        x, batch = states(block.gate, 2, 4, dtype=dtype), tokens(2, 4)
        graph, output = captured(lambda block=block, x=x, batch=batch: block(x, batch), warmups=2)
        for seed in (7, 8):
            x.copy_(states(block.gate, 2, 4, dtype=dtype, seed=seed))
            batch.copy_(batch.flip(0))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(output, block(x, batch))
        has_router = dtype is torch.bfloat16
        with pytest.raises(InputError, match="force=True") if has_router else nullcontext():
            uninstall(model)
        del graph
        registered = ROUTERS.ids()
        uninstall(model, force=True)
        assert len(registered - ROUTERS.ids()) == has_router
        install(model)
    uninstall(model)


@pytest.mark.parametrize(
    "options",
    [{"backend": "aot_eager"}, {"backend": "inductor"}, {"mode": "reduce-overhead"}],
    ids=["aot_eager", "inductor", "cuda_graphs"],
)
def test_compiled_moe_blocks(options, installed):
    if options != {"backend": "aot_eager"}:
        pytest.importorskip("triton", reason="inductor needs triton")
    torch._dynamo.reset()
    layers = [layer.mlp for layer in installed.model.layers]
    for block in layers:
        compiled = torch.compile(block, fullgraph=True, **options)
        for seed in (3, 4, 5):
            x, batch = states(block.gate, 2, 4, seed=seed), tokens(2, 4)
            found = compiled(x, batch).clone()
            # The experts' own sums may run in another order, and in bf16.
            torch.testing.assert_close(found, block(x, batch), rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


def test_new_weights_reach_a_captured_graph(installed):
    module = dense(installed)[0]
    x = states(module, 8)
    graph = torch.cuda.CUDAGraph()
    module(x)
    with torch.cuda.graph(graph):
        _, weights, ids = module(x)
    kept = module.weight.clone()
    module.weight.copy_(module.weight.flip(0))
    with pytest.raises(InputError, match=r"install\(model\) again"):
        module(x)
    install(installed)
    graph.replay()
    torch.cuda.synchronize()
    expected = module(x)
    assert torch.equal(weights, expected[1])
    assert torch.equal(ids, expected[2])
    module.weight.copy_(kept)


def test_a_shape_without_a_kernel(make_model):
    model = make_model(torch.bfloat16, hidden=128, experts=24, top_k=4)
    with pytest.raises(ResolutionError, match=r"mlp.gate: [\s\S]*--model-file"):
        install(model)
    assert uninstall(model) == []
    assert hashed(model)
