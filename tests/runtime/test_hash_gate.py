"""Mode ``hash_gate``: what it refuses, and that both its devices and the op give the oracle's
result, with serving inputs and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import router_runtime as rt
from build_kernels.catalog.models import MODELS
from build_kernels.plan import plan
from router_runtime import spec
from router_runtime.device import kernels
from router_runtime.device.kernels import kernels_on
from router_runtime.errors import InputError, ResolutionError
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cuda_hash import CudaHashGate
from router_runtime.routing.router import Router
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
CONFIG = RouterConfig(H, E, K, 1.5, mode="hash_gate", vocab_size=V)
SHAPE = {"HIDDEN": H, "EXPERTS": E, "TOP_K": K}
TAG, DENSE = "k16", "dense_router_prefill"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, IMAGE_BIAS = draw(E, H).bfloat16(), draw(E, seed=1)
TABLE = torch.randint(0, E, (V, K), generator=torch.Generator().manual_seed(1))


def hidden(tokens: int) -> Tensor:
    return draw(tokens, H, seed=tokens).bfloat16()


def token_ids(tokens: int) -> Tensor:
    """Some inside the vocabulary, some outside."""
    return torch.arange(tokens) * 7 % (V + 9) - 3


def expected(tokens: int, weight: Tensor = WEIGHT, **inputs: Any) -> tuple[Tensor, Tensor]:
    return spec.hash_gate(hidden(tokens), token_ids(tokens), weight, TABLE, 1.5, **inputs)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1].to(found[1].dtype))


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router(CONFIG, weight=WEIGHT, table=TABLE, image_bias=IMAGE_BIAS, device="cpu")
    router_id = rt.register_router(made)
    yield made
    rt.unregister_router(router_id)


@pytest.fixture
def gate(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """The fake driver with three variants: two by number of tokens, one for images."""
    gpu.entries = [
        build.entry(
            "hash_gate",
            build.gate(),
            model="small",
            variant=variant,
            constants=SHAPE | {"IMAGES": images},
            numerics=TAG,
            latency=latency,
        )
        for variant, images, latency in (
            ("portable", 0, ((8, 1.0), (64, 9.0))),
            ("many_tokens", 0, ((8, 2.0), (64, 3.0))),
            ("images", 1, ()),
        )
    ]
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


def on_gpu(image_bias: Tensor | None = IMAGE_BIAS, **variants: str) -> Router:
    """A router whose back end is the CUDA one, on CPU memory."""
    with pytest.MonkeyPatch.context() as patch:
        build_on_the_fake_gpu(patch)
        tensors: dict[str, Any] = {"weight": WEIGHT, "table": TABLE, "image_bias": image_bias}
        return Router(CONFIG, **tensors, device="cpu", variants=variants)


def test_refused_tensors_and_calls(router: Router) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"weight": WEIGHT}, r"expected \['weight', 'table'\], found \['weight'\]"),
        ({"weight": WEIGHT, "table": TABLE, "bias": draw(E)}, "tensors of a hash_gate router"),
        ({"weight": WEIGHT, "table": TABLE - 1}, "entries from 0 to 23"),
        ({"weight": WEIGHT, "table": TABLE[1:]}, r"table: expected .*\[50, 4\]"),
        ({"weight": WEIGHT * torch.nan, "table": TABLE}, "weight: expected finite values"),
        ({"weight": WEIGHT, "table": TABLE, "image_bias": draw(E + 1)}, "image_bias: expected"),
    )
    for tensors, message in refused:
        with pytest.raises(InputError, match=message):
            Router(CONFIG, **tensors, device="cpu")
    with pytest.raises(InputError, match="vocab_size: expected"):
        RouterConfig(H, E, K, 1.5, mode="hash_gate")
    x, words = hidden(3), token_ids(3)
    for call, message in (
        (lambda: router(x), "no token ids in mode"),
        (lambda: router(x, words[:2]), r"token_ids: expected .*\[3\] on cpu"),
        (lambda: router(x, words.float()), "token_ids: expected"),
        (lambda: router(x.float(), words), "hidden_states: expected"),
        (lambda: router.forward_with_logits(x), "a dense router"),
        (lambda: router.update_weights(bias=draw(E)), "bias: expected a dense router"),
        (
            lambda: rt.hash_gate(x, words, router.router_id, E - 1, K),
            "'num_experts': 23",
        ),
        (lambda: rt.dense_router(x, router.router_id, E, K), "'mode': 'hash_gate'"),
        (lambda: rt.hash_router(words, router.router_id, K), "'mode': 'hash_gate'"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_other_modes_take_no_token_ids() -> None:
    dense = Router(RouterConfig(H, E, K, 1.5), weight=WEIGHT, bias=IMAGE_BIAS, device="cpu")
    with pytest.raises(InputError, match=r"found .*token ids in mode"):
        dense(hidden(3), token_ids(3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 60])
def test_cpu(router: Router, tokens: int, dtype: torch.dtype) -> None:
    words = token_ids(tokens).to(dtype)
    same(router(hidden(tokens), words), expected(tokens))
    op = rt.hash_gate(hidden(tokens), words, router.router_id, E, K)
    same(op, expected(tokens))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "served_by"), [(1, "portable"), (8, "portable"), (60, "many")])
def test_cuda(gate: Any, tokens: int, served_by: str, dtype: torch.dtype) -> None:
    made = on_gpu()
    assert [each.entry.variant for each in made.token_ranges] == ["portable", "many_tokens"]
    same(made(hidden(tokens), token_ids(tokens).to(dtype)), expected(tokens))
    (launch,) = gate.launches
    assert launch.grid == (tokens, 1, 1)
    assert launch.arguments["serving"] == 0
    place = 0 if served_by == "portable" else 1
    assert tokens <= made.token_ranges[place].high


@pytest.mark.parametrize("name", ["many_tokens", "portable"])
def test_a_named_variant_serves_all(gate: Any, name: str) -> None:
    assert [each.entry.variant for each in on_gpu(hash_gate=name).token_ranges] == [name]


def test_layouts_are_handled(gate: Any) -> None:
    made, x, words = on_gpu(), hidden(9), token_ids(9)
    odd = torch.empty(9 * H + 1, dtype=torch.bfloat16)[1:].view(9, H).copy_(x)
    for layout in (x.repeat_interleave(2, 0)[::2], x.T.contiguous().T, odd):
        same(made(layout, words.repeat_interleave(3)[::3]), expected(9))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_serving_inputs(device: str, gate: Any, router: Router) -> None:
    made = on_gpu() if device == "cuda" else router
    tokens = 30
    x, words = hidden(tokens), token_ids(tokens)
    images, padding = torch.arange(tokens) % 3 == 1, torch.arange(tokens) % 5 == 2
    valid = torch.tensor([27], dtype=torch.int32)
    dropped = padding | (torch.arange(tokens) >= 27)
    wanted = expected(tokens, image_mask=images, image_bias=IMAGE_BIAS, padding=dropped)
    inputs: dict[str, Any] = {
        "is_padding": padding,
        "num_valid_tokens": valid,
        "image_mask": images,
    }
    same(made(x, words, **inputs), wanted)
    same(made(x, words, **inputs, ids_dtype=torch.int64), wanted)
    same(made(x, words, is_padding=padding), expected(tokens, padding=padding))
    weights, ids = torch.empty(tokens, K), torch.empty(tokens, K, dtype=torch.int64)
    made.forward_out(x, words, weights_out=weights, ids_out=ids, **inputs)
    same((weights, ids), wanted)
    expert_map = torch.arange(E * 2).view(E, 2).flip(0)
    counts = torch.arange(E) % 2 + 1
    made.set_expert_map(expert_map, counts)
    weights, physical, logical = made.forward_mapped(x, words, **inputs)
    same((weights, logical), wanted)
    rows = torch.arange(tokens)
    assert torch.equal(physical, spec.physical_ids(wanted[1], rows, expert_map, counts, -1))


def test_image_tokens_need_an_image_bias(gate: Any) -> None:
    images = torch.ones(3, dtype=torch.bool)
    with pytest.raises(InputError, match="image_mask: expected a router with an image_bias"):
        on_gpu(None)(hidden(3), token_ids(3), image_mask=images)


def test_image_variant_is_required_at_construction(
    gpu: Any, build: SimpleNamespace, tmp_path: Path
) -> None:
    constants = SHAPE | {"IMAGES": 0}
    gpu.entries = [
        build.entry("hash_gate", build.gate(), model="s", constants=constants, numerics=TAG)
    ]
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    assert on_gpu(None).token_ranges
    with pytest.raises(ResolutionError, match="IMAGES is 0, not 1"):
        on_gpu()


def test_update_keeps_the_address(gate: Any) -> None:
    made, other = on_gpu(), draw(E, H, seed=9).bfloat16()
    (packed,) = made.weights.packed_buffers()
    made.update_weights(weight=other)
    same(made(hidden(5), token_ids(5)), expected(5, other))
    assert gate.launches[0].arguments["packed_weight"] == packed.data_ptr()


# --- a dense kernel serves many tokens ------------------------------------------------------------


@pytest.fixture
def with_dense(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """The fake driver with hash_gate for up to 8 tokens and images, and two dense kernels that are
    faster from there on, of which the faster one adds in another order.
    """
    gate = {"model": "small", "numerics": TAG}
    gpu.entries = [
        build.entry(
            "hash_gate", build.gate(), constants=SHAPE | {"IMAGES": 0}, latency=((8, 1.0),), **gate
        ),
        build.entry(
            "hash_gate",
            build.gate(),
            constants=SHAPE | {"IMAGES": 1},
            variant="images",
            **gate,
        ),
        *(
            build.entry(
                "dense_router_prefill",
                build.prefill(H, E, (1, 40)),
                model="small",
                constants=SHAPE,
                variant=variant,
                numerics=tag,
                latency=((8, 2.0), (64, figure)),
            )
            for variant, tag, figure in (("portable", TAG, 3.0), ("tcgen05", "other", 1.0))
        ),
    ]
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


def served_by(gpu: Any) -> list[str]:
    return [launch.symbol for launch in gpu.launches]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "kernel"), [(8, "hash_gate"), (9, DENSE)])
def test_one_launch_of_either_kernel(
    with_dense: Any, tokens: int, kernel: str, dtype: torch.dtype
) -> None:
    made = on_gpu()
    entries = [each.entry for each in made.token_ranges]
    # Beyond what the dense kernel takes, hash_gate serves again.
    assert [e.kernel for e in entries] == ["hash_gate", DENSE, "hash_gate"]
    assert {entry.numerics for entry in entries} == {TAG}
    x, words = hidden(tokens), token_ids(tokens).to(dtype)
    same(made(x, words), expected(tokens))
    same(made(x, words, ids_dtype=torch.int64), expected(tokens))
    assert served_by(with_dense) == [kernel] * 2
    for layout in (x.repeat_interleave(2, 0)[::2], x.T.contiguous().T, x[:1].expand(tokens, H)):
        wanted = spec.hash_gate(layout, token_ids(tokens), WEIGHT, TABLE, 1.5)
        same(made(layout, words), wanted)


def test_serving_inputs_of_a_dense_kernel(with_dense: Any) -> None:
    """Given experts, padding, images and options, as hash_gate has them."""
    made, tokens = on_gpu(), 30
    x, words, rows = hidden(tokens), token_ids(tokens), torch.arange(tokens)
    images, padding, mask = rows % 3 == 1, rows % 5 == 2, rows % 4 == 0
    given = torch.randint(0, E, (tokens, K), generator=torch.Generator().manual_seed(3))
    given[0, 1] = E
    inputs: dict[str, Any] = {"image_mask": images, "given_ids": given, "given_mask": mask}
    wanted = expected(tokens, image_bias=IMAGE_BIAS, padding=padding, **inputs)
    same(made(x, words, is_padding=padding, **inputs), wanted)
    load = torch.zeros(E, dtype=torch.int32)
    same(made(x, words, is_padding=padding, expert_load=load, **inputs), wanted)
    assert torch.equal(load, spec.expert_load(wanted[1], wanted[1], E))
    assert served_by(with_dense) == [DENSE] * 2
    # An image token of a small batch has a variant of its own.
    same(
        made(x[:3], words[:3], image_mask=images[:3]),
        spec.hash_gate(
            *(x[:3], words[:3], WEIGHT, TABLE, 1.5),
            image_mask=images[:3],
            image_bias=IMAGE_BIAS,
        ),
    )
    assert served_by(with_dense)[2:] == ["hash_gate"]


def test_a_write_into_the_weight_reaches_both_kernels(with_dense: Any) -> None:
    made = on_gpu()
    made.weight.neg_()
    for tokens in (3, 20):
        same(made(hidden(tokens), token_ids(tokens)), expected(tokens, -WEIGHT))
    assert served_by(with_dense) == ["hash_gate", DENSE]


def test_the_kernel_whose_variant_is_named_serves_alone(with_dense: Any) -> None:
    for kernel in ("hash_gate", DENSE):
        ranges = on_gpu(IMAGE_BIAS, **{kernel: "portable"}).token_ranges
        assert {each.entry.kernel for each in ranges} == {kernel}
    made = on_gpu(dense_router_prefill="portable")
    same(made(hidden(90), token_ids(90)), expected(90))
    assert served_by(with_dense) == [DENSE] * 3
    words = token_ids(90)
    weights, ids = made(hidden(90), words, is_padding=torch.arange(90) % 2 == 0)
    same((weights, ids), expected(90, padding=torch.arange(90) % 2 == 0))


@pytest.mark.parametrize("lacks", ["evidence", "table"])
def test_a_dense_kernel_that_may_not_serve(
    lacks: str,
    with_dense: Any,
    build: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without evidence, or of a release whose kernels cannot look up: hash_gate serves."""
    if lacks == "evidence":
        monkeypatch.setattr(
            kernels,
            "status",
            lambda entry, *_: (
                "unproven"
                if entry.variant == "portable" and "dense" in entry.kernel
                else "verified"
            ),
        )
    else:
        with_dense.entries = [
            dataclasses.replace(
                entry,
                contract=dataclasses.replace(
                    entry.contract,
                    parameters=tuple(
                        p
                        for p in entry.contract.parameters
                        if p.name != "vocab" and (p.name != "table" or "dense" not in entry.kernel)
                    ),
                ),
            )
            if "dense" in entry.kernel
            else entry
            for entry in with_dense.entries
        ]
        build.artifacts(tmp_path / "artifacts", with_dense.entries)
    assert {each.entry.kernel for each in on_gpu().token_ranges} == {"hash_gate"}


@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile(router: Router) -> None:
    number = router.router_id
    images = torch.arange(5) % 2 == 0
    for inputs in ({}, {"image_mask": images, "ids_dtype": torch.int64}):
        arguments = (hidden(5), token_ids(5), number, E, K)
        torch.library.opcheck(torch.ops.dsv4.hash_gate.default, arguments, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, words: router(x, words), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (3, 4, 9):
        same(compiled(hidden(tokens), token_ids(tokens)), expected(tokens))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_contracts_bind(model: Any, gpu: Any, build: SimpleNamespace, tmp_path: Path) -> None:
    """The catalog's own contracts: which entry serves which batch, and one numerics tag for all."""
    from build_kernels.kernels.common.numerics import dense_tag
    from build_kernels.kernels.dense.contract import contract as dense
    from build_kernels.kernels.hash_gate import contract

    gpu.execute = False
    both = ["hash_gate", "dense_router_prefill"]
    jobs = plan(targets=["sm_90a"], kernels=both, models=[model.name])
    gpu.entries = [
        build.entry(
            job.kernel,
            (contract.contract if job.kernel == "hash_gate" else dense)(job.constants),
            model=job.model,
            variant=job.variant,
            constants=job.constants,
            numerics=(contract.numerics if job.kernel == "hash_gate" else dense_tag)(job.constants),
            latency=job.latency,
        )
        for job in jobs
    ]
    assert len({entry.numerics for entry in gpu.entries}) == 1
    assert all(job.latency for job in jobs if not job.constants.get("IMAGES"))
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    config = RouterConfig(
        model.hidden, model.experts, model.top_k, model.scale, mode="hash_gate", vocab_size=11
    )
    weights = Weights(config, torch.device("cpu"), True)
    path = CudaHashGate(config, weights, kernels_on(0), Selection())
    served = [each.entry for each in path.token_ranges]
    assert served[0].kernel == "hash_gate"
    assert (served[0].variant, served[0].constants["IMAGES"]) == ("portable", 0)
    assert "dense_router_prefill" in {entry.kernel for entry in served}
    for each in path.token_ranges[:-1]:
        rows = torch.zeros(each.low, model.hidden, dtype=torch.bfloat16)
        path.route(rows, torch.zeros(each.low, dtype=torch.int64))
        (launch,) = gpu.launches[-1:]
        assert launch.block == each.entry.contract.block
        assert launch.arguments["vocab"] == 11
        assert launch.arguments["serving"] == int(each.entry.kernel != "hash_gate")


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_writes_into_the_table_are_checked(gate: Any, place: str) -> None:
    """Its entries become addresses."""
    with pytest.MonkeyPatch.context() as patch:
        if place == "gpu":
            build_on_the_fake_gpu(patch)
        router = Router(CONFIG, weight=WEIGHT, table=TABLE, device="cpu")
    padding = torch.zeros(7, dtype=torch.bool)
    for inputs in ({}, {"is_padding": padding}):
        same(router(hidden(7), token_ids(7), **inputs), expected(7))
        router.table[4, 0] = E
        with pytest.raises(InputError, match=r"table: expected entries from 0 to 23, .*\[4, 0\]"):
            router(hidden(7), token_ids(7), **inputs)
        router.table.copy_(TABLE)
        router.weight.neg_()
        same(router(hidden(7), token_ids(7), **inputs), expected(7, -WEIGHT))
        router.weight.neg_()
    assert bool(gate.launches) == (place == "gpu")
