"""The parameters that end every dense kernel's list: results, and what serving adds to a call.

Stated once, as the fields of ``Routing``: a contract takes ``ROUTING`` from it, a kernel takes the
tuple itself as one argument, which the DSL flattens into these parameters in this order.

With ``serving`` 0 nothing below it is read. Otherwise a null pointer is an input that the call does
not have, and of two pointers that differ in the width of their integers at most one is not null.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, NamedTuple

from router_runtime.format.contract import Parameter

F32 = Annotated[Any, "f32"]
I32 = Annotated[Any, "i32"]
F32Pointer = Annotated[Any, "ptr:f32"]
I32Pointer = Annotated[Any, "ptr:i32"]
I64Pointer = Annotated[Any, "ptr:i64"]
U8Pointer = Annotated[Any, "ptr:u8"]


class Routing(NamedTuple):
    """Row t of the launch is row ``first_row + t`` of the batch.

    ``is_padding``, ``image_mask``: a byte a token, 0 for no. ``num_valid_tokens``: one integer; the
    rows of the batch from it on are padding. ``image_bias``: what image tokens are selected by.
    ``expert_map`` ``[experts, replicas]`` and ``replica_counts`` ``[experts]``: the physical ids of
    an expert. ``given_ids`` ``[tokens, top_k]``: the experts to weigh instead of selecting.
    """

    weights_out: F32Pointer
    ids_out: I32Pointer
    tokens: I32
    scale: F32
    renormalize: I32
    serving: I32
    sentinel: I32
    first_row: I32
    replicas: I32
    is_padding: U8Pointer
    num_valid_tokens: I32Pointer
    image_mask: U8Pointer
    image_bias: F32Pointer
    expert_map: I32Pointer
    replica_counts: I32Pointer
    given_ids_i32: I32Pointer
    given_ids_i64: I64Pointer
    ids_out_i64: I64Pointer
    logical_ids_out: I32Pointer
    logical_ids_out_i64: I64Pointer


ROUTING = tuple(
    Parameter(name, hint.__metadata__[0])
    for name, hint in typing.get_type_hints(Routing, include_extras=True).items()
)
