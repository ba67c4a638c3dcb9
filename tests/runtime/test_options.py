"""Options of a call, on CPU tensors and through the fake driver: each against plain torch, each in
every kind of launch, each refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import router_runtime as rt
from router_runtime import spec
from router_runtime.device.kernels import kernels_on
from router_runtime.errors import InputError
from router_runtime.routing import row_ops as rows
from router_runtime.routing.call import Call, Results
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cuda_dense import CudaDense
from router_runtime.routing.cuda_hash import CudaHash, CudaHashGate
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.options import OPTIONS, Options
from router_runtime.routing.router import Router
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights

H, E, K, V = 128, 24, 4, 50
SENTINEL = -3
#: Physical experts: the copies of expert e are e, e + 24 and e + 48.
PHYSICAL_EXPERTS = 3 * E
Mode = Any


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TENSORS = {
    "weight": torch.randn(E, H, generator=seeded(1)).bfloat16(),
    "bias": torch.randn(E, generator=seeded(2)) * 0.5,
    "image_bias": torch.randn(E, generator=seeded(3)) * 0.5,
    "table": torch.randint(0, E, (V, K), generator=seeded(4)).int(),
}
OWN = {
    "dense": ("weight", "bias", "image_bias"),
    "hash": ("table",),
    "hash_gate": ("weight", "table", "image_bias"),
}
MODES = tuple(OWN)
TABLE = (torch.arange(E).unsqueeze(1) + E * torch.arange(3)).int()
COUNTS = torch.randint(1, 4, (E,), generator=seeded(5)).int()
MAP = ExpertMap(TABLE, COUNTS, 5, 2654435769)


def config_of(mode: Mode) -> RouterConfig:
    vocab = None if mode == "dense" else V
    return RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=vocab, sentinel=SENTINEL)


def make_router(mode: Mode) -> Router:
    given: dict[str, Any] = {name: TENSORS[name] for name in OWN[mode]}
    router = Router(config_of(mode), **given, device="cpu")
    order = {"replica_start": MAP.start, "replica_step": MAP.step}
    router.set_expert_map(MAP.physical, MAP.counts, **order)
    return router


@pytest.fixture(params=MODES)
def router(request: pytest.FixtureRequest) -> Iterator[Router]:
    made = make_router(request.param)
    router_id = rt.register_router(made)
    yield made
    rt.unregister_router(router_id)


@pytest.fixture
def dense() -> Any:
    return make_router("dense")


def arguments_of(mode: str, tokens: int) -> Any:
    x = torch.randn(tokens, H, generator=seeded(tokens)).bfloat16()
    words = torch.randint(-5, V + 5, (tokens,), generator=seeded(tokens))
    return {"dense": (x,), "hash": (words,), "hash_gate": (x, words)}[mode]


def mask(tokens: int, seed: int) -> Tensor:
    return torch.rand(tokens, generator=seeded(seed)) < 0.4


def given_ids(tokens: int) -> Tensor:
    """Distinct experts in a row, and some ids that are no expert."""
    ids = torch.argsort(torch.rand(tokens, E, generator=seeded(tokens + 1)), dim=1)[:, :K]
    ids[::3, 1] = -1
    ids[1::3, 2] = 2**40
    return ids


def results(tokens: int, columns: int = K) -> dict[str, Any]:
    return {
        "weights_out": torch.full((tokens, columns), 9.0),
        "ids_out": torch.full((tokens, columns), 9).int(),
    }


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_loads_are_counted_by_physical_id(router: Any, mapped: bool) -> None:
    given = arguments_of(router.config.mode, 30)
    padding = mask(30, 1)
    before = torch.randint(0, 100, (PHYSICAL_EXPERTS,), generator=seeded(6)).int()
    load, outputs = before.clone(), results(30)
    router.forward_out(*given, **outputs, mapped=mapped, expert_load=load, is_padding=padding)
    expected = before.tolist()
    for row in range(30):
        for id in outputs["ids_out"][row].tolist():
            if id != SENTINEL:
                assert not padding[row]
                expected[id] += 1
    assert load.tolist() == expected
    assert load.sum() > before.sum()
    assert bool((load[E:] != before[E:]).any()) == mapped


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_flag_on_the_device_turns_recording_off(router: Any, shape: tuple[int, ...]) -> None:
    given, load = arguments_of(router.config.mode, 9), torch.zeros(E).int()
    for recorded in (False, True):
        flag = torch.full(shape, recorded)
        router.forward_out(*given, **results(9), expert_load=load, record_load=flag)
        assert bool(load.any()) == recorded


def test_an_id_beyond_the_counts_is_not_counted(dense: Any) -> None:
    (x,) = arguments_of("dense", 30)
    whole, short = torch.zeros(E).int(), torch.zeros(7).int()
    dense.forward_out(x, **results(30), expert_load=whole)
    dense.forward_out(x, **results(30), expert_load=short)
    assert torch.equal(short, whole[:7])
    assert whole[7:].any()


def test_loads_add_up_over_calls(dense: Any) -> None:
    (x,) = arguments_of("dense", 30)
    once, twice = torch.zeros(E).int(), torch.zeros(E).int()
    dense.forward_out(x, **results(30), expert_load=once)
    for _ in range(2):
        dense.forward_out(x, **results(30), expert_load=twice)
    assert torch.equal(twice, 2 * once)


# --- capture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("mapped", [False, True])
def test_captured_ids_are_the_logical_ones(router: Any, dtype: torch.dtype, mapped: bool) -> None:
    given, padding = arguments_of(router.config.mode, 9), mask(9, 1)
    # One layer of a buffer of several layers.
    buffer = torch.full((12, 3, K), 77, dtype=dtype)
    captured = buffer[:, 1]
    router.forward_out(
        *given, **results(9), mapped=mapped, captured_ids=captured, is_padding=padding
    )
    assert torch.equal(captured[:9], router(*given, is_padding=padding)[1].to(dtype))
    captured[:9] = 77
    assert (buffer == 77).all()


# --- rows with given ids --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", ["dense", "hash_gate"])
def test_given_rows_beside_others(mode: Mode, dtype: torch.dtype) -> None:
    router, given = make_router(mode), arguments_of(mode, 20)
    chosen, images, padding = mask(20, 1), mask(20, 2), mask(20, 3)
    ids = given_ids(20).clamp(max=2**31 - 1).to(dtype)
    inputs: dict[str, Any] = {"image_mask": images, "is_padding": padding}
    found = router(*given, **inputs, given_ids=ids, given_mask=chosen)
    plain = router(*given, **inputs)
    whole = router(*given, **inputs, given_ids=ids)
    rows_given = chosen.unsqueeze(1)
    same(found, [torch.where(rows_given, a, b) for a, b in zip(whole, plain, strict=True)])
    exists = (ids >= 0) & (ids < E) & ~padding.unsqueeze(1)
    assert torch.equal(whole[1], torch.where(exists, ids, SENTINEL).int())
    assert not whole[0][~exists].any()
    sums = whole[0].sum(1)[exists.any(1)]
    torch.testing.assert_close(sums, torch.full_like(sums, 1.5))


def test_given_ids_replay_a_selection(dense: Any) -> None:
    (x,) = arguments_of("dense", 9)
    selected = dense(x)
    same(dense(x, given_ids=selected[1]), selected)
    same(dense(x, given_ids=selected[1]), dense.replay(x, selected[1]))


def test_logits_that_were_gathered_route_hash_layers_with_images() -> None:
    """``activation_topk`` with the table's ids for text, and its own choice for images."""
    gate = make_router("hash_gate")
    x, words = arguments_of("hash_gate", 20)
    words, images = words.clamp(0, V - 1), mask(20, 1)
    logits = (x.double() @ TENSORS["weight"].double().T).float()
    found = rt.activation_topk(
        *(logits, TENSORS["image_bias"], K, 1.5, True),
        given_ids=TENSORS["table"][words],
        given_mask=~images,
        sentinel=SENTINEL,
    )
    expected = gate(x, words, image_mask=images)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


# --- shared experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shared_experts_follow(router: Any, count: int, dtype: torch.dtype) -> None:
    given, padding = arguments_of(router.config.mode, 9), mask(9, 1)
    inputs: dict[str, Any] = {"is_padding": padding, "ids_dtype": dtype}
    plain = router.forward_mapped(*given, **inputs)
    for named, first, weight in (
        ({}, E, 1.0),
        ({"shared_id": 1000, "shared_weight": 0.4}, 1000, 0.4),
    ):
        found = router.forward_mapped(*given, **inputs, shared_experts=count, **named)
        assert found[0].shape == found[1].shape == (9, K + count)
        same([found[0][:, :K], found[1][:, :K], found[2]], plain)
        for shared in range(count):
            expected = torch.where(padding, SENTINEL, first + shared)
            assert torch.equal(found[1][:, K + shared], expected.to(dtype))
            values = torch.where(padding, 0.0, weight)
            assert torch.equal(found[0][:, K + shared], values)


def test_shared_experts_are_neither_counted_nor_captured(dense: Any) -> None:
    (x,) = arguments_of("dense", 9)
    found = []
    for count in (0, 2):
        load, captured = torch.zeros(E + 2).int(), torch.zeros(9, K).int()
        records = {"expert_load": load, "captured_ids": captured}
        dense.forward_out(x, **results(9, K + count), **records, shared_experts=count)
        found.append((load, captured))
    same(*found)


# --- packed results -------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_packed_words(router: Any, mapped: bool) -> None:
    given = arguments_of(router.config.mode, 9)
    inputs: dict[str, Any] = {"is_padding": mask(9, 1)}
    shared: dict[str, Any] = {"shared_experts": 1, "shared_weight": 0.3}
    words = router.forward_packed(*given, mapped=mapped, **inputs, **shared)
    plain = router.forward_mapped if mapped else router.forward
    weights, ids, *_ = plain(*given, **inputs, **shared)
    assert words.dtype is torch.int32
    assert torch.equal(words >> 16, ids)
    halves = (words & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(halves, weights.bfloat16())


def test_packed_rounds_ties_to_even() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0x7F7F0000, 1, 0])
    weights = bits.int().view(torch.float32)
    found = spec.packed(weights, torch.zeros(7).int())
    assert found.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0x7F7F, 0, 0]


# --- strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_results_whose_rows_are_apart(router: Any, dtype: torch.dtype) -> None:
    given = arguments_of(router.config.mode, 9)
    weights, ids = torch.full((9, 7), 8.0), torch.full((9, 11), 8, dtype=dtype)
    router.forward_out(*given, weights_out=weights[:, 1 : K + 1], ids_out=ids[:, 2 : K + 2])
    plain = router(*given, ids_dtype=dtype)
    same((weights[:, 1 : K + 1], ids[:, 2 : K + 2]), plain)
    weights[:, 1 : K + 1] = 8
    ids[:, 2 : K + 2] = 8
    assert (weights == 8).all()
    assert (ids == 8).all()


# --- the launch: the fake driver reads what the hardware would ------------------------------------


@pytest.fixture
def backends(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """The CUDA backends by mode, on CPU memory."""
    sizes = {"HIDDEN": H, "EXPERTS": E, "TOP_K": K}
    gates = [
        build.entry(
            "hash_gate",
            build.gate(),
            model="small",
            variant=variant,
            constants={**sizes, "IMAGES": int(variant == "images")},
            numerics="gather",
        )
        for variant in ("portable", "images")
    ]
    gpu.entries = [*build.small(), *gates]
    kernels = kernels_on(0, build.artifacts(tmp_path / "with gates", gpu.entries))
    found: dict[str, Any] = {}
    for mode, kind in (("dense", CudaDense), ("hash", CudaHash), ("hash_gate", CudaHashGate)):
        weights = Weights(config_of(mode), torch.device("cpu"), "image_bias" in OWN[mode])
        found[mode] = kind(config_of(mode), weights, kernels, Selection())
        weights.write({name: TENSORS[name] for name in OWN[mode]})
    return found


def options_calls(mode: str, tokens: int) -> Iterator[dict[str, Any]]:
    """Arguments of calls with each option alone, and with all that go together."""
    records = {
        "expert_load": torch.ones(PHYSICAL_EXPERTS).int(),
        "record_load": torch.tensor([True]),
        "captured_ids": torch.zeros(tokens + 3, 2, K, dtype=torch.int16)[:, 1],
    }
    yield {"expert_load": torch.ones(PHYSICAL_EXPERTS - 9).int()}
    yield {"expert_load": torch.ones(E).int(), "record_load": torch.tensor(False)}
    yield {"captured_ids": torch.zeros(tokens, K).int()}
    yield {"shared_experts": 1}
    yield {"shared_experts": 2, "shared_id": 900, "shared_weight": 0.25}
    yield {**records, "shared_experts": 2}
    if mode != "hash":
        given = {"given_ids": given_ids(tokens), "given_mask": mask(tokens, 8)}
        yield given
        yield {**records, **given}


#: Small ones are the decode kernel's, 9 the prefill kernel's, 100 is cut into four.
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 100])
@pytest.mark.parametrize("mode", MODES)
def test_launches(gpu: Any, backends: dict[str, Any], mode: str, tokens: int) -> None:
    router, backend = make_router(mode), backends[mode]
    tensor, *words = arguments_of(mode, tokens)
    beside: dict[str, Any] = {"token_ids": words[0]} if words else {}
    for number, options in enumerate(options_calls(mode, tokens)):
        served = {"is_padding": mask(tokens, 6), "mapped": number % 2 == 1}
        found = []
        for serve in (router.serve, lambda x, call: backend.serve(x, call, MAP)):
            own = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in options.items()
            }
            kept = dict(own)
            call = Call.taking(own, **served, **beside)
            given = serve(tensor, call).given()
            records = [kept[name] for name in ("expert_load", "captured_ids") if name in kept]
            found.append([*given, *records])
        same(*found)
    assert {launch.arguments["serving"] for launch in gpu.launches} <= {1, 2}


@pytest.mark.parametrize("tokens", [1, 8, 9, 100])
@pytest.mark.parametrize("mode", MODES)
def test_launches_of_packed_and_strided_calls(
    backends: dict[str, Any], mode: str, tokens: int
) -> None:
    router, backend = make_router(mode), backends[mode]
    tensor, *words = arguments_of(mode, tokens)
    beside: dict[str, Any] = {"token_ids": words[0]} if words else {}
    for mapped in (False, True):
        call: dict[str, Any] = {
            "packed": True,
            "mapped": mapped,
            "options": Options(shared_experts=1),
            **beside,
        }
        expected = router.serve(tensor, Call(**call))
        same(backend.serve(tensor, Call(**call), MAP).given(), expected.given())
    plain = router.serve(tensor, Call(**beside))
    for dtype in (torch.int32, torch.int64):
        weights, ids = torch.zeros(tokens, 9), torch.zeros(tokens, 6, dtype=dtype)
        own = Results(weights[:, 2 : 2 + K], ids[:, 1 : 1 + K])
        backend.serve(tensor, Call(outputs=own, **beside), MAP)
        same(own[:2], (plain.weights, plain.ids.to(dtype)))
        assert not weights[:, 2 + K :].any()


def test_activation_launches(gpu: Any) -> None:
    logits = torch.randn(9, E, generator=seeded(7))
    rules: Any = {
        **{"image_bias": TENSORS["image_bias"], "sentinel": 7},
        **{"expert_map": MAP.physical, "replica_counts": MAP.counts},
        **{"replica_start": MAP.start, "replica_step": MAP.step},
    }
    for packed in (False, True):
        found = []
        for serve in (rows.serve_activation_cpu, rows.serve_activation_cuda):
            options = Options(
                shared_experts=2,
                expert_load=torch.zeros(PHYSICAL_EXPERTS).int(),
                captured_ids=torch.zeros(9, K).short(),
            )
            call = Call(
                image_mask=mask(9, 1),
                is_padding=mask(9, 2),
                given_ids=given_ids(9),
                given_mask=mask(9, 3),
                packed=packed,
                options=options,
            )
            given = serve(logits, TENSORS["bias"], K, 1.5, True, call=call, **rules).given()
            records: Any = (options.expert_load, options.captured_ids)
            found.append((*given, *records))
        same(*found)
        assert found[0][-2].any()


def test_other_launches_have_no_options(backends: dict[str, Any], gpu: Any) -> None:
    (x,) = arguments_of("dense", 3)
    backends["dense"].serve(
        x, Call.taking({"shared_experts": 2, "expert_load": torch.zeros(E).int()}), None
    )
    assert gpu.launches[-1].arguments["serving"] == 2
    backends["dense"].serve(x, Call(is_padding=mask(3, 1)), None)
    assert gpu.launches[-1].arguments["serving"] == 1
    backends["dense"].route(x)
    assert gpu.launches[-1].arguments["serving"] == 0
    for launch in gpu.launches[-2:]:
        assert not any(launch.arguments[name] for name in OPTIONS)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_load": torch.zeros(E)}, "expert_load: expected torch.int32"),
        ({"expert_load": torch.zeros(E).long()}, "expert_load: expected torch.int32"),
        ({"expert_load": torch.zeros(2 * E).int()[::2]}, "expert_load: expected .*contiguous"),
        ({"expert_load": torch.zeros(1, E).int()}, "expert_load: expected torch.int32"),
        ({"expert_load": torch.zeros(E, device="meta").int()}, "expert_load: expected .* on cpu"),
        ({"record_load": torch.tensor(True)}, "record_load: expected expert_load beside it"),
        (
            {"expert_load": torch.zeros(E).int(), "record_load": torch.tensor(1)},
            "record_load: expected torch.bool, one element",
        ),
        (
            {"expert_load": torch.zeros(E).int(), "record_load": torch.ones(2).bool()},
            "record_load: expected torch.bool, one element",
        ),
        ({"captured_ids": torch.zeros(4, K).int()}, r"captured_ids: expected .*\[5 or more, 4\]"),
        ({"captured_ids": torch.zeros(5, K + 1).int()}, "captured_ids: expected"),
        ({"captured_ids": torch.zeros(5, K).long()}, "captured_ids: expected torch.int16"),
        ({"captured_ids": torch.zeros(K, 5).int().T}, "captured_ids: .*side by side"),
        ({"captured_ids": torch.zeros(K).int().expand(5, K)}, "no two rows in one place"),
        ({"shared_experts": 3}, "shared_experts: expected an integer from 0 to 2"),
        ({"shared_experts": -1}, "shared_experts: expected an integer from 0 to 2"),
        ({"shared_experts": 1, "shared_id": -1}, "shared_id: expected an integer from 0"),
        ({"shared_experts": 1, "shared_id": 2**31}, "shared_id: expected an integer from 0"),
        ({"shared_experts": 1, "shared_weight": -0.5}, "shared_weight: expected a number from 0"),
        ({"shared_experts": 1, "shared_weight": torch.inf}, "shared_weight: expected a number"),
        ({"shared_id": 5}, "shared_id: expected shared_experts beside it"),
        ({"shared_weight": 5.0}, "shared_weight: expected shared_experts beside it"),
        ({"given_mask": torch.ones(5).bool()}, "given_mask: expected given_ids beside it"),
        (
            {"given_ids": torch.zeros(5, K).int(), "given_mask": torch.ones(5)},
            r"given_mask: expected torch.bool \[5\]",
        ),
        ({"shared_experts": 2}, r"weights_out: expected .*\[5, 6\]"),
        ({"mapped": 1}, "mapped: expected True or False"),
    ],
)
def test_refused_options(dense: Any, options: dict[str, Any], message: str) -> None:
    outputs = results(5)
    with pytest.raises(InputError, match=message):
        dense.forward_out(*arguments_of("dense", 5), **outputs, **options)
    assert (outputs["weights_out"] == 9).all()


def test_more_shared_experts_than_own_ones_are_refused() -> None:
    config = RouterConfig(H, E, 1, 1.5)
    router = Router(config, weight=TENSORS["weight"], bias=TENSORS["bias"], device="cpu")
    (x,) = arguments_of("dense", 5)
    assert router(x, shared_experts=1)[1].shape == (5, 2)
    with pytest.raises(InputError, match="shared_experts: expected an integer from 0 to 1"):
        router(x, shared_experts=2)


def test_a_sentinel_that_int16_cannot_hold() -> None:
    config = RouterConfig(H, E, K, 1.5, sentinel=2**15)
    router = Router(config, weight=TENSORS["weight"], bias=TENSORS["bias"], device="cpu")
    (x,) = arguments_of("dense", 5)
    router.forward_out(x, **results(5), captured_ids=torch.zeros(5, K).int())
    with pytest.raises(InputError, match="a sentinel from -32768 to 32767"):
        router.forward_out(x, **results(5), captured_ids=torch.zeros(5, K).short())


def test_what_takes_no_such_option(dense: Any) -> None:
    (x,), hashed = arguments_of("dense", 5), make_router("hash")
    with pytest.raises(InputError, match="given_ids: expected a router that weighs by scores"):
        hashed(*arguments_of("hash", 5), given_ids=given_ids(5))
    with pytest.raises(InputError, match="ids_dtype of forward_packed"):
        dense.forward_packed(x, ids_dtype=torch.int64)
    unmapped = Router(
        config_of("dense"), weight=TENSORS["weight"], bias=TENSORS["bias"], device="cpu"
    )
    for call in (
        lambda: unmapped.forward_packed(x, mapped=True),
        lambda: unmapped.forward_out(x, **results(5), mapped=True),
    ):
        with pytest.raises(InputError, match="a router with an expert map"):
            call()


# --- torch's own checks ---------------------------------------------------------------------------


def op_of(router: Any) -> tuple[Any, tuple[int, ...]]:
    names = {"dense": "dense_router", "hash": "hash_router", "hash_gate": "hash_gate"}
    numbers = (router.router_id, E, K) if router.config.mode != "hash" else (router.router_id, K)
    return getattr(torch.ops.dsv4, names[router.config.mode]), numbers


@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(router: Any, tokens: int) -> None:
    packet, numbers = op_of(router)
    given = arguments_of(router.config.mode, tokens)
    inputs: dict[str, Any] = {"shared_experts": 1, "shared_weight": 0.5}
    if router.config.mode != "hash":
        inputs |= {"given_ids": given_ids(tokens), "given_mask": mask(tokens, 1)}
    records = {
        "expert_load": torch.zeros(PHYSICAL_EXPERTS).int(),
        "record_load": torch.tensor(True),
        "captured_ids": torch.zeros(tokens + 2, K).short(),
    }
    for op, more in (
        (packet.default, {}),
        (packet.mapped, {}),
        (packet.packed, {"mapped": True}),
        (packet.out, {**results(tokens, K + 1), **records, "mapped": True}),
    ):
        torch.library.opcheck(op, (*given, *numbers), {**inputs, **more})


@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck_of_row_ops(tokens: int) -> None:
    logits = torch.randn(tokens, E, generator=seeded(9))
    brought: dict[str, Any] = {"expert_map": TABLE, "replica_counts": COUNTS}
    brought |= {"replica_start": 3, "replica_step": 2654435769, "shared_experts": 2}
    given = (logits, TENSORS["bias"], K, 1.5, True)
    packet = torch.ops.dsv4.activation_topk
    load = torch.zeros(PHYSICAL_EXPERTS).int()
    torch.library.opcheck(packet.mapped, given, {**brought, "given_ids": given_ids(tokens)})
    torch.library.opcheck(packet.packed, given, brought)
    out = {**brought, **results(tokens, K + 2), "expert_load": load}
    torch.library.opcheck(packet.out, given, out)


def test_a_row_op_with_a_map_applies_it_in_every_form() -> None:
    logits = torch.randn(9, E, generator=seeded(9))
    given = (logits, TENSORS["bias"], K, 1.5, True)
    brought: dict[str, Any] = {"expert_map": TABLE, "replica_counts": COUNTS, "replica_step": 7}
    packet = torch.ops.dsv4.activation_topk
    weights, ids, _ = packet.mapped(*given, **brought)
    outputs = results(9)
    packet.out(*given, **brought, **outputs)
    same(outputs.values(), (weights, ids))
    assert torch.equal(packet.packed(*given, **brought) >> 16, ids)
    with pytest.raises(InputError, match="replica_step: expected an integer from 0"):
        packet.mapped(*given, **{**brought, "replica_step": -1})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_record(router: Any, backend: str) -> None:
    torch._dynamo.reset()
    load, captured = torch.zeros(PHYSICAL_EXPERTS).int(), torch.zeros(16, K).short()
    flag = torch.tensor(True)

    def layer(*given: Tensor) -> list[Tensor]:
        tokens = given[0].shape[0]
        weights = given[0].new_empty((tokens, K + 1), dtype=torch.float32)
        ids = given[0].new_empty((tokens, K + 1), dtype=torch.int32)
        router.forward_out(
            *given,
            weights_out=weights,
            ids_out=ids,
            mapped=True,
            expert_load=load,
            record_load=flag,
            captured_ids=captured,
            shared_experts=1,
        )
        return [weights, ids, router.forward_packed(*given, shared_experts=1)]

    given = arguments_of(router.config.mode, 9)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    found = [*compiled(*given), load.clone(), captured.clone()]
    load.zero_()
    captured.zero_()
    same(found, [*layer(*given), load, captured])
    assert load.any()


def test_vmap_of_packed(router: Any) -> None:
    given = arguments_of(router.config.mode, 12)
    slices = [tensor.view(3, 4, *tensor.shape[1:]) for tensor in given]
    found = torch.vmap(lambda *own: router.forward_packed(*own))(*slices)
    assert torch.equal(found.view(12, K), router.forward_packed(*given))
