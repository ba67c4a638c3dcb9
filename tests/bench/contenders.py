"""The contenders: what is timed.

Each is built from a chain's layers and routes hidden states by a layer's index.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from build_kernels.catalog.models import Model
from router_runtime import Router, RouterConfig, register_router, unregister_router
from router_runtime.device.kernels import kernels_on
from router_runtime.device.resolve import Request, resolve
from router_runtime.format.scoring import SIGMOID, SQRT_SOFTPLUS, scoring_constants
from router_runtime.ops.functions import activation_topk
from router_runtime.routing.config import KERNELS
from tests.bench.artifacts import DENSE
from tests.bench.chain import Layers, Output, Route

#: With programmatic dependent launch, or without.
Mode = Literal["pdl", "plain"]
MODES: tuple[Mode, ...] = ("pdl", "plain")


@dataclass(frozen=True, slots=True)
class Settings:
    """``folders`` holds the artifacts for each mode (none on a CPU). ``variants`` maps a kernel to
    the one variant to use for it. ``alone``: a dense kernel by itself, timed for no more tokens
    than one launch of it serves.
    """

    folders: Mapping[Mode, Path]
    variants: Mapping[str, str]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Contender:
    """``make`` gives the route through a chain's layers. ``launches_dependent`` is True if its own
    launches differ between the modes; else only the links do.
    """

    name: str
    make: Callable[[Layers, Mode, Settings], Route]
    launches_dependent: bool = False
    settings: Settings = Settings({}, {})


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """Logits: bf16 in, FP32 out. A CPU has no such product and only dry runs come here with one."""
    if not x.is_cuda:
        return x.float() @ weight.t().float()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def rule(model: Model) -> dict[str, Any]:
    """How a model scores, under the names of RouterConfig and of ``spec.py``."""
    return {"scoring": model.scoring, "gate_temperature": model.gate_temperature}


def scored(logits: Tensor, scoring: str, gate_temperature: float) -> Tensor:
    """Scores as one writes them in torch."""
    logits = logits if gate_temperature == 1 else logits / gate_temperature
    return logits.sigmoid() if scoring == SIGMOID else torch.nn.functional.softplus(logits).sqrt()


def mathematics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    scoring: str = SQRT_SOFTPLUS,
    gate_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The router as one writes it in torch: one line, and one or more kernels, for each step."""
    scores = scored(mm(x, weight), scoring, gate_temperature)
    ids = (scores + bias).topk(k, dim=-1).indices
    chosen = scores.gather(1, ids)
    return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * scale, ids


def make_router(
    model: Model, weight: Tensor, bias: Tensor, mode: Mode, settings: Settings
) -> Router:
    """A router of the product, by its public constructor. Variants of kernels that it has no use
    for are left out.
    """
    config = RouterConfig(model.hidden, model.experts, model.top_k, model.scale, **rule(model))
    return Router(
        config,
        weight=weight,
        bias=bias,
        device=weight.device,
        artifacts=settings.folders.get(mode),
        variants={
            kernel: variant
            for kernel, variant in settings.variants.items()
            if kernel.startswith(DENSE)
        },
    )


class DenseRouters:
    """The product: one Router a layer, called as a user calls it."""

    def __init__(self, layers: Layers, mode: Mode, settings: Settings) -> None:
        self._routers = [
            make_router(layers.model, weight, bias, mode, settings)
            for weight, bias in zip(layers.weights, layers.biases, strict=True)
        ]
        self._alone = settings.alone

    def __call__(self, layer: int, x: Tensor) -> Output:
        return Output(*self._routers[layer](x))

    def with_logits(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, ids and logits."""
        return self._routers[layer].forward_with_logits(x)

    def release(self) -> None:
        """Free the memory: a router that a graph captured stays registered until its caller
        unregisters it.
        """
        for router in self._routers:
            unregister_router(register_router(router), force=True)
        self._routers = []

    def served_by(self, tokens: int) -> str | None:
        """The entry that serves batches of that size; None on a CPU."""
        token_ranges = self._routers[0].token_ranges
        fitting = [each.entry.key for each in token_ranges if tokens <= each.high]
        if fitting or not token_ranges:
            return next(iter(fitting), None)
        return f"{token_ranges[-1].entry.key}, by parts"

    def declines(self, tokens: int) -> bool:
        """True for a kernel alone that would need several launches."""
        token_ranges = self._routers[0].token_ranges
        return self._alone and bool(token_ranges) and tokens > token_ranges[-1].high


class GateRouters:
    """The product in the layers that look their experts up: one Router a layer."""

    def __init__(self, layers: Layers, mode: Mode, settings: Settings) -> None:
        model = layers.model
        config = RouterConfig(
            *(model.hidden, model.experts, model.top_k, model.scale),
            mode="hash_gate",
            vocab_size=model.vocab,
            **rule(model),
        )
        self._token_ids = layers.token_ids
        self._routers = [
            Router(
                config,
                weight=weight,
                table=table,
                device=weight.device,
                artifacts=settings.folders.get(mode),
                # A dense kernel that is named serves all, so its look-up can be timed.
                variants={k: v for k, v in settings.variants.items() if k in GATE_KERNELS},
            )
            for weight, table in zip(layers.weights, layers.tables, strict=True)
        ]

    def __call__(self, layer: int, x: Tensor) -> Output:
        return Output(*self._routers[layer](x, self._token_ids[: x.shape[0]]), "hash_gate")


def _hash_router(layers: Layers, mode: Mode, settings: Settings) -> Route:
    """The product's look-up with uniform weights: a part of hash_gate's work."""
    model = layers.model
    config = RouterConfig(
        *(model.hidden, model.experts, model.top_k, model.scale),
        mode="hash",
        vocab_size=model.vocab,
    )
    routers = [
        Router(
            config,
            table=table,
            device=table.device,
            artifacts=settings.folders.get(mode),
            variants={k: v for k, v in settings.variants.items() if k == HASH},
        )
        for table in layers.tables
    ]
    return lambda layer, x: Output(*routers[layer](layers.token_ids[: x.shape[0]]), "hash")


def _gathered(layers: Layers, mode: Mode, settings: Settings) -> Route:
    """hash_gate as one writes it in torch: the weight rows are gathered and multiplied."""
    model = layers.model

    def route(layer: int, x: Tensor) -> Output:
        ids = layers.tables[layer][layers.token_ids[: x.shape[0]]]
        logits = (x.float().unsqueeze(1) * layers.weights[layer][ids.long()].float()).sum(dim=-1)
        scores = scored(logits, **rule(model))
        weights = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) * model.scale
        return Output(weights, ids, "hash_gate")

    return route


def _mm(layers: Layers, mode: Mode, settings: Settings) -> Route:
    return lambda layer, x: Output(mm(x, layers.weights[layer]), None)


def _mm_activation_topk(layers: Layers, mode: Mode, settings: Settings) -> Route:
    """The product's epilogue kernel, of the mode's folder. The op itself finds its own artifacts,
    and wants evidence for them.
    """
    model = layers.model
    if layers.device.type == "cpu":

        def on_cpu(layer: int, x: Tensor) -> Output:
            logits = mm(x, layers.weights[layer])
            bias = layers.biases[layer]
            logits = logits if model.gate_temperature == 1 else logits / model.gate_temperature
            weights, ids = activation_topk(
                logits, bias, model.top_k, model.scale, True, scoring=model.scoring
            )
            return Output(weights, ids)

        return on_cpu
    index = layers.device.index
    kernels = kernels_on(index, settings.folders[mode])
    request = Request(
        "activation_topk",
        scoring_constants(model.scoring, 1.0),
        quantities={"experts": model.experts, "top_k": model.top_k},
        variant=settings.variants.get("activation_topk"),
    )
    # A peer needs no evidence: every result is checked.
    entry = resolve(request, kernels.facts, kernels.manifest, lambda _: "verified").require()
    launch = kernels.load_entry(entry).bind(
        ("logits", "bias", "weights_out", "ids_out", "tokens"),
        experts=model.experts,
        row_stride=model.experts,
        top_k=model.top_k,
        scale=model.scale,
        renormalize=1,
    )

    def route(layer: int, x: Tensor) -> Output:
        logits = mm(x, layers.weights[layer])
        logits = logits if model.gate_temperature == 1 else logits / model.gate_temperature
        tokens = logits.shape[0]
        weights = logits.new_empty(tokens, model.top_k)
        ids = logits.new_empty(tokens, model.top_k, dtype=torch.int32)
        launch(
            torch.cuda.current_stream(layers.device).cuda_stream,
            logits.data_ptr(),
            layers.biases[layer].data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            tokens,
        )
        return Output(weights, ids)

    return route


def _mm_triton(layers: Layers, mode: Mode, settings: Settings) -> Route:
    if layers.device.type == "cpu":
        raise ImportError("Triton needs a GPU")
    if rule(layers.model) != {"scoring": SQRT_SOFTPLUS, "gate_temperature": 1}:
        raise ImportError("the kernel in Triton scores by sqrtsoftplus, with the temperature 1")
    from tests.bench.triton_topk import topk

    model = layers.model

    def route(layer: int, x: Tensor) -> Output:
        logits = mm(x, layers.weights[layer])
        return Output(*topk(logits, layers.biases[layer], model.top_k, model.scale))

    return route


def _eager(layers: Layers, mode: Mode, settings: Settings) -> Route:
    model = layers.model

    def route(layer: int, x: Tensor) -> Output:
        weight, bias = layers.weights[layer], layers.biases[layer]
        given = x, weight, bias, model.top_k, model.scale
        return Output(*mathematics(*given, **rule(model)))

    return route


class _Compiled:
    """``torch.compile`` of the mathematics, compiled anew for every number of tokens."""

    def __init__(self, layers: Layers, mode: Mode, settings: Settings) -> None:
        self._layers = layers
        self._shape: tuple[int, ...] = ()
        self._function: Callable[..., tuple[Tensor, Tensor]] = mathematics

    def __call__(self, layer: int, x: Tensor) -> Output:
        layers, model = self._layers, self._layers.model
        if x.shape != self._shape:
            # Forget the other shapes: torch stops compiling a function after a few of them.
            torch._dynamo.reset()
            self._shape = tuple(x.shape)
            # A dry run has no C++ compiler to count on.
            backend = "inductor" if x.is_cuda else "eager"
            self._function = torch.compile(
                mathematics, backend=backend, dynamic=False, fullgraph=True
            )
        weight, bias = layers.weights[layer], layers.biases[layer]
        given = x, weight, bias, model.top_k, model.scale
        return Output(*self._function(*given, **rule(model)))


OURS = "dense_router"
GATE_KERNELS = KERNELS["hash_gate"]
GATE, HASH = "hash_gate", "hash_router"
MM, MM_TRITON = "torch.mm", "mm+triton"

CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(OURS, DenseRouters, launches_dependent=True),
        Contender(MM, _mm),
        Contender("mm+activation_topk", _mm_activation_topk, launches_dependent=True),
        Contender(MM_TRITON, _mm_triton),
        Contender(GATE, GateRouters, launches_dependent=True),
        Contender(HASH, _hash_router, launches_dependent=True),
        Contender("gathered", _gathered),
        Contender("eager", _eager),
        Contender("compile", _Compiled),
    )
}


def field(
    names: Sequence[str], folders: Mapping[Mode, Path], variants: Mapping[str, Sequence[str]]
) -> list[Contender]:
    """The contenders of those names. A kernel with several variants makes one ``dense_router`` of
    each; with variants for several kernels, one of each combination.
    """
    combinations = [
        dict(zip(variants, combination, strict=True))
        for combination in itertools.product(*variants.values())
    ]
    # Those of kernels that no Router has are for the other contenders.
    dense = [
        {kernel: variant for kernel, variant in combination.items() if kernel.startswith(DENSE)}
        for combination in combinations
    ]
    dense = [chosen for index, chosen in enumerate(dense) if chosen not in dense[:index]]
    chosen = []
    for name in names:
        contender = CONTENDERS[name]
        if name != OURS:
            settings = Settings(folders, combinations[0])
            chosen.append(dataclasses.replace(contender, settings=settings))
            continue
        for each in dense:
            label = f"{name}[{','.join(each.values())}]" if len(dense) > 1 else name
            settings = Settings(folders, each)
            chosen.append(dataclasses.replace(contender, name=label, settings=settings))
    return chosen


def alone(folders: Mapping[Mode, Path], kernel: str, variant: str) -> Contender:
    """One kernel by itself. ``folders`` hold editions with no other dense kernel."""
    settings = Settings(folders, {kernel: variant}, alone=True)
    family = CONTENDERS[GATE if kernel == GATE else OURS]
    return dataclasses.replace(family, name=f"{kernel}/{variant}", settings=settings)


def family(name: str) -> str | None:
    """``dense_router`` or ``hash_gate`` for a contender of ours, with or without variants, and for
    a kernel alone; None for any other.
    """
    return next((ours for ours in (OURS, GATE) if name.startswith(ours)), None)


def triton_version() -> str | None:
    """None if there is no Triton."""
    try:
        import triton
    except ImportError:
        return None
    version: Any = triton.__version__
    return str(version)
