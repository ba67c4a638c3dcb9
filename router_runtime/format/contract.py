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
        "ptr:i16": (8, 8),
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

#: No size here is larger: sizes of a manifest are added and handed to C without further checks.
_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Parameter:
    """One kernel parameter: its name in the launch, and its type, a key of ``PARAMETER_TYPES``."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class GridAxis:
    """The extent of the grid along one axis, in CTAs (never in clusters).

    Attributes:
        form: How the extent is computed. ``constant``: ``value``. ``ceil``:
            ``ceil(argument / divisor) * value``. ``ceil_capped_at_sms``: the same, at most the
            number of multiprocessors, rounded down to a multiple of the cluster's extent along this
            axis, at least one cluster.
        value: A multiple of the cluster's extent along this axis.
        argument: The name of an integer argument of the launch, such as ``tokens``; None for
            ``constant``.
        divisor: How many units of the argument one step of ``value`` covers, such as the tokens
            of a tile.

    """

    form: Literal["constant", "ceil", "ceil_capped_at_sms"]
    value: int = 1
    argument: str | None = None
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class TensorMap:
    """How the launcher encodes one ``tensormap`` parameter. Elements outside the tensor read as 0.

    Attributes:
        parameter: The name of the kernel parameter.
        argument: The name of the launch argument: a row-major matrix, shape [rows, columns].
        dtype: The type of an element.
        box: The tile that one TMA instruction copies, in elements: (columns, rows).
        swizzle: The swizzle of the tile in shared memory.

    """

    parameter: str
    argument: str
    dtype: Literal["bf16", "f32"]
    box: tuple[int, int]
    swizzle: Literal["none", "32B", "64B", "128B"]


@dataclass(frozen=True, slots=True)
class Repack:
    """The order in which a kernel reads a weight matrix, as data.

    The runtime builds the buffer of ``parameter`` once, when the weight is loaded or updated: it
    pads the matrix with zero rows, views it as ``shape``, permutes the axes and stores the result
    contiguously.

    Attributes:
        parameter: The name of the kernel parameter that points to the buffer.
        argument: The name of the row-major matrix, shape [experts, hidden].
        rows: How many rows the padded matrix has.
        shape: The view of the padded matrix: factors of its rows, then factors of its columns.
        order: The permutation of the axes of ``shape``, as ``torch.permute`` takes it.

    """

    parameter: str
    argument: str
    rows: int
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contract:
    """How a kernel is launched.

    Attributes:
        parameters: The kernel's parameters in their order.
        grid: The extents of the grid in CTAs: x, y, z.
        block: Threads per CTA: x, y, z; at most 1024 together.
        cluster: CTAs per cluster: x, y, z; at most 16 together. More than 8 need an opt-in, which
            the loader sets.
        dynamic_shared_memory: Bytes per CTA, beside the static part that the cubin states. More
            than 48 KiB need an opt-in, which the loader sets.
        programmatic_dependent_launch: Whether the launch may start before the launch in front of it
            has ended. The kernel then executes the dependency wait on every path.
        workspace_bytes: The size of the buffer behind the parameter ``workspace``. It is zeroed
            when it is made, every launch leaves its counters at zero, and launches that can overlap
            never share it.
        tensor_maps: One for each parameter of type ``tensormap``.
        repacks: The weight matrices that the kernel reads in an order of its own.
        limits: Quantity of a request (``tokens``, ``experts``, ``top_k``, ``row_length``) -> the
            inclusive range that the kernel serves.

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
        """The number of CTAs per cluster."""
        return self.cluster[0] * self.cluster[1] * self.cluster[2]

    @property
    def nonportable_cluster(self) -> bool:
        """Whether the cluster has more than 8 CTAs, which need an opt-in of the function."""
        return self.cluster_size > 8

    def parameter_layout(self, target: Target) -> tuple[tuple[int, int], ...]:
        """Return (offset, size) in bytes of each parameter in the device's parameter space.

        Compilers lay parameters out so for ``target``, cubins record it and the driver reports it.
        Only checks need it: a launch hands the driver one address per parameter. Raises FormatError
        for a target whose parameter space is unknown.
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
        raise FormatError(f"{where}: expected at most 1024 threads per block, found {threads}")
    if contract.cluster_size > 16:
        raise FormatError(
            f"{where}: expected at most 16 blocks per cluster, found {contract.cluster_size}"
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
