"""The custom ops inside the transformations of ``torch.func``.

``vmap`` calls an op once for each slice. Differentiation, forward or reverse, of a tensor that an
op is called with is refused: there is no derivative, and torch would take it for zero. An op that
is called with other tensors is left alone.

Each op has one implementation for the dispatch key that torch sets inside these transformations
only, so that nothing of this costs other calls any time. It is called once for each transformation
that the call is in, from the innermost outwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, _unwrap_for_grad
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from router_runtime.errors import InputError, explain
from router_runtime.routing.checks import refuse_grad

#: The dispatch key of calls inside a transformation.
KEY = "FuncTorchDynamicLayerFrontMode"

#: A call of an op whose tensors are not wrapped by the innermost transformation.
_Call = Callable[..., Any]


def transformed(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The implementation of ``op`` for calls inside a transformation."""
    names = [argument.name for argument in op._schema.arguments]

    def call(*arguments: Any, **keywords: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | keywords
        positional = len(arguments)

        def again(values: dict[str, Any]) -> Any:
            in_order = list(values.values())
            rest = dict(zip(list(values)[positional:], in_order[positional:], strict=True))
            return op(*in_order[:positional], **rest)

        interpreter = retrieve_current_functorch_interpreter()
        rule = {
            TransformType.Grad: _differentiated,
            TransformType.Jvp: _differentiated,
            TransformType.Vmap: _by_slices,
            TransformType.Functionalize: _functionalized,
        }[interpreter.key()]
        if rule is not _differentiated and op._schema.is_mutable:
            raise InputError(
                explain(
                    f"{op} inside torch.func.{interpreter.key().name.lower()}",
                    expected="a form of the op that returns its results",
                    found="the one that writes into the caller's tensors",
                    remedy="call the form without out, or call this one outside",
                )
            )
        return rule(interpreter, given, again)

    return call


def _differentiated(interpreter: Any, given: dict[str, Any], again: _Call) -> Any:
    """Results that are constants to ``grad`` or ``jvp``."""
    level, plain = interpreter.level(), dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor):
            refuse_grad(name, value)
            plain[name] = _unwrap_for_grad(value, level)
    with interpreter.lower():
        return again(plain)


def _by_slices(interpreter: Any, given: dict[str, Any], again: _Call) -> Any:
    """The results of a call for each slice, stacked. Without any, a call with zeros says
    which sizes and dtypes the empty results have.
    """
    level, slices = interpreter.level(), []
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    for name, value in given.items():
        place = None
        if isinstance(value, Tensor):
            value, place = _unwrap_batched(value, level)
        values[name] = value
        if place is not None:
            places[name] = place
    with interpreter.lower():
        if not places:
            return again(values)
        count = interpreter.batch_size()
        if not count:
            zeros = {name: _slice_of_zeros(values[name], place) for name, place in places.items()}
            results = again({**values, **zeros})
            stacked = [each.new_empty((0, *each.shape)) for each in _as_tuple(results)]
        else:
            for number in range(count):
                cut = {name: values[name].select(place, number) for name, place in places.items()}
                slices.append(again({**values, **cut}))
            results = slices[0]
            stacked = [torch.stack(each) for each in zip(*map(_as_tuple, slices), strict=True)]
    batches = tuple(_add_batch_dim(each, 0, level) for each in stacked)
    return batches[0] if isinstance(results, Tensor) else batches


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    """What an op returns, also where it is one tensor."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _slice_of_zeros(tensor: Tensor, place: int) -> Tensor:
    """Zeros in the shape of a slice of ``tensor``."""
    shape = list(tensor.shape)
    del shape[place]
    return tensor.new_zeros(shape)


def _functionalized(interpreter: Any, given: dict[str, Any], again: _Call) -> Any:
    """The results of an op that writes nothing: it is functional as it is."""
    # Imported here, because it takes long, and warns where there is no NumPy.
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    api = FunctorchFunctionalizeAPI(interpreter)
    plain = api.unwrap_tensors(tuple(given.values()))
    with interpreter.lower():
        results = again(dict(zip(given, plain, strict=True)))
    return api.wrap_tensors(results)
