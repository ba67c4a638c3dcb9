"""What engines pass in, on CPU tensors and through the fake driver: each input against the oracle,
each refusal, and torch's own checks of every form of every op.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
from router_runtime.routing.cuda_hash import CudaHash
from router_runtime.routing.expert_map import ExpertMap
from router_runtime.routing.router import Router
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights

H, E, K, V = 128, 24, 4, 50
SENTINEL = -3
CONFIG = RouterConfig(H, E, K, 1.5, sentinel=SENTINEL)
HASH = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V, sentinel=SENTINEL)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WEIGHT = torch.randn(E, H, generator=seeded(1)).bfloat16()
BIAS, IMAGE_BIAS = torch.randn(2, E, generator=seeded(2)) * 0.5
TABLE = torch.randint(0, E, (V, K), generator=seeded(3))
COUNTS = torch.randint(1, 4, (E,), generator=seeded(4))
PHYSICAL = torch.arange(E * 3).view(E, 3) + 100


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=seeded(tokens)).bfloat16()


def token_ids(tokens: int) -> Tensor:
    return torch.randint(-5, V + 5, (tokens,), generator=seeded(tokens))


def mask(tokens: int, seed: int) -> Tensor:
    return torch.rand(tokens, generator=seeded(seed)) < 0.4


def count(valid: int) -> Tensor:
    return torch.tensor([valid], dtype=torch.int32)


@pytest.fixture
def dense() -> Iterator[Router]:
    router = Router(CONFIG, weight=WEIGHT, bias=BIAS, image_bias=IMAGE_BIAS, device="cpu")
    router.set_expert_map(PHYSICAL, COUNTS)
    router_id = rt.register_router(router)
    yield router
    rt.unregister_router(router_id)


@pytest.fixture
def hashed() -> Iterator[Router]:
    router = Router(HASH, table=TABLE, device="cpu")
    router.set_expert_map(PHYSICAL, COUNTS)
    router_id = rt.register_router(router)
    yield router
    rt.unregister_router(router_id)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- the mathematics ------------------------------------------------------------------------------


def test_padding_is_the_sentinel_and_zero(dense: Router, hashed: Router) -> None:
    padding = mask(9, 1)
    for router, tensor in ((dense, hidden(9)), (hashed, token_ids(9).clamp(0, V - 1))):
        weights, ids = router(tensor, is_padding=padding)
        plain = router(tensor)
        assert (ids[padding] == SENTINEL).all()
        assert not weights.view(torch.int32)[padding].any()
        same((weights[~padding], ids[~padding]), (plain[0][~padding], plain[1][~padding]))


@pytest.mark.parametrize("valid", [-1, 0, 1, 8, 9, 100])
def test_rows_from_the_count_on_are_padding(dense: Router, hashed: Router, valid: int) -> None:
    for router, tensor in ((dense, hidden(9)), (hashed, token_ids(9))):
        found = router(tensor, num_valid_tokens=count(valid))
        same(found, router(tensor, is_padding=torch.arange(9) >= valid))
        same(found, router(tensor, num_valid_tokens=count(valid)[0]))


def test_logits_of_padding_are_those_of_its_rows(dense: Router) -> None:
    x = hidden(6)
    found = dense.forward_with_logits(x, num_valid_tokens=count(2))
    same(found[2:], dense.forward_with_logits(x)[2:])


def test_image_tokens_are_selected_by_their_own_bias(dense: Router) -> None:
    x, images = hidden(20), mask(20, 2)
    other = Router(CONFIG, weight=WEIGHT, bias=IMAGE_BIAS, device="cpu")
    plain, of_images = dense(x), other(x)
    assert not torch.equal(plain[1], of_images[1])
    chosen = images.unsqueeze(1)
    expected = tuple(torch.where(chosen, a, b) for a, b in zip(of_images, plain, strict=True))
    same(dense(x, image_mask=images), expected)


def test_physical_ids(dense: Router, hashed: Router) -> None:
    padding = mask(9, 3)
    for router, tensor in ((dense, hidden(9)), (hashed, token_ids(9))):
        weights, physical, logical = router.forward_mapped(tensor, is_padding=padding)
        same((weights, logical), router(tensor, is_padding=padding))
        for row in range(9):
            for rank in range(K):
                expert = int(logical[row, rank])
                expected = SENTINEL
                if expert != SENTINEL:
                    expected = int(PHYSICAL[expert, row % int(COUNTS[expert])])
                assert int(physical[row, rank]) == expected


def test_replay(dense: Router) -> None:
    x = hidden(7)
    weights, ids = dense(x)
    for given in (ids, ids.long()):
        same(dense.replay(x, given), (weights, ids))
    logits = dense.forward_with_logits(x)[2]
    order = torch.tensor([2, 0, 3, 1])
    found = dense.replay(x, ids[:, order])
    scores = spec.expert_scores(logits).gather(1, ids[:, order].long())
    same(found, (spec.routing_weights(scores, 1.5), ids[:, order]))


@pytest.mark.parametrize("strange", [-1, E, 2**31 - 1, 2**32, 2**32 + 1, -(2**63)])
def test_replay_of_what_is_no_expert(dense: Router, strange: int) -> None:
    x = hidden(3)
    given = dense(x)[1].long()
    given[1, 2] = strange
    weights, ids = dense.replay(x, given)
    assert ids[1].tolist() == [int(given[1, 0]), int(given[1, 1]), SENTINEL, int(given[1, 3])]
    assert weights[1, 2] == 0
    torch.testing.assert_close(weights[1].sum(), torch.tensor(1.5))


def test_a_sentinel_that_is_an_expert_is_not_mapped() -> None:
    config = RouterConfig(H, E, K, 1.5, sentinel=5)
    router = Router(config, weight=WEIGHT, bias=BIAS, device="cpu")
    router.set_expert_map(PHYSICAL, COUNTS)
    _, physical, logical = router.forward_mapped(hidden(4), is_padding=torch.ones(4).bool())
    assert (physical == 5).all()
    assert (logical == 5).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_both_widths(dense: Router, hashed: Router, dtype: torch.dtype) -> None:
    for router, tensor in ((dense, hidden(5)), (hashed, token_ids(5))):
        found, plain = router.forward_mapped(tensor, ids_dtype=dtype), router(tensor)
        assert found[1].dtype == found[2].dtype == dtype
        same((found[0], found[2].int()), plain)
        weights, ids = torch.empty(5, K), torch.empty(5, K, dtype=dtype)
        assert router.forward_out(tensor, weights_out=weights, ids_out=ids) is None
        same((weights, ids.int()), plain)


def test_activation_topk_is_given_what_a_router_owns(dense: Router) -> None:
    x, images, padding = hidden(9), mask(9, 4), mask(9, 5)
    logits = dense.forward_with_logits(x)[2]
    expected = dense.forward_mapped(x, image_mask=images, is_padding=padding)
    found = torch.ops.dsv4.activation_topk.mapped(
        *(logits, BIAS, K, 1.5, True),
        image_mask=images,
        image_bias=IMAGE_BIAS,
        is_padding=padding,
        sentinel=SENTINEL,
        expert_map=PHYSICAL.int(),
        replica_counts=COUNTS.int(),
    )
    same(found, expected)


def test_activation_topk_replay(dense: Router) -> None:
    x, padding = hidden(9), mask(9, 5)
    logits = dense.forward_with_logits(x)[2]
    given = torch.randint(-1, E + 1, (9, K), generator=seeded(8))
    expected = dense.replay(x, given, is_padding=padding)
    found = rt.activation_topk_replay(
        logits, given, 1.5, True, is_padding=padding, sentinel=SENTINEL
    )
    same(found, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_entry_of_a_map_is_returned_whatever_it_is(dtype: torch.dtype) -> None:
    """As the kernels do: the op does not look at a map. A Router refuses such entries."""
    logits, padding = torch.randn(6, E, generator=seeded(11)), mask(6, 3)
    entries = torch.tensor([-1, -2, SENTINEL, -(2**31), 2**31 - 1, 0], dtype=torch.int32)
    expert_map = entries.repeat(E)[:E].unsqueeze(1)
    _, physical, logical = torch.ops.dsv4.activation_topk.mapped(
        *(logits, BIAS, K, 1.5, True),
        ids_dtype=dtype,
        is_padding=padding,
        sentinel=SENTINEL,
        expert_map=expert_map,
        replica_counts=torch.ones(E, dtype=torch.int32),
    )
    assert physical.dtype is dtype
    expected = expert_map[:, 0][logical.clamp(min=0).long()]
    expected = torch.where(padding.unsqueeze(1), SENTINEL, expected)
    assert torch.equal(physical, expected.to(dtype))
    assert int((physical < 0).sum()) > int((physical == SENTINEL).sum())
    router = Router(CONFIG, weight=WEIGHT, bias=BIAS, device="cpu")
    with pytest.raises(InputError, match=r"expert_map: expected entries from 0 to 2147483647"):
        router.set_expert_map(expert_map, torch.ones(E, dtype=torch.int32))


def test_a_count_outside_the_map_stays_inside_it() -> None:
    logits, expert_map = torch.randn(6, E), PHYSICAL.int()
    for wrong, right in ((0, 1), (-5, 1), (99, 3)):
        counts = [torch.full((E,), value, dtype=torch.int32) for value in (wrong, right)]
        found = [
            torch.ops.dsv4.activation_topk.mapped(
                *(logits, BIAS, K, 1.5, True), expert_map=expert_map, replica_counts=each
            )
            for each in counts
        ]
        same(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_coarse_logits_and_biases_are_those_values_in_fp32(
    gpu: Any, dtype: torch.dtype, strided: bool
) -> None:
    x, bias, image_bias = (
        torch.randn(*shape, generator=seeded(9)).to(dtype) for shape in ((9, E), (E,), (E,))
    )
    if strided:
        x = x.T.contiguous().T
    exact, mixed = (x.float(), bias.float()), (x, bias.float())
    plain, images = rows.activation_topk_cpu(*exact, K, 1.5, True), mask(9, 1)
    rules: Any = {"image_bias": image_bias.float()}
    expected = rows.serve_activation_cpu(
        *exact, K, 1.5, True, call=Call(image_mask=images), **rules
    )
    given = plain[1].flip(1)
    replayed = rows.replay_activation_cpu(exact[0], given, 1.5, True, call=Call())
    for logits, of_them in ((x, bias), mixed):
        for activate in (rt.activation_topk, rows.activation_topk_cuda):
            same(activate(logits, of_them, K, 1.5, True), plain)
        for serve in (rows.serve_activation_cpu, rows.serve_activation_cuda):
            for each in (image_bias, image_bias.float()):
                call = Call(image_mask=images)
                found = serve(logits, of_them, K, 1.5, True, call=call, image_bias=each)
                same(found.given(), expected.given())
    for replay in (rows.replay_activation_cpu, rows.replay_activation_cuda):
        same(replay(x, given, 1.5, True, call=Call()).given(), replayed.given())


# --- the launch: the fake driver reads what the hardware would ------------------------------------


def paths(gpu: Any) -> dict[str, Any]:
    """The CUDA backends, on CPU memory."""
    weights = Weights(CONFIG, torch.device("cpu"), image_bias=True)
    dense = CudaDense(CONFIG, weights, kernels_on(0), Selection())
    weights.write({"weight": WEIGHT, "bias": BIAS, "image_bias": IMAGE_BIAS})
    table = Weights(HASH, torch.device("cpu"))
    table.write({"table": TABLE})
    return {"dense": dense, "hash": CudaHash(HASH, table, kernels_on(0), Selection())}


MAP = ExpertMap(PHYSICAL.int(), COUNTS.int())


#: Small ones are the decode kernel's, 9 the prefill kernel's, 100 is cut into four.
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 100])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("replay", [False, True])
def test_launches(
    gpu: Any, dense: Router, hashed: Router, tokens: int, dtype: torch.dtype, replay: bool
) -> None:
    backends = paths(gpu)
    for name, router, tensor in (
        ("dense", dense, hidden(tokens)),
        ("hash", hashed, token_ids(tokens)),
    ):
        scored = name == "dense"

        def call(scored: bool = scored) -> Call:
            return Call(
                ids_dtype=dtype,
                is_padding=mask(2 * tokens, 6)[::2],  # strided
                num_valid_tokens=count(tokens * 3 // 4),
                image_mask=mask(tokens, 7) if scored and not replay else None,
                given_ids=(
                    torch.randint(-1, E + 1, (K, tokens), generator=seeded(8)).to(dtype).T
                    if scored and replay
                    else None
                ),
                mapped=True,
                logits=scored,
            )

        found = backends[name].serve(tensor, call(), MAP)
        expected = router.serve(tensor, call())
        same(found.given(), expected.given())
    assert all(launch.arguments["serving"] == 1 for launch in gpu.launches)


def test_plain_launches_have_no_serving_inputs(gpu: Any) -> None:
    backends = paths(gpu)
    backends["dense"].serve(hidden(3), Call(is_padding=mask(3, 1)), None)
    gpu.launches.clear()
    backends["dense"].route(hidden(3))
    backends["hash"].route(token_ids(3))
    for launch in gpu.launches:
        for name in ("serving", "is_padding", "expert_map", "logical_ids_out", "replicas"):
            assert launch.arguments[name] == 0


def test_activation_launches(gpu: Any) -> None:
    logits, images = torch.randn(9, E), mask(9, 1)
    rules = {"image_bias": IMAGE_BIAS, "sentinel": 7}
    arguments = (logits, BIAS, K, 1.5, True)
    for serve in (rows.serve_activation_cpu, rows.serve_activation_cuda):
        call = Call(image_mask=images, num_valid_tokens=count(5), mapped=True)
        found = serve(
            *arguments, call=call, **rules, expert_map=MAP.physical, replica_counts=MAP.counts
        )
        if serve is rows.serve_activation_cpu:
            expected = found
    same(found.given(), expected.given())
    assert (found.ids[5:] == 7).all()
    given = torch.randint(-1, E + 1, (9, K), generator=seeded(8))
    same(
        rows.replay_activation_cuda(logits, given, 1.5, False, call=Call()).given(),
        rows.replay_activation_cpu(logits, given, 1.5, False, call=Call()).given(),
    )


# --- the expert map -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert_map", "counts", "message"),
    [
        (PHYSICAL[:-1], COUNTS, r"expert_map: expected .*\[24, replicas\]"),
        (PHYSICAL.float(), COUNTS, "expert_map: expected"),
        (PHYSICAL[:, 0], COUNTS, "expert_map: expected"),
        (PHYSICAL, COUNTS[:-1], r"replica_counts: expected .*\[24\]"),
        ([0], COUNTS, r"expert_map of Router\.\w+: expected torch\.Tensor, found list"),
        (PHYSICAL, COUNTS.to("meta"), "replica_counts: .* found 'a meta tensor'"),
        (PHYSICAL, COUNTS * 0, "replica_counts: expected entries from 1 to 3"),
        (PHYSICAL, COUNTS * 0 + 4, "replica_counts: expected entries from 1 to 3"),
        (PHYSICAL - 101, COUNTS, "expert_map: expected entries from 0"),
        (PHYSICAL + 2**31, COUNTS, "expert_map: expected entries from 0"),
        (PHYSICAL[:, :2], COUNTS.clamp(max=2), r"expert_map: expected \[24, 3\]"),
    ],
)
def test_a_bad_map_leaves_the_old_one(
    dense: Router, expert_map: Tensor, counts: Tensor, message: str
) -> None:
    before = dense.forward_mapped(hidden(5))
    for change in (dense.set_expert_map, dense.update_expert_map):
        with pytest.raises(InputError, match=message):
            change(expert_map, counts)
    same(dense.forward_mapped(hidden(5)), before)


#: As engines fill it: -1 in the places of row e from COUNTS[e] on. The last row is full.
FILLED = torch.where(torch.arange(3) < COUNTS.unsqueeze(1), PHYSICAL, -1)


@pytest.mark.parametrize("filling", [-1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unused_places_of_a_map_may_hold_anything(
    dense: Router, filling: int, dtype: torch.dtype
) -> None:
    expected = dense.forward_mapped(hidden(9))
    given = torch.where(FILLED < 0, filling, PHYSICAL).to(dtype)
    assert (given == filling).any()
    made = Router(CONFIG, weight=WEIGHT, bias=BIAS, device="cpu")
    made.set_expert_map(given, COUNTS)
    same(made.forward_mapped(hidden(9)), expected)
    made.update_expert_map(given, COUNTS)
    same(made.forward_mapped(hidden(9)), expected)


def test_a_used_place_without_a_physical_id_is_refused(dense: Router) -> None:
    """One more copy than the map has: the error says where."""
    row = int((COUNTS < 3).nonzero()[0, 0])
    counts = COUNTS.clone()
    counts[row] += 1
    place = rf"1 others, the first at \[{row}, {int(COUNTS[row])}\]: -1"
    for change in (dense.set_expert_map, dense.update_expert_map):
        with pytest.raises(InputError, match=place):
            change(FILLED, counts)


#: Rows of a batch that is cut into launches are numbered on, so the order holds beyond the first.
@pytest.mark.parametrize(
    ("start", "step"), [(0, 1), (3, 23333), (0, 2654435769), (1, 0), (2**32 - 1, 2**32 - 1)]
)
def test_the_order_in_which_copies_are_taken(
    gpu: Any, dense: Router, hashed: Router, start: int, step: int
) -> None:
    order = {"replica_start": start, "replica_step": step}
    backends = paths(gpu)
    for name, of_kind, x in (("dense", dense, hidden(100)), ("hash", hashed, token_ids(100))):
        tensors: dict[str, Any] = of_kind.weights.tensors
        router = Router(of_kind.config, **tensors, device="cpu")
        router.set_expert_map(FILLED + 7, COUNTS, **order)
        for change in (
            lambda own=router: own.set_expert_map(FILLED, COUNTS, **order),
            lambda own=router: own.update_expert_map(FILLED, COUNTS),
        ):
            change()
            _, physical, logical = router.forward_mapped(x)
            for i in range(100):
                for id, found in zip(logical[i].tolist(), physical[i].tolist(), strict=True):
                    place = (start + i * step) % 2**32 % int(COUNTS[id])
                    assert found == (SENTINEL if id == SENTINEL else int(FILLED[id, place]))
        launched = backends[name].serve(x, Call(mapped=True), router.expert_map)
        assert torch.equal(launched.ids, physical)
        assert torch.equal(copy.deepcopy(router).forward_mapped(x)[1], physical)


def test_the_order_of_copies_stays(dense: Router) -> None:
    """Captured graphs keep it, so a later call cannot seem to change it."""
    before = dense.forward_mapped(hidden(5))
    for order in ({"replica_start": 1}, {"replica_step": 2654435769}):
        expected = "replica_start and replica_step: expected those of the first call, 0 and 1"
        with pytest.raises(InputError, match=expected):
            dense.set_expert_map(PHYSICAL + 1, COUNTS, **order)
    same(dense.forward_mapped(hidden(5)), before)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"replica_start": -1}, "replica_start: expected an integer from 0 to 4294967295"),
        ({"replica_step": 2**32}, "replica_step: expected an integer from 0 to 4294967295"),
        ({"replica_step": True}, "replica_step of Router"),
        ({"replica_step": 1.0}, "replica_step of Router"),
    ],
)
def test_a_bad_order_leaves_the_old_map(dense: Router, order: Any, message: str) -> None:
    before = dense.forward_mapped(hidden(5))
    with pytest.raises(InputError, match=message):
        dense.set_expert_map(PHYSICAL + 1, COUNTS, **order)
    same(dense.forward_mapped(hidden(5)), before)


def test_a_map_is_updated_in_place(dense: Router) -> None:
    assert dense.expert_map is not None
    addresses = [tensor.data_ptr() for tensor in dense.expert_map[:2]]
    before = dense.forward_mapped(hidden(5))
    dense.update_expert_map(PHYSICAL + 7, COUNTS)
    assert [tensor.data_ptr() for tensor in dense.expert_map[:2]] == addresses
    after = dense.forward_mapped(hidden(5))
    same(after, (before[0], before[1] + 7, before[2]))


def test_no_map_no_physical_ids() -> None:
    router = Router(CONFIG, weight=WEIGHT, bias=BIAS, device="cpu")
    with pytest.raises(InputError, match="a router with an expert map"):
        router.forward_mapped(hidden(2))
    with pytest.raises(InputError, match="a router with an expert map"):
        router.update_expert_map(PHYSICAL, COUNTS)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"is_padding": torch.zeros(4).bool()}, r"is_padding: expected torch.bool \[5\]"),
        ({"is_padding": torch.zeros(5)}, "is_padding: expected"),
        ({"is_padding": torch.zeros(5, 1).bool()}, "is_padding: expected"),
        ({"image_mask": torch.zeros(6).bool()}, r"image_mask: expected torch.bool \[5\]"),
        ({"num_valid_tokens": torch.tensor([1])}, "num_valid_tokens: expected torch.int32"),
        ({"num_valid_tokens": torch.tensor([1, 2]).int()}, "one element"),
        ({"is_padding": torch.zeros(5, device="meta").bool()}, "is_padding: expected"),
        ({"ids_dtype": torch.int16}, "ids_dtype: expected torch.int32 or torch.int64"),
    ],
)
def test_refused_inputs(dense: Router, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dense(hidden(5), **inputs)


def test_image_masks_need_a_bias(hashed: Router) -> None:
    router = Router(CONFIG, weight=WEIGHT, bias=BIAS, device="cpu")
    images = mask(5, 1)
    with pytest.raises(InputError, match="a router with an image_bias"):
        router(hidden(5), image_mask=images)
    with pytest.raises(InputError, match="a router with an image_bias"):
        hashed(token_ids(5), image_mask=images)
    with pytest.raises(InputError, match="a router built with one"):
        router.update_weights(image_bias=IMAGE_BIAS)
    with pytest.raises(InputError, match="image_bias: expected finite"):
        Router(CONFIG, weight=WEIGHT, bias=BIAS, image_bias=BIAS / 0, device="cpu")
    with pytest.raises(InputError, match="image_bias: expected a router with a weight"):
        Router(HASH, table=TABLE, image_bias=BIAS, device="cpu")


def test_the_image_bias_is_updated_in_place(dense: Router) -> None:
    images = torch.ones(6, dtype=torch.bool)
    dense.update_weights(image_bias=torch.arange(E).float() * 100)
    _, ids = dense(hidden(6), image_mask=images)
    assert ids.tolist() == [[E - 1, E - 2, E - 3, E - 4]] * 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(5, K - 1).int(), r"given_ids: expected .*\[5, 4\]"),
        (torch.zeros(4, K).int(), "given_ids: expected"),
        (torch.zeros(5, K), "given_ids: expected torch.int32 or torch.int64"),
    ],
)
def test_refused_replays(dense: Router, hashed: Router, given: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dense.replay(hidden(5), given)
    with pytest.raises(InputError, match="expected a dense router"):
        hashed.replay(token_ids(5), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_out": torch.empty(5, K).double()}, "weights_out: expected torch.float32"),
        ({"weights_out": torch.empty(4, K)}, r"weights_out: expected .*\[5, 4\]"),
        ({"weights_out": torch.empty(K, 5).T}, "weights_out: expected .*side by side"),
        ({"weights_out": torch.empty(8).as_strided((5, K), (1, 1))}, "weights_out: expected"),
        ({"ids_out": torch.empty(5, K)}, "ids_out: expected torch.int32 or torch.int64"),
        ({"ids_out": torch.empty(5, 2 * K).int()[:, ::2]}, "ids_out: expected .*side by side"),
        ({"logical_ids_out": torch.empty(K, 5).int().T}, "logical_ids_out: expected .*contiguous"),
        ({"logits_out": torch.empty(5, E + 1)}, r"logits_out: expected .*\[5, 24\]"),
        ({"logical_ids_out": torch.empty(5, 1).int()}, "logical_ids_out: expected"),
        ({"ids_out": torch.empty(5, K, device="meta").int()}, "ids_out: expected .* on cpu"),
    ],
)
def test_refused_outputs(dense: Router, change: dict[str, Any], message: str) -> None:
    outputs: dict[str, Any] = {
        "weights_out": torch.full((5, K), 9.0),
        "ids_out": torch.full((5, K), 9).int(),
    }
    with pytest.raises(InputError, match=message):
        dense.forward_out(hidden(5), **{**outputs, **change})
    assert (outputs["weights_out"] == 9).all()
    assert (outputs["ids_out"] == 9).all()


# --- torch's own checks ---------------------------------------------------------------------------


def outputs(tokens: int, logits: bool) -> dict[str, Tensor]:
    found = {"weights_out": torch.zeros(tokens, K), "ids_out": torch.zeros(tokens, K).long()}
    found["logical_ids_out"] = torch.zeros(tokens, K).int()
    return found | ({"logits_out": torch.zeros(tokens, E)} if logits else {})


def calls(dense: Router, hashed: Router, tokens: int) -> Iterator[tuple[Any, Any, Any]]:
    """(op, arguments, keywords) of every form of every routing op."""
    numbers = (dense.router_id, E, K)
    x, padding, images = hidden(tokens), mask(tokens, 1), mask(tokens, 2)
    inputs = {"is_padding": padding, "num_valid_tokens": count(2)}
    logits = torch.randn(tokens, E, generator=seeded(9))
    brought = {"expert_map": MAP.physical, "replica_counts": MAP.counts}
    for name, arguments, more in (
        ("dense_router", (x, *numbers), {"image_mask": images}),
        ("dense_router_logits", (x, *numbers), {"image_mask": images}),
        ("dense_router_replay", (x, torch.randint(0, E, (tokens, K)), *numbers), {}),
        ("hash_router", (token_ids(tokens), hashed.router_id, K), {}),
        (
            "activation_topk",
            (logits, BIAS, K, 1.5, True),
            {"image_mask": images, "image_bias": IMAGE_BIAS, "sentinel": SENTINEL},
        ),
        (
            "activation_topk_replay",
            (logits, torch.randint(0, E, (tokens, K)), 1.5, True),
            {"sentinel": SENTINEL},
        ),
    ):
        packet = getattr(torch.ops.dsv4, name)
        more = inputs | more
        own = brought if name.startswith("activation") else {}
        yield packet.default, arguments, more
        yield packet.default, arguments, {**more, "ids_dtype": torch.int64}
        yield packet.mapped, arguments, {**more, **own, "ids_dtype": torch.int64}
        yield packet.out, arguments, {**more, **own, **outputs(tokens, name.endswith("logits"))}


@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(dense: Router, hashed: Router, tokens: int) -> None:
    for op, arguments, inputs in calls(dense, hashed, tokens):
        torch.library.opcheck(op, arguments, inputs)


def test_forms_agree(dense: Router, hashed: Router) -> None:
    """What ``out`` writes is what ``mapped`` returns."""
    found = list(calls(dense, hashed, 6))
    for mapped, out in zip(found[2::4], found[3::4], strict=True):
        expected = mapped[0](*mapped[1], **mapped[2])
        assert out[0](*out[1], **out[2]) is None
        written = out[2]
        assert torch.equal(written["weights_out"], expected[0])
        assert torch.equal(written["ids_out"], expected[1])
        assert torch.equal(written["logical_ids_out"], expected[-1].int())
        if "logits_out" in written:
            assert torch.equal(written["logits_out"], expected[2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_form_compiles_whole(dense: Router, hashed: Router, backend: str) -> None:
    torch._dynamo.reset()

    def layer(x: Tensor, tokens: Tensor, padding: Tensor, images: Tensor) -> list[Tensor]:
        weights = x.new_empty((x.shape[0], K), dtype=torch.float32)
        ids = x.new_empty((x.shape[0], K), dtype=torch.int64)
        found = [*dense(x, is_padding=padding, image_mask=images, ids_dtype=torch.int64)]
        found += dense.forward_with_logits(x, is_padding=padding)
        found += dense.forward_mapped(x, image_mask=images)
        found += dense.replay(x, found[1], is_padding=padding)
        found += hashed(tokens, is_padding=padding)
        torch.ops.dsv4.dense_router.out(
            x, dense.router_id, E, K, weights_out=weights, ids_out=ids, is_padding=padding
        )
        return [*found, weights, ids]

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 9):
        arguments = hidden(tokens), token_ids(tokens), mask(tokens, 1), mask(tokens, 2)
        for one, other in zip(compiled(*arguments), layer(*arguments), strict=True):
            assert torch.equal(one, other)


def test_results_hold_the_caller_s_own_tensors(dense: Router) -> None:
    own = Results(torch.empty(4, K), torch.empty(4, K).int())
    found = dense.serve(hidden(4), Call(outputs=own))
    assert found.weights is own.weights
    assert found.ids is own.ids
