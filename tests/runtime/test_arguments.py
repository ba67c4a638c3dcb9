"""Arguments of the wrong kind: every public function and method answers with an InputError.

The table has a right call of each. Every parameter of it is then given values of every kind that
its annotation does not name, and the call is made with one argument too few, too many or unknown.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import router_runtime as rt
from router_runtime import InputError, Router, RouterConfig
from router_runtime.integrations import transformers as integration
from router_runtime.routing.call import Call, Inputs, ReplayInputs
from router_runtime.routing.module import GateModule

H, E, K, V = 64, 16, 4, 30

NUMBERS: tuple[Any, ...] = (3, 1.5, True, 10**5000)
OTHERS: tuple[Any, ...] = ("x", b"x", [1.0], (1,), {}, object(), nn.Identity())
ARRAY = torch.zeros(3).numpy()
MODES = numpy.array(["dense", "hash"])
#: No number of 64 bits, nor a float64; Python does not write the last one in digits.
LARGE: tuple[Any, ...] = (2**64, -(2**63) - 1, 10**400, 10**5000)
#: What torch takes for a number of its own.
CODES: tuple[Any, ...] = (torch.float32, torch.strided, torch.contiguous_format)

X = torch.zeros(3, H, dtype=torch.bfloat16)
LOGITS = torch.zeros(3, E)
GIVEN = torch.zeros(3, K, dtype=torch.int32)
ROWS = torch.zeros(3, 4)
with warnings.catch_warnings(action="ignore"):  # torch warns that some of these are new or old
    #: Tensors whose elements are not one by one in memory.
    STORED_OTHERWISE: tuple[Any, ...] = (
        ROWS.to_sparse(),
        ROWS.to_sparse_csr(),
        torch.nested.nested_tensor([ROWS]),
        torch.quantize_per_tensor(ROWS, 1.0, 0, torch.quint8),
        *(X.to_sparse(), LOGITS.to_sparse(), GIVEN.to_sparse(), torch.ones(1).int().to_sparse()),
    )

#: Values that are of no kind that an annotation, as it is written, names.
WRONG: dict[str, tuple[Any, ...]] = {
    "Tensor": (None, ARRAY, *NUMBERS, *OTHERS, *STORED_OTHERWISE),
    "Tensor | None": (ARRAY, *NUMBERS, *OTHERS, *STORED_OTHERWISE),
    "torch.dtype | None": (*NUMBERS, "int64", int, [torch.int64], numpy.array([torch.int64])),
    "int": (None, 1.5, True, *OTHERS, torch.zeros(2, 2), *LARGE, *CODES),
    "float": (None, True, *OTHERS, torch.zeros(2, 2), *LARGE[2:], *CODES),
    "float | None": (True, *OTHERS, torch.zeros(2, 2), *LARGE[2:], *CODES),
    "bool": (None, 1, "yes", [True]),
    "int | None": (1.5, True, *OTHERS, *LARGE, *CODES),
    "str": (None, "softmax", 3, 1.5, ["sigmoid"], {}, True),
    "int | str": (None, 1.5, True, [1], {}),
    "str | None": (3, 1.5, [], {}, object(), numpy.array(["emulated"])),
    "Literal['dense', 'hash', 'hash_gate']": (None, "Dense", 3, ["dense"], {}, MODES, MODES[:1]),
    "Literal['sqrtsoftplus', 'sigmoid']": (None, "Sigmoid", 3, ["sigmoid"], {}, True),
    "torch.device | str | int": (None, 1.5, "x", [0], {}, True, 128, 200, 2**40, *LARGE),
    "RouterConfig": (None, {"hidden_size": H}, 3, "x"),
    "Router": (None, 3, "x", nn.Identity()),
    "Call": (None, 3, {}),
    "nn.Module": (None, 3, "x", [nn.Identity()], dict),
    "Any": (None, 3, [1], ARRAY),
    "Mapping[str, str] | None": (
        3,
        "ab",
        ["ab"],
        {"ab": "c"},
        {3: "c"},
        {"dense_router_decode": 3},
    ),
    "str | os.PathLike[str] | None": (3, ["x"], {}, b"x"),
    "str | os.PathLike[str]": (None, 3, ["x"], {}),
    "bytes | str | os.PathLike[str]": (None, 3, ["x"], {}),
    "Mapping[str, Tensor] | str | os.PathLike[str]": (
        *(None, 3, [torch.zeros(E, H)], torch.zeros(E, H)),
        *({3: torch.zeros(E, H)}, {"layers.0.ffn.gate.weight": [1.0]}),
    ),
}

TENSORS: dict[str, Any] = {
    "weight": torch.zeros(E, H, dtype=torch.bfloat16),
    "bias": torch.zeros(E),
}
CONFIG = RouterConfig(H, E, K, 1.5)
MAP: dict[str, Any] = {
    "expert_map": torch.zeros(E, 2, dtype=torch.int32),
    "replica_counts": torch.ones(E, dtype=torch.int32),
}
CHECKPOINT = {f"layers.0.ffn.gate.{name}": tensor for name, tensor in TENSORS.items()}
#: Named by annotation in WRONG, and of no function that runs on a CPU by itself.
NOT_CALLED = ("require_signature", "install", "uninstall")


def make_router(mode: Any = "dense") -> Router:
    config = RouterConfig(H, E, K, 1.5, mode=mode, vocab_size=None if mode == "dense" else V)
    table = torch.zeros(V, K, dtype=torch.int32)
    tensors: dict[str, Any] = {
        "dense": {**TENSORS, "image_bias": torch.zeros(E)},
        "hash": {"table": table},
        "hash_gate": {"weight": TENSORS["weight"], "table": table},
    }[mode]
    return Router(config, **tensors, device="cpu")


def outputs() -> dict[str, Tensor]:
    return {
        "weights_out": torch.zeros(3, K),
        "ids_out": GIVEN.clone(),
        "logits_out": torch.zeros(3, E),
    }


@pytest.fixture
def table() -> Iterator[dict[str, tuple[Callable[..., Any], dict[str, Any]]]]:
    """What is called, and a right call of it; by name."""
    router = make_router()
    router.set_expert_map(**MAP)
    hashed, gate = make_router("hash"), make_router("hash_gate")
    spare = rt.register_router(make_router())
    ids = {each.config.mode: rt.register_router(each) for each in (router, hashed, gate)}
    sizes = {"num_experts": E, "top_k": K}
    dense = {"router_id": ids["dense"], **sizes}
    words = torch.zeros(3, dtype=torch.int64)
    checkpoint = {
        "hidden_size": H,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "routed_scaling_factor": 1.5,
        "num_hidden_layers": 2,
        "num_hash_layers": 0,
    }
    yield {
        "Router": (Router, {"config": CONFIG, **TENSORS, "device": "cpu"}),
        "RouterConfig": (
            RouterConfig,
            {"hidden_size": H, "num_experts": E, "top_k": K, "routed_scaling_factor": 1.5},
        ),
        "RouterConfig.from_hf": (RouterConfig.from_hf, {"config": checkpoint, "layer": 0}),
        "Router.from_state_dict": (
            Router.from_state_dict,
            {"config": CONFIG, "tensors": CHECKPOINT, "layer": 0, "device": "cpu"},
        ),
        "Router.forward": (router.forward, {"tensor": X}),
        "Router.__call__": (router, {"tensor": X}),
        "Router.forward of hash_gate": (gate.forward, {"tensor": X, "token_ids": words}),
        "Router.forward of hash": (hashed.forward, {"tensor": words}),
        "Router.forward_with_logits": (router.forward_with_logits, {"tensor": X}),
        "Router.forward_mapped": (router.forward_mapped, {"tensor": X}),
        "Router.replay": (router.replay, {"tensor": X, "given_ids": GIVEN}),
        "Router.forward_packed": (router.forward_packed, {"tensor": X}),
        "Router.forward_out": (router.forward_out, {"tensor": X, **outputs()}),
        "Router.serve": (router.serve, {"tensor": X, "call": Call()}),
        "Router.set_expert_map": (router.set_expert_map, MAP),
        "Router.update_expert_map": (router.update_expert_map, MAP),
        "Router.update_weights": (router.update_weights, TENSORS),
        "dense_router": (rt.dense_router, {"hidden_states": X, **dense}),
        "dense_router_logits": (rt.dense_router_logits, {"hidden_states": X, **dense}),
        "dense_router_replay": (
            rt.dense_router_replay,
            {"hidden_states": X, "given_ids": GIVEN, **dense},
        ),
        "hash_router": (
            rt.hash_router,
            {"token_ids": words, "router_id": ids["hash"], "top_k": K},
        ),
        "hash_gate": (
            rt.hash_gate,
            {"hidden_states": X, "token_ids": words, "router_id": ids["hash_gate"], **sizes},
        ),
        "topk_select": (rt.topk_select, {"scores": LOGITS, "k": K}),
        "topk_indices": (
            rt.topk_indices,
            {"scores": LOGITS, "k": K, "page_table": GIVEN, "page_size": 4},
        ),
        "activation_topk": (
            rt.activation_topk,
            {"logits": LOGITS, "bias": LOGITS[0], "k": K, "scale": 1.5, "renormalize": True},
        ),
        "activation_topk_replay": (
            rt.activation_topk_replay,
            {"logits": LOGITS, "given_ids": GIVEN, "scale": 1.5, "renormalize": True},
        ),
        "register_router": (rt.register_router, {"router": router}),
        "get_router": (rt.get_router, {"router_id": spare}),
        "unregister_router": (rt.unregister_router, {"router_id": spare}),
        "warmup_router_compilation": (rt.warmup_router_compilation, {"router": router}),
        "require_signature": (
            rt.require_signature,
            {"public_key": "no such file", "envelope": "no such file"},
        ),
        "install": (integration.install, {"model": nn.Identity()}),
        "uninstall": (integration.uninstall, {"model": nn.Identity()}),
    }
    for router_id in ids.values():
        rt.unregister_router(router_id)


#: Methods that nn.Module or the registry calls, or that take no argument.
INTERNAL = {"exported", "extra_repr", "register_buffer", "watch_captures", "warmup"}


def public_names() -> set[str]:
    """Every public function, class and method."""
    names = {name for name in rt.__all__ if not name.endswith("Error")}
    names |= {"install", "uninstall", "Router.__call__", "RouterConfig.from_hf"}
    for cls in (Router, GateModule):
        for name, value in vars(cls).items():
            if not name.startswith("_") and callable(getattr(cls, name)) and name not in INTERNAL:
                assert inspect.isfunction(value) or isinstance(value, classmethod)
                names.add(f"Router.{name}")
    return names


def signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function.forward if isinstance(function, Router) else function)


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """The annotation of each parameter, as it is written."""
    found: dict[str, str] = {}
    for parameter in signature(function).parameters.values():
        if parameter.annotation in ("Unpack[Inputs]", "Unpack[ReplayInputs]"):
            inputs = Inputs if parameter.annotation == "Unpack[Inputs]" else ReplayInputs
            found |= {name: each.__forward_arg__ for name, each in inputs.__annotations__.items()}
        elif parameter.name != "self":
            found[parameter.name] = parameter.annotation
    return found


def shown(value: object) -> str:
    return "a large int" if isinstance(value, int) and abs(value) > 2**63 else repr(value)


def refused(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(InputError) as info:
        function(*arguments, **keywords)
    message = str(info.value)
    assert "expected" in message, message
    assert "found" in message, message
    return message


def test_every_public_name_is_in_the_table(table: dict[str, Any]) -> None:
    assert public_names() == {name.partition(" of ")[0] for name in table}


def test_every_wrong_kind_of_every_argument(table: dict[str, Any]) -> None:
    for name, (function, right) in table.items():
        if name not in NOT_CALLED and name != "unregister_router":
            function(**right)
        for parameter, annotation in parameters(function).items():
            for wrong in WRONG[annotation]:
                try:
                    message = refused(function, **{**right, parameter: wrong})
                except BaseException as error:
                    raise AssertionError(
                        f"{name}({parameter}={shown(wrong)}): {error!r}"
                    ) from error
                assert len(message) < 1000


def test_arguments_by_position(table: dict[str, Any]) -> None:
    """As they are mostly passed, and as the custom ops take them."""
    for name, (function, right) in table.items():
        kinds = signature(function).parameters
        positional = [each for each in right if kinds[each].kind is not kinds[each].KEYWORD_ONLY]
        rest = {each: right[each] for each in right if each not in positional}
        for place, parameter in enumerate(positional):
            for wrong in WRONG[parameters(function)[parameter]]:
                arguments = [right[each] for each in positional]
                arguments[place] = wrong
                try:
                    refused(function, *arguments, **rest)
                except BaseException as error:
                    raise AssertionError(
                        f"{name}({parameter}={shown(wrong)}): {error!r}"
                    ) from error


def test_arguments_that_do_not_fit_the_signature(table: dict[str, Any]) -> None:
    for function, right in table.values():
        if getattr(function, "__name__", "") == "forward":
            continue  # Python itself refuses it; the table has ``router(...)`` too
        message = refused(function, **right, tensors_of="x")
        assert "an unexpected keyword argument 'tensors_of'" in message
        assert "too many positional arguments" in refused(function, *range(20))
        required = [
            each
            for each in right
            if signature(function).parameters[each].default is inspect.Parameter.empty
        ]
        for missing in required:
            given = {each: value for each, value in right.items() if each != missing}
            assert f"no '{missing}'" in refused(function, **given)


def test_messages() -> None:
    router = make_router()
    assert refused(router, X, num_valid_tokens=3) == (
        "num_valid_tokens of Router.forward: expected torch.Tensor or None, found int 3; correct "
        "the argument, or see help(router_runtime.Router.forward)"
    )
    assert "found numpy.ndarray" in refused(router, ARRAY)
    assert "found an unexpected keyword argument 'is_paddin' (did you mean is_padding?)" in (
        refused(router, X, is_paddin=None)
    )
    message = refused(router.update_weights, weights=X)
    assert message.startswith("arguments of Router.update_weights: expected (*, weight=None, bias")
    assert "help(router_runtime.Router.update_weights)" in message
    for name in ("Router", "Router.update_weights", "topk_select"):
        path = rt
        for part in name.split("."):
            path = getattr(path, part)
        assert callable(path)
    assert refused(integration.install, None).endswith(
        "help(router_runtime.integrations.transformers.install)"
    )


def test_errors_of_other_causes_are_raised_as_they_are() -> None:
    router = make_router()

    def broken(*_: Any) -> None:
        raise TypeError("of the user's own hook")

    router.register_forward_hook(broken)
    with pytest.raises(TypeError, match="own hook"):
        router(X)

    class Own(Router):
        def forward(self, states: Tensor) -> Any:  # type: ignore[override]
            raise TypeError("of the user's own method")

    own = Own(CONFIG, **TENSORS, device="cpu")
    with pytest.raises(TypeError, match="own method"):
        own(X)
    message = refused(own, 3)
    assert message.startswith("states of Router.forward: expected torch.Tensor, found int 3")


def test_ops_refuse_none_in_the_place_of_a_tensor() -> None:
    """torch passes it on to an op."""
    ops = torch.ops.dsv4
    out = {"weights_out": torch.zeros(3, K), "ids_out": GIVEN}
    router_id = rt.register_router(make_router())
    for call in (
        lambda: ops.activation_topk(LOGITS, None, K, 1.5, True),
        lambda: ops.activation_topk.mapped(LOGITS, None, K, 1.5, True, **MAP),
        lambda: ops.activation_topk.mapped(
            LOGITS, LOGITS[0], K, 1.5, True, **{**MAP, "expert_map": None}
        ),
        lambda: ops.activation_topk.mapped(
            LOGITS, LOGITS[0], K, 1.5, True, expert_map=None, replica_counts=None
        ),
        lambda: ops.activation_topk.out(
            LOGITS, LOGITS[0], K, 1.5, True, **{**out, "ids_out": None}
        ),
        lambda: ops.activation_topk.out(
            LOGITS, LOGITS[0], K, 1.5, True, **out, logical_ids_out=GIVEN.clone()
        ),
        lambda: ops.activation_topk_replay(LOGITS, None, 1.5, True),
        lambda: ops.dense_router_replay(X, None, router_id, E, K),
        lambda: ops.dense_router.out(X, router_id, E, K, **{**out, "weights_out": None}),
    ):
        refused(call)
    rt.unregister_router(router_id)


@pytest.mark.parametrize("real", ["rows", "others"])
def test_tensors_on_several_devices(real: str) -> None:
    """torch calls an op without values if one of its tensors is a meta tensor."""
    ops = torch.ops.dsv4
    routers = {mode: make_router(mode) for mode in ("dense", "hash", "hash_gate")}
    ids = {mode: rt.register_router(router) for mode, router in routers.items()}
    mask, words = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    count, sizes = torch.ones(1, dtype=torch.int32), (E, K)
    gate, config = routers["dense"].exported()
    first: Callable[[Tensor], Tensor] = (lambda x: x) if real == "rows" else meta
    other: Callable[[Tensor], Tensor] = meta if real == "rows" else (lambda x: x)
    x, z, w = first(X), first(LOGITS), first(words)
    dense, hash_gate, numbers = ids["dense"], ids["hash_gate"], (1.5, True)
    out = {"weights_out": torch.zeros(3, K), "ids_out": GIVEN}
    outputs = {name: other(tensor) for name, tensor in out.items()}
    mapped = {name: other(tensor) for name, tensor in MAP.items()}
    for name, call in {
        "given_ids": lambda: rt.dense_router_replay(x, other(GIVEN), dense, *sizes),
        "given_ids of rows": lambda: rt.activation_topk_replay(z, other(GIVEN), *numbers),
        "token_ids": lambda: ops.hash_gate(x, other(words), hash_gate, *sizes),
        "bias": lambda: rt.activation_topk(z, other(LOGITS[0]), K, *numbers),
        "is_padding": lambda: ops.dense_router(x, dense, *sizes, is_padding=other(mask)),
        "num_valid_tokens": lambda: ops.hash_router(
            w, ids["hash"], K, num_valid_tokens=other(count)
        ),
        "image_mask": lambda: ops.dense_router_logits(x, dense, *sizes, image_mask=other(mask)),
        "weights_out": lambda: ops.dense_router.out(x, dense, *sizes, **outputs),
        "expert_map": lambda: ops.activation_topk.mapped(
            z, first(LOGITS[0]), K, *numbers, **mapped
        ),
        "router": lambda: ops.dense_router.by_buffer(x, other(routers["dense"].weight), *sizes),
        "router exported": lambda: ops.dense_router.exported(
            x, [None if each is None else other(each) for each in gate], config, *sizes
        ),
    }.items():
        message = refused(call)
        devices = ("cpu", "meta") if real == "rows" else ("meta", "cpu")
        assert message.startswith(f"{name.partition(' ')[0]}: expected a tensor on {devices[0]}")
        assert f"on {devices[1]}; " in message
    assert ops.dense_router(meta(X), dense, *sizes)[0].is_meta
    for router_id in ids.values():
        rt.unregister_router(router_id)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def test_a_path_for_artifacts_is_taken(tmp_path: Path) -> None:
    Router(CONFIG, **TENSORS, device="cpu", artifacts=tmp_path)
