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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, Unpack

import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.checkpoint import gates as checkpoint
from router_runtime.device import driver
from router_runtime.device.kernels import Kernels, kernels_on
from router_runtime.device.launch import LoadedKernel
from router_runtime.device.packing import selector
from router_runtime.device.resolve import Request
from router_runtime.device.tensor_map import Matrix
from router_runtime.errors import InputError, explain
from router_runtime.evidence.choice import DENSE, TokenRange
from router_runtime.format.contract import Repack
from router_runtime.ops import registration as ops
from router_runtime.routing.call import (
    Call,
    ExpertMap,
    Inputs,
    Results,
    ServingLaunch,
    check_expert_map,
    narrow_ids,
)
from router_runtime.routing.checks import (
    MAX_EXPERTS,
    MAX_TOP_K,
    check_activations,
    check_int,
    check_scale,
    check_token_ids,
    readable_rows,
    wrong_value,
)
from router_runtime.routing.placement import CPU, Placement, refuse_capture
from router_runtime.routing.repack import packed_shape, repack
from router_runtime.routing.workspace import Workspaces

HIDDEN_MULTIPLE = 64

HASH = "hash_router"
GATE = "hash_gate"

#: The kernels that serve each mode.
_KERNELS = {"dense": DENSE, "hash": (HASH,), "hash_gate": (GATE,)}


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router computes.

    ``mode``: ``dense`` selects by the gate's scores; ``hash`` looks the experts up by token id and
    weighs them alike; ``hash_gate`` looks them up and weighs them by the gate's scores.
    ``routed_scaling_factor`` is the scale r of the weights (``hash`` has no use for it);
    ``vocab_size`` is the number of rows of a table; ``sentinel`` is the id that stands where there
    is no expert: for padding, for a token outside the vocabulary, for a given id outside [0,
    num_experts).
    """

    hidden_size: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    mode: Literal["dense", "hash", "hash_gate"] = "dense"
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
        if self.mode not in _KERNELS:
            raise wrong_value("mode", f"one of {list(_KERNELS)}", self.mode)
        if not isinstance(self.renormalize, bool):
            raise wrong_value("renormalize", "True or False", self.renormalize)
        if self.vocab_size is not None or self.mode != "dense":
            check_int("vocab_size", self.vocab_size, 1, 2**31 - 1)
        check_scale("routed_scaling_factor", self.routed_scaling_factor)

    @classmethod
    def from_hf(cls, config: Any, *, layer: int | None = None) -> RouterConfig:
        """The configuration of the router of ``layer`` in a DeepSeek-V4 model.

        ``config`` is a transformers configuration, its dict, a ``config.json`` or its folder. The
        first layers of released checkpoints are hash layers: their mode is ``hash_gate``. Without
        ``layer``: of the layers that choose experts by score. Raises InputError for a model that
        routes in another way.
        """
        return cls(**checkpoint.config_fields(config, layer))


class _Backend(Protocol):
    """What differs between devices and modes. ``route`` takes the rows, and of hash_gate the token
    ids, which ``serve`` finds in the call.
    """

    @property
    def route(self) -> Callable[..., tuple[Tensor, Tensor]]: ...

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results: ...


class _DenseBackend(_Backend, Protocol):
    """A dense one can also return the logits that it routed by."""

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class Router:
    """A gate with its weights. Call it with hidden states (dense), token ids (hash), or both
    (hash_gate).

    dense: ``weight`` bf16 ``[num_experts, hidden_size]`` and ``bias`` fp32 ``[num_experts]``,
    finite. hash: ``table`` int32 or int64 ``[vocab_size, top_k]`` with entries in ``[0,
    num_experts)``. hash_gate: ``weight`` and ``table``. ``image_bias``, like ``bias``, is what
    image tokens are selected by, where there is a ``weight``: those of hash_gate too, which are not
    looked up.

    The router copies what it is given. ``device`` is a torch device. ``artifacts`` names the
    artifacts folder. ``variants`` maps a kernel's name to the one variant to use for it, proven or
    not: without it only kernels with evidence are used, and the constructor fails if there is
    none.

    Results are ``(weights fp32 [tokens, top_k], ids int32 [tokens, top_k])``. What else a call can
    be given stands in ``serving.py``.

    A dense batch is one launch, of the decode or of the prefill kernel:
    ``token_ranges`` says of which. All of them carry one ``numerics`` tag, so a token's bits depend
    on no batch size. A batch larger than the last range is split.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        image_bias: Tensor | None = None,
        table: Tensor | None = None,
        device: torch.device | str | int,
        artifacts: str | os.PathLike[str] | None = None,
        variants: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.device = _resolved_device(device)
        self._router_id: int | None = None
        self._captured = False
        self._weights: _Weights | None = None
        self._expert_map: ExpertMap | None = None
        self._backend: _Backend | _DenseBackend
        used = _KERNELS[config.mode]
        variants = dict(variants or {})
        unknown = sorted(set(variants) - set(used))
        if unknown:
            expected = f"kernels of a {config.mode} router, {list(used)}"
            raise wrong_value("variants", expected, unknown)
        given = {"weight": weight, "bias": bias, "table": table}
        wanted = checkpoint.TENSORS[config.mode]
        named = [name for name, tensor in given.items() if tensor is not None]
        if image_bias is not None and "weight" not in wanted:
            raise wrong_value("image_bias", "a router with a weight", f"mode {config.mode!r}")
        if sorted(named) != sorted(wanted):
            raise wrong_value(f"tensors of a {config.mode} router", list(wanted), named)
        kernels = None
        if self.device.type == "cuda":
            refuse_capture("building a Router")
            kernels = kernels_on(self.device.index, artifacts)
        # All values are checked before any is stored.
        table = None if table is None else _checked_table(table, config)
        weight = None if weight is None else _checked_weight(weight, config)
        bias = None if bias is None else _checked_bias("bias", bias, config)
        if image_bias is not None:
            image_bias = _checked_bias("image_bias", image_bias, config)
        if weight is None and table is not None:
            self._backend = self._hash(table, kernels, variants)
        elif weight is not None:
            values = weight, bias, image_bias
            self._backend = self._scoring(values, table, kernels, variants)
        if kernels is not None:
            # As in update_weights: kernels may read these before their dependency wait.
            torch.cuda.synchronize(self.device)
        self._watch_captures()

    def _watch_captures(self) -> None:
        """Register this router when a CUDA graph captures a launch of it: the graph holds addresses
        of its memory, and the registry keeps it alive.
        """
        self._captured = False
        reference = weakref.ref(self)  # a cycle would keep the memory until the next collection

        def captured() -> None:
            router = reference()
            if router is not None:
                ops.register_router(router)
                router._captured = True

        placement: Placement | None = getattr(self._backend, "_placement", None)  # none on a CPU
        if placement is not None:
            placement.captured = captured

    def __reduce__(self) -> NoReturn:
        raise InputError(
            explain(
                "copy or pickle of a Router",
                expected="a Router used where it was built: it holds loaded kernels and addresses",
                found="an attempt to copy it or to send it to another process",
                remedy="send the config and the tensors, and build it there",
            )
        )

    @classmethod
    def from_state_dict(
        cls,
        config: RouterConfig,
        tensors: Mapping[str, Tensor] | str | os.PathLike[str],
        layer: int | str,
        *,
        device: torch.device | str | int,
        artifacts: str | os.PathLike[str] | None = None,
        variants: Mapping[str, str] | None = None,
    ) -> Router:
        """The router of ``layer`` with its tensors of a checkpoint.

        ``tensors`` is a state dict, a ``safetensors`` file or a checkpoint's folder, of which only
        the gate's own tensors are read; both naming schemes are known (``checkpoint.py``).
        ``layer`` is a number, or the gate's whole name where that is not enough
        (``"mtp.0.ffn.gate"``). A weight that is not bf16 and a bias that is not fp32 are converted
        if that is exact, else refused. Raises InputError, naming the tensor.
        """
        sizes = {
            name: getattr(config, name)
            for name in ("hidden_size", "num_experts", "top_k", "vocab_size")
        }
        found = checkpoint.gate_tensors(config.mode, sizes, tensors, layer)
        return cls(config, **found, device=device, artifacts=artifacts, variants=variants)

    def _hash(
        self, table: Tensor, kernels: Kernels | None, variants: Mapping[str, str]
    ) -> _Backend:
        stored = _stored_table(table, self.device)
        if kernels is None:
            return _CpuHash(self.config, stored)
        return _CudaHash(self.config, stored, kernels, variants)

    def _scoring(
        self,
        values: tuple[Tensor, Tensor | None, Tensor | None],
        table: Tensor | None,
        kernels: Kernels | None,
        variants: Mapping[str, str],
    ) -> _Backend:
        """With a table of mode ``hash_gate``, without of mode ``dense``."""
        config = self.config
        weights = self._weights = _Weights(config, self.device, values[2] is not None)
        backend: _Backend
        if table is not None:
            stored = _stored_table(table, self.device)
            backend = (
                _CpuHashGate(config, weights, stored)
                if kernels is None
                else _CudaHashGate(config, weights, stored, kernels, variants)
            )
        else:
            backend = (
                _CpuDense(config, weights)
                if kernels is None
                else _CudaDense(config, weights, kernels, variants)
            )
        # Only now: the kernels' contracts say in which orders the weight is stored.
        weights.write(*values)
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

    def forward(
        self, tensor: Tensor, token_ids: Tensor | None = None, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor]:
        """Route hidden states ``[tokens, hidden_size]`` bf16 (dense), token ids ``[tokens]`` int32
        or int64 (hash), or hidden states and ``token_ids`` (hash_gate).

        Eagerly this skips torch's dispatcher. Inside ``torch.compile`` it is the custom op, which
        needs the router to be registered.
        """
        rows = self._rows(tensor, token_ids)
        if torch.compiler.is_compiling():
            return self._op("", "default")(*rows, *self._numbers(), **inputs)  # type: ignore[no-any-return]
        if inputs:
            return self._serve(tensor, Call(**inputs, token_ids=token_ids))[:2]
        return self._backend.route(*rows)

    __call__ = forward

    def forward_with_logits(
        self, tensor: Tensor, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward`` of a dense router, and the logits that it routed by: canonical, FP32
        ``[tokens, num_experts]``, a NaN stored as 0x7fffffff. Weights and ids are those of
        ``forward``, bit for bit.
        """
        self._require_dense("forward_with_logits")
        if torch.compiler.is_compiling():
            return self._op("_logits", "default")(tensor, *self._numbers(), **inputs)  # type: ignore[no-any-return]
        if inputs:
            weights, ids, logits, _ = self._serve(tensor, Call(**inputs, logits=True))
            return weights, ids, typing.cast(Tensor, logits)
        return typing.cast(_DenseBackend, self._backend).route_with_logits(tensor)

    def forward_mapped(
        self, tensor: Tensor, token_ids: Tensor | None = None, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``, with physical ids by the expert map, and the logical ids:
        ``(weights, physical ids, logical ids)``.
        """
        rows = self._rows(tensor, token_ids)
        if torch.compiler.is_compiling():
            return self._op("", "mapped")(*rows, *self._numbers(), **inputs)  # type: ignore[no-any-return]
        call = Call(**inputs, token_ids=token_ids, mapped=True)
        weights, ids, _, logical = self._serve(tensor, call)
        return weights, ids, typing.cast(Tensor, logical)

    def replay(
        self, tensor: Tensor, given_ids: Tensor, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor]:
        """The weights of given (logical) experts, ``[tokens, top_k]`` int32 or int64, in the given
        order, and those ids. Given the ids of ``forward`` it returns its weights, bit for bit.

        An id outside [0, num_experts) becomes the sentinel, with weight 0, left out of the sum.
        """
        self._require_dense("replay")
        if torch.compiler.is_compiling():
            return self._op("_replay", "default")(tensor, given_ids, *self._numbers(), **inputs)  # type: ignore[no-any-return]
        return self._serve(tensor, Call(**inputs, given_ids=given_ids))[:2]

    def forward_out(
        self,
        tensor: Tensor,
        token_ids: Tensor | None = None,
        *,
        weights_out: Tensor,
        ids_out: Tensor,
        logits_out: Tensor | None = None,
        logical_ids_out: Tensor | None = None,
        given_ids: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        """As the other methods, into the caller's tensors, which are contiguous.

        ``ids_out`` and ``logical_ids_out`` are int32 or int64. ``logits_out`` asks for the logits,
        ``logical_ids_out`` for the expert map, ``given_ids`` for a replay.
        """
        if logits_out is not None or given_ids is not None:
            self._require_dense("forward_out with logits_out or given_ids")
        self._rows(tensor, token_ids)
        outputs = Results(weights_out, ids_out, logits_out, logical_ids_out)
        call = Call(**inputs, given_ids=given_ids, token_ids=token_ids, outputs=outputs)
        self._serve(tensor, call)

    def set_expert_map(self, expert_map: Tensor, replica_counts: Tensor) -> None:
        """Give every logical expert its physical ids: row e of ``expert_map`` ``[num_experts,
        replicas]`` has ``replica_counts[e]`` of them, from 1 to ``replicas``; what follows them in
        the row is never used. Both int32 or int64. A token in row i of its batch gets the one
        number i modulo the count.

        The first call fixes the number of replicas; from then on it is ``update_expert_map``.
        """
        if self._expert_map is not None:
            self.update_expert_map(expert_map, replica_counts)
            return
        checked = check_expert_map(expert_map, replica_counts, self.config.num_experts)
        if self.device.type == "cuda":
            refuse_capture("set_expert_map")
        stored = ExpertMap(
            *(torch.zeros(t.shape, dtype=torch.int32, device=self.device) for t in checked)
        )
        self._write(lambda: _copy_map(stored, checked))
        self._expert_map = stored

    def update_expert_map(self, expert_map: Tensor, replica_counts: Tensor) -> None:
        """Replace the expert map in place: captured graphs stay valid and use the new one.

        The same shape as before. Everything is checked before anything is written; ordered as
        ``update_weights`` is.
        """
        stored = self._expert_map
        if stored is None:
            raise wrong_value("update_expert_map", "a router with an expert map", "one without")
        checked = check_expert_map(expert_map, replica_counts, self.config.num_experts)
        if checked[0].shape != stored.physical.shape:
            raise wrong_value("expert_map", list(stored.physical.shape), list(checked[0].shape))
        if self.device.type == "cuda":
            refuse_capture("update_expert_map")
        self._write(lambda: _copy_map(stored, checked))

    def _serve(self, tensor: Tensor, call: Call) -> Results:
        """A call with serving inputs, from a method or an op."""
        if call.mapped and self._expert_map is None:
            raise wrong_value("a mapped call", "a router with an expert map", "one without")
        return self._backend.serve(tensor, call, self._expert_map)

    def _rows(self, tensor: Tensor, token_ids: Tensor | None) -> tuple[Tensor, ...]:
        """What this router's mode routes by."""
        if (token_ids is not None) != (self.config.mode == "hash_gate"):
            given = "no token ids" if token_ids is None else "token ids"
            raise wrong_value(
                "token_ids",
                "token ids beside the rows in mode 'hash_gate', and in no other",
                f"{given} in mode {self.config.mode!r}",
            )
        return (tensor,) if token_ids is None else (tensor, token_ids)

    def _op(self, what: str, form: str) -> Any:
        """The custom op of this router's mode."""
        mode = self.config.mode
        name = mode if mode == "hash_gate" else f"{mode}_router{what}"
        return getattr(getattr(getattr(torch.ops, ops.NAMESPACE), name), form)

    def _numbers(self) -> tuple[int, ...]:
        """What this router's ops are called with after the tensors."""
        config = self.config
        if config.mode == "hash":
            return self.router_id, config.top_k
        return self.router_id, config.num_experts, config.top_k

    def _require_dense(self, what: str) -> None:
        if self.config.mode != "dense":
            raise wrong_value(what, "a dense router", f"mode {self.config.mode!r}")

    @property
    def token_ranges(self) -> tuple[TokenRange, ...]:
        """Which entry serves how many tokens. Empty for mode ``hash`` and on a CPU."""
        backend = self._backend
        return backend.token_ranges if isinstance(backend, _CudaDense | _CudaHashGate) else ()

    def update_weights(
        self,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        image_bias: Tensor | None = None,
    ) -> None:
        """Replace the weight, the biases or all, in place: addresses stay, captured graphs stay
        valid.

        All are checked before any is written. Launches made before the call, on any stream, use
        the old values; launches and graph replays made after it, on any stream, use the new ones.
        The host waits for both: an event could order neither a replay on another stream nor a
        kernel that reads the weights before its dependency wait (programmatic dependent launch).
        Not to be called while another thread launches this router.
        """
        if self._weights is None:
            raise wrong_value("update_weights", "a router with a weight", "mode 'hash'")
        if bias is not None and "bias" not in checkpoint.TENSORS[self.config.mode]:
            raise wrong_value("bias", "a dense router", f"mode {self.config.mode!r}")
        if weight is None and bias is None and image_bias is None:
            raise wrong_value("update_weights", "a weight, a bias or both", "neither")
        weight = None if weight is None else _checked_weight(weight, self.config)
        bias = None if bias is None else _checked_bias("bias", bias, self.config)
        if image_bias is not None:
            if self._weights.image_bias is None:
                raise wrong_value("image_bias", "a router built with one", "one without")
            image_bias = _checked_bias("image_bias", image_bias, self.config)
        weights = self._weights
        if self.device.type == "cuda":
            refuse_capture("update_weights")
        self._write(lambda: weights.write(weight, bias, image_bias))

    def _write(self, write: Callable[[], None]) -> None:
        """Write buffers that kernels of any stream may be reading."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        write()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warmup(self) -> None:
        """One dummy call of every kernel, so that torch's allocator and the driver are warm; of a
        registered router by its op, so that torch's dispatcher is too.
        """
        backend = self._backend
        for tokens in [each.low for each in self.token_ranges] or [1]:
            rows = self._dummies(tokens)
            if self._router_id is None:
                backend.route(*rows)
            else:
                self._op("", "default")(*rows, *self._numbers())
        if isinstance(backend, _CudaDense):
            known = {each.entry.key for each in self.token_ranges}
            for each in backend.recording_token_ranges:
                if each.entry.key not in known:
                    backend.route_with_logits(*self._dummies(each.low))
        if self._weights is not None and self._weights.image_bias is not None:
            images = torch.ones(1, dtype=torch.bool, device=self.device)
            self.forward(*self._dummies(1), image_mask=images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _dummies(self, tokens: int) -> list[Tensor]:
        """What this router's mode routes by, all zeros."""
        rows = []
        if "weight" in checkpoint.TENSORS[self.config.mode]:
            shape = (tokens, self.config.hidden_size)
            rows.append(torch.zeros(shape, dtype=torch.bfloat16, device=self.device))
        if "table" in checkpoint.TENSORS[self.config.mode]:
            rows.append(torch.zeros(tokens, dtype=torch.int64, device=self.device))
        return rows


def warmup_router_compilation(router: Router) -> None:
    """Make ``router`` ready for serving and graph capture. Nothing is compiled, ever: the name is
    kept for callers that know it. Kernels were loaded when the router was built; this runs them
    once.
    """
    router.warmup()


class _Weights:
    """The weights of a gate on its device, at addresses that never change. Mode ``hash_gate`` makes
    no use of the bias.

    ``packed`` returns the buffer of a kernel's Repack recipe; equal recipes share one buffer.
    """

    def __init__(
        self, config: RouterConfig, device: torch.device, image_bias: bool = False
    ) -> None:
        shape = (config.num_experts, config.hidden_size)
        self.weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.bias = torch.empty(config.num_experts, dtype=torch.float32, device=device)
        self.image_bias = torch.empty_like(self.bias) if image_bias else None
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
    def write(
        self, weight: Tensor | None, bias: Tensor | None, image_bias: Tensor | None = None
    ) -> None:
        """Copy checked values into place, on the current stream."""
        if bias is not None:
            self.bias.copy_(bias)
        if image_bias is not None and self.image_bias is not None:
            self.image_bias.copy_(image_bias)
        if weight is None:
            return
        self.weight.copy_(weight)
        for recipe, buffer in self._packed:
            repack(recipe, self.weight, buffer)


class _CpuDense:
    def __init__(self, config: RouterConfig, weights: _Weights) -> None:
        self._config, self._weights = config, weights

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.serve(tensor, Call(), None)[:2]

    def route_with_logits(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids, logits, _ = self.serve(tensor, Call(logits=True), None)
        return weights, ids, typing.cast(Tensor, logits)

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        config, weights = self._config, self._weights
        tokens = check_activations(tensor, config.hidden_size, CPU.device)
        call.check(tokens, config.top_k, CPU.device, weights.image_bias is not None)
        results = call.results(CPU, tokens, config.top_k, config.num_experts)
        logits = spec.dense_logits(tensor, weights.weight)
        result = spec.activation_topk(
            logits,
            weights.bias,
            config.top_k,
            config.routed_scaling_factor,
            config.renormalize,
            image_mask=call.image_mask,
            image_bias=weights.image_bias,
            given_ids=call.given_ids,
            padding=call.padding(torch.arange(tokens)),
        )
        if results.logits is not None:
            results.logits.copy_(logits)
        return call.store(results, *result, config.sentinel, expert_map)


class _CpuHash:
    def __init__(self, config: RouterConfig, table: Tensor) -> None:
        self._config, self._table = config, table

    def route(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.serve(tensor, Call(), None)[:2]

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        config = self._config
        tokens = check_token_ids(tensor, CPU.device)
        call.check(tokens, config.top_k, CPU.device, image_bias=False)
        results = call.results(CPU, tokens, config.top_k, config.num_experts)
        padding = call.padding(torch.arange(tokens))
        result = spec.hash_router(tensor, self._table, config.top_k, spec.NO_EXPERT, padding)
        return call.store(results, *result, config.sentinel, expert_map)


class _CpuHashGate:
    def __init__(self, config: RouterConfig, weights: _Weights, table: Tensor) -> None:
        self._config, self._weights, self._table = config, weights, table

    def route(self, hidden_states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.serve(hidden_states, Call(token_ids=token_ids), None)[:2]

    def serve(self, hidden_states: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        config, weights = self._config, self._weights
        tokens = check_activations(hidden_states, config.hidden_size, CPU.device)
        token_ids = typing.cast(Tensor, call.token_ids)
        check_token_ids(token_ids, CPU.device, tokens)
        call.check(tokens, config.top_k, CPU.device, weights.image_bias is not None)
        results = call.results(CPU, tokens, config.top_k, config.num_experts)
        result = spec.hash_gate(
            hidden_states,
            token_ids,
            weights.weight,
            self._table,
            config.routed_scaling_factor,
            config.renormalize,
            spec.NO_EXPERT,
            image_mask=call.image_mask,
            image_bias=weights.image_bias,
            padding=call.padding(torch.arange(tokens)),
        )
        return call.store(results, *result, config.sentinel, expert_map)


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
        self._workspaces.address(placement.stream())  # made now, and not by the first call
        fixed: dict[str, Any] = {"bias": weights.bias, "scale": config.routed_scaling_factor}
        fixed |= {"renormalize": int(config.renormalize), "sentinel": config.sentinel}
        fixed["image_bias"] = weights.image_bias
        fixed |= {recipe.parameter: weights.packed(recipe) for recipe in contract.repacks}
        given = [index for index, name in enumerate(_VARYING) if name in kernel.arguments]
        self._select = selector(given)
        self._launch = ServingLaunch(kernel, tuple(_VARYING[index] for index in given), **fixed)

    def __call__(
        self,
        stream: int,
        address: int,
        row_stride: int,
        tokens: int,
        weights: int,
        ids: int,
        logits: int,
        served: tuple[int, ...] | None = None,
    ) -> None:
        """``served`` has the values of ``serving.SERVED`` where the call has such inputs."""
        rows: int | Matrix = address
        if self.mapped:
            rows = Matrix(address, tokens, self._hidden_size, row_stride)
        workspace = self._workspaces.address(stream)
        given = self._select((rows, weights, ids, logits, tokens, row_stride, workspace))
        if served is None:
            self._launch.plain(stream, *given)
        else:
            self._launch.serve(stream, given, served)


class _Plan:
    """Launchers by the most tokens that each serves, in ascending order."""

    def __init__(
        self, token_ranges: Sequence[TokenRange], launchers: Mapping[str, _DenseLauncher]
    ) -> None:
        self.highs = [each.high for each in token_ranges]
        self.launchers = [launchers[each.entry.key] for each in token_ranges]

    def parts(self, tokens: int) -> Iterator[slice]:
        """The rows of each launch of a batch. No bit depends on where it is cut."""
        most = self.highs[-1]
        for start in range(0, tokens, most):
            yield slice(start, min(start + most, tokens))


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
        self._images = weights.image_bias is not None
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
        self.token_ranges = kernels.dispatch(requests).require()
        self._recording = kernels.dispatch(
            [dataclasses.replace(request, parameters=("logits_out",)) for request in requests]
        )
        launchers = {
            entry.key: _DenseLauncher(kernels.load_entry(entry), config, weights, self._placement)
            for entry in {
                each.entry.key: each.entry
                for each in (*self.token_ranges, *self._recording.token_ranges)
            }.values()
        }
        self._plan = _Plan(self.token_ranges, launchers)
        self._recording_plan = _Plan(self._recording.token_ranges, launchers)

    @property
    def recording_token_ranges(self) -> tuple[TokenRange, ...]:
        """``token_ranges`` of calls that also want logits."""
        return self._recording.token_ranges

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

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        placement = self._placement
        tokens = check_activations(tensor, self._hidden_size, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.serve(tensor, call, expert_map)
        call.check(tokens, self._top_k, placement.device, self._images)
        results = call.results(placement, tokens, self._top_k, self._experts)
        plan = self._plan
        if results.logits is not None:
            self._recording.require()
            plan = self._recording_plan
        for rows in plan.parts(tokens):
            part = results.part(rows)
            served = call.arguments(rows, part, expert_map)
            self._launch(plan, tensor[rows], rows.stop - rows.start, *part[:3], served)
        return results

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
        served: tuple[int, ...] | None = None,
    ) -> None:
        place = bisect.bisect_left(plan.highs, tokens)
        if place == len(plan.highs):
            for rows in plan.parts(tokens):
                part = Results(weights, ids, logits).part(rows)
                self._launch(plan, tensor[rows], rows.stop - rows.start, *part[:3])
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
            ids.data_ptr() if served is None else narrow_ids(ids),
            0 if logits is None else logits.data_ptr(),
            served,
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
        self._experts = config.num_experts
        self._launch = ServingLaunch(
            kernel,
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
        narrow, wide = _both_widths(words)
        launch = self._launch.plain
        launch(placement.stream(), narrow, wide, weights.data_ptr(), ids.data_ptr(), tokens)
        return weights, ids

    def serve(self, tensor: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        placement = self._placement
        tokens = check_token_ids(tensor, placement.device)
        if placement.elsewhere():
            with placement.current():
                return self.serve(tensor, call, expert_map)
        call.check(tokens, self._top_k, placement.device, image_bias=False)
        results = call.results(placement, tokens, self._top_k, self._experts)
        if tokens:
            words = tensor.contiguous()
            narrow, wide = _both_widths(words)
            given = narrow, wide, results.weights.data_ptr(), narrow_ids(results.ids), tokens
            served = call.arguments(slice(0, tokens), results, expert_map)
            self._launch.serve(placement.stream(), given, served)
        return results


class _CudaHashGate:
    """The variants that the resolver divided the batches among, and the one for image tokens."""

    def __init__(
        self,
        config: RouterConfig,
        weights: _Weights,
        table: Tensor,
        kernels: Kernels,
        variants: Mapping[str, str],
    ) -> None:
        self._hidden_size, self._experts = config.hidden_size, config.num_experts
        self._top_k = config.top_k
        self._placement = Placement(table.device)
        shape = {"HIDDEN": self._hidden_size, "EXPERTS": self._experts, "TOP_K": self._top_k}
        request = Request(GATE, constants=shape | {"IMAGES": 0}, variant=variants.get(GATE))
        self.token_ranges = kernels.dispatch([request]).require()

        def launch(kernel: LoadedKernel) -> ServingLaunch:
            return ServingLaunch(
                kernel,
                (
                    *("hidden_states", "row_stride", "token_ids_i32", "token_ids_i64"),
                    *("weights_out", "ids_out", "tokens"),
                ),
                weight=weights.weight,
                table=table,
                vocab=table.shape[0],
                scale=config.routed_scaling_factor,
                renormalize=int(config.renormalize),
                sentinel=config.sentinel,
                image_bias=weights.image_bias,
            )

        self._highs = [each.high for each in self.token_ranges]
        self._launches = [launch(kernels.load_entry(each.entry)) for each in self.token_ranges]
        self._images: ServingLaunch | None = None
        if weights.image_bias is not None:
            self._images = launch(kernels.load(Request(GATE, constants=shape | {"IMAGES": 1})))

    def route(self, hidden_states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        placement = self._placement
        tokens = check_activations(hidden_states, self._hidden_size, placement.device)
        check_token_ids(token_ids, placement.device, tokens)
        if placement.elsewhere():
            with placement.current():
                return self.route(hidden_states, token_ids)
        weights, ids = placement.outputs(tokens, self._top_k)
        if tokens == 0:
            return weights, ids
        # Both names keep a copy alive until the launch, if there is one.
        hidden_states, address, row_stride = readable_rows(hidden_states)
        words = token_ids.contiguous()
        self._launches[bisect.bisect_left(self._highs, tokens)].plain(
            placement.stream(),
            address,
            row_stride,
            *_both_widths(words),
            weights.data_ptr(),
            ids.data_ptr(),
            tokens,
        )
        return weights, ids

    def serve(self, hidden_states: Tensor, call: Call, expert_map: ExpertMap | None) -> Results:
        placement = self._placement
        tokens = check_activations(hidden_states, self._hidden_size, placement.device)
        token_ids = typing.cast(Tensor, call.token_ids)
        check_token_ids(token_ids, placement.device, tokens)
        if placement.elsewhere():
            with placement.current():
                return self.serve(hidden_states, call, expert_map)
        call.check(tokens, self._top_k, placement.device, self._images is not None)
        results = call.results(placement, tokens, self._top_k, self._experts)
        if tokens == 0:
            return results
        launch = self._launches[bisect.bisect_left(self._highs, tokens)]
        if call.image_mask is not None and self._images is not None:
            launch = self._images
        hidden_states, address, row_stride = readable_rows(hidden_states)
        words = token_ids.contiguous()
        addresses = results.weights.data_ptr(), narrow_ids(results.ids)
        launch.serve(
            placement.stream(),
            (address, row_stride, *_both_widths(words), *addresses, tokens),
            call.arguments(slice(0, tokens), results, expert_map),
        )
        return results


def _both_widths(words: Tensor) -> tuple[int, int]:
    """The address of int32 or int64 words, as (narrow, wide): the other one is null."""
    address = words.data_ptr()
    return (0, address) if words.dtype is torch.int64 else (address, 0)


def _stored_table(table: Tensor, device: torch.device) -> Tensor:
    """The table as kernels read it: int32, contiguous, on the device, the router's own."""
    return table.to(device, torch.int32, copy=True, memory_format=torch.contiguous_format)


def _resolved_device(device: torch.device | str | int) -> torch.device:
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise wrong_value("device", "'cpu' or a CUDA device", str(resolved))
    driver.refuse_fork()
    if torch.cuda._is_in_bad_fork():  # torch initialised it, before this package did
        raise driver.fork_error()
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


def _checked_bias(name: str, bias: Tensor, config: RouterConfig) -> Tensor:
    return _checked_values(name, bias, torch.float32, (config.num_experts,))


def _copy_map(stored: ExpertMap, checked: tuple[Tensor, Tensor]) -> None:
    for buffer, values in zip(stored, checked, strict=True):
        buffer.copy_(values)


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
