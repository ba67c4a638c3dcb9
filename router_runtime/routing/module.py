"""The tensors of a gate as an ``nn.Module``: buffers that keep their addresses, their device and
their dtypes, into which new values are written in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from router_runtime.arguments import checks_arguments, explain_failure
from router_runtime.checkpoint.tensors import TENSORS
from router_runtime.errors import InputError, explain
from router_runtime.format.scoring import SQRT_SOFTPLUS
from router_runtime.routing.checks import wrong_value
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.expert_map import ExpertMap, checked_expert_map
from router_runtime.routing.placement import quiet
from router_runtime.routing.weights import NAMES, Weights, checked_values


class _Buffers(dict[str, Tensor | None]):
    """The buffers of a gate. Its weights are told of a tensor that torch puts in another's place
    past ``nn.Module``, as ``torch.func.functional_call`` does for the time of a call: refused here,
    it would leave the rest of a model with tensors that are not its own.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        super().__setitem__(name, tensor)
        # While torch.compile traces, an op is called with the tensor, and refuses it.
        if name in NAMES and not is_compiling():
            self._weights.replaced(name, tensor)


class GateModule(nn.Module):
    """The tensors of a gate, of which kernels and captured graphs hold the addresses.

    Attributes:
        config: what the router computes.
        device: where the tensors are.
        weights: the tensors, and the copies in the orders in which kernels read them.
        expert_map: the map of ``set_expert_map`` as the kernels read it, or None. Read only.
        described: the configuration, and the order in which rows take the copies of an expert, as
            JSON for exported programs. Read only.

    """

    weight: Tensor
    bias: Tensor
    image_bias: Tensor | None
    table: Tensor

    def __init__(self, config: RouterConfig, device: torch.device, image_bias: bool) -> None:
        """Allocate the tensors that a gate of that mode has; they have no values yet."""
        super().__init__()
        self._compiled_call_impl = None  # nn.Module's; found sooner here than in its class
        self.config = config
        self.device = device
        self.expert_map: ExpertMap | None = None
        self.described = self._describe()
        self.weights = Weights(config, device, image_bias)
        self._buffers = _Buffers(self.weights)
        for name in NAMES:
            self.register_buffer(name, self.weights.tensors.get(name))

    # --- calls ---

    def __call__(self, *arguments: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        """``forward``, with the same arguments, and the hooks around it.

        nn.Module's own takes 0.7 us to find out that there are none. Hooks of the backward pass
        have nothing to do here: no result requires grad.
        """
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or self._compiled_call_impl is not None
        ):
            return super().__call__(*arguments, **inputs)  # type: ignore[no-any-return]
        try:
            return self.forward(*arguments, **inputs)  # type: ignore[no-any-return]
        except TypeError as error:
            if "forward" not in vars(self):
                explain_failure(error, type(self).forward, (self, *arguments), inputs)
            raise

    # --- values in place ---

    @checks_arguments
    def set_expert_map(
        self,
        expert_map: Tensor,
        replica_counts: Tensor,
        *,
        replica_start: int = 0,
        replica_step: int = 1,
    ) -> None:
        """Give every logical expert its physical ids.

        A token in row i of its batch gets, of the n physical ids of an expert, the one in place
        ``((replica_start + i * replica_step) modulo 2^32) modulo n``: without these two, i modulo
        n; with 0 and 2654435769, the rule of vLLM; with the number of the rank and 23333, that of
        DeepGEMM and TileKernels. The first call fixes these two and the number of replicas, which
        captured graphs keep; from then on this is ``update_expert_map``. The map is no part of
        ``state_dict``.

        Args:
            expert_map: int32 or int64 ``[num_experts, replicas]``: the physical ids of an expert in
                its row. What follows the first ``replica_counts[e]`` of row e is never used, and
                may have any value, such as -1.
            replica_counts: int32 or int64 ``[num_experts]``, from 1 to ``replicas``.
            replica_start: from 0 to 2^32 - 1.
            replica_step: from 0 to 2^32 - 1.

        Raises:
            InputError: a shape, a dtype or a value does not fit; a graph capture is in progress.

        """
        checked = checked_expert_map(
            expert_map, replica_counts, self.config.num_experts, replica_start, replica_step
        )
        if self.expert_map is not None:
            if self.expert_map[2:] != checked[2:]:
                given = {"replica_start": replica_start, "replica_step": replica_step}
                expected = "those of the first call, {} and {}".format(*self.expert_map[2:])
                raise wrong_value("replica_start and replica_step", expected, given)
            self._update_map(self.expert_map, checked)
            return
        with quiet(self.device, "set_expert_map"):
            physical, counts = (
                torch.zeros(tensor.shape, dtype=torch.int32, device=self.device)
                for tensor in checked[:2]
            )
            stored = ExpertMap(physical, counts, *checked[2:])
            _copy_map(stored, checked)
        self.expert_map = stored
        self.described = self._describe()

    def _describe(self) -> str:
        order = {}
        if self.expert_map is not None:
            order = {
                "replica_start": self.expert_map.start,
                "replica_step": self.expert_map.step,
            }
        return json.dumps({"config": dataclasses.asdict(self.config), "replica_order": order})

    @checks_arguments
    def update_expert_map(self, expert_map: Tensor, replica_counts: Tensor) -> None:
        """Replace the expert map in place: captured graphs stay valid and use the new one.

        The shape stays, and the order in which rows take the copies. Everything is checked before
        anything is written; ordered with launches as ``update_weights`` is. Raises InputError as
        ``set_expert_map`` does, and if there is no map.
        """
        stored = self.expert_map
        if stored is None:
            raise wrong_value("update_expert_map", "a router with an expert map", "one without")
        experts = self.config.num_experts
        checked = checked_expert_map(expert_map, replica_counts, experts, *stored[2:])
        self._update_map(stored, checked)

    def _update_map(self, stored: ExpertMap, checked: ExpertMap) -> None:
        if checked.physical.shape != stored.physical.shape:
            raise wrong_value("expert_map", list(stored.physical.shape), list(checked[0].shape))
        with quiet(self.device, "update_expert_map"):
            _copy_map(stored, checked)

    @checks_arguments
    def update_weights(
        self,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        image_bias: Tensor | None = None,
    ) -> None:
        """Replace the weight, the biases or all of them, in place: addresses stay, captured graphs
        stay valid.

        All are checked before any is written. Launches made before the call, on any stream, use
        the old values; launches and graph replays made after it, on any stream, use the new ones.
        The host waits for both: an event could order neither a replay on another stream nor a
        kernel that reads the weights before its dependency wait (programmatic dependent launch).
        Not to be called while another thread launches this router.

        Args:
            weight: as of the constructor.
            bias: as of the constructor.
            image_bias: as of the constructor, of a router that was built with one.

        Raises:
            InputError: as the constructor does; a graph capture is in progress.

        """
        mode = self.config.mode
        if mode == "hash":
            raise wrong_value("update_weights", "a router with a weight", "mode 'hash'")
        if bias is not None and "bias" not in TENSORS[mode]:
            raise wrong_value("bias", "a dense router", f"mode {mode!r}")
        given = {"weight": weight, "bias": bias, "image_bias": image_bias}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        if not tensors:
            raise wrong_value("update_weights", "a weight, a bias or both", "neither")
        if image_bias is not None and self.image_bias is None:
            raise wrong_value("image_bias", "a router built with one", "one without")
        self._update("update_weights", checked_values(self.config, tensors), tensors)

    def _update(
        self, what: str, checked: Mapping[str, Tensor], given: Mapping[str, Tensor]
    ) -> None:
        """Write checked values, of which ``given`` are the tensors that the caller has."""
        with quiet(self.device, what):
            self.weights.write(checked)
        self.weights.watch(given)

    # --- what nn.Module's methods do ---

    def extra_repr(self) -> str:
        """What ``repr`` says of a gate: its configuration and its device."""
        config = self.config
        words = [
            config.mode,
            f"hidden_size={config.hidden_size}",
            f"num_experts={config.num_experts}",
            f"top_k={config.top_k}",
        ]
        if config.mode != "hash":
            words.append(f"routed_scaling_factor={config.routed_scaling_factor}")
        if config.vocab_size is not None:
            words.append(f"vocab_size={config.vocab_size}")
        if config.scoring != SQRT_SOFTPLUS:
            words.append(f"scoring={config.scoring}")
        if config.gate_temperature != 1:
            words.append(f"gate_temperature={config.gate_temperature}")
        if not config.renormalize:
            words.append("renormalize=False")
        words.append(f"device={str(self.device)!r}")
        return ", ".join(words)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another tensor in place of a buffer: kernels would go on reading the old one."""
        if name in NAMES and name in self.__dict__.get("_buffers", ()):
            raise InputError(
                explain(
                    f"assignment to {name} of a Router",
                    expected="new values for the tensor that it has",
                    found=f"another {type(value).__name__}",
                    remedy=f"call router.update_weights({name}=...) or router.load_state_dict(...)",
                )
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to delete a buffer, which kernels go on reading."""
        if name in NAMES:
            raise wrong_value(f"deletion of {name}", "a Router with all its tensors", name)
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """nn.Module's, which would put another tensor in place of a buffer of that name."""
        if name in NAMES and name in self._buffers:
            setattr(self, name, tensor)
        super().register_buffer(name, tensor, persistent)

    @contextlib.contextmanager
    def _without_gate(self) -> Iterator[None]:
        """Leave this module only the tensors and the hooks that are not the gate's own, such as
        those of a subclass, for a block that runs nn.Module's code on them.
        """
        buffers, hooks = self._buffers, self._load_state_dict_pre_hooks
        rest = {name: tensor for name, tensor in buffers.items() if name not in NAMES}
        self._buffers, self._load_state_dict_pre_hooks = rest, OrderedDict()
        try:
            yield
        finally:
            buffers.update(rest)
            self._buffers, self._load_state_dict_pre_hooks = buffers, hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``cuda``, ``cpu``, ``half`` and the like call on every module of a model:
        nothing to the gate's tensors where no device and no dtype would change, else an InputError.
        Tensors and modules that a user added are converted.
        """
        for name, tensor in self.weights.tensors.items():
            # Tried on another tensor of the same kind, so that nothing is copied or changed.
            probe = tensor.new_empty((1,) * tensor.dim())
            kind, after = _kind(probe), fn(probe)
            if _kind(after) != kind:
                raise self._fixed(name, tensor, after)
        with self._without_gate():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _fixed(self, name: str, tensor: Tensor, after: Tensor) -> InputError:
        """The error for a change of a buffer into something like ``after``."""
        if after.dtype != tensor.dtype:
            remedy = (
                "convert the other modules one by one, or the model before Routers are put into "
                "it: a Router routes in these dtypes only"
            )
        elif after.device.type not in ("cpu", "cuda"):
            remedy = (
                "leave Routers where they are, and convert the other modules one by one: a Router "
                "has its values on 'cpu' or a CUDA device only"
            )
        elif after.device != tensor.device:
            remedy = "build it anew there: Router(router.config, **router.state_dict(), device=...)"
        else:
            remedy = "send the config and state_dict(), and build a Router in the other process"
        changed = (after.dtype, after.device) != (tensor.dtype, tensor.device)
        memory = "" if changed else " in shared memory"
        return InputError(
            explain(
                f"{name} of a Router",
                expected=f"{tensor.dtype} on {tensor.device} for as long as it lives",
                found=f"a change to {after.dtype} on {after.device}{memory}",
                remedy=remedy,
            )
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What ``load_state_dict`` calls on every module: all values are checked, then written in
        place and repacked, so that captured graphs stay valid and use them.

        A value that does not fit is reported as torch reports one, and then nothing of this router
        is written. With ``assign=True`` too the values are copied. Tensors that a user added are
        loaded as those of any module.
        """
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                *(state_dict, prefix, local_metadata, strict),
                *(missing_keys, unexpected_keys, error_msgs),
            )
        own = self.weights.tensors
        given = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        rest = {key: value for key, value in state_dict.items() if key[len(prefix) :] not in own}
        with self._without_gate():
            super()._load_from_state_dict(
                *(rest, prefix, local_metadata, strict),
                *(missing_keys, unexpected_keys, error_msgs),
            )
        if strict:
            missing_keys += [prefix + name for name in own if name not in given]
        checked: dict[str, Tensor] = {}
        errors = []
        for name in own:
            if name in given:
                try:
                    checked |= checked_values(self.config, {name: given[name]})
                except InputError as error:
                    errors.append(f"{prefix}{error}")
        error_msgs += errors
        if checked and not errors:
            self._update("load_state_dict", checked, {name: given[name] for name in checked})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling and shallow copies: a router holds loaded kernels and addresses."""
        raise InputError(
            explain(
                "pickling of a Router, or a shallow copy",
                expected="its values alone, by state_dict(): it holds kernels and addresses",
                found="an attempt to save it whole, to send it to another process, or copy.copy",
                remedy="send the config and state_dict(), and build it there: "
                "Router(config, **tensors, device=...); "
                "save a model by torch.save(model.state_dict(), path)",
            )
        )


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What ``Router._apply`` refuses to change."""
    shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return tensor.dtype, tensor.device, shared


def _copy_map(stored: ExpertMap, checked: ExpertMap) -> None:
    stored.physical.copy_(checked.physical)
    stored.counts.copy_(checked.counts)
