"""A Router as an ``nn.Module``: its state, copies, conversions, and in a model that is saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_runtime import (
    InputError,
    ResolutionError,
    Router,
    RouterConfig,
    register_router,
    unregister_router,
)
from router_runtime.device import kernels
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
DECODE = "dense_router_decode"
MODES = ("dense", "hash", "hash_gate")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors_of(mode: str, seed: int = 0, images: bool = True) -> dict[str, Tensor]:
    weight = torch.randn(E, H, generator=seeded(seed)).bfloat16()
    bias, image_bias = torch.randn(2, E, generator=seeded(seed)) * 0.1
    table = torch.randint(0, E, (V, K), generator=seeded(seed), dtype=torch.int32)
    named = {"weight": weight, "bias": bias, "image_bias": image_bias, "table": table}
    names = {"dense": ["weight", "bias"], "hash": ["table"], "hash_gate": ["weight", "table"]}[mode]
    with_images = images and mode != "hash"
    return {name: named[name] for name in [*names, *(["image_bias"] if with_images else [])]}


def make_router(mode: Any = "dense", seed: int = 0, **options: Any) -> Router:
    config = RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=None if mode == "dense" else V)
    options |= tensors_of(mode, seed)
    return Router(config, device="cpu", **options)


def rows(mode: str) -> tuple[Tensor, ...]:
    x = torch.randn(9, H, generator=seeded(5)).bfloat16()
    words = torch.arange(9) * 7 % (V + 3)
    return {"dense": (x,), "hash": (words,)}.get(mode, (x, words))


def same(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


# --- state ---


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_has_the_values_by_the_names_of_the_arguments(mode: str) -> None:
    router = make_router(mode)
    state = router.state_dict()
    assert state.keys() == tensors_of(mode).keys()
    same(state.values(), [tensors_of(mode)[name] for name in state])
    assert not list(router.parameters())
    assert dict(router.named_buffers()).keys() == state.keys()
    same(Router(router.config, **state, device="cpu")(*rows(mode)), router(*rows(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_saved_and_restored(mode: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make_router(mode, 1))
    other = nn.Sequential(nn.Linear(3, 3), make_router(mode, 2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    wanted, before = model[1](*rows(mode)), other[1](*rows(mode))
    addresses = [tensor.data_ptr() for tensor in other[1].buffers()]
    assert not torch.equal(wanted[1], before[1])
    assert str(other.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    same(other[1](*rows(mode)), wanted)
    assert [tensor.data_ptr() for tensor in other[1].buffers()] == addresses
    # With assign=True too: a tensor in place of a buffer would be one that no kernel reads.
    fresh = nn.Sequential(nn.Linear(3, 3), make_router(mode, 3))
    fresh.load_state_dict(model.state_dict(), assign=True)
    same(fresh[1](*rows(mode)), wanted)
    assert fresh[1]._buffers.keys() == other[1]._buffers.keys()
    model[1].load_state_dict(tensors_of(mode, 9))
    same(fresh[1](*rows(mode)), wanted)


def test_tables_of_both_widths_are_loaded() -> None:
    router = make_router("hash", 1)
    router.load_state_dict({"table": tensors_of("hash", 2)["table"].long()})
    same(router(*rows("hash")), make_router("hash", 2)(*rows("hash")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(E, H)}, r"1\.weight: expected torch.bfloat16 \[24, 128\], found"),
        ({"bias": torch.full((E,), torch.nan)}, r"1\.bias: expected finite values"),
        ({"weight": torch.zeros(E, H, dtype=torch.bfloat16, device="meta")}, "a meta tensor"),
        ({"bias": torch.zeros(E + 1)}, r"1\.bias: expected torch.float32 \[24\]"),
        ({"weight": "a word"}, r"1\.weight: expected a dense torch.Tensor, found 'str'"),
        (
            {"weight": torch.zeros(E, H, dtype=torch.bfloat16).to_sparse()},
            r"1\.weight: expected a dense torch.Tensor, found 'torch.sparse_coo'",
        ),
        ({"table": torch.zeros(V, K)}, 'Unexpected key.*"1.table"'),
        ({"bias": None}, 'Missing key.*"1.bias"'),
    ],
)
def test_a_bad_state_changes_nothing(change: dict[str, Any], message: str) -> None:
    """It is reported as torch reports one: with everything else that does not fit."""
    model = nn.Sequential(nn.Identity(), make_router(seed=1))
    before = model[1](*rows("dense"))
    given = tensors_of("dense", 2) | change
    state = {f"1.{name}": tensor for name, tensor in given.items() if tensor is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    if "Missing" not in message and "Unexpected" not in message:
        same(model[1](*rows("dense")), before)


def test_a_part_of_a_state_is_loaded_if_not_strict() -> None:
    router = make_router(seed=1)
    given = tensors_of("dense", 2)
    missing, unexpected = router.load_state_dict({"bias": given["bias"], "x": given["bias"]}, False)
    assert (sorted(missing), unexpected) == (["image_bias", "weight"], ["x"])
    wanted: dict[str, Any] = tensors_of("dense", 1) | {"bias": given["bias"]}
    same(router(*rows("dense")), Router(router.config, **wanted, device="cpu")(*rows("dense")))


def test_hooks_before_loading_see_the_state() -> None:
    router = make_router(seed=1)

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in list(state):
            state[prefix + name.removeprefix("old_")] = state.pop(name)

    router.register_load_state_dict_pre_hook(rename)
    router.load_state_dict({f"old_{name}": t for name, t in tensors_of("dense", 2).items()})
    same(router(*rows("dense")), make_router(seed=2)(*rows("dense")))


def test_loading_on_a_gpu_repacks_in_place_and_waits(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that were captured hold the addresses of the repacked weight."""
    build_on_the_fake_gpu(monkeypatch)
    router = make_router(seed=1)
    before = router(*rows("dense"))
    events: list[str] = []
    monkeypatch.setattr(router, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    router.load_state_dict(tensors_of("dense", 2))
    assert events == ["wait", "wait"]
    after = router(*rows("dense"))
    wanted = make_router(seed=2)
    same(after, wanted(*rows("dense")))
    assert not torch.equal(before[1], after[1])
    first, second = gpu.launches[:2]
    for name in ("packed_weight", "bias"):
        assert first.arguments[name] == second.arguments[name]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match=r"load_state_dict: expected no CUDA graph capture"):
        router.load_state_dict(tensors_of("dense", 1))


def test_written_outside_of_the_inference_mode_that_built_it() -> None:
    with torch.inference_mode():
        router = make_router(seed=1)
        router(*rows("dense"))
    router.update_weights(bias=tensors_of("dense", 2)["bias"])
    router.load_state_dict(tensors_of("dense", 2))
    same(router(*rows("dense")), make_router(seed=2)(*rows("dense")))


def test_buffers_are_not_replaced() -> None:
    router = make_router()
    with pytest.raises(InputError, match=r"assignment to weight.*call router.update_weights"):
        router.weight = torch.zeros(E, H).bfloat16()
    with pytest.raises(InputError, match="deletion of bias"):
        del router.bias
    with pytest.raises(InputError, match=r"assignment to weight.*call router.update_weights"):
        router.register_buffer("weight", torch.zeros(E, H).bfloat16())
    assert torch.equal(router.weight, tensors_of("dense")["weight"])
    router.note = "anything else is the user's"
    assert router.note == "anything else is the user's"


# --- conversions ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.to("cpu"),
        lambda module: module.cpu(),
        lambda module: module.to(torch.device("cpu"), non_blocking=True),
        lambda module: module.to_empty(device="cpu"),
        lambda module: module.requires_grad_(False),
        lambda module: module.requires_grad_(),
        lambda module: module.train(),
        lambda module: module.eval(),
    ],
)
def test_what_changes_nothing_is_done(mode: str, convert: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(make_router(mode))
    wanted = model[0](*rows(mode))
    addresses = [tensor.data_ptr() for tensor in model.buffers()]
    assert convert(model) is model
    assert [tensor.data_ptr() for tensor in model.buffers()] == addresses
    assert not any(tensor.requires_grad for tensor in model.buffers())
    same(model[0](*rows(mode)), wanted)


def test_train_and_eval_are_remembered() -> None:
    router = make_router()
    assert router.training
    assert not router.eval().training
    assert router.train().training


@pytest.mark.parametrize(
    ("mode", "convert"),
    [
        ("hash", lambda module: module.half()),
        ("hash", lambda module: module.bfloat16()),
        ("hash", lambda module: module.double()),
    ],
)
def test_conversions_of_floats_leave_a_table_alone(
    mode: str, convert: Callable[[nn.Module], Any]
) -> None:
    router = make_router(mode)
    assert convert(router) is router
    assert router.table.dtype == torch.int32


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda module: module.half(), r"weight of a Router: .*found a change to torch.float16"),
        (lambda module: module.float(), "weight of a Router.*convert the other modules"),
        (lambda module: module.bfloat16(), "bias of a Router: expected torch.float32 on cpu"),
        (lambda module: module.to(torch.float64), "change to torch.float64"),
        (lambda module: module.to("meta"), r"on meta; leave Routers where they are"),
        (lambda module: module.share_memory(), "in shared memory; send the config"),
    ],
)
def test_what_would_change_something_is_refused(
    convert: Callable[[nn.Module], Any], message: str
) -> None:
    router = make_router()
    wanted = router(*rows("dense"))
    for module in (router, nn.Sequential(router)):
        with pytest.raises(InputError, match=message):
            convert(module)
    same(router(*rows("dense")), wanted)
    assert not router.weight.is_shared()


# --- what a user adds ---


class Extended(Router):
    """A router with a constructor, a signature, tensors and a module of its own."""

    def __init__(self, seed: int) -> None:
        config = RouterConfig(H, E, K, 1.5)
        tensors: dict[str, Any] = tensors_of("dense", seed, images=False)
        super().__init__(config, device="cpu", **tensors)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.gain = nn.Parameter(torch.full((1,), float(seed)))
        self.linear = nn.Linear(2, 2)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights, ids = super().forward(states)
        return weights * self.gain.detach(), ids


def test_a_subclass_is_called_with_what_it_takes() -> None:
    router, states = Extended(2), rows("dense")[0]
    weights, ids = make_router(seed=2)(states)
    same(router(states), (weights * 2.0, ids))
    seen: list[Any] = []
    router.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments)))
    same(router(states), (weights * 2.0, ids))
    assert seen == [1]


def test_what_a_subclass_adds_is_in_its_state() -> None:
    """Also with values of another router, and in a model."""
    states = rows("dense")[0]
    first, second = nn.Sequential(Extended(2)), nn.Sequential(Extended(3))
    assert set(first.state_dict()) == {
        f"0.{name}" for name in ("weight", "bias", "count", "gain", "linear.weight", "linear.bias")
    }
    second.load_state_dict(first.state_dict())
    same(second(states), first(states))
    same(second[0].parameters(), first[0].parameters())
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.gain".*\n.*Unexpected key.*"0.gains"'):
        second.load_state_dict(
            {name.replace("gain", "gains"): value for name, value in first.state_dict().items()}
        )


def test_what_a_subclass_adds_is_copied_deep() -> None:
    router, states = Extended(2), rows("dense")[0]
    router.count += 7
    twin = copy.deepcopy(router)
    assert type(twin) is Extended
    same(twin(states), router(states))
    assert twin.count == 7
    router.count += 1
    assert twin.count == 7
    assert twin.linear.weight.data_ptr() != router.linear.weight.data_ptr()


def test_what_a_subclass_adds_is_converted() -> None:
    router = Extended(2)
    address, converted = router.weight.data_ptr(), []

    def convert(tensor: Tensor) -> Tensor:
        converted.append(tuple(tensor.shape))
        return tensor.clone()

    names = list(router._buffers)
    nn.Sequential(router)._apply(convert)
    assert {(2, 2), (2,), (1,)} <= set(converted)
    assert router.weight.data_ptr() == address
    assert list(router._buffers) == names


# --- copies ---


@pytest.mark.parametrize("mode", MODES)
def test_a_deep_copy_is_independent(mode: str) -> None:
    router = make_router(mode)
    router.set_expert_map(torch.arange(2 * E).view(E, 2), torch.arange(E) % 2 + 1)
    seen: list[str] = []
    router.register_forward_hook(lambda *_: seen.append("called"))
    router.eval()
    router_id = register_router(router)
    copied_pair = copy.deepcopy(nn.Sequential(router, router))
    assert copied_pair[0] is copied_pair[1]
    copied: Any = copied_pair[0]
    same(copied(*rows(mode)), router(*rows(mode)))
    same(copied.forward_mapped(*rows(mode)), router.forward_mapped(*rows(mode)))
    assert seen == ["called", "called"]
    assert copied.config == router.config
    assert not copied.training
    assert not copied.is_registered
    unregister_router(router_id)
    assert {t.data_ptr() for t in copied.buffers()}.isdisjoint(
        t.data_ptr() for t in router.buffers()
    )
    wanted = router(*rows(mode))
    copied.load_state_dict(tensors_of(mode, 7))
    same(router(*rows(mode)), wanted)
    assert not torch.equal(copied(*rows(mode))[1], wanted[1])


def test_a_deep_copy_has_the_artifacts_and_the_variants(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.delenv("ROUTER_RUNTIME_ARTIFACTS")
    monkeypatch.setattr(kernels, "status", lambda *_: "unproven")  # so that it must be named
    options: dict[str, Any] = {
        "artifacts": tmp_path / "artifacts",
        "variants": {DECODE: "portable"},
    }
    router = make_router(**options)
    copied = copy.deepcopy(router)
    assert copied.token_ranges == router.token_ranges
    assert {each.entry.kernel for each in copied.token_ranges} == {DECODE}
    same(copied(*rows("dense")), router(*rows("dense")))
    assert len({each.arguments["packed_weight"] for each in gpu.launches}) == 2


def test_an_accepted_status_is_kept_and_shown(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the constructor, ``from_state_dict`` and ``copy.deepcopy``."""
    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "status", lambda *_: "emulated")
    with pytest.raises(ResolutionError, match="accept='emulated'"):
        make_router()
    router = make_router(accept="emulated")
    copied = copy.deepcopy(router)
    assert set(copied.evidence.values()) == {"emulated"}
    assert copied.evidence == router.evidence
    key = router.token_ranges[0].entry.key
    assert f", emulated=['{key}'" in repr(router)
    state = {f"layers.0.ffn.gate.{name}": tensor for name, tensor in router.state_dict().items()}
    restored = Router.from_state_dict(router.config, state, 0, device="cpu", accept="emulated")
    assert restored.evidence == router.evidence
    monkeypatch.setattr(kernels, "status", lambda *_: "verified")
    manifest = tmp_path / "artifacts" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())  # so that the statuses are computed again
    assert "emulated" not in repr(make_router())


# --- words ---


def test_repr_says_what_it_is() -> None:
    router = make_router()
    assert repr(nn.Sequential(router)) == (
        "Sequential(\n  (0): Router(dense, hidden_size=128, num_experts=24, top_k=4, "
        "routed_scaling_factor=1.5, device='cpu')\n)"
    )
    router_id = register_router(router)
    assert repr(router).endswith(f"device='cpu', router_id={router_id})")
    unregister_router(router_id)
    assert "hash_gate, hidden_size=128" in repr(make_router("hash_gate"))
    assert "vocab_size=50" in repr(make_router("hash"))
