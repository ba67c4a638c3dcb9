"""The second scoring function and the gate temperature: Routers, ``activation_topk``, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import router_runtime as rt
from router_runtime import Router, RouterConfig, spec
from router_runtime.cli.decisions import imagined_device, router_decisions
from router_runtime.cli.why import parse
from router_runtime.errors import InputError, ResolutionError
from router_runtime.format.scoring import is_temperature, scoring_constants
from router_runtime.routing import row_ops
from router_runtime.routing.call import Call
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
PLAIN = RouterConfig(H, E, K, 1.5)
SIGMOID = dataclasses.replace(PLAIN, scoring="sigmoid")
WARM = dataclasses.replace(SIGMOID, gate_temperature=1.7)
CONFIGS = [SIGMOID, WARM, dataclasses.replace(PLAIN, gate_temperature=0.3)]
SHAPE = {"HIDDEN": H, "EXPERTS": E, "TOP_K": K}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(E, H).bfloat16(), draw(E, seed=1) / 4
TABLE = torch.randint(0, E, (V, K), generator=torch.Generator().manual_seed(2))
X = draw(9, H, seed=3).bfloat16()
WORDS = torch.arange(9) * 7


def rule(config: RouterConfig) -> dict[str, Any]:
    return {"scoring": config.scoring, "gate_temperature": config.gate_temperature}


def expected(config: RouterConfig, **inputs: Any) -> tuple[Tensor, Tensor]:
    logits = spec.dense_logits(X, WEIGHT)
    return spec.activation_topk(logits, BIAS, K, 1.5, **rule(config), **inputs)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def entries_of(build: SimpleNamespace, *configs: RouterConfig) -> list[Any]:
    """Kernels of the same shape for each of the configurations, each model with one name."""
    made = []
    for number, config in enumerate(configs):
        constants = config.constants()
        named: dict[str, Any] = {
            "model": f"model{number}",
            "numerics": f"{build.numerics}/{number}",
        }
        made += [
            build.entry(kernel, contract, constants=constants, **named)
            for kernel, contract in (
                ("dense_router_decode", build.dense(H, E)),
                ("dense_router_prefill", build.prefill(H, E)),
            )
        ]
        images = {"constants": {**constants, "IMAGES": 0}}
        made.append(build.entry("hash_gate", build.gate(), **images, **named))
    return made


@pytest.fixture
def kernels(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """The fake driver with kernels of one shape for four rules."""
    gpu.entries = entries_of(build, PLAIN, *CONFIGS)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_routers_score_as_their_configuration_says(
    kernels: Any, config: RouterConfig, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:
        build_on_the_fake_gpu(monkeypatch)
    router = Router(config, weight=WEIGHT, bias=BIAS, device="cpu")
    same(router(X), expected(config))
    assert not torch.equal(router(X)[0], expected(PLAIN)[0])
    weights, ids, logits = router.forward_with_logits(X)
    same((weights, ids, logits), (*expected(config), spec.dense_logits(X, WEIGHT)))
    given = expected(PLAIN)[1].flip(1)
    same(router(X, given_ids=given), expected(config, given_ids=given))
    hashed = dataclasses.replace(config, mode="hash_gate", vocab_size=V)
    gate = Router(hashed, weight=WEIGHT, table=TABLE, device="cpu")
    wanted = spec.hash_gate(X, WORDS, WEIGHT, TABLE, 1.5, **rule(config))
    same(gate(X, WORDS), wanted)
    if on_gpu:
        number = 1 + CONFIGS.index(config)
        served = {*router.backend.evidence, *gate.backend.evidence}
        assert {key.split("/")[1] for key in served} == {f"model{number}"}


def test_a_temperature_is_that_of_fp32(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kernels for 0.3 serve a configuration that read 0.3 in fp32."""
    build_on_the_fake_gpu(monkeypatch)
    single = float(torch.tensor(0.3))
    router = Router(
        dataclasses.replace(PLAIN, gate_temperature=single), weight=WEIGHT, bias=BIAS, device="cpu"
    )
    same(router(X), expected(CONFIGS[2]))


def test_kernels_for_another_rule_do_not_serve(
    gpu: Any, build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.entries = entries_of(build, SIGMOID)
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    build_on_the_fake_gpu(monkeypatch)
    tensors: Any = {"weight": WEIGHT, "bias": BIAS}
    Router(SIGMOID, **tensors, device="cpu")
    with pytest.raises(ResolutionError) as plain:
        Router(PLAIN, **tensors, device="cpu")
    assert "SCORING is sigmoid, not sqrtsoftplus" in str(plain.value)
    assert "with scoring" not in str(plain.value)
    with pytest.raises(ResolutionError) as warm:
        Router(dataclasses.replace(SIGMOID, gate_temperature=2.0), **tensors, device="cpu")
    text = str(warm.value)
    assert "GATE_TEMPERATURE is 1.0, not 2.0" in text
    keys = 'with scoring = "sigmoid" and gate_temperature = 2.0, into mine.toml'
    assert keys in text
    assert "build --model-file mine.toml" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring": "softmax"}, r"scoring: expected one of \['sqrtsoftplus', 'sigmoid'\]"),
        ({"gate_temperature": 0.0}, "gate_temperature: expected a number from 9.53674e-07 to"),
        ({"gate_temperature": -1.0}, "gate_temperature: expected a number"),
        ({"gate_temperature": float("nan")}, "gate_temperature: expected a number"),
        ({"gate_temperature": float("inf")}, "gate_temperature: expected a number"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_temperatures_in_range() -> None:
    assert all(map(is_temperature, (2.0**-20, 0.1, 1.0, 2.0**20)))
    assert not any(map(is_temperature, (2.0**-21, 2.0**21, 0.0, -1.0, float("nan"))))


def test_what_a_router_says_of_itself() -> None:
    tensors: Any = {"weight": WEIGHT, "bias": BIAS}
    text = repr(Router(WARM, **tensors, device="cpu"))
    assert "scoring=sigmoid, gate_temperature=1.7" in text
    text = repr(Router(PLAIN, **tensors, device="cpu"))
    assert "scoring" not in text
    assert "gate_temperature" not in text


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9's own, in load
def test_an_exported_program_keeps_its_rule(tmp_path: Path) -> None:
    router = Router(WARM, weight=WEIGHT, bias=BIAS, device="cpu")
    program = torch.export.export(router, (X,))
    torch.export.save(program, tmp_path / "program.pt2")
    del router, program
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    same(loaded(X), expected(WARM))


# --- activation_topk ------------------------------------------------------------------------------

LOGITS = torch.cat(
    (draw(9, E, seed=4) * 8, torch.tensor([[float("nan"), float("inf"), -float("inf")] * 8]))
)


@pytest.fixture
def activations(gpu: Any, build: SimpleNamespace, tmp_path: Path) -> Any:
    """The fake driver with an activation_topk for each scoring function."""
    gpu.entries = [
        build.entry(
            "activation_topk",
            build.activation(256),
            variant=function,
            constants=scoring_constants(function, 1.0),
        )
        for function in spec.SCORINGS
    ]
    build.artifacts(tmp_path / "artifacts", gpu.entries)
    return gpu


def test_the_op_scores_as_it_is_told() -> None:
    wanted = spec.activation_topk(LOGITS, BIAS, K, 2.5, scoring="sigmoid")
    same(rt.activation_topk(LOGITS, BIAS, K, 2.5, True, scoring="sigmoid"), wanted)
    same(
        rt.activation_topk(LOGITS, BIAS, K, 2.5, True, scoring="sqrtsoftplus"),
        rt.activation_topk(LOGITS, BIAS, K, 2.5, True),
    )
    replayed = rt.activation_topk_replay(LOGITS, wanted[1], 2.5, True, scoring="sigmoid")
    same(replayed, wanted)
    ops = torch.ops.dsv4
    words = ops.activation_topk.packed(LOGITS, BIAS, K, 2.5, True, scoring="sigmoid")
    assert torch.equal(words, spec.packed(*wanted))
    weights, ids = torch.empty(10, K), torch.empty(10, K, dtype=torch.int32)
    ops.activation_topk.out(
        LOGITS, BIAS, K, 2.5, True, scoring="sigmoid", weights_out=weights, ids_out=ids
    )
    same((weights, ids), wanted)


def test_each_function_has_its_kernel(activations: Any) -> None:
    found = {
        function: row_ops.serve_activation_cuda(
            LOGITS, BIAS, K, 2.5, True, call=Call(), scoring=function
        )[:2]
        for function in ("sigmoid", "sqrtsoftplus")
    }
    for function, results in found.items():
        same(results, spec.activation_topk(LOGITS, BIAS, K, 2.5, scoring=function))
    given = found["sigmoid"][1].flip(1)
    replayed = row_ops.replay_activation_cuda(
        LOGITS, given, 2.5, True, call=Call(), scoring="sigmoid"
    )
    wanted = spec.activation_topk(LOGITS, BIAS, K, 2.5, scoring="sigmoid", given_ids=given)
    same(replayed[:2], wanted)


def test_a_process_loads_only_what_it_uses(activations: Any) -> None:
    row_ops.activation_topk_cuda(LOGITS, BIAS, K, 2.5, True)
    assert activations.calls.count("cuFuncLoad activation_topk") == 1


def test_artifacts_without_the_function(gpu: Any) -> None:
    """They are of an older runtime: no model file helps."""
    with pytest.raises(ResolutionError, match=r"SCORING is sqrtsoftplus, not sigmoid[\s\S]*build-"):
        row_ops.serve_activation_cuda(LOGITS, BIAS, K, 2.5, True, call=Call(), scoring="sigmoid")


@pytest.mark.parametrize("wrong", ["softmax", "", None, 3, True])
def test_an_unknown_function_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="scoring"):
        rt.activation_topk(LOGITS, BIAS, K, 2.5, True, scoring=wrong)
    with pytest.raises(InputError, match="scoring"):
        rt.activation_topk_replay(LOGITS, TABLE[:10], 2.5, True, scoring=wrong)


def test_opcheck_and_compile() -> None:
    arguments = (LOGITS[:9], BIAS, K, 2.5, True)
    inputs = {"scoring": "sigmoid"}
    torch.library.opcheck(torch.ops.dsv4.activation_topk.default, arguments, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda logits: rt.activation_topk(logits, BIAS, K, 2.5, True, scoring="sigmoid"),
        backend="aot_eager",
        fullgraph=True,
    )
    same(compiled(LOGITS[:9]), spec.activation_topk(LOGITS[:9], BIAS, K, 2.5, scoring="sigmoid"))


# --- what doctor says -----------------------------------------------------------------------------


@pytest.fixture
def manifest(build: SimpleNamespace) -> Any:
    return build.manifest(entries_of(build, PLAIN, SIGMOID))


def test_models_of_one_shape_are_told_apart(manifest: Any) -> None:
    found = router_decisions(manifest, imagined_device(9, 0), lambda _: "verified")
    dense = {each.models: each for each in found if each.kernel == "dense_router"}
    assert set(dense) == {("model0",), ("model1",)}
    for number, scoring in enumerate(("sqrtsoftplus", "sigmoid")):
        decision = dense[f"model{number}",]
        assert decision.constants["SCORING"] == scoring
        assert {each.entry.split("/")[1] for each in decision.ranges} == {f"model{number}"}


def test_a_question_about_a_rule(manifest: Any) -> None:
    def constants(text: str) -> dict[str, Any]:
        return dict(parse(f"dense_router/{text}", manifest).requests[0].constants)

    shape = f"HIDDEN={H}/EXPERTS={E}/TOP_K={K}"
    assert constants("model1") == SIGMOID.constants()
    assert constants(shape) == PLAIN.constants()
    warm = constants(f"{shape}/SCORING=sigmoid/GATE_TEMPERATURE=1.5")
    assert warm == {**SHAPE, **scoring_constants("sigmoid", 1.5)}
