"""How a kernel is launched: parameters, grid, tensor maps, repacked weights, and their validation.

A kernel's ``contract.py`` states its contract. The builder checks it against the cubin and writes
it into the manifest; the loader checks it against the loaded function. Standard library only.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from router_runtime.errors import FormatError
from router_runtime.format.target import Target

#: The compile-time constants of a cubin, by name. A string is a plain name such as ``wgmma``.
Constants = Mapping[str, int | float | str]

#: Parameter type -> (size in bytes, alignment in bytes) in the kernel's parameter space.
PARAMETER_TYPES: Mapping[str, tuple[int, int]] = types.MappingProxyType(
    {
        "ptr:bf16": (8, 8),
        "ptr:f32": (8, 8),
        "ptr:i32": (8, 8),
        "ptr:i64": (8, 8),
        "ptr:u8": (8, 8),
        "ptr:u32": (8, 8),
        "ptr:u64": (8, 8),
        "i32": (4, 4),
        "i64": (8, 8),
        "f32": (4, 4),
        "tensormap": (128, 64),
    }
)

#: Major compute capability -> where a kernel's parameters start in its constant bank. A parameter's
#: alignment is that of its address there, not of its offset from the start: 0x210 is a multiple of
#: 16 only, so a leading ``tensormap`` is at offset 0x30 for sm_90a, and at 0 for sm_100a.
_PARAMETER_SPACE: Mapping[int, int] = types.MappingProxyType({9: 0x210, 10: 0x380})

#: Nothing here is larger: what a manifest says is added and handed to C without further checks.
_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Parameter:
    """One kernel parameter. ``type`` is a key of ``PARAMETER_TYPES``."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class GridAxis:
    """One axis of the grid, in blocks (never in clusters).

    ``constant``            ``value``
    ``ceil``                ``ceil(argument / divisor) * value``
    ``ceil_capped_at_sms``  ``min(ceil(argument / divisor) * value, multiprocessors)``, rounded down
    to
                            a multiple of the cluster's extent on this axis, at least one cluster

    ``argument`` names an integer argument of the launch, such as ``tokens``.
    """

    form: Literal["constant", "ceil", "ceil_capped_at_sms"]
    value: int = 1
    argument: str | None = None
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class TensorMap:
    """How the launcher encodes one ``tensormap`` parameter.

    ``argument`` names the row-major 2-D tensor that the map describes (outer, inner); ``box`` is
    the tile in elements, innermost first; elements outside the tensor read as zero.
    """

    parameter: str
    argument: str
    dtype: Literal["bf16", "f32"]
    box: tuple[int, int]
    swizzle: Literal["none", "32B", "64B", "128B"]


@dataclass(frozen=True, slots=True)
class Repack:
    """The order in which a kernel reads a weight matrix, as data.

    The runtime builds the buffer of ``parameter`` from the row-major matrix ``argument`` once, when
    the weight is loaded or updated: pad it with zero rows to ``rows``, view it as ``shape``,
    permute the axes to ``order``, store contiguously. ``shape`` splits rows first, then columns.
    """

    parameter: str
    argument: str
    rows: int
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contract:
    """How a kernel is launched. Declared beside the kernel, checked by the builder against the
    cubin and by the loader against the loaded function.

    ``dynamic_shared_memory`` is in bytes. ``workspace_bytes`` is the size of the buffer behind the
    parameter ``workspace``: zeroed once when it is made, left zeroed where it matters by every
    launch, never shared by launches that can overlap. ``limits`` gives, for a named quantity of a
    request (``tokens``, ``experts``, ``top_k``, ``row_length``), the inclusive range that the
    kernel serves.
    """

    parameters: tuple[Parameter, ...]
    grid: tuple[GridAxis, GridAxis, GridAxis]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_shared_memory: int = 0
    programmatic_dependent_launch: bool = False
    workspace_bytes: int = 0
    tensor_maps: tuple[TensorMap, ...] = ()
    repacks: tuple[Repack, ...] = ()
    limits: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        return self.cluster[0] * self.cluster[1] * self.cluster[2]

    @property
    def nonportable_cluster(self) -> bool:
        """Clusters of more than 8 blocks need an opt-in attribute on the function."""
        return self.cluster_size > 8

    def parameter_layout(self, target: Target) -> tuple[tuple[int, int], ...]:
        """(offset, size) in bytes of each parameter on the device, as the compilers lay them out
        for ``target``, cubins record them and the driver reports them. It concerns who checks, not
        who launches: a launch gives the driver one address a parameter.
        """
        if target.major not in _PARAMETER_SPACE:
            raise FormatError(
                f"expected a target of major version {sorted(_PARAMETER_SPACE)}, found {target}"
            )
        start = end = _PARAMETER_SPACE[target.major]
        layout: list[tuple[int, int]] = []
        for parameter in self.parameters:
            size, alignment = PARAMETER_TYPES[parameter.type]
            address = -(-end // alignment) * alignment
            layout.append((address - start, size))
            end = address + size
        return tuple(layout)


def validate_contract(contract: Contract, where: str) -> None:
    """Check that a contract is consistent in itself. ``where`` starts every message."""
    names = [parameter.name for parameter in contract.parameters]
    if len(set(names)) != len(names):
        raise FormatError(f"{where}: expected distinct parameter names, found {names}")
    for parameter in contract.parameters:
        if parameter.type not in PARAMETER_TYPES:
            raise FormatError(
                f"{where}: parameter {parameter.name}: expected a type of "
                f"{sorted(PARAMETER_TYPES)}, found {parameter.type!r}"
            )
    for label, extents in (("block", contract.block), ("cluster", contract.cluster)):
        if min(extents) < 1:
            raise FormatError(f"{where}: expected positive {label} extents, found {extents}")
    threads = contract.block[0] * contract.block[1] * contract.block[2]
    if threads > 1024:
        raise FormatError(f"{where}: expected at most 1024 threads a block, found {threads}")
    if contract.cluster_size > 16:
        raise FormatError(
            f"{where}: expected at most 16 blocks a cluster, found {contract.cluster_size}"
        )
    if not 0 <= contract.dynamic_shared_memory < _LIMIT:
        raise FormatError(f"{where}: expected dynamic shared memory >= 0 bytes")
    if not 0 <= contract.workspace_bytes < _LIMIT or (
        contract.workspace_bytes and "workspace" not in names
    ):
        raise FormatError(
            f"{where}: expected a parameter 'workspace' for {contract.workspace_bytes} bytes"
        )
    for axis, extent in zip(contract.grid, contract.cluster, strict=True):
        if axis.form not in ("constant", "ceil", "ceil_capped_at_sms"):
            raise FormatError(f"{where}: unknown grid form {axis.form!r}")
        if not 1 <= axis.value < _LIMIT or not 1 <= axis.divisor < _LIMIT:
            raise FormatError(f"{where}: expected grid value and divisor >= 1, found {axis}")
        if (axis.argument is None) != (axis.form == "constant"):
            raise FormatError(
                f"{where}: grid form {axis.form!r} with argument {axis.argument!r}: "
                "'constant' takes none, the others need one"
            )
        if axis.value % extent:
            raise FormatError(
                f"{where}: expected grid value {axis.value} to be a multiple of the "
                f"cluster extent {extent}"
            )
    mapped = [recipe.parameter for recipe in contract.tensor_maps]
    declared = [p.name for p in contract.parameters if p.type == "tensormap"]
    if sorted(mapped) != sorted(declared):
        raise FormatError(
            f"{where}: expected one recipe for each tensormap parameter {declared}, found {mapped}"
        )
    for repack in contract.repacks:
        if repack.parameter not in names:
            raise FormatError(
                f"{where}: repack of {repack.parameter!r}: expected a parameter of {names}"
            )
        if (
            sorted(repack.order) != list(range(len(repack.shape)))
            or min(repack.shape, default=0) < 1
        ):
            raise FormatError(
                f"{where}: repack of {repack.parameter}: expected order to permute the axes of a "
                f"positive shape, found shape {repack.shape}, order {repack.order}"
            )
    for quantity, (low, high) in contract.limits.items():
        if low > high:
            raise FormatError(f"{where}: limits of {quantity}: {low} is above {high}")
