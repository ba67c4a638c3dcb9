"""The parameters that end every routing kernel's list: results, and what serving adds to a call.

Stated once, as the fields of ``Routing``. The contract of a CUDA C++ kernel takes ``ROUTING`` from
it, that of a dense kernel ``DENSE_ROUTING``: all of it. A dense kernel takes the tuple itself as
one argument, which the DSL flattens into these parameters in this order.

``serving`` says how much of the list a launch uses. With 0, a plain call, nothing below it is read.
With ``SERVED`` the serving inputs are, with ``WITH_OPTIONS`` the options too. Of what is read, a
null pointer is an input or an output that the call does not have, and of two pointers that differ
in the width of their integers at most one is not null.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, NamedTuple

from router_runtime.format.contract import Parameter

#: Values of ``serving``: with serving inputs, and with the options of ``Routing`` beside them.
SERVED = 1
WITH_OPTIONS = 2

F32 = Annotated[Any, "f32"]
I32 = Annotated[Any, "i32"]
F32Pointer = Annotated[Any, "ptr:f32"]
I16Pointer = Annotated[Any, "ptr:i16"]
I32Pointer = Annotated[Any, "ptr:i32"]
I64Pointer = Annotated[Any, "ptr:i64"]
U8Pointer = Annotated[Any, "ptr:u8"]


class Routing(NamedTuple):
    """Row t of the launch is row ``first_row + t`` of the batch.

    ``is_padding``, ``image_mask``: a byte a token, 0 for no. ``num_valid_tokens``: one integer; the
    rows of the batch from it on are padding. ``image_bias``: what image tokens are selected by.
    ``expert_map`` ``[experts, replicas]`` and ``replica_counts`` ``[experts]``: the physical ids of
    an expert, of which row i of the batch takes the one in place ``(replica_start + i *
    replica_step)``, computed in 32 bits without sign, modulo their number. ``given_ids``
    ``[tokens, top_k]``: the experts to weigh instead of selecting, for all tokens or, with
    ``given_mask``, a byte a token, for those that it marks.

    The options, read with ``WITH_OPTIONS`` only:

    - ``weights_stride``, ``ids_stride``: elements from a row of these outputs to the next.
    - ``packed_out``, with rows as ``ids_out``: id and weight in one word, in place of both outputs.
    - ``expert_load`` ``[load_experts]``: 1 is added for each expert of a token to the element of
      its physical id, unless the byte ``record_load`` is 0.
    - ``captured_ids``, rows ``captured_stride`` elements apart: a copy of the logical ids.
    - ``shared_experts``, at most ``top_k``: so many experts follow the others in each row. The
      first one has the id ``shared_id``, the next the one after it; ``shared_weight`` is the weight
      of each.

    The look-up of a dense kernel is a serving input. With ``table`` ``[vocab, top_k]``, the experts
    of a token are those in the row that its element of ``token_ids`` names, and none if that is
    outside [0, ``vocab``). Given experts take their place, and image tokens select their own.
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
    replica_start: I32
    replica_step: I32
    given_mask: U8Pointer
    weights_stride: I32
    ids_stride: I32
    packed_out: I32Pointer
    expert_load: I32Pointer
    load_experts: I32
    record_load: U8Pointer
    captured_ids_i16: I16Pointer
    captured_ids_i32: I32Pointer
    captured_stride: I32
    shared_experts: I32
    shared_id: I32
    shared_weight: F32
    token_ids_i32: I32Pointer
    token_ids_i64: I64Pointer
    table: I32Pointer
    vocab: I32


#: The parameters of the look-up.
LOOKUP = ("token_ids_i32", "token_ids_i64", "table", "vocab")

DENSE_ROUTING = tuple(
    Parameter(name, hint.__metadata__[0])
    for name, hint in typing.get_type_hints(Routing, include_extras=True).items()
)
ROUTING = tuple(parameter for parameter in DENSE_ROUTING if parameter.name not in LOOKUP)
