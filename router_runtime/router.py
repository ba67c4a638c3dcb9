"""Router: one gate of one layer, with its weights on a device and its kernels loaded.

``RouterConfig`` says what the gate computes; the mathematics and its edge rules are in ``spec.py``.
Everything that can fail or allocate for good happens in the constructor: values are checked,
weights are stored in the order in which the kernels read them, and every kernel the router can
need is loaded, so that a call does nothing but allocate its two outputs and launch.

On a CPU device the router is ``spec.py`` itself and needs neither artifacts nor a driver.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from router_runtime import ops, spec
from router_runtime.checks import (
    MAX_EXPERTS,
    MAX_TOP_K,
    check_activations,
    check_int,
    check_scale,
    check_token_ids,
    readable_rows,
    wrong_value,
)
from router_runtime.errors import InputError, explain
from router_runtime.kernels import Kernels, kernels_on
from router_runtime.launch import LoadedKernel, Matrix, selector
from router_runtime.manifest import Repack
from router_runtime.placement import CPU, Placement, refuse_capture
from router_runtime.repack import packed_shape, repack
from router_runtime.resolve import DENSE, Request, Span
from router_runtime.workspace import Workspaces

HIDDEN_MULTIPLE = 64

HASH = "hash_router"


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router computes.

    ``routed_scaling_factor`` is the scale r of the weights; ``vocab_size`` is the number of rows
    of a hash router's table; ``sentinel`` is the id that a token outside the vocabulary gets.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    mode: Literal["dense", "hash"] = "dense"
    vocab_size: int | None = None
    renormalize: bool = True
    sentinel: int = -1

    def __post_init__(self) -> None:
        check_int("hidden_size", self.hidden_size, HIDDEN_MULTIPLE, 2**20)
        if self.hidden_size % HIDDEN_MULTIPLE:
            raise wrong_value("hidden_size", f"a multiple of {HIDDEN_MULTIPLE}", self.hidden_size)
        check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_int("top_k", self.top_k, 1, min(MAX_TOP_K, self.num_experts))
        check_int("sentinel", self.sentinel, -(2**31), 2**31 - 1)
        if self.mode not in ("dense", "hash"):
            raise wrong_value("mode", "'dense' or 'hash'", self.mode)
        if not isinstance(self.renormalize, bool):
            raise wrong_value("renormalize", "True or False", self.renormalize)
        if self.vocab_size is not None or self.mode == "hash":
            check_int("vocab_size", self.vocab_size, 1, 2**31 - 1)
        check_scale("routed_scaling_factor", self.routed_scaling_factor)


class _Backend(Protocol):
    """What differs between devices and modes."""

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]: ...


class _DenseBackend(_Backend, Protocol):
    """A dense one can also return the logits that it routed by."""

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class Router:
    """A gate with its weights. Call it with hidden states (dense) or token ids (hash).

    dense: ``weight`` bf16 ``[num_experts, hidden_size]`` and ``bias`` fp32 ``[num_experts]``,
    finite. hash:  ``table`` int32 or int64 ``[vocab_size, top_k]`` with entries in ``[0,
    num_experts)``.

    The router copies what it is given. ``device`` is a torch device. ``artifacts`` names the
    artifacts folder. ``variants`` maps a kernel's name to the one variant to use for it, proven or
    not: without it only kernels with evidence are used, and the constructor fails if there is
    none.

    Results are ``(weights fp32 [tokens, top_k], ids int32 [tokens, top_k])``.

    A dense batch is one launch, of the decode or of the prefill kernel: ``spans`` says of which.
    All of them carry one ``numerics`` tag, so a token's bits depend on no batch size. A batch
    larger than the last span is split.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        table: Tensor | None = None,
        device: torch.device | str | int,
        artifacts: str | os.PathLike[str] | None = None,
        variants: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.device = _resolved_device(device)
        self._router_id: int | None = None
        self._weights: _Weights | None = None
        self._backend: _Backend | _DenseBackend
        used = DENSE if config.mode == "dense" else (HASH,)
        variants = dict(variants or {})
        unknown = sorted(set(variants) - set(used))
        if unknown:
            expected = f"kernels of a {config.mode} router, {list(used)}"
            raise wrong_value("variants", expected, unknown)
        given = {"weight": weight, "bias": bias, "table": table}
        wanted = ("weight", "bias") if config.mode == "dense" else ("table",)
        named = [name for name, tensor in given.items() if tensor is not None]
        if sorted(named) != sorted(wanted):
            raise wrong_value(f"tensors of a {config.mode} router", list(wanted), named)
        kernels = None
        if self.device.type == "cuda":
            refuse_capture("building a Router")
            kernels = kernels_on(self.device.index, artifacts)
        if table is not None:
            self._backend = self._hash(_checked_table(table, config), kernels, variants)
        elif weight is not None and bias is not None:
            weight, bias = _checked_weight(weight, config), _checked_bias(bias, config)
            self._backend = self._dense(weight, bias, kernels, variants)
        if kernels is not None:
            # As in update_weights: kernels may read these before their dependency wait.
            torch.cuda.synchronize(self.device)

    def _hash(
        self, table: Tensor, kernels: Kernels | None, variants: Mapping[str, str]
    ) -> _Backend:
        stored = table.to(
            self.device, torch.int32, copy=True, memory_format=torch.contiguous_format
        )
        if kernels is None:
            return _CpuHash(self.config, stored)
        return _CudaHash(self.config, stored, kernels, variants)

    def _dense(
        self, weight: Tensor, bias: Tensor, kernels: Kernels | None, variants: Mapping[str, str]
    ) -> _DenseBackend:
        self._weights = _Weights(self.config, self.device)
        backend: _DenseBackend = (
            _CpuDense(self.config, self._weights)
            if kernels is None
            else _CudaDense(self.config, self._weights, kernels, variants)
        )
        # Only now: the kernels' contracts say in which orders the weight is stored.
        self._weights.write(weight, bias)
        return backend

    def __repr__(self) -> str:
        return f"Router({self.config}, device={self.device}, id={self._router_id})"

    @property
    def router_id(self) -> int:
        """The id under which the custom ops know this router."""
        if self._router_id is None:
            raise InputError(
                explain(
                    "router_id",
                    expected="a registered router",
                    found="one that is not registered",
                    remedy="call register_router(router)",
                )
            )
        return self._router_id

    def forward(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Route hidden states ``[tokens, hidden_size]`` bf16 (dense) or token ids ``[tokens]``
        (hash).

        Eagerly this skips torch's dispatcher. Inside ``torch.compile`` it is the custom op, which
        needs the router to be registered.
        """
        if torch.compiler.is_compiling():
            config = self.config
            if config.mode == "dense":
                return ops.dense_router(tensor, self.router_id, config.num_experts, config.top_k)
            return ops.hash_router(tensor, self.router_id, config.top_k)
        return self._backend.route(tensor)

    __call__ = forward

    def forward_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward`` of a dense router, and the logits that it routed by: canonical, FP32
        ``[tokens, num_experts]``, a NaN stored as 0x7fffffff. Weights and ids are those of
        ``forward``, bit for bit.
        """
        config = self.config
        if config.mode != "dense":
            raise wrong_value("forward_with_logits", "a dense router", f"mode {config.mode!r}")
        if torch.compiler.is_compiling():
            return ops.dense_router_logits(tensor, self.router_id, config.num_experts, config.top_k)
        return typing.cast(_DenseBackend, self._backend).route_with_logits(tensor)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Which entry serves how many tokens. Empty for a hash router and on a CPU."""
        return self._backend.spans if isinstance(self._backend, _CudaDense) else ()

    def update_weights(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Replace the weight, the bias or both, in place: addresses stay, captured graphs stay
        valid.

        Both are checked before either is written. Launches made before the call, on any stream, use
        the old values; launches and graph replays made after it, on any stream, use the new ones.
        The host waits for both: an event could order neither a replay on another stream nor a
        kernel that reads the weights before its dependency wait (programmatic dependent launch).
        Not to be called while another thread launches this router.
        """
        if self._weights is None:
            raise wrong_value("update_weights", "a dense router", f"mode {self.config.mode!r}")
        if weight is None and bias is None:
            raise wrong_value("update_weights", "a weight, a bias or both", "neither")
        weight = None if weight is None else _checked_weight(weight, self.config)
        bias = None if bias is None else _checked_bias(bias, self.config)
        if self.device.type == "cpu":
            self._weights.write(weight, bias)
            return
        refuse_capture("update_weights")
        torch.cuda.synchronize(self.device)
        self._weights.write(weight, bias)
        torch.cuda.synchronize(self.device)

    def warmup(self) -> None:
        """One dummy call of every kernel, so that torch's allocator and the driver are warm."""
        if self.config.mode == "hash":
            self._backend.route(torch.zeros(1, dtype=torch.int64, device=self.device))
            return
        for tokens in [span.low for span in self.spans] or [1]:
            shape = (tokens, self.config.hidden_size)
            self._backend.route(torch.zeros(shape, dtype=torch.bfloat16, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def warmup_router_compilation(router: Router) -> None:
    """Make ``router`` ready for serving and graph capture. Nothing is compiled, ever: the name is
    kept for callers that know it. Kernels were loaded when the router was built; this runs them
    once.
    """
    router.warmup()


class _Weights:
    """The weights of a dense router on its device, at addresses that never change.

    ``packed`` returns the buffer of a kernel's Repack recipe; equal recipes share one buffer.
    """

    def __init__(self, config: RouterConfig, device: torch.device) -> None:
        shape = (config.num_experts, config.hidden_size)
        self.weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.bias = torch.empty(config.num_experts, dtype=torch.float32, device=device)
        self._packed: list[tuple[Repack, Tensor]] = []

    def packed(self, recipe: Repack) -> Tensor:
        """The buffer for ``recipe``. Its content is written by ``write``."""
        if recipe.argument != "weight":
            raise wrong_value("repack recipe", "the argument 'weight'", recipe.argument)
        for known, buffer in self._packed:
            if dataclasses.replace(known, parameter=recipe.parameter) == recipe:
                return buffer
        buffer = self.weight.new_empty(packed_shape(recipe, *self.weight.shape))
        self._packed.append((recipe, buffer))
        return buffer

    @torch.no_grad()
    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Copy checked values into place, on the current stream."""
        if bias is not None:
            self.bias.copy_(bias)
        if weight is None:
            return
        self.weight.copy_(weight)
        for recipe, buffer in self._packed:
            repack(recipe, self.weight, buffer)


class _CpuDense:
    def __init__(self, config: RouterConfig, weights: _Weights) -> None:
        self._config, self._weights = config, weights

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.route_with_logits(tensor)[:2]

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, weights = self._config, self._weights
        check_activations(tensor, config.hidden_size, CPU.device)
        logits = spec.dense_logits(tensor, weights.weight)
        result = spec.activation_topk(
            logits, weights.bias, config.top_k, config.routed_scaling_factor, config.renormalize
        )
        return *CPU.stored(*result), logits


class _CpuHash:
    def __init__(self, config: RouterConfig, table: Tensor) -> None:
        self._config, self._table = config, table

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        check_token_ids(tensor, CPU.device)
        config = self._config
        return CPU.stored(*spec.hash_router(tensor, self._table, config.top_k, config.sentinel))


#: What a launch of a dense kernel may be given. A contract takes those that it names.
_VARYING = (
    *("hidden_states", "weights_out", "ids_out", "logits_out", "tokens", "row_stride"),
    "workspace",
)


class _DenseLauncher:
    """One dense kernel, bound to one router's weights."""

    def __init__(
        self, kernel: LoadedKernel, config: RouterConfig, weights: _Weights, placement: Placement
    ) -> None:
        contract = kernel.entry.contract
        # The kernel's rows come through a tensor map.
        self.mapped = any(recipe.argument == "hidden_states" for recipe in contract.tensor_maps)
        self._hidden_size = config.hidden_size
        self._workspaces = Workspaces(contract.workspace_bytes, placement)
        fixed: dict[str, Any] = {"bias": weights.bias, "scale": config.routed_scaling_factor}
        fixed["renormalize"] = int(config.renormalize)
        fixed |= {recipe.parameter: weights.packed(recipe) for recipe in contract.repacks}
        given = [index for index, name in enumerate(_VARYING) if name in kernel.arguments]
        self._select = selector(given)
        self._launch = kernel.bind(tuple(_VARYING[index] for index in given), **fixed)

    def __call__(
        self,
        stream: int,
        address: int,
        row_stride: int,
        tokens: int,
        weights: int,
        ids: int,
        logits: int,
    ) -> None:
        rows: int | Matrix = address
        if self.mapped:
            rows = Matrix(address, tokens, self._hidden_size, row_stride)
        workspace = self._workspaces.address(stream)
        self._launch(
            stream,
            *self._select((rows, weights, ids, logits, tokens, row_stride, workspace)),
        )


class _Plan:
    """Launchers by the most tokens that each serves, in ascending order."""

    def __init__(self, spans: Sequence[Span], launchers: Mapping[str, _DenseLauncher]) -> None:
        self.highs = [span.high for span in spans]
        self.launchers = [launchers[span.entry.key] for span in spans]


class _CudaDense:
    """The kernels that the resolver divided the batches among."""

    def __init__(
        self,
        config: RouterConfig,
        weights: _Weights,
        kernels: Kernels,
        variants: Mapping[str, str],
    ) -> None:
        self._hidden_size, self._experts = config.hidden_size, config.num_experts
        self._top_k = config.top_k
        self._placement = Placement(weights.weight.device)
        requests = [
            Request(
                kernel,
                constants={
                    "HIDDEN": config.hidden_size,
                    "EXPERTS": config.num_experts,
                    "TOP_K": config.top_k,
                },
                variant=variants.get(kernel),
            )
            for kernel in DENSE
        ]
        self.spans = kernels.dispatch(requests).require()
        self._recording = kernels.dispatch(
            [dataclasses.replace(request, parameters=("logits_out",)) for request in requests]
        )
        launchers = {
            entry.key: _DenseLauncher(kernels.load_entry(entry), config, weights, self._placement)
            for entry in {
                span.entry.key: span.entry for span in (*self.spans, *self._recording.spans)
            }.values()
        }
        self._plan = _Plan(self.spans, launchers)
        self._recording_plan = _Plan(self._recording.spans, launchers)

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        placement = self._placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.route(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens:
            self._launch(self._plan, tensor, tokens, weights, ids, None)
        return weights, ids

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._recording.require()
        placement = self._placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.route_with_logits(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        logits = placement.floats(tokens, self._experts)
        if tokens:
            self._launch(self._recording_plan, tensor, tokens, weights, ids, logits)
        return weights, ids, logits

    def _launch(
        self,
        plan: _Plan,
        tensor: Tensor,
        tokens: int,
        weights: Tensor,
        ids: Tensor,
        logits: Tensor | None,
    ) -> None:
        place = bisect.bisect_left(plan.highs, tokens)
        if place == len(plan.highs):
            self._split(plan, tensor, tokens, weights, ids, logits)
            return
        launcher = plan.launchers[place]
        # ``tensor`` becomes the copy, if there is one: it has to live until the launch.
        tensor, address, row_stride = readable_rows(tensor)
        if row_stride < self._hidden_size and launcher.mapped:
            # A tensor map takes no rows that overlap; one row may bear any stride.
            tensor = tensor.contiguous()
            address, row_stride = tensor.data_ptr(), self._hidden_size
        launcher(
            self._placement.stream(),
            address,
            row_stride,
            tokens,
            weights.data_ptr(),
            ids.data_ptr(),
            0 if logits is None else logits.data_ptr(),
        )

    def _split(
        self,
        plan: _Plan,
        tensor: Tensor,
        tokens: int,
        weights: Tensor,
        ids: Tensor,
        logits: Tensor | None,
    ) -> None:
        """Launch by parts. No bit depends on where a batch is cut."""
        most = plan.highs[-1]
        for start in range(0, tokens, most):
            part = slice(start, min(start + most, tokens))
            self._launch(
                plan,
                tensor[part],
                part.stop - start,
                weights[part],
                ids[part],
                None if logits is None else logits[part],
            )


class _CudaHash:
    def __init__(
        self,
        config: RouterConfig,
        table: Tensor,
        kernels: Kernels,
        variants: Mapping[str, str],
    ) -> None:
        self._top_k = config.top_k
        self._placement = Placement(table.device)
        kernel = kernels.load(
            Request(HASH, quantities={"top_k": config.top_k}, variant=variants.get(HASH))
        )
        self._launch = kernel.bind(
            ("token_ids_i32", "token_ids_i64", "weights_out", "ids_out", "tokens"),
            table=table,
            vocab=table.shape[0],
            top_k=config.top_k,
            sentinel=config.sentinel,
        )

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        placement = self._placement
        tokens = check_token_ids(tensor, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.route(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens == 0:
            return weights, ids
        words = tensor.contiguous()
        narrow, wide = words.data_ptr(), 0
        if words.dtype is torch.int64:
            narrow, wide = wide, narrow
        self._launch(placement.stream(), narrow, wide, weights.data_ptr(), ids.data_ptr(), tokens)
        return weights, ids


def _resolved_device(device: torch.device | str | int) -> torch.device:
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise wrong_value("device", "'cpu' or a CUDA device", str(resolved))
    if not torch.cuda.is_available():
        raise InputError(
            explain(
                "device",
                expected=f"a GPU that torch {torch.__version__} can use for {resolved}",
                found="none",
                remedy="use device='cpu', or see: router-runtime doctor",
            )
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    return torch.device("cuda", index)


def _checked_weight(weight: Tensor, config: RouterConfig) -> Tensor:
    shape = (config.num_experts, config.hidden_size)
    return _checked_values("weight", weight, torch.bfloat16, shape)


def _checked_bias(bias: Tensor, config: RouterConfig) -> Tensor:
    return _checked_values("bias", bias, torch.float32, (config.num_experts,))


def _checked_values(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    tensor = tensor.detach()
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise wrong_value(name, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        where = (~finite).nonzero()
        first = where[0].tolist()
        raise wrong_value(
            name, "finite values", f"{len(where)} others, the first at {first}: {tensor[*first]}"
        )
    return tensor


def _checked_table(table: Tensor, config: RouterConfig) -> Tensor:
    shape = (config.vocab_size, config.top_k)
    if table.dtype not in (torch.int32, torch.int64) or tuple(table.shape) != shape:
        raise wrong_value(
            "table",
            f"torch.int32 or torch.int64 {list(shape)}",
            f"{table.dtype} {list(table.shape)}",
        )
    outside = (table < 0) | (table >= config.num_experts)
    if bool(outside.any()):
        where = outside.nonzero()
        first = where[0].tolist()
        raise wrong_value(
            "table",
            f"entries from 0 to {config.num_experts - 1}",
            f"{len(where)} others, the first at {first}: {int(table[*first])}",
        )
    return table
