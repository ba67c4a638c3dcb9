"""Router: one gate of one layer, with its weights on a device and its kernels loaded.

Everything that can fail or allocate permanently happens in the constructor: values are checked,
weights are stored in the order in which the kernels read them, and every kernel that the router can
need is loaded, so that a call does nothing but allocate its two outputs and launch.
"""

from __future__ import annotations

import copy
import logging
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from router_runtime.arguments import checks_arguments, explain_failure, explains_arguments
from router_runtime.checkpoint.tensors import TENSORS, gate_tensors
from router_runtime.device.kernels import Kernels
from router_runtime.errors import InputError, RouterRuntimeError, explain
from router_runtime.evidence.choice import TokenRange
from router_runtime.routing.backend import DenseBackend, make_backend
from router_runtime.routing.call import SERVING, Call, Inputs, ReplayInputs, Results
from router_runtime.routing.checks import NoMemory, wrong_token_ids, wrong_value
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.module import GateModule
from router_runtime.routing.options import Records
from router_runtime.routing.placement import kernels_for, resolved_device
from router_runtime.routing.registry import Registry
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import NAMES, checked_values

_log = logging.getLogger(__name__)

#: The tensors that an exported program has of a gate, in their order.
EXPORTED = (*NAMES, "expert_map", "replica_counts")


class Router(GateModule):
    """A gate with its weights. Call it with hidden states (mode ``dense``), with token ids
    (``hash``), or with both (``hash_gate``).

    It is an ``nn.Module`` whose tensors are buffers at addresses that never change: ``weight``
    bf16 ``[num_experts, hidden_size]`` (dense, hash_gate), ``bias`` fp32 ``[num_experts]`` (dense),
    ``image_bias`` fp32 ``[num_experts]`` (None unless given) and ``table`` int32
    ``[vocab_size, top_k]`` (hash, hash_gate). Kernels read the weight from further copies, in other
    orders, so new values are written by ``update_weights`` or ``load_state_dict``. The next call
    outside of a CUDA graph follows writes into the buffers too, and into the tensors that the
    values were copied from if one of them is an ``nn.Parameter``; it does not see writes through
    ``.data``. The device and the dtypes are those of construction: ``to``, ``half`` and the like
    are refused where they would change one. ``copy.deepcopy`` builds an independent Router;
    pickling is refused.

    Results are ``(weights fp32 [tokens, top_k], ids int32 [tokens, top_k])``, by the numbered steps
    of ``spec.py``. On a CPU the router is ``spec.py`` itself. On a GPU a dense batch is one launch,
    of the kernel that ``token_ranges`` names for its number of tokens; a batch larger than the last
    range is split. All kernels of a router carry one ``numerics`` tag, so a token's bits depend on
    no batch size.

    Inside ``torch.compile`` and ``torch.export`` a call is a custom op that takes the weight (or
    the table) in place of the router, so all routers of one shape share a graph. A compiled
    function needs the Router itself to be alive in its process. An exported program has all that a
    Router is built from: saved, and loaded in a process that has imported this package, its first
    call builds the Routers, by the artifacts and the evidence of that process.

    The methods take these keyword arguments, all optional:

    - ``ids_dtype``: ``torch.int32`` (as without it) or ``torch.int64``, of the ids returned;
    - ``is_padding``: bool ``[tokens]``; those rows get the sentinel and zero weights (step 7);
    - ``num_valid_tokens``: int32, one element; the rows from that number on are padding. The
      kernel reads it, so a captured graph can be replayed with another number;
    - ``image_mask``: bool ``[tokens]``; those rows are selected by ``image_bias``;
    - ``given_ids``: int32 or int64 ``[tokens, top_k]``: (logical) experts to weigh instead of
      selecting or looking up, in their order, of all rows or of those in ``given_mask``. An id
      outside [0, num_experts) becomes the sentinel, with weight 0. Not in mode ``hash``;
    - ``given_mask``: bool ``[tokens]``, beside ``given_ids``;
    - ``shared_experts``: 1 or 2: so many columns follow the ``top_k`` of the results, for experts
      that every token has. Padding has the sentinel and 0 there;
    - ``shared_id``: the id of the first of these; ``num_experts`` without it. The next has the id
      after it;
    - ``shared_weight``: the weight of each; 1 without it.

    Attributes:
        config: what the router computes.
        device: where it does.
        backend: what computes there; for the custom ops, tests and measurements.
        expert_map: the map of ``set_expert_map`` as the kernels read it, or None. Read only.

    """

    @explains_arguments
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
        accept: str | None = None,
    ) -> None:
        """Copy the tensors to the device and load the kernels.

        Args:
            config: what the router computes.
            weight: bf16 ``[num_experts, hidden_size]``, finite; modes ``dense`` and ``hash_gate``.
            bias: fp32 ``[num_experts]``, finite; mode ``dense``.
            image_bias: fp32 ``[num_experts]``, finite: the bias by which image tokens are selected;
                optional where there is a weight. Image tokens of mode ``hash_gate`` are not looked
                up.
            table: int32 or int64 ``[vocab_size, top_k]`` with entries in [0, num_experts); modes
                ``hash`` and ``hash_gate``.
            device: ``"cpu"`` or a CUDA device.
            artifacts: the artifacts folder; without it the one of the environment or the package.
            variants: the one variant to use of a kernel, by the kernel's name, whether it has
                evidence or not. Without it only kernels with evidence are used.
            accept: ``"emulated"`` lets kernels serve too whose PTX passed the oracle suite on
                another GPU, with the instructions that it lacks in software. They never ran on a
                GPU of their target. Among them and those that are *source-verified*, the fastest
                serve.

        Raises:
            InputError: a tensor is missing, of another dtype or shape, or has a value that is
                refused; a variant of a kernel that the mode does not use; a status that cannot be
                accepted; a device that torch cannot use; a graph capture is in progress.
            ArtifactError: a file of the artifacts is missing or altered.
            DriverError: the driver is missing, too old, or failed.
            ResolutionError: no kernel serves this configuration on this device.

        """
        if is_compiling():
            torch._dynamo.graph_break(
                msg="A Router is built from values and addresses, outside of what is compiled. "
                "Next: build it before the compiled function is called."
            )
        if not isinstance(artifacts, str | os.PathLike | None):
            raise wrong_value("artifacts", "the path of a folder, or None", artifacts)
        resolved = resolved_device(device)
        selection = Selection(dict(variants or {}), accept)
        given = {"weight": weight, "bias": bias, "image_bias": image_bias, "table": table}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        selection.check(config.mode)
        _check_tensors(config, tensors)
        kernels = kernels_for(resolved, artifacts)
        values = checked_values(config, tensors)
        super().__init__(config, resolved, "image_bias" in tensors)
        self._artifacts, self._selection = artifacts, selection
        self.backend = make_backend(config, self.weights, kernels, selection)
        # Only now: the kernels' contracts say in which orders the weight is stored.
        self.weights.write(values)
        self.weights.watch(tensors)
        if resolved.type == "cuda":
            # As in update_weights: kernels may read these before their dependency wait.
            torch.cuda.synchronize(resolved)
        ROUTERS.adopt(self, self._key())
        self._log_what_serves(kernels)

    @classmethod
    @checks_arguments
    def from_state_dict(
        cls,
        config: RouterConfig,
        tensors: Mapping[str, Tensor] | str | os.PathLike[str],
        layer: int | str,
        *,
        device: torch.device | str | int,
        artifacts: str | os.PathLike[str] | None = None,
        variants: Mapping[str, str] | None = None,
        accept: str | None = None,
    ) -> Router:
        """The router of one layer, with its tensors of a released checkpoint.

        Args:
            config: what the router computes; ``RouterConfig.from_hf`` reads it from the checkpoint.
            tensors: a state dict of the whole model, a ``safetensors`` file, or a checkpoint's
                folder, of which only the gate's own tensors are read.
            layer: the number of the layer, or the whole name of its gate where a number is not
                enough (``"mtp.0.ffn.gate"``).
            device: as of the constructor.
            artifacts: as of the constructor.
            variants: as of the constructor.
            accept: as of the constructor.

        Raises:
            InputError: a tensor is missing or has another shape, or converting it to bf16 (the
                weight) or fp32 (the biases) would round a value. The error names the tensor.

        """
        sizes = {
            name: getattr(config, name)
            for name in ("hidden_size", "num_experts", "top_k", "vocab_size")
        }
        found = gate_tensors(config.mode, sizes, tensors, layer)
        return cls(
            config, **found, device=device, artifacts=artifacts, variants=variants, accept=accept
        )

    # --- calls ---

    def forward(
        self, tensor: Tensor, token_ids: Tensor | None = None, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor]:
        """The weights and the ids of the experts of each token.

        Args:
            tensor: hidden states bf16 ``[tokens, hidden_size]``; in mode ``hash`` token ids, int32
                or int64 ``[tokens]``.
            token_ids: int32 or int64 ``[tokens]``, in mode ``hash_gate`` only.
            **inputs: see the class.

        Returns:
            ``(weights fp32 [tokens, top_k], ids int32 or int64 [tokens, top_k])``, in rank order
            (in the table's order in the hash modes).

        Raises:
            InputError: a dtype, a shape or a device does not fit, or the hidden states require
                grad in grad mode.
            DriverError: the launch failed.

        """
        if is_compiling():
            rows = self._rows(tensor, token_ids)
            return self._traced("", "by_buffer", rows, inputs)  # type: ignore[no-any-return]
        try:
            if token_ids is None and not inputs:
                return self.backend.route(tensor)
            rows = self._rows(tensor, token_ids)
            if peek_interpreter_stack() is not None:
                return self._traced("", "by_buffer", rows, inputs)  # type: ignore[no-any-return]
            if inputs:
                return self.serve(tensor, _call(inputs, token_ids=token_ids))[:2]
            return self.backend.route(*rows)
        except Exception as error:
            ours = isinstance(error, RouterRuntimeError) and not isinstance(error, NoMemory)
            if not ours and _through_an_op():
                rows = self._rows(tensor, token_ids)
                return self._traced("", "by_buffer", rows, inputs)  # type: ignore[no-any-return]
            explain_failure(error, Router.forward, (self, tensor, token_ids), inputs)
            raise

    @explains_arguments
    def forward_with_logits(
        self, tensor: Tensor, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward`` of a dense router, and the logits that it routed by.

        The logits are fp32 ``[tokens, num_experts]``, a NaN stored as 0x7fffffff (step 1). Those of
        padding tokens are computed too. Weights and ids are those of ``forward``, bit for bit.
        """
        self._require_dense("forward_with_logits")
        if _through_an_op():
            return self._traced("_logits", "by_buffer", (tensor,), inputs)  # type: ignore[no-any-return]
        if inputs:
            weights, ids, logits, *_ = self.serve(tensor, _call(inputs, logits=True))
            return weights, ids, typing.cast(Tensor, logits)
        return typing.cast(DenseBackend, self.backend).route_with_logits(tensor)

    @explains_arguments
    def forward_mapped(
        self, tensor: Tensor, token_ids: Tensor | None = None, **inputs: Unpack[Inputs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``, with physical ids by the expert map, and the logical ids:
        ``(weights, physical ids, logical ids)``.

        Raises InputError for a router without an expert map; see ``set_expert_map``.
        """
        rows = self._rows(tensor, token_ids)
        if _through_an_op():
            return self._traced("", "mapped_by_buffer", rows, inputs)  # type: ignore[no-any-return]
        call = _call(inputs, token_ids=token_ids, mapped=True)
        weights, ids, _, logical, _ = self.serve(tensor, call)
        return weights, ids, typing.cast(Tensor, logical)

    @explains_arguments
    def forward_packed(
        self,
        tensor: Tensor,
        token_ids: Tensor | None = None,
        *,
        mapped: bool = False,
        **inputs: Unpack[Inputs],
    ) -> Tensor:
        """As ``forward``, with id and weight in one word: int32 ``[tokens, top_k]``, or with the
        columns of shared experts.

        A word is ``(id << 16) | bits of bf16(weight)``: the lower 16 bits of the id, and the weight
        rounded to the nearest, ties to even. With ``mapped`` the ids are the physical ones.
        ``ids_dtype`` has no meaning here and is refused.
        """
        _check_mapped(mapped)
        if inputs.get("ids_dtype") is not None:
            raise wrong_value("ids_dtype of forward_packed", "none", inputs["ids_dtype"])
        rows = self._rows(tensor, token_ids)
        if _through_an_op():
            options = {**inputs, "mapped": True} if mapped else inputs
            return self._traced("", "packed_by_buffer", rows, options)  # type: ignore[no-any-return]
        call = _call(inputs, token_ids=token_ids, mapped=mapped, packed=True)
        return typing.cast(Tensor, self.serve(tensor, call).packed)

    @explains_arguments
    def replay(
        self, tensor: Tensor, given_ids: Tensor, **inputs: Unpack[ReplayInputs]
    ) -> tuple[Tensor, Tensor]:
        """The weights of given (logical) experts of a dense router, and those ids.

        ``given_ids`` is int32 or int64 ``[tokens, top_k]``; its order is kept. Given the ids of
        ``forward``, the weights are those of ``forward``, bit for bit. An id outside [0,
        num_experts) becomes the sentinel, with weight 0, and is left out of the sum.
        """
        self._require_dense("replay")
        if given_ids is None:
            raise wrong_value("given_ids of replay", "a torch.Tensor", None)
        if _through_an_op():
            return self._traced("_replay", "by_buffer", (tensor, given_ids), inputs)  # type: ignore[no-any-return]
        return self.serve(tensor, _call({**inputs, "given_ids": given_ids}))[:2]

    @explains_arguments
    def forward_out(
        self,
        tensor: Tensor,
        token_ids: Tensor | None = None,
        *,
        weights_out: Tensor,
        ids_out: Tensor,
        logits_out: Tensor | None = None,
        logical_ids_out: Tensor | None = None,
        mapped: bool = False,
        expert_load: Tensor | None = None,
        record_load: Tensor | None = None,
        captured_ids: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        """As the other methods, into the caller's own tensors, and record what was routed.

        Args:
            tensor: as of ``forward``.
            token_ids: as of ``forward``.
            weights_out: fp32 ``[tokens, top_k]``, or with the columns of shared experts; its rows
                may be apart.
            ids_out: int32 or int64, as ``weights_out``.
            logits_out: fp32 ``[tokens, num_experts]``, contiguous, for the logits of a dense
                router.
            logical_ids_out: int32 or int64 ``[tokens, top_k]``, contiguous, for a call with the
                expert map, whose other ids are the physical ones.
            mapped: whether the ids are physical ones; True with ``logical_ids_out``.
            expert_load: int32 ``[physical experts]``, contiguous: 1 is added for each expert of
                each token at its physical id (without the map: its id), but not for padding, nor
                for shared experts, nor for an id beyond its end.
            record_load: bool, one element: False leaves ``expert_load`` as it is. The kernel reads
                it, at each replay of a captured graph again.
            captured_ids: int16 or int32 ``[tokens or more, top_k]``, whose rows may be apart: its
                first rows become the logical ids, those before the expert map.
            **inputs: see the class; the dtype of the ids is that of the tensors.

        """
        _check_mapped(mapped)
        if logits_out is not None:
            self._require_dense("forward_out with logits_out")
        rows = self._rows(tensor, token_ids)
        records: Records = {
            "expert_load": expert_load,
            "record_load": record_load,
            "captured_ids": captured_ids,
        }
        if _through_an_op():
            what = "" if logits_out is None else "_logits"
            named = {
                "weights_out": weights_out,
                "ids_out": ids_out,
                "logits_out": logits_out,
                "logical_ids_out": logical_ids_out,
                **records,
            }
            given = {name: value for name, value in named.items() if value is not None}
            wanted = {"mapped": True} if mapped else {}
            self._traced(what, "out_by_buffer", rows, {**inputs, **given, **wanted})
            return
        outputs = Results(weights_out, ids_out, logits_out, logical_ids_out)
        call = _call({**inputs, **records}, token_ids=token_ids, mapped=mapped, outputs=outputs)
        self.serve(tensor, call)

    @explains_arguments
    def serve(self, tensor: Tensor, call: Call) -> Results:
        """A call as the custom ops make it: everything but the rows is in ``call``."""
        if call.mapped and self.expert_map is None:
            raise wrong_value("a mapped call", "a router with an expert map", "one without")
        return self.backend.serve(tensor, call, self.expert_map)

    def _rows(self, tensor: Tensor, token_ids: Tensor | None) -> tuple[Tensor, ...]:
        """What this router's mode routes by."""
        if (token_ids is not None) != (self.config.mode == "hash_gate"):
            raise wrong_token_ids(self.config.mode, token_ids is not None)
        return (tensor,) if token_ids is None else (tensor, token_ids)

    def _traced(
        self, what: str, form: str, rows: tuple[Tensor, ...], inputs: Mapping[str, Any]
    ) -> Any:
        """A call of the custom op of this router's mode, as ``torch.compile`` records it.

        It reads only what routers of one configuration have in common, and the buffer, which
        becomes an input of the graph: anything else would be compiled into it. An exported program
        gets all that a Router is built from, for a process that has none.
        """
        packets = {"dense": f"dense_router{what}", "hash": "hash_router", "hash_gate": "hash_gate"}
        packet = getattr(torch.ops.dsv4, packets[self.config.mode])
        numbers: tuple[int, ...] = (self.config.num_experts, self.config.top_k)
        if self.config.mode == "hash":
            numbers = numbers[1:]
        # The flag itself: torch 2.9 takes its function is_exporting() for True in any compilation.
        if torch.compiler._is_exporting_flag:
            op = getattr(packet, form.replace("by_buffer", "exported"))
            return op(*rows, *self.exported(), *numbers, **inputs)
        return getattr(packet, form)(*rows, self._key(), *numbers, **inputs)

    def exported(self) -> tuple[list[Tensor | None], str]:
        """What the custom ops of an exported program have in place of this router: the tensors in
        the order of ``EXPORTED``, and ``GateModule.described``.
        """
        expert_map = (None, None) if self.expert_map is None else self.expert_map[:2]
        tensors = [self.weight, self.bias, self.image_bias, self.table, *expert_map]
        return tensors, self.described

    def _key(self) -> Tensor:
        """The buffer by which the custom ops find this router."""
        return self.table if self.config.mode == "hash" else self.weight

    def _require_dense(self, what: str) -> None:
        if self.config.mode != "dense":
            raise wrong_value(what, "a dense router", f"mode {self.config.mode!r}")

    # --- the registry ---

    @property
    def router_id(self) -> int:
        """The id under which the custom ops know this router. Raises InputError if it is not
        registered.
        """
        router_id = ROUTERS.id_of(self)
        if router_id is None:
            raise InputError(
                explain(
                    "router_id",
                    expected="a registered router",
                    found="one that is not registered",
                    remedy="call register_router(router)",
                )
            )
        return router_id

    @property
    def is_registered(self) -> bool:
        """Whether ``register_router`` or the capture of a CUDA graph has registered this router."""
        return ROUTERS.id_of(self) is not None

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph has captured a launch of this router, and so holds addresses of its
        memory. ``unregister_router`` with ``force`` resets it.
        """
        return ROUTERS.is_captured(self)

    def watch_captures(self, captured: Callable[[], None]) -> None:
        """Call ``captured`` once, when the next CUDA graph captures a launch of this router. For
        the registry.
        """
        self.backend.watch_captures(captured)

    # --- what serves a batch, and warming it up ---

    def _log_what_serves(self, kernels: Kernels | None) -> None:
        """Log which kernels serve this router and by which evidence, once."""
        if not _log.isEnabledFor(logging.INFO):
            return
        if kernels is None:
            _log.info("%s: computed on the CPU by plain torch, without kernels", self)
            return
        tokens: dict[str, str] = {}
        for each in self.token_ranges:
            before = f"{tokens[each.entry.key]} and " if each.entry.key in tokens else ""
            tokens[each.entry.key] = f"{before}{each.low} to {each.high} tokens"
        named = self._selection.variants
        lines = [
            f"{key} ({status}{', named by the caller' if key.partition('/')[0] in named else ''})"
            f" for {tokens.get(key, 'other calls' if tokens else 'any number of tokens')}"
            for key, status in self.evidence.items()
        ]
        folders = ", ".join(map(str, kernels.evidence_folders))
        _log.info("%s: %s; evidence of %s", self, "; ".join(lines), folders)

    @property
    def token_ranges(self) -> tuple[TokenRange, ...]:
        """Which kernel serves how many tokens. Empty for mode ``hash`` and on a CPU."""
        return self.backend.token_ranges

    @property
    def evidence(self) -> Mapping[str, str]:
        """The key of each entry of the manifest that serves this router, and its evidence status:
        ``verified``, ``source-verified``, ``emulated`` or ``unproven``. Empty on a CPU.
        """
        return self.backend.evidence

    def warmup(self) -> None:
        """Call every kernel of this router once, with zeros, so that torch's allocator and the
        driver are warm; of a registered router by its custom op, so that torch's dispatcher is too.
        """
        backend = self.backend
        for tokens in [each.low for each in self.token_ranges] or [1]:
            rows = self._zeros(tokens)
            if self.is_registered:
                self._by_id(rows)
            else:
                backend.route(*rows)
        if self.config.mode == "dense":
            dense = typing.cast(DenseBackend, backend)
            known = {each.entry.key for each in self.token_ranges}
            for each in dense.logits_token_ranges:
                if each.entry.key not in known:
                    dense.route_with_logits(*self._zeros(each.low))
        if self.image_bias is not None:
            images = torch.ones(1, dtype=torch.bool, device=self.device)
            self.forward(*self._zeros(1), image_mask=images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _by_id(self, rows: list[Tensor]) -> None:
        config = self.config
        if config.mode == "hash":
            torch.ops.dsv4.hash_router.default(*rows, self.router_id, config.top_k)
            return
        packet = (
            torch.ops.dsv4.hash_gate if config.mode == "hash_gate" else torch.ops.dsv4.dense_router
        )
        packet.default(*rows, self.router_id, config.num_experts, config.top_k)

    def _zeros(self, tokens: int) -> list[Tensor]:
        """What this router's mode routes by, all zeros."""
        rows = []
        if "weight" in TENSORS[self.config.mode]:
            shape = (tokens, self.config.hidden_size)
            rows.append(torch.zeros(shape, dtype=torch.bfloat16, device=self.device))
        if "table" in TENSORS[self.config.mode]:
            rows.append(torch.zeros(tokens, dtype=torch.int64, device=self.device))
        return rows

    # --- as an nn.Module ---

    def extra_repr(self) -> str:
        """What ``repr`` says of a router: its configuration, device, id if it has one, and which
        entries serve as ``emulated``, if any does.
        """
        own = f", router_id={self.router_id}" if self.is_registered else ""
        emulated = [key for key, status in self.evidence.items() if status == "emulated"]
        own += f", emulated={emulated}" if emulated else ""
        return super().extra_repr() + own

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """An independent router with the same values, artifacts, variants, accepted status and
        expert map. It is not registered.
        """
        # A subclass may have a constructor of its own.
        copied = type(self).__new__(type(self))
        Router.__init__(
            copied,
            self.config,
            **self.weights.tensors,
            device=self.device,
            artifacts=self._artifacts,
            variants=self._selection.variants,
            accept=self._selection.accept,
        )
        memo[id(self)] = copied
        if self.expert_map is not None:
            expert_map, counts, start, step = self.expert_map
            copied.set_expert_map(expert_map, counts, replica_start=start, replica_step=step)
        # The rest is nn.Module's (hooks, the training flag) or the user's.
        built = vars(copied).keys() - vars(nn.Module()).keys()
        for name, value in vars(self).items():
            if name not in built | {"_buffers"}:
                vars(copied)[name] = copy.deepcopy(value, memo)
        for name, tensor in self._buffers.items():
            if name not in NAMES:
                copied._buffers[name] = copy.deepcopy(tensor, memo)
        sources = self.weights.sources()
        copied.weights.watch({name: copy.deepcopy(sources[name], memo) for name in sources})
        return copied


def _call(inputs: Mapping[str, Any], **wanted: Any) -> Call:
    """The call that these keyword arguments of a method mean. TypeError for one that none has."""
    if SERVING.issuperset(inputs):  # most calls
        return Call(**inputs, **wanted)
    rest = dict(inputs)
    call = Call.taking(rest, **wanted)
    if rest:
        raise TypeError(f"unexpected keyword arguments {sorted(rest)}")
    return call


def _check_mapped(mapped: object) -> None:
    """Raise InputError for what is no bool: None would count as False."""
    if not isinstance(mapped, bool):
        raise wrong_value("mapped", "True or False", mapped)


def _through_an_op() -> bool:
    """Whether a call is recorded by torch.compile or torch.export, or made inside a transformation
    of torch.func, whose tensors have no memory: then it has to be a call of a custom op.
    """
    return is_compiling() or peek_interpreter_stack() is not None


def _check_tensors(config: RouterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a router of that mode does not use, or that are missing."""
    mode = config.mode
    wanted = TENSORS[mode]
    if "image_bias" in tensors and "weight" not in wanted:
        raise wrong_value("image_bias", "a router with a weight", f"mode {mode!r}")
    named = [name for name in tensors if name != "image_bias"]
    if sorted(named) != sorted(wanted):
        raise wrong_value(f"tensors of a {mode} router", list(wanted), named)


#: Every router of this process.
ROUTERS: Registry[Router] = Registry()


@checks_arguments
def register_router(router: Router) -> int:
    """Make ``router`` known to the custom ops that take an id, and return its id.

    Ids are never reused. The registry keeps the router alive until ``unregister_router``.
    Registering a router again while it is registered returns the same id. Raises InputError for
    what is no Router.
    """
    return ROUTERS.register(router)


@checks_arguments
def get_router(router_id: int) -> Router:
    """The registered router of that id. Raises InputError if there is none."""
    return ROUTERS.get(router_id)


@checks_arguments
def unregister_router(router_id: int, *, force: bool = False) -> None:
    """Forget the router of that id. Its memory comes back once the caller drops it too.

    A captured CUDA graph that launches a router holds addresses of its memory, so a router that was
    captured stays registered (the capture registers it, if it was not) and is refused here.

    Args:
        router_id: what ``register_router`` returned.
        force: forget a captured router all the same: for when no such graph will be replayed again.

    Raises:
        InputError: no router has that id, or it was captured and ``force`` is False.

    """
    ROUTERS.unregister(router_id, force=force)


@checks_arguments
def warmup_router_compilation(router: Router) -> None:
    """Make ``router`` ready for serving and for graph capture: ``router.warmup()``.

    Nothing is compiled, ever: the name is kept for callers that know it.
    """
    router.warmup()
