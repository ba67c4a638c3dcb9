"""The custom ops on CPU tensors: schema, opcheck, torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import router_runtime as rt
from router_runtime import spec
from router_runtime.errors import InputError
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router

H, E, K, V = 64, 16, 4, 30


@pytest.fixture
def dense() -> Iterator[Router]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, H, generator=generator).bfloat16()
    bias = torch.randn(E, generator=generator)
    router = Router(RouterConfig(H, E, K, 1.5), weight=weight, bias=bias, device="cpu")
    router_id = rt.register_router(router)
    yield router
    rt.unregister_router(router_id)


@pytest.fixture
def hashed() -> Iterator[Router]:
    config = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V)
    router = Router(config, table=torch.arange(V * K).view(V, K) % E, device="cpu")
    router_id = rt.register_router(router)
    yield router
    rt.unregister_router(router_id)


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def test_schemas_are_exact() -> None:
    numbers = "SymInt router_id, int num_experts, int top_k"
    dense = f"(Tensor hidden_states, {numbers}"
    serving = ", *, ScalarType? ids_dtype=None, Tensor? is_padding=None, "
    serving += "Tensor? num_valid_tokens=None"
    images, given = ", Tensor? image_mask=None", ", Tensor? given_ids=None, Tensor? given_mask=None"
    scoring = ', str scoring="sqrtsoftplus"'
    rules = f"{images}, Tensor? image_bias=None{given}, int sentinel=-1{scoring}"
    shared = ", int? shared_experts=None, int? shared_id=None, float? shared_weight=None"
    expected = {
        "dense_router": f"{dense}{serving}{images}{given}{shared})",
        "dense_router_logits": f"{dense}{serving}{images}{given}{shared})",
        "dense_router_replay": f"(Tensor hidden_states, Tensor given_ids, {numbers}{serving}"
        f"{shared})",
        "hash_router": f"(Tensor token_ids, SymInt router_id, int top_k{serving}{shared})",
        "topk_select": "(Tensor scores, int k)",
        "topk_indices": "(Tensor scores, int k, *, Tensor? row_starts=None, "
        "Tensor? row_ends=None, Tensor? page_table=None, int page_size=1, Tensor? requests=None, "
        "Tensor? offsets=None, bool sorted=False, bool nan_first=False)",
        "activation_topk": "(Tensor logits, Tensor bias, int k, float scale, bool renormalize"
        f"{serving}{rules}{shared})",
        "activation_topk_replay": "(Tensor logits, Tensor given_ids, float scale, "
        f"bool renormalize{serving}, int sentinel=-1{scoring}{shared})",
    }
    for name, arguments in expected.items():
        op = getattr(torch.ops.dsv4, name).default
        results = "(Tensor, Tensor, Tensor)" if "logits" in name else "(Tensor, Tensor)"
        results = "Tensor" if name == "topk_indices" else results
        assert str(op._schema) == f"dsv4::{name}{arguments} -> {results}"
        assert torch.Tag.pt2_compliant_tag in op.tags
        assert torch.Tag.needs_fixed_stride_order in op.tags


def test_every_op_is_a_documented_function() -> None:
    """With the op's own arguments and defaults, each described."""
    ops = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "dsv4::" in name
    }
    names = {name.split(".")[0] for name in ops} - {"transformers_gate"}
    assert names == {name for name in rt.__all__ if hasattr(torch.ops.dsv4, name)}
    for name in names:
        function, schema = getattr(rt, name), getattr(torch.ops.dsv4, name).default._schema
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [argument.name for argument in schema.arguments]
        for argument in schema.arguments:
            parameter = parameters[argument.name]
            assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
            default = parameter.default if argument.has_default_value() else None
            assert default == argument.default_value
        text = inspect.getdoc(function) or ""
        assert "Returns:" in text
        assert name == "dense_router_logits" or all(
            f"\n    {each}: " in text for each in parameters
        )


def test_functions_pass_every_input_on(dense: Router) -> None:
    padding = torch.tensor([True, False, False])
    inputs = {"is_padding": padding, "ids_dtype": torch.int64}
    logits, bias = torch.randn(3, E), torch.randn(E)
    for name, arguments, more in (
        ("dense_router", (hidden(3), dense.router_id, E, K), {}),
        ("dense_router_logits", (hidden(3), dense.router_id, E, K), {}),
        ("dense_router_replay", (hidden(3), torch.zeros(3, K).int(), dense.router_id, E, K), {}),
        ("activation_topk", (logits, bias, K, 1.5, True), {"sentinel": 9}),
        ("activation_topk_replay", (logits, torch.zeros(3, K).int(), 1.5, True), {"sentinel": 9}),
    ):
        op = getattr(torch.ops.dsv4, name).default
        for given in ({}, more, inputs, inputs | more):
            found = getattr(rt, name)(*arguments, **given)
            for one, other in zip(found, op(*arguments, **given), strict=True):
                assert torch.equal(one, other)
                assert one.dtype == other.dtype


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck(dense: Router, hashed: Router, tokens: int) -> None:
    dsv4 = torch.ops.dsv4
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (dsv4.dense_router.default, (hidden(tokens), dense.router_id, E, K)),
        (dsv4.dense_router_logits.default, (hidden(tokens), dense.router_id, E, K)),
        (dsv4.hash_router.default, (torch.arange(tokens), hashed.router_id, K)),
        (dsv4.hash_router.default, (torch.arange(tokens).int(), hashed.router_id, K)),
        (dsv4.topk_select.default, (torch.randn(tokens, 40), 7)),
        (dsv4.topk_select.default, (torch.randn(40, tokens + 7).T, 7)),
        (dsv4.topk_select.default, (torch.randn(tokens, 90), 40)),
        (dsv4.topk_indices.default, (torch.randn(tokens, 40), 50)),
        (dsv4.topk_indices.default, (torch.randn(40, tokens + 7).bfloat16().T, 7)),
        (dsv4.activation_topk.default, (torch.randn(tokens, E), torch.randn(E), K, 2.5, True)),
        (dsv4.activation_topk.default, (torch.randn(tokens, E), torch.randn(E), K, 2.5, False)),
    ]
    if tokens:  # opcheck itself cannot copy an empty tensor with a stride
        calls.append((dsv4.dense_router.default, (hidden(2 * tokens)[::2], dense.router_id, E, K)))
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
    vectors = {
        name: torch.arange(tokens, dtype=torch.int32)
        for name in ("row_starts", "requests", "offsets")
    }
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    given = {**vectors, "page_table": table, "page_size": 8, "sorted": True, "nan_first": True}
    outputs = {name: torch.empty(tokens, 9, dtype=torch.int32) for name in ("slots_out", "ids_out")}
    for op, more in (
        (dsv4.topk_indices.default, {}),
        (dsv4.topk_indices.with_ids, {}),
        (dsv4.topk_indices.out, outputs),
    ):
        torch.library.opcheck(op, (torch.randn(tokens, 40), 9), {**given, **more})


def test_results_are_the_oracles(dense: Router, hashed: Router) -> None:
    found: tuple[Tensor, ...] = rt.dense_router(hidden(5), dense.router_id, E, K)
    assert all(torch.equal(a, b) for a, b in zip(found, dense(hidden(5)), strict=True))
    found = rt.dense_router_logits(hidden(5), dense.router_id, E, K)
    expected: tuple[Tensor, ...] = dense.forward_with_logits(hidden(5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = rt.hash_router(torch.arange(5), hashed.router_id, K)
    assert all(torch.equal(a, b) for a, b in zip(found, hashed(torch.arange(5)), strict=True))
    scores = torch.randn(3, 50)
    found = rt.topk_select(scores, 8)
    expected = spec.topk_select(scores, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_calls_that_disagree_with_the_router(dense: Router, hashed: Router) -> None:
    for action, message in (
        (
            lambda: rt.dense_router(hidden(1), dense.router_id, E + 1, K),
            "'num_experts': 17",
        ),
        (lambda: rt.dense_router(hidden(1), dense.router_id, E, K - 1), "'top_k': 3"),
        (lambda: rt.dense_router(hidden(1), hashed.router_id, E, K), "'mode': 'hash'"),
        (
            lambda: rt.dense_router_logits(hidden(1), dense.router_id, E - 1, K),
            "'num_experts': 15",
        ),
        (
            lambda: rt.dense_router_logits(hidden(1), hashed.router_id, E, K),
            "'mode': 'hash'",
        ),
        (
            lambda: rt.hash_router(torch.arange(1), dense.router_id, K),
            "'mode': 'dense'",
        ),
        (
            lambda: rt.hash_router(torch.arange(1), hashed.router_id, K + 1),
            "'top_k': 5",
        ),
        (lambda: rt.dense_router(hidden(1), 10**9, E, K), "found 1000000000"),
        (lambda: rt.hash_router(torch.arange(1), -1, K), "found -1"),
    ):
        with pytest.raises(InputError, match=message):
            action()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8).double(), 2), "scores: expected torch.float32"),
        ((torch.zeros(8), 2), "scores: expected torch.float32"),
        ((torch.zeros(2, 8), 0), "k: expected an integer from 1 to 8"),
        ((torch.zeros(2, 8), 9), "k: expected an integer from 1 to 8"),
        ((torch.zeros(2, 8000), 4097), "k: expected an integer from 1 to 4096"),
        ((torch.zeros(1).expand(1, 2**21 + 1), 3), "columns of scores: .* from 1 to 2097152"),
        ((torch.zeros(2, 0), 1), "columns of scores"),
        ((torch.zeros(2, 8).requires_grad_(), 2), "needs no gradient"),
    ],
)
def test_refused_selections(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rt.topk_select(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8).double(), torch.zeros(8), 2, 1.0, True), "logits: expected"),
        ((torch.zeros(2, 8), torch.zeros(7), 2, 1.0, True), r"bias: expected .*\[8\] on cpu"),
        ((torch.zeros(2, 8), torch.zeros(8).double(), 2, 1.0, True), "bias: expected"),
        ((torch.zeros(2, 1025), torch.zeros(1025), 2, 1.0, True), "experts: expected"),
        ((torch.zeros(2, 8), torch.zeros(8), 9, 1.0, True), "k: expected"),
        ((torch.zeros(2, 8), torch.zeros(8), 2, float("inf"), True), "scale: expected"),
        ((torch.zeros(2, 8), torch.zeros(8), 2, -1.0, True), "scale: expected"),
        ((torch.zeros(2, 8), torch.zeros(8).requires_grad_(), 2, 1.0, True), "no gradient"),
    ],
)
def test_refused_activations(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rt.activation_topk(*arguments)


class Counter:
    """A backend that counts its graphs and runs them unchanged."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def routers() -> Iterator[list[Router]]:
    config = RouterConfig(H, E, K, 1.5)
    made = []
    for seed in range(61):
        weight = torch.randn(E, H, generator=torch.Generator().manual_seed(seed)).bfloat16()
        made.append(Router(config, weight=weight, bias=torch.zeros(E), device="cpu"))
        rt.register_router(made[-1])
    yield made
    for router in made:
        rt.unregister_router(router.router_id)


@pytest.mark.parametrize("call", ["op", "router"])
def test_61_routers_share_two_graphs(routers: list[Router], call: str) -> None:
    torch._dynamo.reset()
    counter = Counter()

    def by_op(x: Tensor, router_id: int) -> Tensor:
        weights, ids = torch.ops.dsv4.dense_router(x, router_id, E, K)
        mixed: Tensor = weights * 2 + ids
        return mixed

    def by_router(x: Tensor, router: Router) -> Tensor:
        weights, ids = router(x)
        return weights * 2 + ids

    layer: Any = torch.compile(
        by_op if call == "op" else by_router, backend=counter, fullgraph=True
    )
    x = hidden(5)
    for router in routers:
        found = layer(x, router.router_id if call == "op" else router)
        weights, ids = router(x)
        assert torch.equal(found, weights * 2 + ids)
    assert counter.graphs <= 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_op_compiles_whole(dense: Router, hashed: Router, backend: str) -> None:
    torch._dynamo.reset()
    router_id, hash_id = dense.router_id, hashed.router_id

    def layer(x: Tensor, token_ids: Tensor, logits: Tensor) -> list[Tensor]:
        outputs = [*torch.ops.dsv4.dense_router(x, router_id, E, K)]
        outputs += dense.forward_with_logits(x)
        outputs += torch.ops.dsv4.hash_router(token_ids, hash_id, K)
        outputs += torch.ops.dsv4.topk_select(logits, 3)
        ends = token_ids.int() * 5
        outputs.append(torch.ops.dsv4.topk_indices(logits, 3, row_ends=ends))
        outputs += torch.ops.dsv4.topk_indices.with_ids(logits, 20, offsets=ends, sorted=True)
        slots = ends.new_zeros(logits.shape[0], 4)
        torch.ops.dsv4.topk_indices.out(logits, 4, row_ends=ends, slots_out=slots)
        outputs.append(slots)
        outputs += torch.ops.dsv4.activation_topk(logits, logits[0] * 0, 3, 1.5, True)
        return outputs

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 4, 9):
        arguments = hidden(tokens), torch.arange(tokens), torch.randn(tokens, E)
        for found, expected in zip(compiled(*arguments), layer(*arguments), strict=True):
            assert torch.equal(found, expected)


def test_gradients_are_refused_while_tracing(dense: Router) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: rt.dense_router(x, dense.router_id, E, K),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="needs no gradient"):
        compiled(hidden(3).requires_grad_())


def test_fake_results_have_the_right_form(dense: Router) -> None:
    meta = torch.empty(7, H, dtype=torch.bfloat16, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty_like(meta, device="cpu")
        weights, ids = rt.dense_router(x, 10**9, E, K)
        logits = rt.dense_router_logits(x, 10**9, E, K)[2]
    assert (weights.shape, weights.dtype) == ((7, K), torch.float32)
    assert (ids.shape, ids.dtype) == ((7, K), torch.int32)
    assert (logits.shape, logits.dtype) == ((7, E), torch.float32)
