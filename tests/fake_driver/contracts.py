"""Contracts of synthetic kernels, with the parameters that the real kernels have."""

from __future__ import annotations

import dataclasses

from router_runtime.format.contract import Contract, GridAxis, Parameter, Repack, TensorMap

#: The last parameters of every routing kernel.
SERVED = (
    " serving=i32 sentinel=i32 first_row=i32 replicas=i32 is_padding=ptr:u8 "
    "num_valid_tokens=ptr:i32 image_mask=ptr:u8 image_bias=ptr:f32 expert_map=ptr:i32 "
    "replica_counts=ptr:i32 given_ids_i32=ptr:i32 given_ids_i64=ptr:i64 ids_out_i64=ptr:i64 "
    "logical_ids_out=ptr:i32 logical_ids_out_i64=ptr:i64 replica_start=i32 replica_step=i32 "
    "given_mask=ptr:u8 weights_stride=i32 ids_stride=i32 packed_out=ptr:i32 expert_load=ptr:i32 "
    "load_experts=i32 record_load=ptr:u8 captured_ids_i16=ptr:i16 captured_ids_i32=ptr:i32 "
    "captured_stride=i32 shared_experts=i32 shared_id=i32 shared_weight=f32"
)

ONE = GridAxis("constant")


def parameters(text: str) -> tuple[Parameter, ...]:
    """The parameters that ``name=type`` pairs, separated by spaces, describe."""
    return tuple(Parameter(*item.split("=")) for item in text.split())


def hash_contract() -> Contract:
    """The contract of hash_router."""
    scoring = ("image_mask", "image_bias", "given_ids_i32", "given_ids_i64", "given_mask")
    return Contract(
        parameters=tuple(
            parameter
            for parameter in parameters(
                "token_ids_i32=ptr:i32 token_ids_i64=ptr:i64 table=ptr:i32 weights_out=ptr:f32 "
                "ids_out=ptr:i32 tokens=i32 vocab=i32 top_k=i32" + SERVED
            )
            if parameter.name not in scoring
        ),
        grid=(GridAxis("ceil", argument="tokens", divisor=128), GridAxis("constant"), ONE),
        block=(128, 1, 1),
        limits={"top_k": (1, 32)},
    )


#: What a dense kernel has beside, to look experts up in a table.
LOOKUP = " token_ids_i32=ptr:i32 token_ids_i64=ptr:i64 table=ptr:i32 vocab=i32"


def gate_contract(hidden: int = 128, experts: int = 24) -> Contract:
    """The contract of hash_gate, which reads the weight by columns."""
    return Contract(
        parameters=parameters(
            "hidden_states=ptr:bf16 token_ids_i32=ptr:i32 token_ids_i64=ptr:i64 "
            "packed_weight=ptr:bf16 table=ptr:i32 row_stride=i64 vocab=i32 weights_out=ptr:f32 "
            "ids_out=ptr:i32 tokens=i32 scale=f32 renormalize=i32" + SERVED
        ),
        grid=(GridAxis("ceil", argument="tokens"), ONE, ONE),
        block=(64, 1, 1),
        programmatic_dependent_launch=True,
        repacks=(Repack("packed_weight", "weight", experts, (experts, hidden), (1, 0)),),
        limits={"tokens": (1, 2**31 - 1)},
    )


def select_contract(longest: int) -> Contract:
    """The contract of a topk_select that takes rows of up to ``longest`` scores."""
    return Contract(
        parameters=parameters(
            "scores=ptr:f32 values_out=ptr:f32 ids_out=ptr:i32 rows=i32 row_length=i32 "
            "row_stride=i64 top_k=i32"
        ),
        grid=(GridAxis("ceil", argument="rows", divisor=4), ONE, ONE),
        block=(128, 1, 1),
        limits={"row_length": (1, longest), "top_k": (1, 32)},
    )


def indices_contract(blocks_per_row: int = 1, most: int = 2048) -> Contract:
    """The contract of a topk_indices of fp32 scores with that many CTAs for a row."""
    return Contract(
        parameters=parameters(
            "scores=ptr:f32 row_starts=ptr:i32 row_ends=ptr:i32 page_table=ptr:i32 "
            "requests=ptr:i32 offsets=ptr:i32 values_out=ptr:f32 ids_out=ptr:i32 "
            "slots_out=ptr:i32 rows=i32 row_length=i32 row_stride=i64 top_k=i32 page_rows=i32 "
            "page_columns=i32 page_stride=i64 page_size=i32 sorted=i32 nan_first=i32"
        ),
        grid=(GridAxis("ceil", blocks_per_row, "rows"), ONE, ONE),
        block=(512, 1, 1),
        cluster=(blocks_per_row, 1, 1),
        programmatic_dependent_launch=True,
        limits={"rows": (1, 2**26), "row_length": (1, 2**21), "top_k": (1, most)},
    )


def activation_contract(capacity: int) -> Contract:
    """The contract of an activation_topk that takes up to ``capacity`` experts."""
    return Contract(
        parameters=parameters(
            "logits=ptr:f32 bias=ptr:f32 weights_out=ptr:f32 ids_out=ptr:i32 tokens=i32 "
            "experts=i32 row_stride=i64 top_k=i32 scale=f32 renormalize=i32" + SERVED
        ),
        grid=(GridAxis("ceil_capped_at_sms", argument="tokens", divisor=4), ONE, ONE),
        block=(128, 1, 1),
        programmatic_dependent_launch=True,
        limits={"experts": (1, capacity), "top_k": (1, 32)},
    )


def dense_contract(
    hidden: int,
    experts: int,
    *,
    workspace: int = 0,
    tokens: tuple[int, int] = (1, 8),
    logits: bool = True,
) -> Contract:
    """The contract of a dense router that reads its rows by address.

    Args:
        hidden: Elements per hidden state.
        experts: Rows of the weight; the repack pads them to a multiple of 16.
        workspace: Bytes of the workspace.
        tokens: The smallest and largest batch.
        logits: Whether it can store logits.

    """
    padded = -(-experts // 16) * 16
    return Contract(
        parameters=parameters(
            "hidden_states=ptr:bf16 packed_weight=ptr:bf16 bias=ptr:f32 weights_out=ptr:f32 "
            + "logits_out=ptr:f32 " * logits
            + "ids_out=ptr:i32 workspace=ptr:u32 tokens=i32 row_stride=i64 scale=f32 "
            "renormalize=i32" + SERVED + LOOKUP
        ),
        grid=(GridAxis("constant", 16), ONE, ONE),
        block=(256, 1, 1),
        cluster=(16, 1, 1),
        dynamic_shared_memory=100 * 1024,
        programmatic_dependent_launch=True,
        workspace_bytes=workspace,
        repacks=(Repack("packed_weight", "weight", padded, (padded // 16, 16, hidden), (0, 2, 1)),),
        limits={"tokens": tokens},
    )


def prefill_contract(hidden: int, experts: int, tokens: tuple[int, int] = (1, 32)) -> Contract:
    """The contract of a dense router that reads its rows through a tensor map, and that cannot
    store logits.
    """
    return dataclasses.replace(
        dense_contract(hidden, experts, tokens=tokens),
        parameters=parameters(
            "hidden_states=tensormap packed_weight=ptr:bf16 bias=ptr:f32 weights_out=ptr:f32 "
            "ids_out=ptr:i32 tokens=i32 scale=f32 renormalize=i32" + SERVED + LOOKUP
        ),
        grid=(GridAxis("ceil", 2, "tokens", 16), ONE, ONE),
        cluster=(2, 1, 1),
        tensor_maps=(TensorMap("hidden_states", "hidden_states", "bf16", (64, 8), "128B"),),
    )
