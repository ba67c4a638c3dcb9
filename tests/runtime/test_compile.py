"""Routers inside ``torch.compile`` and ``torch.export``: how many graphs, and what they return."""

from __future__ import annotations

import gc
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime import InputError, Router, RouterConfig
from router_runtime.routing.router import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
H, E, K, V = 64, 16, 4, 30
#: A deep model: one router for each layer.
LAYERS = 61

# torch's tools give deprecation warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


class Counter:
    """A back end that records its graphs and runs them unchanged."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def counter() -> Iterator[Counter]:
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=seeded(tokens)).bfloat16()


def token_ids(tokens: int) -> Tensor:
    return torch.arange(tokens) * 7 % (V + 4) - 2


def make_router(seed: int, mode: Any = "dense") -> Router:
    weight = torch.randn(E, H, generator=seeded(seed)).bfloat16()
    table = torch.randint(0, E, (V, K), generator=seeded(seed))
    bias, image_bias = torch.randn(2, E, generator=seeded(seed))
    config = RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=None if mode == "dense" else V)
    tensors: dict[str, Any] = {
        "dense": {"weight": weight, "bias": bias, "image_bias": image_bias},
        "hash": {"table": table},
        "hash_gate": {"weight": weight, "table": table, "image_bias": image_bias},
    }[mode]
    router = Router(config, **tensors, device="cpu")
    router.set_expert_map(torch.arange(2 * E).view(E, 2) + seed, torch.arange(E) % 2 + 1)
    return router


class Layer(nn.Module):
    """A layer that holds its router, as models do."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, *rows: Tensor) -> Tensor:
        weights, ids = self.router(*rows)
        return weights * 2 + ids


class Model(nn.Module):
    """Layers that are alike, each of which reads what the one before it returned."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(make_router(seed)) for seed in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).sum(1, keepdim=True).bfloat16()
        return x


def same(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


# --- graphs ---


@pytest.mark.parametrize("mode", ["dense", "hash", "hash_gate"])
@pytest.mark.parametrize("compiled", ["function", "each module"])
def test_layers_with_routers_of_their_own_share_a_graph(
    counter: Counter, mode: str, compiled: str
) -> None:
    layers = [Layer(make_router(seed, mode)) for seed in range(LAYERS)]

    @torch.compile(backend=counter, fullgraph=True)
    def of_function(layer: Layer, *rows: Tensor) -> Tensor:
        found: Tensor = layer(*rows)
        return found

    def rows(tokens: int) -> tuple[Tensor, ...]:
        given = {"dense": (hidden(tokens),), "hash": (token_ids(tokens),)}
        return given.get(mode, (hidden(tokens), token_ids(tokens)))

    for tokens, most in ((5, 1), (9, 2), (7, 2)):
        for layer in layers:
            if compiled == "function":
                found = of_function(layer, *rows(tokens))
            else:
                found = torch.compile(layer, backend=counter, fullgraph=True)(*rows(tokens))
            assert torch.equal(found, layer(*rows(tokens)))
        assert len(counter.graphs) <= most


def test_a_router_that_is_compiled_itself(counter: Counter) -> None:
    for seed in range(12):
        router = make_router(seed)
        same(torch.compile(router, backend=counter, fullgraph=True)(hidden(5)), router(hidden(5)))
    assert len(counter.graphs) == 1


def test_a_model_of_identical_layers_is_one_graph_without_ids(counter: Counter) -> None:
    model = Model(LAYERS)
    ids = {ROUTERS.register(layer.router) for layer in model.layers}  # type: ignore[arg-type]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(compiled(hidden(5)), model(hidden(5)))
    (graph,) = counter.graphs
    calls = [node for node in graph.graph.nodes if "dsv4" in str(node.target)]
    assert len(calls) == LAYERS
    for node in calls:
        assert node.target is torch.ops.dsv4.dense_router.by_buffer
        assert not ids & {argument for argument in node.args if isinstance(argument, int)} - {E, K}
    # Another model of that shape, and other weights in this one, need no graph of their own.
    for layer in model.layers:
        weight = torch.randn(E, H, generator=seeded(99)).bfloat16()
        layer.router.update_weights(weight=weight)  # type: ignore[union-attr, operator]
    assert torch.equal(compiled(hidden(5)), model(hidden(5)))
    assert len(counter.graphs) == 1
    for router_id in ids:
        ROUTERS.unregister(router_id)


def test_another_configuration_is_another_graph(counter: Counter) -> None:
    """What differs between routers of one shape must not be compiled in; k must."""
    router = make_router(1)
    fewer = RouterConfig(H, E, K - 1, 1.5)
    other = Router(fewer, weight=router.weight, bias=torch.zeros(E), device="cpu")
    layer = torch.compile(lambda router, x: router(x), backend=counter, fullgraph=True)
    same(layer(router, hidden(5)), router(hidden(5)))
    same(layer(other, hidden(5)), other(hidden(5)))
    assert len(counter.graphs) == 2


def methods(router: Router) -> dict[str, Callable[[Tensor], Any]]:
    """Every way to call a dense router, with every input."""

    def out(x: Tensor) -> list[Tensor]:
        outputs: dict[str, Any] = {
            "weights_out": x.new_empty((x.shape[0], K), dtype=torch.float32),
            "ids_out": x.new_empty((x.shape[0], K), dtype=torch.int64),
            "logits_out": x.new_empty((x.shape[0], E), dtype=torch.float32),
        }
        router.forward_out(x, **outputs)
        return [*outputs.values()]

    def mapped_out(x: Tensor) -> list[Tensor]:
        outputs: dict[str, Any] = {
            "weights_out": x.new_empty((x.shape[0], K), dtype=torch.float32),
            "ids_out": x.new_empty((x.shape[0], K), dtype=torch.int32),
            "logical_ids_out": x.new_empty((x.shape[0], K), dtype=torch.int32),
        }
        router.forward_out(x, **outputs)
        return [*outputs.values()]

    def replayed_out(x: Tensor) -> list[Tensor]:
        weights = x.new_empty((x.shape[0], K), dtype=torch.float32)
        ids = x.new_empty((x.shape[0], K), dtype=torch.int32)
        given = torch.zeros_like(ids)
        router.forward_out(x, weights_out=weights, ids_out=ids, given_ids=given)
        return [weights, ids]

    def padding(x: Tensor) -> Tensor:
        return x[:, 0] > 0

    return {
        "inputs": lambda x: router(
            x, is_padding=padding(x), image_mask=x[:, 1] > 0, ids_dtype=torch.int64
        ),
        "logits": lambda x: router.forward_with_logits(x, is_padding=padding(x)),
        "mapped": lambda x: router.forward_mapped(x, ids_dtype=torch.int64),
        "replay": lambda x: router.replay(x, torch.zeros(x.shape[0], K, dtype=torch.int64)),
        "out": out,
        "mapped_out": mapped_out,
        "replayed_out": replayed_out,
    }


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", sorted(methods(make_router(0))))
def test_every_method_compiles_whole(counter: Counter, backend: str, name: str) -> None:
    call = methods(make_router(3))[name]
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 4, 9):
        same(compiled(hidden(tokens)), call(hidden(tokens)))


@pytest.mark.parametrize("mode", ["hash", "hash_gate"])
def test_methods_of_the_other_modes_compile_whole(counter: Counter, mode: str) -> None:
    router = make_router(3, mode)

    def call(*rows: Tensor) -> list[Tensor]:
        weights = torch.empty(rows[0].shape[0], K)
        ids = torch.empty(rows[0].shape[0], K, dtype=torch.int32)
        router.forward_out(*rows, weights_out=weights, ids_out=ids)
        return [*router(*rows, ids_dtype=torch.int64), *router.forward_mapped(*rows), weights, ids]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 4, 9):
        rows = (token_ids(tokens),) if mode == "hash" else (hidden(tokens), token_ids(tokens))
        same(compiled(*rows), call(*rows))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_are_right(counter: Counter, backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler for code of a CPU")
    model = Model(3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(hidden(5)), model(hidden(5)))

    @torch.compile(backend=backend, fullgraph=True)
    def of_function(layer: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = layer(x)
        return found

    for layer in model.layers:
        torch.testing.assert_close(of_function(layer, hidden(5)), layer(hidden(5)))


def test_hooks_run_compiled_and_eagerly(counter: Counter) -> None:
    router = make_router(1)
    weights, ids = router(hidden(3))
    handle = router.register_forward_hook(
        lambda module, given, results: (results[0] * 2, results[1])
    )
    compiled = torch.compile(lambda x: router(x), backend=counter, fullgraph=True)
    for call in (router, compiled):
        same(call(hidden(3)), (weights * 2, ids))
    handle.remove()
    same(router(hidden(3)), (weights, ids))


def test_a_router_is_built_outside_of_a_graph(counter: Counter) -> None:
    """In a function that is compiled whole it is refused in words, else it is built eagerly."""
    config, tensors = make_router(3).config, make_router(3).state_dict()

    def function(x: Tensor) -> Any:
        return Router(config, **tensors, device="cpu")(x)

    with pytest.raises(Exception, match="build it before the compiled function is called"):
        torch.compile(function, backend=counter, fullgraph=True)(hidden(5))
    same(torch.compile(function, backend=counter)(hidden(5)), make_router(3)(hidden(5)))


def test_a_buffer_that_is_no_routers_is_refused() -> None:
    router = make_router(1)
    op = torch.ops.dsv4.dense_router.by_buffer
    same(op(hidden(3), router.weight, E, K), router(hidden(3)))
    message = (
        r"weight or table .*expected a buffer of a Router that is alive.*Router\(config, \.\.\.\)"
    )
    with pytest.raises(InputError, match=message):
        op(hidden(3), router.weight.clone(), E, K)
    with pytest.raises(InputError, match="'top_k': 3"):
        op(hidden(3), router.weight, E, K - 1)
    with pytest.raises(InputError, match=r"router of that buffer.*'mode': 'hash'"):
        torch.ops.dsv4.hash_router.by_buffer(token_ids(3), router.weight, K)
    weight = router.weight
    del router
    gc.collect()
    with pytest.raises(InputError, match=message):
        op(hidden(3), weight, E, K)


# --- export ---


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    model = Model(3)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(model, (hidden(5),), dynamic_shapes=({0: tokens},), strict=strict)
    run = program.module()
    for count in (5, 9):
        assert torch.equal(run(hidden(count)), model(hidden(count)))
    assert {f"layers.{n}.router.weight" for n in range(3)} <= program.state_dict.keys()


class Everything(nn.Module):
    """Every method of routers of every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.hash, self.gate = (
            make_router(seed, mode) for seed, mode in enumerate(("dense", "hash", "hash_gate"))
        )

    def forward(self, x: Tensor, words: Tensor, given: Tensor) -> list[Tensor]:
        padding = words > 20
        weights = x.new_empty((x.shape[0], K), dtype=torch.float32)
        ids = words.new_empty((x.shape[0], K))
        self.dense.forward_out(x, weights_out=weights, ids_out=ids)
        return [
            *(*self.dense(x, is_padding=padding, ids_dtype=torch.int64), weights, ids),
            *self.dense.forward_with_logits(x),
            *self.dense.forward_mapped(x),
            *self.dense.replay(x, given),
            *self.hash(words),
            *self.hash.forward_mapped(words),
            *self.gate(x, words, image_mask=padding),
        ]


def inputs_of_everything(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return hidden(tokens), token_ids(tokens), torch.zeros(tokens, K, dtype=torch.int64)


def in_a_new_process(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("strict", [True, False])
def test_a_saved_program_works_in_a_new_process(tmp_path: Path, strict: bool) -> None:
    """It builds its Routers there, by its first call, from the tensors that were saved with it."""
    model = Everything()
    program = torch.export.export(model, inputs_of_everything(), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((inputs_of_everything(), model(*inputs_of_everything())), tmp_path / "wanted.pt")
    code = """
import gc, sys
import torch, router_runtime
from router_runtime.routing.router import ROUTERS, Router

run = torch.export.load(sys.argv[1]).module()
inputs, wanted = torch.load(sys.argv[2])
built, construct = [], Router.__init__
Router.__init__ = lambda self, *given, **named: built.append(1) or construct(self, *given, **named)
for _ in range(2):
    assert all(map(torch.equal, run(*inputs), wanted))
assert len(built) == 3, built
# Other weights in the program are followed.
state = {name: tensor.clone() for name, tensor in run.state_dict().items()}
state["dense.weight"].neg_()
run.load_state_dict(state)
assert not torch.equal(run(*inputs)[0], wanted[0])
state["dense.weight"].neg_()
run.load_state_dict(state)
assert all(map(torch.equal, run(*inputs), wanted))
# The routers live as long as the program.
assert len(built) == 3
key = ROUTERS.find(dict(run.named_buffers())["dense.weight"])
assert key is not None
assert len(ROUTERS) == 6  # by their own tensors, and by the program's
del run, key
gc.collect()
assert ROUTERS.find(torch.zeros(3)) is None
assert len(ROUTERS) == 0
print("worked")
"""
    assert in_a_new_process(code, tmp_path / "model.pt2", tmp_path / "wanted.pt") == "worked\n"


def test_an_exported_program_is_served_by_the_router_that_was_exported() -> None:
    model = Model(2)
    run = torch.export.export(model, (hidden(5),)).module()
    for layer in model.layers:
        weight = torch.randn(E, H, generator=seeded(99)).bfloat16()
        layer.router.update_weights(weight=weight)  # type: ignore[union-attr, operator]
    assert torch.equal(run(hidden(5)), model(hidden(5)))


def test_an_exported_program_outlives_the_router_that_was_exported() -> None:
    model = Model(2)
    wanted = model(hidden(5))
    program = torch.export.export(model, (hidden(5),))
    del model
    gc.collect()
    assert torch.equal(program.module()(hidden(5)), wanted)


def test_values_of_an_exported_program_are_checked() -> None:
    program = torch.export.export(Model(1), (hidden(5),))
    gc.collect()
    run = program.module()
    dict(run.named_buffers())["layers.0.router.weight"][1, 2] = torch.nan
    with pytest.raises(InputError, match=r"weight: expected finite values.*\[1, 2\]"):
        run(hidden(5))


def test_a_state_dict_that_was_saved_serves_a_compiled_model(counter: Counter) -> None:
    model, other = Model(3), Model(3)
    for layer in other.layers:
        weight = torch.randn(E, H, generator=seeded(77)).bfloat16()
        layer.router.update_weights(weight=weight)  # type: ignore[union-attr, operator]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert not torch.equal(compiled(hidden(5)), other(hidden(5)))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert torch.equal(compiled(hidden(5)), other(hidden(5)))
    assert len(counter.graphs) == 1
