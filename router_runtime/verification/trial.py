"""A case with its inputs on the CPU and on a device, and what is expected of a kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from router_runtime.evidence.cases import Case
from router_runtime.verification.inputs import Inputs, digest
from router_runtime.verification.reference import Oracle


class Trial:
    """A case with its inputs, on the CPU and on a device, and its oracle.

    All kernels that compute the same can be examined with one trial: every part is computed on
    first use and then kept.
    """

    def __init__(self, case: Case, inputs: Inputs, device: str) -> None:
        self.case, self.inputs, self.device = case, inputs, device
        self.oracle = Oracle(case, inputs)

    @functools.cached_property
    def inputs_sha256(self) -> str:
        """Digest of the inputs."""
        return digest(self.inputs)

    @functools.cached_property
    def on_device(self) -> Inputs:
        """The inputs on the device. Kernels get copies of these."""
        return copied(self.inputs, self.device)

    def nbytes(self) -> int:
        """The memory of all tensors held so far, host and device, each storage counted once."""
        kept = [tensor.untyped_storage() for tensor in _tensors([vars(self), vars(self.oracle)])]
        return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def copied(inputs: Inputs, device: str) -> Inputs:
    """Copies on a device, strides and gaps included (``Tensor.to`` would close the gaps)."""
    copies: dict[str, Tensor | int | float] = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            storage = whole_storage(value).to(device, copy=True)
            copies[name] = storage.as_strided(value.shape, value.stride(), value.storage_offset())
    return copies


def whole_storage(tensor: Tensor) -> Tensor:
    """All elements of a tensor's storage, one-dimensional, the gaps of a strided one included."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, Case):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
