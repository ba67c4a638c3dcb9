"""The artifact format: what the builder writes and the runtime reads.

The runtime owns this module and the builder imports it, so the format has one definition. It is
plain standard-library Python: importing it needs neither torch nor a driver.

A manifest is strict. An unknown key, a missing key, a value of the wrong type or another format
version is refused with the JSON path of the offender; a file name that could leave the artifacts
folder is refused too. Serialisation is canonical (sorted keys, fixed separators, entries in
``Entry.key`` order, no times, no paths, no host names), so equal manifests are equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

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

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TARGET = re.compile(r"sm_([1-9][0-9]*)([0-9])([af]?)")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.cubin")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_SYMBOL = re.compile(r"[!-~]+")

#: The integers that a file may hold.
_LEAST, _MOST = -(2**63), 2**63 - 1

#: Nothing here is larger: what a manifest says is added and handed to C without further checks.
_LIMIT = 2**31


class ManifestError(ValueError):
    """A manifest, a contract or a file name that the format does not allow."""


@dataclass(frozen=True, slots=True)
class Target:
    """A compilation target such as ``sm_90a``.

    ``a`` loads on exactly its own compute capability, ``f`` on its own and later minors of the same
    family, no suffix on its own and later minors of the same major version.
    """

    major: int
    minor: int
    suffix: Literal["", "a", "f"]

    @classmethod
    def parse(cls, text: str) -> Target:
        match = _TARGET.fullmatch(text)
        if match is None:
            raise ManifestError(
                f"expected a target such as sm_90a, sm_100a or sm_100f, found {text!r}"
            )
        return cls(int(match[1]), int(match[2]), typing.cast(Literal["", "a", "f"], match[3]))

    def __str__(self) -> str:
        return f"sm_{self.major}{self.minor}{self.suffix}"

    def runs_on(self, major: int, minor: int) -> bool:
        """True if a cubin for this target loads on a device of compute capability major.minor."""
        if self.suffix == "a":
            return (major, minor) == (self.major, self.minor)
        return major == self.major and minor >= self.minor


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
            raise ManifestError(
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


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cubin says it uses. Spills and local memory are in bytes per thread, shared memory
    in bytes per block (static part only; the dynamic part is the contract's)."""

    registers: int
    spill_stores: int
    spill_loads: int
    local_memory: int
    static_shared_memory: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One cubin. ``model`` is None where the kernel does not depend on a model; ``numerics`` is
    None where the kernel accumulates nothing over the hidden dimension. ``latency`` holds what one
    call was measured to take, as (tokens, microseconds) with ascending tokens: it chooses among
    variants that may all serve, and is empty where nothing was measured."""

    kernel: str
    model: str | None
    target: str
    variant: str
    constants: Mapping[str, int | float]
    file: str
    sha256: str
    size: int
    symbol: str
    contract: Contract
    source_sha256: str
    numerics: str | None
    resources: Resources
    latency: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> str:
        """The entry's name: ``kernel/model/target/variant``, with ``any`` for no model."""
        return f"{self.kernel}/{self.model or 'any'}/{self.target}/{self.variant}"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiled the cubins: package -> version, language -> compiler flags."""

    packages: Mapping[str, str]
    flags: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Manifest:
    source_sha256: str
    toolchain: Toolchain
    entries: tuple[Entry, ...]
    format_version: int = FORMAT_VERSION


def artifact_name(kernel: str, model: str | None, target: str, variant: str, sha256: str) -> str:
    """The content-addressed file name of a cubin."""
    return f"{kernel}-{model or 'any'}-{target}-{variant}-{sha256[:16]}.cubin"


def dumps(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest. Raises ManifestError if it breaks a rule of the format."""
    validate(manifest)
    ordered = dataclasses.replace(
        manifest, entries=tuple(sorted(manifest.entries, key=lambda entry: entry.key))
    )
    text = json.dumps(encode(ordered), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def loads(data: bytes) -> Manifest:
    """Parse manifest bytes. Raises ManifestError naming the JSON path, the expected and the
    found."""
    try:
        document = parse_json(data, "a manifest")
    except ManifestError as error:
        raise ManifestError(f"{error}; run: make build-cubins") from error
    if not isinstance(document, dict):
        raise ManifestError(
            f"expected a JSON object, found {type(document).__name__}; run: make build-cubins"
        )
    found = document.get("format_version")
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise ManifestError(
            f"expected manifest format version {FORMAT_VERSION}, found {found!r}; "
            "use the router_runtime that was released with these artifacts, "
            "or run: make build-cubins"
        )
    manifest: Manifest = decode(Manifest, document, "manifest")
    validate(manifest)
    return manifest


def validate(manifest: Manifest) -> None:
    """Check every rule of the format that the types alone do not express."""
    if manifest.format_version != FORMAT_VERSION:
        raise ManifestError(
            f"expected format version {FORMAT_VERSION}, found {manifest.format_version}"
        )
    _match(_SHA256, manifest.source_sha256, "source_sha256", "64 lower-case hex digits")
    seen: set[str] = set()
    for entry in manifest.entries:
        where = f"entry {entry.key}"
        for field, name in (("kernel", entry.kernel), ("variant", entry.variant)):
            _match(_NAME, name, f"{where}: {field}", "a plain name")
        if entry.model is not None:
            _match(_NAME, entry.model, f"{where}: model", "a plain name")
        Target.parse(entry.target)
        _match(_SHA256, entry.sha256, f"{where}: sha256", "64 lower-case hex digits")
        _match(_SHA256, entry.source_sha256, f"{where}: source_sha256", "64 lower-case hex digits")
        _match(_FILE, entry.file, f"{where}: file", "a plain .cubin file name inside the folder")
        # Swapped entries, or a file under another's name, show here already.
        named = artifact_name(entry.kernel, entry.model, entry.target, entry.variant, entry.sha256)
        if entry.file != named:
            raise ManifestError(f"{where}: expected the file {named}, found {entry.file}")
        _match(_SYMBOL, entry.symbol, f"{where}: symbol", "printable ASCII")
        if not 0 < entry.size < _LIMIT:
            raise ManifestError(f"{where}: expected a positive size, found {entry.size}")
        if entry.key in seen:
            raise ManifestError(f"{where}: expected one entry of this name, found two")
        seen.add(entry.key)
        counts = [tokens for tokens, _ in entry.latency]
        if sorted({0, *counts}) != [0, *counts] or not all(
            0 < microseconds < float("inf") for _, microseconds in entry.latency
        ):
            raise ManifestError(
                f"{where}: latency: expected ascending token counts and positive microseconds, "
                f"found {entry.latency}"
            )
        validate_contract(entry.contract, where)


def validate_contract(contract: Contract, where: str) -> None:
    """Check that a contract is consistent in itself. ``where`` starts every message."""
    names = [parameter.name for parameter in contract.parameters]
    if len(set(names)) != len(names):
        raise ManifestError(f"{where}: expected distinct parameter names, found {names}")
    for parameter in contract.parameters:
        if parameter.type not in PARAMETER_TYPES:
            raise ManifestError(
                f"{where}: parameter {parameter.name}: expected a type of "
                f"{sorted(PARAMETER_TYPES)}, found {parameter.type!r}"
            )
    for label, extents in (("block", contract.block), ("cluster", contract.cluster)):
        if min(extents) < 1:
            raise ManifestError(f"{where}: expected positive {label} extents, found {extents}")
    threads = contract.block[0] * contract.block[1] * contract.block[2]
    if threads > 1024:
        raise ManifestError(f"{where}: expected at most 1024 threads a block, found {threads}")
    if contract.cluster_size > 16:
        raise ManifestError(
            f"{where}: expected at most 16 blocks a cluster, found {contract.cluster_size}"
        )
    if not 0 <= contract.dynamic_shared_memory < _LIMIT:
        raise ManifestError(f"{where}: expected dynamic shared memory >= 0 bytes")
    if not 0 <= contract.workspace_bytes < _LIMIT or (
        contract.workspace_bytes and "workspace" not in names
    ):
        raise ManifestError(
            f"{where}: expected a parameter 'workspace' for {contract.workspace_bytes} bytes"
        )
    for axis, extent in zip(contract.grid, contract.cluster, strict=True):
        if axis.form not in ("constant", "ceil", "ceil_capped_at_sms"):
            raise ManifestError(f"{where}: unknown grid form {axis.form!r}")
        if not 1 <= axis.value < _LIMIT or not 1 <= axis.divisor < _LIMIT:
            raise ManifestError(f"{where}: expected grid value and divisor >= 1, found {axis}")
        if (axis.argument is None) != (axis.form == "constant"):
            raise ManifestError(
                f"{where}: grid form {axis.form!r} with argument {axis.argument!r}: "
                "'constant' takes none, the others need one"
            )
        if axis.value % extent:
            raise ManifestError(
                f"{where}: expected grid value {axis.value} to be a multiple of the "
                f"cluster extent {extent}"
            )
    mapped = [recipe.parameter for recipe in contract.tensor_maps]
    declared = [p.name for p in contract.parameters if p.type == "tensormap"]
    if sorted(mapped) != sorted(declared):
        raise ManifestError(
            f"{where}: expected one recipe for each tensormap parameter {declared}, found {mapped}"
        )
    for repack in contract.repacks:
        if repack.parameter not in names:
            raise ManifestError(
                f"{where}: repack of {repack.parameter!r}: expected a parameter of {names}"
            )
        if (
            sorted(repack.order) != list(range(len(repack.shape)))
            or min(repack.shape, default=0) < 1
        ):
            raise ManifestError(
                f"{where}: repack of {repack.parameter}: expected order to permute the axes of a "
                f"positive shape, found shape {repack.shape}, order {repack.order}"
            )
    for quantity, (low, high) in contract.limits.items():
        if low > high:
            raise ManifestError(f"{where}: limits of {quantity}: {low} is above {high}")


def source_digest(files: Mapping[str, bytes], *facts: str) -> str:
    """SHA-256 over named file contents and further facts, with every length made explicit."""
    digest = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    for fact in facts:
        data = fact.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _match(pattern: re.Pattern[str], text: str, where: str, expected: str) -> None:
    if pattern.fullmatch(text) is None:
        raise ManifestError(f"{where}: expected {expected}, found {text!r}")


def parse_json(data: bytes, what: str) -> Any:
    """``data`` as JSON in UTF-8. Raises ManifestError, naming ``what``, for anything that two
    readers could understand differently: a key that appears twice, NaN, infinities, another
    encoding; and for nesting or numbers too large to read.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=_refuse_constant,
        )
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"expected {what} in JSON, found {error}") from error


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``: the object, refused if a key appears twice."""
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ManifestError(f"expected each key once, found {twice} more than once")
    return document


def _refuse_constant(name: str) -> Any:
    raise ManifestError(f"expected finite numbers, found {name}")


def encode(value: Any) -> Any:
    """A frozen dataclass as what ``json.dumps`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Build ``kind`` from parsed JSON, refusing whatever does not fit exactly."""
    try:
        return _decoder(kind)(value)
    except _MisfitError as misfit:
        path = "".join(reversed(misfit.steps))
        raise ManifestError(f"{where}{path}: {misfit}") from None


class _MisfitError(Exception):
    """A value that does not fit; ``steps`` lead to it, the innermost first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.steps: list[str] = []


_Decoder = Callable[[Any], Any]


@functools.cache
def _decoder(kind: Any) -> _Decoder:
    """The function that builds ``kind``. Made once a type: type hints are slow to evaluate, and a
    serving process pays for every manifest and record before its first token.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_decoder(typing.cast(type, kind))
    if origin is Literal:
        return functools.partial(_decode_literal, arguments)
    if origin is Mapping:
        return functools.partial(_decode_mapping, arguments[1] is float, _decoder(arguments[1]))
    if origin is tuple:
        repeated = arguments[-1] is Ellipsis
        decoders = [_decoder(item) for item in arguments if item is not Ellipsis]
        return functools.partial(_decode_tuple, decoders, repeated)
    options = arguments if origin in (types.UnionType, typing.Union) else (kind,)
    return functools.partial(_decode_scalar, frozenset(options), _name_of(kind))


def _dataclass_decoder(kind: type) -> _Decoder:
    hints = typing.get_type_hints(kind)
    decoders = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(kind)}
    # Most values are text or integers: they are looked at here, without a call.
    steps = [
        (name, hints[name] is str, hints[name] is int, decoder)
        for name, decoder in decoders.items()
    ]

    def decode_object(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _wrong_type("an object", value)
        if value.keys() != decoders.keys():
            raise _MisfitError(
                f"expected exactly the keys {sorted(decoders)}; unknown "
                f"{sorted(value.keys() - decoders.keys())}, "
                f"missing {sorted(decoders.keys() - value.keys())}"
            )
        fields = {}
        name = ""
        try:
            for name, is_text, is_integer, decoder in steps:
                item = value[name]
                if (is_text and type(item) is str) or (
                    is_integer and type(item) is int and _LEAST <= item <= _MOST
                ):
                    fields[name] = item
                else:
                    fields[name] = decoder(item)
        except _MisfitError as misfit:
            misfit.steps.append(f".{name}")
            raise
        return kind(**fields)

    return decode_object


def _decode_literal(options: tuple[Any, ...], value: Any) -> Any:
    if value not in options:
        raise _MisfitError(f"expected one of {list(options)}, found {value!r}")
    return value


def _decode_mapping(of_floats: bool, decoder: _Decoder, value: Any) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type("an object", value)
    items = {}
    key = ""
    try:
        for key, item in value.items():
            finite = of_floats and type(item) is float and -math.inf < item < math.inf
            items[key] = item if finite else decoder(item)
    except _MisfitError as misfit:
        misfit.steps.append(f".{key}")
        raise
    return types.MappingProxyType(items)


def _decode_tuple(decoders: list[_Decoder], repeated: bool, value: Any) -> Any:
    if not isinstance(value, list):
        raise _wrong_type("a list", value)
    if repeated:
        decoders = decoders * len(value)
    if len(decoders) != len(value):
        raise _MisfitError(f"expected {len(decoders)} items, found {len(value)}")
    items: list[Any] = []
    try:
        for decoder, item in zip(decoders, value, strict=True):
            items.append(decoder(item))
    except _MisfitError as misfit:
        misfit.steps.append(f"[{len(items)}]")
        raise
    return tuple(items)


def _decode_scalar(options: frozenset[type], name: str, value: Any) -> Any:
    kind = type(value)  # exactly: True is no number here
    if kind not in options:
        raise _wrong_type(name, value)
    if kind is float and not math.isfinite(value):
        raise _MisfitError(f"expected a finite number, found {value!r}")
    if kind is int and not _LEAST <= value <= _MOST:
        raise _MisfitError(f"expected an integer of 64 bits, found one of {value.bit_length()}")
    return value


def _name_of(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _wrong_type(expected: str, value: Any) -> _MisfitError:
    return _MisfitError(f"expected {expected}, found {type(value).__name__} {_short(value)}")


def _short(value: Any) -> str:
    """A value from a file that may be anything, at a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
