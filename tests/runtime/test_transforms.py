"""Routers and ops inside the transformations of ``torch.func``, and forward-mode differentiation.

Nothing has a derivative, so none may come out as zero without a word; ``vmap`` gives the results of
a call for each slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import router_runtime as rt
from router_runtime import InputError, Router, RouterConfig
from tests.runtime.routers import build_on_the_fake_gpu

# torch.func imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

H, E, K, V = 128, 24, 4, 50


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, H, generator=seeded(sum(shape))).bfloat16()


def make_router(mode: Any = "dense") -> Router:
    config = RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=None if mode == "dense" else V)
    weight = torch.randn(E, H, generator=seeded(0)).bfloat16()
    tensors: dict[str, Any] = {
        "weight": weight,
        "bias": torch.randn(E, generator=seeded(1)),
        "table": torch.randint(0, E, (V, K), generator=seeded(2)),
    }
    names = {"dense": ["weight", "bias"], "hash": ["table"], "hash_gate": ["weight", "table"]}
    return Router(config, **{name: tensors[name] for name in names[mode]}, device="cpu")


@pytest.fixture(params=["cpu", "gpu"])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    """A registered dense router with ``spec.py``, and one with kernels of the fake driver."""
    if request.param == "gpu":
        request.getfixturevalue("gpu")
        build_on_the_fake_gpu(monkeypatch)
    router = make_router()
    router.set_expert_map(torch.arange(2 * E).view(E, 2), torch.arange(E) % 2 + 1)
    router_id = rt.register_router(router)
    yield router
    rt.unregister_router(router_id)


def calls(router: Router) -> dict[str, Callable[[Tensor], Any]]:
    """Every way to route hidden states."""
    number = router.router_id
    ids = torch.arange(K, dtype=torch.int32).expand(5, K)
    return {
        "Router": lambda x: router(x),
        "with inputs": lambda x: router(x, is_padding=torch.arange(5) > 3),
        "logits": lambda x: router.forward_with_logits(x),
        "mapped": lambda x: router.forward_mapped(x),
        "replay": lambda x: router.replay(x, ids),
        "function": lambda x: rt.dense_router(x, number, E, K),
        "op": lambda x: torch.ops.dsv4.dense_router(x, number, E, K),
        "op with inputs": lambda x: torch.ops.dsv4.dense_router(
            x, number, E, K, is_padding=torch.arange(5) > 3
        ),
        "logits op": lambda x: torch.ops.dsv4.dense_router_logits(x, number, E, K),
        "replay op": lambda x: torch.ops.dsv4.dense_router_replay(x, ids, number, E, K),
    }


def row_calls() -> dict[str, Callable[[Tensor], Any]]:
    """Every way to route fp32 rows."""
    bias, ids = torch.zeros(E), torch.arange(K).expand(5, K)
    return {
        "activation_topk": lambda z: rt.activation_topk(z, bias, K, 1.5, True),
        "activation_topk of the bias": lambda z: rt.activation_topk(z * 0, z[0], K, 1.5, True),
        "activation_topk of the image bias": lambda z: rt.activation_topk(
            z.detach(), bias, K, 1.5, True, image_mask=torch.arange(5) > 3, image_bias=z[0]
        ),
        "activation_topk_replay": lambda z: rt.activation_topk_replay(z, ids, 1.5, True),
        "topk_select": lambda z: rt.topk_select(z, K),
        "topk_indices": lambda z: (rt.topk_indices(z, K),),
        "topk_indices.with_ids": lambda z: torch.ops.dsv4.topk_indices.with_ids(z, K),
    }


def derivatives(call: Callable[[Tensor], Any], x: Tensor) -> dict[str, Callable[[], Any]]:
    """Every way to ask for a derivative of the weights by ``x``."""

    def weights(z: Tensor) -> Tensor:
        found: Tensor = call(z)[0]
        return found

    def dual_level() -> Tensor | None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangent: Tensor | None = forward_ad.unpack_dual(weights(dual)).tangent
            return tangent

    def backward() -> Any:
        return torch.autograd.grad(weights(x.clone().requires_grad_()).sum(), x)

    func = torch.func
    return {
        "jvp": lambda: func.jvp(weights, (x,), (torch.ones_like(x),)),
        "jacfwd": lambda: func.jacfwd(weights)(x),
        "dual_level": dual_level,
        "grad": lambda: func.grad(lambda z: weights(z).sum())(x),
        "vjp": lambda: func.vjp(weights, x),
        "jacrev": lambda: func.jacrev(weights)(x),
        "hessian": lambda: func.hessian(lambda z: weights(z).sum())(x),
        "vmap of grad": lambda: torch.vmap(func.grad(lambda z: weights(z).sum()))(x[None]),
        "jvp of vmap": lambda: func.jvp(torch.vmap(weights), (x[None],), (x[None],)),
        "backward": backward,
    }


REFUSED = r"expected a tensor (without a tangent|that needs no gradient), found"


def test_no_derivative_of_a_router_is_a_silent_zero(dense: Router) -> None:
    x = hidden(5)
    for name, call in calls(dense).items():
        for kind, derivative in derivatives(call, x).items():
            with pytest.raises(InputError, match=f"hidden_states: {REFUSED}"):
                print(name, kind, derivative())


def test_no_derivative_of_a_row_op_is_a_silent_zero() -> None:
    x = torch.randn(5, E, generator=seeded(3))
    for name, call in row_calls().items():
        for kind, derivative in derivatives(call, x).items():
            with pytest.raises(InputError, match=REFUSED):
                print(name, kind, derivative())


def test_no_derivative_of_a_compiled_router() -> None:
    router, x = make_router(), hidden(5)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(z: Tensor) -> Any:
        return torch.func.jvp(lambda y: router(y)[0], (z,), (torch.ones_like(z),))

    with pytest.raises(Exception, match="without a tangent"):
        compiled(x)
    torch._dynamo.reset()


def test_what_is_not_differentiated_is_routed(dense: Router) -> None:
    """Inside of a derivative, by something else or of detached hidden states."""
    x, other = hidden(5), hidden(5).float()
    for name, call in calls(dense).items():
        wanted = call(x)[0]

        def scaled(z: Tensor, call: Callable[[Tensor], Any] = call) -> Tensor:
            found: Tensor = (call(x)[0] + call(x * 2 / 2)[0]).sum() * z.sum()
            return found

        def detached(z: Tensor, call: Callable[[Tensor], Any] = call) -> Tensor:
            found: Tensor = call(z.detach().bfloat16())[0].sum() * z.sum()
            return found

        for function, at, factor in ((scaled, other, 2), (detached, x.float(), 1)):
            slope = wanted.sum() * factor
            value, tangent = torch.func.jvp(function, (at,), (torch.ones_like(at),))[:2]
            assert torch.allclose(value, slope * at.sum()), name
            assert torch.allclose(tangent, slope * at.numel()), name
            assert torch.allclose(torch.func.grad(function)(at), slope), name
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.equal(call(dual.detach())[0], wanted)
            assert torch.equal(call(x)[0], wanted)


def test_vmap_gives_the_results_of_each_slice(dense: Router) -> None:
    batch = hidden(3, 5)
    for name, call in calls(dense).items():
        wanted = [call(x) for x in batch]
        for dims, given in ((0, batch), (1, batch.movedim(0, 1)), (-1, batch.movedim(0, -1))):
            found = torch.vmap(call, in_dims=dims)(given)
            assert len(found) == len(wanted[0]), name
            for place, each in enumerate(found):
                assert torch.equal(each, torch.stack([one[place] for one in wanted])), name
        nested = torch.vmap(torch.vmap(call))(batch[None])
        assert torch.equal(nested[0][0], torch.stack([one[0] for one in wanted]))


def test_vmap_of_the_other_inputs(dense: Router) -> None:
    x, counts = hidden(5), torch.arange(3, dtype=torch.int32)
    ids = torch.randint(0, E, (3, 5, K), generator=seeded(9))
    for call, batch in (
        (lambda each: dense(x, num_valid_tokens=each), counts),
        (lambda each: dense.replay(x, each), ids),
        (lambda each: dense(x, is_padding=each), torch.eye(5)[:3].bool()),
    ):
        found, wanted = torch.vmap(call)(batch), [call(each) for each in batch]
        for place, results in enumerate(found):
            assert torch.equal(results, torch.stack([one[place] for one in wanted]))


@pytest.mark.parametrize("mode", ["hash", "hash_gate"])
def test_vmap_of_the_other_modes(mode: str) -> None:
    router = make_router(mode)
    words = torch.arange(15).view(3, 5)
    rows = (words,) if mode == "hash" else (hidden(3, 5), words)
    found = torch.vmap(router)(*rows)
    for place, results in enumerate(found):
        wanted = [router(*each)[place] for each in zip(*rows, strict=True)]
        assert torch.equal(results, torch.stack(wanted))


def test_vmap_over_no_slices(dense: Router) -> None:
    for name, call in calls(dense).items():
        wanted = torch.vmap(call)(hidden(3, 5))
        for dims, given in ((0, hidden(0, 5)), (1, hidden(5, 0))):
            found = torch.vmap(call, in_dims=dims)(given)
            assert len(found) == len(wanted), name
            for each, other in zip(found, wanted, strict=True):
                assert (each.shape, each.dtype) == ((0, *other.shape[1:]), other.dtype), name
        assert torch.vmap(torch.vmap(call))(hidden(2, 0, 5))[0].shape[:2] == (2, 0)
    for call in row_calls().values():
        assert torch.vmap(call)(torch.zeros(0, 5, E))[0].shape == (0, 5, K)
    with pytest.raises(InputError, match=r"hidden_states: expected torch\.bfloat16"):
        torch.vmap(dense)(hidden(0, 5).float())


def test_vmap_of_row_ops() -> None:
    batch = torch.randn(3, 5, E, generator=seeded(3))
    for call in row_calls().values():
        found, wanted = torch.vmap(call)(batch), [call(each) for each in batch]
        for place, results in enumerate(found):
            assert torch.equal(results, torch.stack([one[place] for one in wanted]))


def test_vmap_of_outputs_of_the_callers_is_refused(dense: Router) -> None:
    weights, ids = torch.zeros(5, K), torch.zeros(5, K, dtype=torch.int32)
    out = torch.ops.dsv4.dense_router.out
    for call in (
        lambda x: out(x, dense.router_id, E, K, weights_out=weights, ids_out=ids),
        lambda x: dense.forward_out(x, weights_out=weights, ids_out=ids),
    ):
        with pytest.raises(InputError, match=r"inside torch.func.vmap: expected a form .* returns"):
            torch.vmap(call)(hidden(3, 5))


def test_what_is_refused_inside_vmap_says_the_same(dense: Router) -> None:
    with pytest.raises(InputError, match=r"hidden_states: expected torch\.bfloat16"):
        torch.vmap(dense)(hidden(3, 5).float())


def test_functionalize(dense: Router) -> None:
    x = hidden(5)
    for name, call in calls(dense).items():
        found, wanted = torch.func.functionalize(call)(x), call(x)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other), name
