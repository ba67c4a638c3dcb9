"""Launch a loaded kernel on the inputs of the oracle suite, by the names of its contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from router_runtime.device.launch import LoadedKernel
from router_runtime.errors import ArtifactError, explain
from router_runtime.format.manifest import Entry
from router_runtime.routing.call import LOOKUP, SERVED
from router_runtime.routing.expert_map import signed
from router_runtime.routing.options import OPTIONS, row_stride
from router_runtime.routing.weights import repacked
from router_runtime.verification.inputs import Inputs

#: The arguments of topk_indices in a case that has no input for them.
_INDEXER: dict[str, Any] = {
    **dict.fromkeys(("row_starts", "row_ends", "page_table", "requests", "offsets")),
    **dict.fromkeys(("page_rows", "page_columns", "page_stride", "sorted", "nan_first"), 0),
    "page_size": 1,
}

#: Inputs with one row per token, and the argument that takes their number of columns.
_COLUMNS = {"hidden_states": "hidden", "logits": "experts", "scores": "row_length"}


def stores_logits(entry: Entry) -> bool:
    """Whether the kernel can store logits."""
    return any(parameter.name == "logits_out" for parameter in entry.contract.parameters)


def largest_batch(entry: Entry) -> int:
    """The most rows of one launch."""
    limits = entry.contract.limits
    return limits.get("tokens", limits.get("rows", (1, 2**31 - 1)))[1]


class KernelRun:
    """A loaded kernel with its workspace, as ``examine.Run`` wants it.

    Its arguments come from the inputs through the kernel's contract, not through the ops, so that
    every entry of a manifest can be examined and not only those that the resolver would choose.
    """

    def __init__(self, kernel: LoadedKernel, device: str) -> None:
        self._kernel = kernel
        self._device = device
        # As the contract says: zeroed once, left zeroed where it matters by every launch.
        size = kernel.entry.contract.workspace_bytes
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._weight: object = None
        self._packed: dict[str, Tensor] = {}

    def __call__(self, inputs: Inputs, *outputs: Tensor, **more: Any) -> None:
        """Launch on torch's current stream.

        Args:
            inputs: Of one case, on the device.
            outputs: Values and ids ``[N, k]``, then the logits ``[N, E]`` if they are to be stored.
                With options their rows may be apart; without elements they are not stored.
            more: ``logical_ids`` ``[N, k]``, where the inputs have an expert map; ``slots``
                ``[N, k]`` of topk_indices; and options.

        Raises:
            ArtifactError: The contract has an argument that the suite has no value for.

        """
        values, ids, *rest = outputs
        arguments = self._input_arguments(inputs)
        arguments |= {"weights_out": values, "values_out": values}
        arguments["logits_out"] = rest[0] if rest else None
        for name, tensor in (
            ("ids_out", ids if ids.numel() else None),
            ("logical_ids_out", more.pop("logical_ids", None)),
            ("given_ids_i32", inputs.get("given_ids")),
        ):
            wide = isinstance(tensor, Tensor) and tensor.dtype is torch.int64
            arguments[name] = None if wide else tensor
            arguments[f"{name.removesuffix('_i32')}_i64"] = tensor if wide else None
        arguments["slots_out"] = more.pop("slots", None)
        absent = dict.fromkeys((*SERVED, *OPTIONS, *LOOKUP), 0) | _INDEXER
        arguments = absent | {"sentinel": -1, "image_bias": None} | arguments
        arguments["serving"] = int("wide_ids" in inputs)
        arguments |= {"tokens": ids.shape[0], "rows": ids.shape[0], "top_k": ids.shape[-1]}
        if more:
            arguments |= _option_arguments(values, ids, more)
        # An address: a contract may declare the workspace as a pointer to any type.
        arguments["workspace"] = self._workspace.data_ptr()
        unknown = sorted(set(self._kernel.arguments) - set(arguments))
        if unknown:
            raise ArtifactError(
                explain(
                    f"contract of {self._kernel.entry.key}",
                    expected="arguments that the oracle suite has a value for",
                    found=unknown,
                    remedy="give them a value in router_runtime/verification/kernel_run.py",
                )
            )
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel.launch(stream, **{name: arguments[name] for name in self._kernel.arguments})

    def _input_arguments(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments that follow from the inputs, under every name a contract may use."""
        arguments: dict[str, Any] = dict(inputs)
        if isinstance(token_ids := inputs.get("token_ids"), Tensor):
            wide = token_ids.dtype == torch.int64
            arguments["token_ids_i64"] = token_ids if wide else None
            arguments["token_ids_i32"] = None if wide else token_ids
        for name in ("is_padding", "image_mask", "given_mask"):
            if isinstance(mask := inputs.get(name), Tensor):
                arguments[name] = mask.view(torch.uint8)
        if isinstance(expert_map := inputs.get("expert_map"), Tensor):
            arguments["replicas"] = expert_map.shape[1]
            for name in ("replica_start", "replica_step"):
                arguments[name] = signed(int(inputs[name]))
        if isinstance(table := inputs.get("table"), Tensor):
            arguments["vocab"] = table.shape[0]
        if isinstance(pages := inputs.get("page_table"), Tensor):
            arguments["page_rows"], arguments["page_columns"] = pages.shape
            arguments["page_stride"] = pages.stride(0)
        for name, columns in _COLUMNS.items():
            if isinstance(rows := inputs.get(name), Tensor):
                arguments["row_stride"] = rows.stride(0)
                arguments[columns] = rows.shape[1]
        if isinstance(weight := inputs.get("weight"), Tensor):
            if weight is not self._weight:
                recipes = self._kernel.entry.contract.repacks
                self._packed = {recipe.parameter: repacked(recipe, weight) for recipe in recipes}
                self._weight = weight
            arguments |= self._packed
        return arguments


def _option_arguments(values: Tensor, ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch with options: those of ``option_checks.Run``, of which some have
    other names in a contract.
    """
    packed, captured = options.get("packed_out"), options.pop("captured_ids", None)
    stored = ids if packed is None else packed
    narrow = captured is not None and captured.dtype is torch.int16
    arguments = {
        "serving": 2,
        "tokens": len(stored),
        "top_k": stored.shape[1] - options["shared_experts"],
        "weights_out": values if packed is None else None,
        "weights_stride": row_stride(values),
        "ids_stride": row_stride(stored),
        "load_experts": len(options["expert_load"]),
        "captured_ids_i16": captured if narrow else None,
        "captured_ids_i32": None if narrow else captured,
        "captured_stride": 0 if captured is None else row_stride(captured),
    }
    if "record_load" in options:
        options["record_load"] = options["record_load"].view(torch.uint8)
    return {**options, **arguments}
