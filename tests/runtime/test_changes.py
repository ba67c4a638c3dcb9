"""Weights that change under a Router, by something else than its own methods: they are followed by
the next call, or refused by it, and never served as they were.

With ``spec.py``, which reads the tensors themselves, and with kernels of the fake driver, which
read copies in another order.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import router_runtime as rt
from router_runtime import InputError, Router, RouterConfig
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
CONFIG = RouterConfig(H, E, K, 1.5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(seed: int) -> Tensor:
    return torch.randn(E, H, generator=seeded(seed)).bfloat16()


def bias_of(seed: int) -> Tensor:
    return torch.randn(E, generator=seeded(seed))


def table_of(seed: int) -> Tensor:
    return torch.randint(0, E, (V, K), generator=seeded(seed), dtype=torch.int32)


X = torch.randn(9, H, generator=seeded(5)).bfloat16()
WORDS = torch.arange(9)


def same(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def fresh(**tensors: Tensor) -> Any:
    """What a Router that is built from these tensors returns, as they are now."""
    copies: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return Router(CONFIG, **copies, device="cpu")(X)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "gpu":
        request.getfixturevalue("gpu")
        build_on_the_fake_gpu(monkeypatch)
    return str(request.param)


# --- the Router's own buffers ---


def plain_router(seed: int = 0) -> Router:
    return Router(CONFIG, weight=weight_of(seed), bias=bias_of(seed), device="cpu")


def every_call(router: Router, router_id: int) -> list[Callable[[], Any]]:
    def out() -> tuple[Tensor, Tensor]:
        weights, ids = torch.zeros(9, K), torch.zeros(9, K, dtype=torch.int32)
        router.forward_out(X, weights_out=weights, ids_out=ids)
        return weights, ids

    return [
        lambda: router(X),
        lambda: router(X, is_padding=torch.zeros(9, dtype=torch.bool)),
        lambda: router.forward_with_logits(X)[:2],
        out,
        lambda: rt.dense_router(X, router_id, E, K),
        lambda: torch.ops.dsv4.dense_router.by_buffer(X, router.weight, E, K),
    ]


def test_writes_into_the_buffers_are_followed() -> None:
    router = plain_router()
    router_id = rt.register_router(router)
    for number, call in enumerate(every_call(router, router_id), start=1):
        call()
        router.weight.copy_(weight_of(number))
        router.bias.copy_(bias_of(number))
        same(call(), fresh(weight=weight_of(number), bias=bias_of(number)))
        router.weight[3:7].neg_()
        same(call(), fresh(weight=router.weight, bias=router.bias))
    rt.unregister_router(router_id)


def test_writes_into_the_buffers_are_checked() -> None:
    router = plain_router()
    before = router(X)
    kept = router.weight[2, 3].clone()
    router.weight[2, 3] = math.nan
    for _ in range(2):
        with pytest.raises(InputError, match=r"weight: expected finite values, found .*\[2, 3\]"):
            router(X)
    router.weight[2, 3] = kept
    same(router(X), before)


def test_writes_into_a_table_are_checked() -> None:
    """Its entries become addresses; the same of mode ``hash_gate`` is in test_hash_gate.py."""
    config = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V)
    router = Router(config, table=table_of(0), device="cpu")
    calls: list[Callable[[], Any]] = [
        lambda: router(WORDS),
        lambda: router(WORDS, is_padding=torch.zeros(9, dtype=torch.bool)),
    ]
    for call in calls:
        call()
        router.table.copy_(table_of(1))
        assert torch.equal(call()[1], table_of(1)[:9])
        router.table[7, 0] = E
        with pytest.raises(InputError, match=r"table: expected entries from 0 to 23, .*\[7, 0\]"):
            call()
        router.table.copy_(table_of(0))
        assert torch.equal(call()[1], table_of(0)[:9])


def test_a_write_is_not_followed_during_a_capture(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = plain_router()
    events: list[str] = []
    monkeypatch.setattr(router.weights, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    router(X)
    router.weight.neg_()
    with pytest.raises(InputError, match=r"after a change of weight: expected no CUDA graph cap"):
        router(X)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert events == []
    same(router(X), fresh(weight=router.weight, bias=router.bias))
    router(X)
    assert events == ["wait", "wait"]


# --- torch.func.functional_call ---


class Layer(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.router = router
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.router(x)


def test_other_tensors_in_functional_call_are_refused() -> None:
    layer = Layer(plain_router())
    before = layer(X)
    kept = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name, other in (("weight", weight_of(1)), ("bias", bias_of(1)), ("image_bias", bias_of(1))):
        message = rf"{name}.* of a Router: expected its own tensors.*functional_call"
        with pytest.raises(InputError, match=message):
            torch.func.functional_call(layer.router, {name: other}, (X,))
        given = {each: tensor.clone() for each, tensor in kept.items()}
        given[f"router.{name}"] = other
        with pytest.raises(InputError, match=message):
            torch.func.functional_call(layer, given, (X,))
        # Everything is back in its place.
        now = dict(layer.named_parameters()) | dict(layer.named_buffers())
        assert now.keys() == kept.keys()
        assert all(now[each] is kept[each] for each in kept)
        same(layer(X), before)


def test_its_own_tensors_in_functional_call_are_served() -> None:
    layer = Layer(plain_router())
    before = layer(X)
    for state in (dict(layer.named_buffers()), layer.state_dict()):
        same(torch.func.functional_call(layer, state, (X,)), before)
    parameters = {name: value * 2 for name, value in layer.named_parameters()}
    same(torch.func.functional_call(layer, parameters, (X,)), before)


def test_other_tensors_in_a_compiled_functional_call_are_refused() -> None:
    router = plain_router()
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def call(weight: Tensor) -> Any:
        return torch.func.functional_call(router, {"weight": weight}, (X,))

    with pytest.raises(Exception, match=r"that this op was called with|its own tensors"):
        call(weight_of(1))
    torch._dynamo.reset()
    same(router(X), fresh(weight=weight_of(0), bias=bias_of(0)))


# --- a module that the values were copied from ---


class Gate(nn.Module):
    """A gate as models have it: the weight is a parameter, the bias may be a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_of(seed))
        self.register_buffer("bias", bias_of(seed))
        self.bias: Tensor

    def router(self) -> Router:
        return Router(CONFIG, weight=self.weight, bias=self.bias, device="cpu")


def step(gate: Gate, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
    gate.weight.grad = torch.ones_like(gate.weight)
    optimizer(gate.parameters(), lr=0.5, **options).step()  # type: ignore[call-arg]


CHANGES: dict[str, Callable[[Gate], Any]] = {
    "load_state_dict": lambda gate: gate.load_state_dict(Gate(1).state_dict()),
    "SGD": lambda gate: step(gate, torch.optim.SGD),
    "AdamW": lambda gate: step(gate, torch.optim.AdamW),
    "AdamW, a loop": lambda gate: step(gate, torch.optim.AdamW, foreach=False),
    "AdamW, fused": lambda gate: step(gate, torch.optim.AdamW, fused=True),
    "no_grad": lambda gate: torch.no_grad()(gate.weight.neg_)(),
    "inference_mode": lambda gate: torch.inference_mode()(gate.weight.neg_)(),
    "set_data": lambda gate: setattr(gate.weight, "data", weight_of(3)),
    "only the bias": lambda gate: gate.bias.add_(torch.arange(E) % 3),
    "init": lambda gate: nn.init.normal_(gate.weight),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_is_followed(name: str) -> None:
    gate = Gate()
    router = gate.router()
    router_id = rt.register_router(router)
    for call in every_call(router, router_id):
        gate.load_state_dict(Gate(0).state_dict())
        call()
        CHANGES[name](gate)
        moved = torch.equal(router.weight, gate.weight), torch.equal(router.bias, gate.bias)
        assert moved != (True, True)
        same(call(), fresh(weight=gate.weight, bias=gate.bias))
        assert torch.equal(router.weight, gate.weight)
    rt.unregister_router(router_id)


def test_a_module_that_moved_is_followed() -> None:
    gate = Gate()
    router = gate.router()
    gate.to(torch.float32).to(torch.bfloat16)
    gate.bias = gate.bias.float()
    same(router(X), fresh(weight=weight_of(0), bias=bias_of(0)))
    gate.half()
    message = r"built from.*weight: expected torch.bfloat16 .*torch.float16.*update_weights"
    with pytest.raises(InputError, match=message):
        router(X)
    router.update_weights(weight=gate.weight.bfloat16())
    same(router(X), fresh(weight=gate.weight.bfloat16(), bias=bias_of(0)))


def test_plain_tensors_are_copied() -> None:
    """As the constructor says: a buffer may be reused for the next layer's values."""
    weight, bias = weight_of(0), bias_of(0)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    weight.zero_()
    same(router(X), fresh(weight=weight_of(0), bias=bias))
    gate = Gate()
    router = Router(CONFIG, weight=gate.weight.detach(), bias=gate.bias, device="cpu")
    torch.no_grad()(gate.weight.neg_)()
    same(router(X), fresh(weight=weight_of(0), bias=gate.bias))


def test_a_module_that_is_gone_is_no_matter() -> None:
    gate = Gate()
    router = gate.router()
    router(X)
    assert router.weights.version == -1  # each call looks at the module's tensors
    del gate
    gc.collect()
    same(router(X), fresh(weight=weight_of(0), bias=bias_of(0)))
    assert router.weights.version == router.weight._version


def test_what_is_written_last_counts() -> None:
    """A value that was given to the Router itself is no longer the module's."""
    gate = Gate()
    router = gate.router()
    router.update_weights(weight=weight_of(7))
    torch.no_grad()(gate.weight.neg_)()
    same(router(X), fresh(weight=weight_of(7), bias=gate.bias))
    gate.bias.add_(torch.arange(E) % 3)
    same(router(X), fresh(weight=weight_of(7), bias=gate.bias))
    router.load_state_dict({"weight": weight_of(8), "bias": bias_of(8)})
    gate.bias.zero_()
    same(router(X), fresh(weight=weight_of(8), bias=bias_of(8)))
    router.update_weights(weight=gate.weight, bias=gate.bias)
    CHANGES["SGD"](gate)
    same(router(X), fresh(weight=gate.weight, bias=gate.bias))


def test_a_deep_copy_follows_the_deep_copy_of_the_module() -> None:
    gate = Gate()
    model = nn.ModuleList([gate, gate.router()])
    other: Any = copy.deepcopy(model)
    CHANGES["SGD"](gate)
    same(other[1](X), fresh(weight=weight_of(0), bias=bias_of(0)))
    other[0].load_state_dict(Gate(4).state_dict())
    same(other[1](X), fresh(weight=weight_of(4), bias=bias_of(4)))
    same(model[1](X), fresh(weight=gate.weight, bias=gate.bias))


def test_a_compiled_call_follows_too() -> None:
    gate = Gate()
    router = gate.router()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: router(x), backend="aot_eager", fullgraph=True)
    compiled(X)
    CHANGES["AdamW, fused"](gate)
    same(compiled(X), fresh(weight=gate.weight, bias=gate.bias))
    router.weight.copy_(weight_of(5))
    same(compiled(X), fresh(weight=weight_of(5), bias=gate.bias))
    torch._dynamo.reset()


def test_an_optimizer_of_other_parameters_counts_nothing() -> None:
    gate, other = Gate(), nn.Linear(2, 2)
    router = gate.router()
    router(X)
    other.weight.grad = torch.ones(2, 2)
    before, version = other.weight._version, gate.weight._version
    torch.optim.SGD([other.weight], lr=0.1, fused=True).step()
    assert (other.weight._version, gate.weight._version) == (before, version)
