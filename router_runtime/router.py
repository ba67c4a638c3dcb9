"""Router: one gate of one layer, with its weights on a device and its kernels loaded.

``RouterConfig`` says what the gate computes; the mathematics and its edge rules are in ``spec.py``.
Everything that can fail or allocate for good happens in the constructor: values are checked,
weights are stored in the order in which the kernels read them, and every kernel the router can
need is loaded, so that a call does nothing but allocate its two outputs and launch.

On a CPU device the router is ``spec.py`` itself and needs neither artifacts nor a driver.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
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
from router_runtime.manifest import Repack
from router_runtime.placement import CPU, Placement, refuse_capture
from router_runtime.repack import packed_shape, repack
from router_runtime.resolve import Request
from router_runtime.workspace import Workspaces

HIDDEN_MULTIPLE = 64

#: A Router's kernels: dense uses the first two, hash the third.
DECODE, ACTIVATION, HASH = "dense_router_decode", "activation_topk", "hash_router"


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

    Batches up to the decode kernel's limit take one fused launch. Larger ones take ``torch.mm``
    with FP32 output and ``activation_topk``; that path carries no ``numerics`` tag: its logits are
    accurate, but its order of accumulation is cuBLAS's, so a token's bits may differ between the
    two paths.
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
        self._backend: _Backend
        used = (DECODE, ACTIVATION) if config.mode == "dense" else (HASH,)
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
    ) -> _Backend:
        self._weights = _Weights(self.config, self.device)
        backend: _Backend = (
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
        """One dummy call on every path, so that what loads lazily (cuBLAS) has loaded."""
        if self.config.mode == "hash":
            self._backend.route(torch.zeros(1, dtype=torch.int64, device=self.device))
            return
        sizes = {1}
        if isinstance(self._backend, _CudaDense):
            sizes.add(self._backend.decode_limit + 1)
        for tokens in sorted(sizes):
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
        config, weights = self._config, self._weights
        check_activations(tensor, config.hidden_size, CPU.device)
        return CPU.stored(
            *spec.dense_router(
                tensor,
                weights.weight,
                weights.bias,
                config.top_k,
                config.routed_scaling_factor,
                config.renormalize,
            )
        )


class _CpuHash:
    def __init__(self, config: RouterConfig, table: Tensor) -> None:
        self._config, self._table = config, table

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        check_token_ids(tensor, CPU.device)
        config = self._config
        return CPU.stored(*spec.hash_router(tensor, self._table, config.top_k, config.sentinel))


class _CudaDense:
    """The decode kernel up to its limit of tokens, ``torch.mm`` and ``activation_topk`` beyond."""

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
        decode = kernels.load(
            Request(
                DECODE,
                constants={
                    "HIDDEN": config.hidden_size,
                    "EXPERTS": config.num_experts,
                    "TOP_K": config.top_k,
                },
                quantities={"tokens": 1},
                variant=variants.get(DECODE),
            )
        )
        activation = kernels.load(
            Request(
                ACTIVATION,
                quantities={"experts": config.num_experts, "top_k": config.top_k},
                variant=variants.get(ACTIVATION),
            )
        )
        contract = decode.entry.contract
        self.decode_limit = contract.limits.get("tokens", (1, 2**31 - 1))[1]
        fixed: dict[str, Any] = {"bias": weights.bias, "scale": config.routed_scaling_factor}
        fixed["renormalize"] = int(config.renormalize)
        packed = {recipe.parameter: weights.packed(recipe) for recipe in contract.repacks}
        varying = ("hidden_states", "weights_out", "ids_out", "tokens", "row_stride", "workspace")
        self._decode = decode.bind(varying, **fixed, **packed)
        self._workspaces = Workspaces(contract.workspace_bytes, self._placement)
        self._activation = activation.bind(
            ("logits", "weights_out", "ids_out", "tokens"),
            **fixed,
            experts=config.num_experts,
            top_k=config.top_k,
            row_stride=config.num_experts,
        )
        self._weight_columns = weights.weight.T

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        placement = self._placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.route(tensor)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens == 0:
            return weights, ids
        if tokens <= self.decode_limit:
            # The copy, if it is one, has to live until the launch.
            _copy, address, row_stride = readable_rows(tensor)
            stream = placement.stream()
            self._decode(
                stream,
                address,
                weights.data_ptr(),
                ids.data_ptr(),
                tokens,
                row_stride,
                self._workspaces.address(stream),
            )
            return weights, ids
        logits = torch.mm(tensor, self._weight_columns, out_dtype=torch.float32)
        self._activation(
            placement.stream(), logits.data_ptr(), weights.data_ptr(), ids.data_ptr(), tokens
        )
        return weights, ids


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
