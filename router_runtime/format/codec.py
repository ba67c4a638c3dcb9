"""Strict JSON: parse without ambiguity, and convert between JSON and frozen dataclasses.

Every file of a release that the runtime reads (manifest, marker, provenance, evidence) goes through
this module. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from router_runtime.errors import FormatError

#: The integers that a file may hold: those of 64 bits.
_LEAST, _MOST = -(2**63), 2**63 - 1


def parse_json(data: bytes, what: str) -> Any:
    """Return ``data`` parsed as JSON in UTF-8.

    Raises FormatError, naming ``what``, for anything that two readers could understand differently
    (a key that appears twice, NaN, infinities, another encoding), and for nesting or numbers too
    large to read.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"expected {what} in JSON, found {error}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; for ``json.loads(object_pairs_hook=...)``.

    Raises FormatError if a key appears twice.
    """
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise FormatError(f"expected each key once, found {twice} more than once")
    return document


def _refuse_constant(name: str) -> Any:
    raise FormatError(f"expected finite numbers, found {name}")


def canonical_json(value: Any) -> bytes:
    """Return the one way in which the files of a release write ``value``, as ``encode`` takes it.

    Keys are sorted, separators are fixed, the text is ASCII and ends with a newline. Raises
    ValueError for a number that is not finite.
    """
    text = json.dumps(encode(value), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def encode(value: Any) -> Any:
    """Return a dataclass, a mapping or a tuple, and what they hold, as ``json.dumps`` takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Return ``kind`` built from parsed JSON.

    Raises FormatError, with ``where`` and the path to it, for the first value that does not fit
    exactly.
    """
    try:
        return _decoder(kind)(value)
    except _MisfitError as misfit:
        path = "".join(reversed(misfit.steps))
        raise FormatError(f"{where}{path}: {misfit}") from None


class _MisfitError(Exception):
    """A value that does not fit; ``steps`` lead to it, the innermost first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.steps: list[str] = []


_Decoder = Callable[[Any], Any]


@functools.cache
def _decoder(kind: Any) -> _Decoder:
    """Return the function that builds ``kind``. It is made once per type: type hints are slow to
    evaluate, and a serving process decodes every manifest and record before its first token.
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
    # Most values are text or integers: they are checked here, without a call.
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
