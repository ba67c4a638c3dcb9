"""Arguments of the wrong kind, in the form of our errors.

A public function says by its signature and its annotations what it takes. A call that does not fit
them, such as one with an unknown keyword or with a list for a tensor, ends in an InputError that
names the argument, and not in a TypeError or an AttributeError from inside the package.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from router_runtime.errors import InputError, RouterRuntimeError, explain

if importlib.util.find_spec("torch") is not None:
    import torch
    from torch.compiler import is_compiling

    def unreadable(value: object) -> str | None:
        """How a tensor stores its elements, if not one by one in memory as kernels read them."""
        if not isinstance(value, torch.Tensor):
            return None
        if value.is_nested:
            return "a nested one"
        if value.is_quantized:
            return f"a quantized one of {value.dtype}"
        return None if value.layout is torch.strided else f"one of layout {value.layout}"
else:

    def unreadable(value: object) -> str | None:
        """Nothing is a tensor where there is no torch."""
        return None

    def is_compiling() -> bool:
        """Nothing is traced where there is no torch."""
        return False


#: What the custom ops take as a number: an int of 64 bits with a sign, a float64.
_BEYOND_INT = 2**63
_MAX_FLOAT = int(sys.float_info.max)

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


def checks_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its arguments are checked before it runs: for what is called
    rarely, because the check takes some microseconds.
    """

    @functools.wraps(function)
    def checked(*arguments: P.args, **keywords: P.kwargs) -> R:
        refuse_wrong_arguments(function, arguments, keywords)
        return function(*arguments, **keywords)

    return checked


def explains_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its arguments are checked if it fails: for what is called often.

    An error that has another cause than the arguments is raised as it is.
    """

    @functools.wraps(function)
    def explained(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            explain_failure(error, function, arguments, keywords)
            raise

    return explained


def explains_construction(made: type[C]) -> type[C]:
    """``explains_arguments`` for the ``__init__`` that ``dataclass`` has made for a class."""
    made.__init__ = explains_arguments(made.__init__)  # type: ignore[method-assign]
    return made


def explain_failure(
    error: Exception,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    """Raise InputError if a call of ``function`` that failed with ``error`` had an argument of the
    wrong kind. Nothing is raised in place of an error of ours, nor while ``torch.compile`` traces
    the call, which would trace the check too.
    """
    if is_compiling() or isinstance(error, RouterRuntimeError):
        return
    try:
        refuse_wrong_arguments(function, arguments, keywords)
    except InputError as refusal:
        raise refusal from error


def refuse_wrong_arguments(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    """Raise InputError for a call that does not fit the signature and the annotations of
    ``function``. The items of a container are checked by what reads them.
    """
    function = inspect.unwrap(function)
    signature = _signature(function)
    called = _name(function, arguments)
    described = f"see help({_public_name(function, called)})"
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(
            explain(
                f"arguments of {called}",
                expected=_shown(signature),
                found=_misfit(error, keywords, signature),
                remedy=described,
            )
        ) from None
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].annotation
        if not _is(value, kind):
            raise InputError(
                explain(
                    f"{name} of {called}",
                    expected=_words(kind),
                    found=_shown_value(value),
                    remedy=f"correct the argument, or {described}",
                )
            )
        if stored := unreadable(value):
            raise InputError(
                explain(
                    f"{name} of {called}",
                    expected="a dense torch.Tensor",
                    found=stored,
                    remedy="convert it, as by its to_dense(), to_padded_tensor() or dequantize(), "
                    f"or {described}",
                )
            )


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function with annotations that are types, in which keyword arguments that
    a TypedDict describes are parameters of their own. ``Any`` where there is no annotation.
    """
    hints = typing.get_type_hints(function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints.get(parameter.name, Any)
        if typing.get_origin(kind) is typing.Unpack:
            parameters += [
                inspect.Parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=each)
                for name, each in typing.get_type_hints(typing.get_args(kind)[0]).items()
            ]
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            parameters.append(parameter.replace(annotation=Any))
        else:
            parameters.append(parameter.replace(annotation=kind))
    return inspect.Signature(parameters)


def _is(value: object, kind: Any) -> bool:
    """Whether ``value`` is of a kind that an annotation names."""
    if kind is Any or isinstance(kind, TypeVar):
        return True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, each) for each in typing.get_args(kind))
    if origin is Literal:  # of text, beside which an array compares by its items
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is None or kind is type(None):
        return value is None
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        # Compared as what it is: a large int is no float.
        return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MAX_FLOAT)
    if kind is int:
        return isinstance(value, int) and -_BEYOND_INT <= value < _BEYOND_INT
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    """A kind as an error names it: ``torch.Tensor or None``."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        *firsts, last = dict.fromkeys(map(_words, typing.get_args(kind)))
        return f"{', '.join(firsts)} or {last}" if firsts else last
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if kind is None or kind is type(None):
        return "None"
    return _type_name(origin or kind)


def _type_name(kind: type) -> str:
    """A type as a user writes it: ``torch.nn.Module``, ``int``, ``RouterConfig``."""
    place = kind.__module__.partition(".modules")[0]
    known = kind.__module__.partition(".")[0] in ("builtins", "collections", "os", __package__)
    return kind.__name__ if known else f"{place}.{kind.__name__}"


def _shown_value(value: object) -> str:
    """What an argument is, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, int) and not -_BEYOND_INT <= value < _BEYOND_INT:
        # Python writes no very long one in digits.
        return f"int of {value.bit_length()} bits, too large"
    shown = f" {value!r}" if isinstance(value, bool | int | float | str) else ""
    return f"{_type_name(type(value))}{shown[:60]}"


def _shown(signature: inspect.Signature) -> str:
    """The parameters that a caller passes, with their defaults."""
    own = [
        each.replace(annotation=each.empty)
        for name, each in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(inspect.Signature(own))


def _misfit(error: TypeError, keywords: Mapping[str, Any], signature: inspect.Signature) -> str:
    """Why a call does not fit a signature, with the keyword that the caller may have meant."""
    found = str(error).removeprefix("got ")
    if found.startswith("missing"):
        found = f"no {found.rpartition(': ')[2]}"
    for unknown in keywords.keys() - signature.parameters.keys():
        for near in difflib.get_close_matches(unknown, signature.parameters, n=1):
            found += f" (did you mean {near}?)"
    return found


def _name(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """``Router.forward``; of a constructor ``Router``. Of a method, the class is the one that the
    package exports.
    """
    of, dot, name = function.__qualname__.rpartition(".")
    for each in type(arguments[0]).__mro__ if dot and arguments else ():
        if hasattr(sys.modules[__package__], each.__name__):
            of = each.__name__
    return f"{of}{dot}{name}".removesuffix(".__init__")


def _public_name(function: Callable[..., Any], name: str) -> str:
    """Where a user finds a function: ``router_runtime.Router.forward``."""
    exported = hasattr(sys.modules[__package__], name.partition(".")[0])
    return f"{__package__ if exported else function.__module__}.{name}"
