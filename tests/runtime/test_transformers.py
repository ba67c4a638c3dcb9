"""The transformers integration on a small, randomly initialised model on the CPU."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import router_runtime as rt
from router_runtime import spec
from router_runtime.errors import InputError
from router_runtime.integrations import transformers as integration
from router_runtime.integrations.transformers import install, uninstall
from router_runtime.routing.router import ROUTERS
from tests import small_models
from tests.small_models import by_id, dense, gates, hashed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    reason="this transformers has no DeepSeek-V4",
)

H, E, K, V, LAYERS, HASHED = 128, 24, 4, 256, 5, 2


def make_model(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Any:
    return small_models.deepseek_v4(H, E, K, V, layers=layers, hashed=HASHED, dtype=dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(2))


def states(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(3)).to(dtype)


def check_form(outputs: Any, count: int) -> None:
    logits, weights, ids = outputs
    assert logits.shape == (count, E)
    assert weights.shape == ids.shape == (count, K)
    assert ids.dtype == torch.int64


# --- fp32 ---


def test_fp32_model_agrees_before_and_after() -> None:
    model = make_model()
    batch = tokens(3, 20)
    before = model(batch, output_router_logits=True)
    assert len(install(model)) == LAYERS
    after = model(batch, output_router_logits=True)
    # The weights differ by a few roundings; the layers above carry them along.
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    # transformers records by class: the dense layers only, before and after.
    assert len(after.router_logits) == len(before.router_logits) == LAYERS - HASHED
    for found, expected in zip(after.router_logits, before.router_logits, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fp32_gates_agree() -> None:
    model = make_model()
    x, batch = states(200, torch.float32).view(4, 50, H), tokens(4, 50)
    arguments = [(x, batch)] * HASHED + [(x,)] * (LAYERS - HASHED)
    expected = [
        module(*given) for module, given in zip(gates(model).values(), arguments, strict=True)
    ]
    install(model)
    for module, given, wanted in zip(gates(model).values(), arguments, expected, strict=True):
        found = module(*given)
        check_form(found, 200)
        assert torch.equal(found[0], wanted[0])
        ours, theirs = by_id(*found[1:]), by_id(*wanted[1:])
        assert torch.equal(ours[0], theirs[0])
        # Their sum runs in another order: at most k roundings of the sum, and one each of the rest.
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)


def test_hash_gates_keep_the_tables_order() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        install(model)
        (module, *_), batch = hashed(model), tokens(30)
        logits, weights, ids = module(states(30, dtype), batch)
        assert torch.equal(ids, module.tid2eid[batch])
        scores = spec.expert_scores(logits.float()).gather(1, ids)
        assert not torch.equal(scores, scores.sort(dim=1, descending=True).values)
        torch.testing.assert_close(weights, spec.routing_weights(scores, 1.5), rtol=1e-6, atol=0)


# --- bf16 ---


def test_bf16_gates_are_the_oracles() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    x = states(60)
    for module in dense(model):
        logits, weights, ids = module(x.view(3, 20, H))
        check_form((logits, weights, ids), 60)
        bias = module.e_score_correction_bias.float()
        expected = spec.dense_router(x, module.weight, bias, K, module.routed_scaling_factor)
        assert torch.equal(weights, expected[0])
        assert torch.equal(ids.int(), expected[1])
        assert torch.equal(logits, spec.dense_logits(x, module.weight))
    for module in hashed(model):
        logits, _, _ = module(x, tokens(60))
        assert torch.equal(logits, spec.dense_logits(x, module.weight))


def test_why_bf16_models_route_otherwise() -> None:
    """transformers computes a bf16 gate's logits, scores and keys in bf16. Where its choice differs
    from the fp32 one, the keys in question are closer than those roundings.
    """
    model = make_model(torch.bfloat16)
    x = states(4000)
    theirs = [module(x) for module in dense(model)]
    install(model)
    differing = 0
    for module, (_, _, other) in zip(dense(model), theirs, strict=True):
        logits, _, ids = module(x)
        bias, scores = module.e_score_correction_bias.float(), spec.expert_scores(logits)
        rows, unexplained = small_models.unexplained(logits, bias, ids, other, scores)
        assert unexplained == 0
        differing += rows
    share = differing / (len(x) * len(theirs))
    print(f"{share:.1%} of the tokens get another set of experts")
    assert 0.005 < share < 0.2


def test_bf16_model_runs_and_generates() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    batch = tokens(2, 9)
    out = model(batch, output_router_logits=True)
    assert torch.isfinite(out.logits).all()
    assert [logits.dtype for logits in out.router_logits] == [torch.float32] * (LAYERS - HASHED)
    generated = model.generate(batch, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > batch.shape[1]


# --- installing ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninstall_restores_exactly(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    batch = tokens(2, 9)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before, state = model(batch).logits, copy.deepcopy(model.state_dict())
    names = install(model)
    assert names == list(gates(model))
    assert uninstall(model) == names
    assert uninstall(model) == []
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(batch).logits, before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_installing_twice_changes_nothing() -> None:
    from router_runtime.integrations.transformers import _gates

    model = make_model(torch.bfloat16)
    names = install(model)
    first = {
        name: (vars(module)["forward"], _gates[module]) for name, module in gates(model).items()
    }
    assert install(model) == names
    for name, module in gates(model).items():
        assert vars(module)["forward"] is first[name][0]
        assert _gates[module] is first[name][1]
    uninstall(model)
    assert not any("forward" in vars(module) for module in gates(model).values())


def test_classes_and_state_stay() -> None:
    model = make_model(torch.bfloat16)
    kinds = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    install(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys


def test_changed_weights_are_not_served() -> None:
    """What the router holds is a copy, so a change since is an error until install sees it."""
    model = make_model(torch.bfloat16)
    install(model)
    module, x = dense(model)[0], states(7)

    def fused_step() -> None:
        """A write that torch does not count."""
        module.weight.requires_grad_().grad = torch.ones_like(module.weight)
        torch.optim.AdamW([module.weight], lr=0.1, fused=True).step()
        module.weight.requires_grad_(False)

    for change in (
        lambda: module.weight.mul_(2),
        lambda: module.e_score_correction_bias.add_(1),
        lambda: module.e_score_correction_bias.copy_(torch.arange(E)),
        lambda: setattr(module.weight, "data", module.weight.data * 3),
        fused_step,
        lambda: setattr(module.e_score_correction_bias, "data", torch.zeros(E).bfloat16()),
    ):
        change()
        with pytest.raises(InputError, match=r"install\(model\) again"):
            module(x)
        install(model)
        bias = module.e_score_correction_bias.float()
        expected = spec.dense_router(x, module.weight, bias, K, module.routed_scaling_factor)
        assert torch.equal(module(x)[2].int(), expected[1])


def test_new_weights_of_the_same_form_keep_the_router() -> None:
    """Its addresses stay, so that graphs that were captured stay right."""
    from router_runtime.integrations.transformers import _gates

    model = make_model(torch.bfloat16)
    install(model)
    module = dense(model)[0]
    router = _gates[module].router
    module.weight.mul_(2)
    install(model)
    assert _gates[module].router is router
    module.routed_scaling_factor = 3.0
    module.weight.mul_(2)
    install(model)
    assert _gates[module].router is not router
    renewed = _gates[module].router
    assert renewed is not None
    assert renewed.config.routed_scaling_factor == 3.0


def test_another_dtype_is_another_forward() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    model.float()
    plain = copy.deepcopy(model)
    uninstall(plain)
    install(model)
    batch = tokens(2, 9)
    torch.testing.assert_close(model(batch).logits, plain(batch).logits, rtol=1e-4, atol=1e-5)
    uninstall(model)
    assert torch.equal(model(batch).logits, plain(batch).logits)


def test_a_copy_needs_its_own_installation() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    copied = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"install\(model\) again"):
        copied(tokens(1, 5))
    install(copied)
    uninstall(model)
    copied(tokens(1, 5))


@pytest.fixture
def captured() -> Any:
    """A model of which a graph has captured some gates, as ``Placement`` says on a GPU."""

    def capture(model: Any, count: int) -> list[Any]:
        routers = [integration._gates[gate].router for gate in list(gates(model).values())[:count]]
        for router in routers:
            assert router is not None
            ROUTERS.mark_captured(router)
        return routers

    return capture


def test_uninstalling_a_captured_model_needs_force(captured: Any) -> None:
    """Its graph would read freed memory; if forced, nothing of it stays registered."""
    model = make_model(torch.bfloat16)
    names = install(model)
    registered = ROUTERS.ids()
    routers = captured(model, 2)
    ids = [router.router_id for router in routers]
    with pytest.raises(InputError, match=rf"captured: {names[0]}, {names[1]};.*force=True"):
        uninstall(model)
    model(tokens(1, 5))  # as it was
    assert [rt.get_router(number) for number in ids] == routers
    references = [weakref.ref(router) for router in routers]
    del routers
    assert uninstall(model, force=True) == names
    assert ROUTERS.ids() == registered
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_uninstall_releases_what_was_registered() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    registered = ROUTERS.ids()
    router = integration._gates[dense(model)[0]].router
    assert router is not None
    number = rt.register_router(router)
    uninstall(model)
    assert number not in ROUTERS.ids()
    assert ROUTERS.ids() == registered


def test_a_captured_router_that_was_replaced_is_released_too(captured: Any) -> None:
    model = make_model(torch.bfloat16)
    install(model)
    registered = ROUTERS.ids()
    captured(model, LAYERS)
    install(model)
    model.float()  # these gates have no routers; the graph has the others'
    install(model)
    with pytest.raises(InputError, match="force=True"):
        uninstall(model)
    model.bfloat16()
    install(model)
    assert len(ROUTERS.ids() - registered) == LAYERS
    uninstall(model, force=True)
    assert ROUTERS.ids() == registered


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    gc.collect()
    before = len(integration._gates), len(integration._by_address)
    model = make_model(torch.bfloat16)
    install(model)
    assert len(integration._gates) == before[0] + LAYERS
    del model
    gc.collect()
    assert (len(integration._gates), len(integration._by_address)) == before


def spoiled(spoil: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = make_model(dtype)
    spoil(SimpleNamespace(dense=dense(model)[-1], hashed=hashed(model)[-1]))
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.dense.weight.index_fill_(0, torch.tensor([3]), torch.nan), "finite"),
        (lambda m: m.dense.half(), "its weight: expected bf16 or fp32 .*float16"),
        (lambda m: m.dense.to("meta"), "its weight: expected bf16 or fp32"),
        (lambda m: setattr(m.dense, "score_fn", nn.Sigmoid()), "its activation.*found Sigmoid"),
        (lambda m: setattr(m.dense, "forward", lambda x: x), "its forward: .*something else"),
        (lambda m: m.hashed.tid2eid.fill_(E), "its tid2eid: expected entries from 0 to 23"),
        (lambda m: setattr(m.dense, "top_k", 40), "its top_k: expected an integer from 1 to 24"),
        (lambda m: setattr(m.dense, "routed_scaling_factor", torch.inf), "scal"),
        (lambda m: m.dense.e_score_correction_bias.data.fill_(torch.inf), "bias: expected finite"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(spoil: Any, message: str) -> None:
    model = spoiled(spoil)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=message) as caught:
        install(model)
    assert str(caught.value).startswith("model.layers.")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert uninstall(model) == []


def test_fp32_gates_with_a_coarse_bias() -> None:
    with pytest.raises(InputError, match=r"its bias: expected one of \(torch.float32,\)"):
        install(
            spoiled(
                lambda m: m.dense._buffers.update(
                    e_score_correction_bias=m.dense.e_score_correction_bias.bfloat16()
                ),
                torch.float32,
            )
        )


def test_models_without_routers() -> None:
    with pytest.raises(InputError, match=r"with DeepseekV4TopKRouter or .*found none in Linear"):
        install(nn.Linear(3, 3))
    assert uninstall(nn.Linear(3, 3)) == []


# --- where a backward may follow ---


def gradients(model: Any, batch: Tensor) -> dict[str, Tensor]:
    """Those of every parameter that requires grad, from a loss of the whole model."""
    model.zero_grad()
    model(batch, labels=batch).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def trainable(dtype: torch.dtype) -> Any:
    model = make_model(dtype).requires_grad_()
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_backward_is_the_models_own(dtype: torch.dtype, training: bool) -> None:
    model, batch = trainable(dtype).train(training), tokens(2, 9)
    expected = gradients(model, batch)
    assert {name for name in expected if name.endswith("gate.weight")} == {
        f"{name}.weight" for name in gates(model)
    }
    install(model)
    for _ in range(2):  # after a step too: nothing of ours has to know of the new weights
        found = gradients(model, batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        uninstall(model)
        expected = gradients(model, batch)
        install(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_is_the_models_own(reentrant: bool, frozen: bool) -> None:
    """A checkpointed layer runs twice, first without grad if it is reentrant. If these kernels
    served one run alone, bf16 keys that nearly tie would choose other experts in the other one.
    ``frozen``: only an earlier parameter trains, as with adapters.
    """
    model, batch = trainable(torch.bfloat16).train(), tokens(4, 60)
    if frozen:
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_()
    plain = gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    install(model)
    found = gradients(model, batch)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_in_grad_mode_only_what_requires_grad_is_the_models_own() -> None:
    model = make_model(torch.bfloat16)
    module, x = dense(model)[0], states(40)
    own = module(x)
    install(model)
    served = module(x)  # nothing requires grad
    assert (own[0].dtype, served[0].dtype) == (torch.bfloat16, torch.float32)

    def check(expected: Any) -> None:
        for found, wanted in zip(module(x), expected, strict=True):
            assert torch.equal(found, wanted)

    for tensor in (x, module.weight):
        tensor.requires_grad_()
        check(own)
        with torch.no_grad():
            check(served)
        with torch.inference_mode():
            check(served)
        tensor.requires_grad_(False)
    check(served)
    model.train()
    with torch.no_grad():
        check(own)


def test_hash_gates_in_grad_mode() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        (module, *_), batch = hashed(model), tokens(30)
        x = states(30, dtype).requires_grad_()
        expected = module(x, batch)
        install(model)
        for found in (module(x, batch), module(x, input_ids=batch)):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert found[1].requires_grad


def test_grad_mode_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    integration._say_that_grad_mode_is_on.cache_clear()
    model = make_model(torch.bfloat16)
    install(model)
    with caplog.at_level("WARNING", logger="router_runtime"):
        model.train()(tokens(1, 5))
        assert not caplog.records
        model.eval().requires_grad_()
        for _ in range(2):
            model(tokens(1, 5))
    (record,) = caplog.records
    assert "torch.no_grad()" in record.getMessage()


def test_a_hook_that_brings_the_weight_may_bring_it_elsewhere() -> None:
    """As the hooks of CPU and disk offload do, around the ``forward`` that they find."""
    model = make_model(torch.bfloat16)
    module, x = dense(model)[0], states(9).requires_grad_()
    kept, own = module.weight, module(x)
    install(model)
    inner = module.forward

    def offloaded(*given: Any) -> Any:
        module.weight = nn.Parameter(kept.clone())
        try:
            return inner(*given)
        finally:
            module.weight = nn.Parameter(torch.empty_like(kept, device="meta"))

    module.forward = offloaded
    assert all(torch.equal(*pair) for pair in zip(module(x), own, strict=True))
    with torch.no_grad(), pytest.raises(InputError, match=r"install\(model\) again"):
        module(x)


def test_compiled_in_grad_mode() -> None:
    model = trainable(torch.bfloat16)
    batch = tokens(2, 5)
    install(model)
    for module, given in ((dense(model)[0], ()), (hashed(model)[0], (batch,))):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        x, other = (states(10).view(2, 5, H).requires_grad_() for _ in range(2))
        compiled(x, *given)[1].sum().backward()
        module(other, *given)[1].sum().backward()
        torch.testing.assert_close(x.grad, other.grad)
    torch._dynamo.reset()


def test_a_shape_without_a_kernel(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the module, and the command that builds the model."""
    from router_runtime.device.kernels import kernels_on
    from router_runtime.errors import ResolutionError
    from router_runtime.routing.cuda_dense import CudaDense
    from router_runtime.routing.selection import Selection
    from router_runtime.routing.weights import Weights

    def router(config: Any, **_: Any) -> None:
        CudaDense(config, Weights(config, torch.device("cpu")), kernels_on(0), Selection())

    monkeypatch.setattr(integration, "Router", router)
    model = make_model(torch.bfloat16)
    for gate in gates(model).values():
        gate.num_experts, gate.weight = 20, nn.Parameter(gate.weight[:20], requires_grad=False)
    for gate in hashed(model):
        gate.tid2eid.fill_(1)
    with pytest.raises(ResolutionError, match=r"mlp.gate: [\s\S]*--model-file"):
        install(model)
    assert uninstall(model) == []


def test_what_the_caller_accepts_reaches_the_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = rt.Router

    def router(config: Any, **options: Any) -> Any:
        asked.append(options)
        return real(config, **options)

    monkeypatch.setattr(integration, "Router", router)
    install(make_model(torch.bfloat16), accept="emulated")
    assert len(asked) == LAYERS
    assert {options["accept"] for options in asked} == {"emulated"}
    with pytest.raises(InputError, match="accept: expected None or one of"):
        install(make_model(torch.bfloat16), accept="anything")


# --- torch.compile ---


class Counter:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_moe_blocks_share_a_graph(dtype: torch.dtype) -> None:
    """Any number of layers: torch stops compiling a block anew after eight times."""
    model = make_model(dtype, layers=12)
    install(model)
    blocks = [layer.mlp for layer in model.model.layers]
    batch, x = tokens(2, 5), states(10, dtype).view(2, 5, H)
    for kind in (True, False):
        torch._dynamo.reset()
        counter = Counter()
        for block in blocks:
            if block.is_hash is kind:
                found = torch.compile(block, backend=counter, fullgraph=True)(x, batch)
                torch.testing.assert_close(found, block(x, batch))
        assert counter.graphs == 1
    torch._dynamo.reset()


def test_gates_through_autograds_compiler() -> None:
    model = make_model(torch.bfloat16)
    install(model)
    x, batch = states(10).view(2, 5, H), tokens(2, 5)
    for module, given in ((dense(model)[0], (x,)), (hashed(model)[0], (x, batch))):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for found, wanted in zip(compiled(*given), module(*given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    torch._dynamo.reset()


def test_fake_results_have_the_right_form() -> None:
    """By hand: opcheck clones the weight, whose address is what the op looks up."""
    model = make_model(torch.bfloat16)
    install(model)
    op, module = torch.ops.dsv4.transformers_gate.default, dense(model)[0]
    for count in (0, 1, 5):
        real = op(states(count), module.weight, module.e_score_correction_bias, K)
        given = (states(count), module.weight.data, module.e_score_correction_bias)
        mode = torch._subclasses.FakeTensorMode()
        fakes = [mode.from_tensor(tensor) for tensor in given]
        with mode:
            fake = op(*fakes, K)
        for one, other in zip(real, fake, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )


def test_without_transformers() -> None:
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch\n"
        "from router_runtime.integrations.transformers import install\n"
        "try: install(torch.nn.Linear(2, 2))\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert "expected a transformers release with DeepSeek-V4" in done.stdout, done.stderr
    assert "pip install 'transformers>=5.23'" in done.stdout
