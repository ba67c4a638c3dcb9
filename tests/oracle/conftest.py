"""The oracle as if it were a kernel, so that the suite itself can be tested without a GPU."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from router_runtime.format.scoring import scoring_constants

if importlib.util.find_spec("torch") is None:
    # The builder's environment: the oracle is written in torch.
    collect_ignore_glob = ["test_*.py"]
else:
    import torch


_MAY_HAVE = ("image_mask", "image_bias", "given_ids", "given_mask")


def oracle_outputs(case, inputs):
    """What a correct kernel writes for a case."""
    from router_runtime import spec

    given = SimpleNamespace(**inputs)
    rule = rule_of(case)
    if case.serving:
        return served_outputs(case, inputs)
    if case.kernel == "hash_router":
        return spec.hash_router(given.token_ids, given.table, given.top_k, given.sentinel)
    if case.kernel == "hash_gate":
        return spec.hash_gate(
            given.hidden_states,
            given.token_ids,
            given.weight,
            given.table,
            given.scale,
            bool(given.renormalize),
            given.sentinel,
            image_mask=inputs.get("image_mask"),
            image_bias=inputs.get("image_bias"),
            **rule,
        )
    if case.kernel == "topk_select":
        return spec.topk_select(given.scores, given.top_k)
    if case.kernel == "topk_indices":
        return indexer_outputs(inputs)
    if case.kernel == "activation_topk":
        return spec.activation_topk(
            given.logits, given.bias, given.top_k, given.scale, bool(given.renormalize), **rule
        )
    return spec.dense_router(
        given.hidden_states,
        given.weight,
        given.bias,
        case.sizes["top_k"],
        given.scale,
        bool(given.renormalize),
        k_chunk=128,
        **rule,
    )


def rule_of(case):
    """How a case scores, as keyword arguments of spec.py."""
    return {"scoring": case.scoring, "gate_temperature": case.gate_temperature}


def indexer_outputs(inputs):
    """``(values, slots, ids)`` of topk_indices."""
    from router_runtime import spec

    scores, starts = inputs["scores"], inputs.get("row_starts")
    ids = spec.topk_indices(
        scores,
        inputs["top_k"],
        starts,
        inputs.get("row_ends"),
        in_rank_order=bool(inputs["sorted"]),
        nan_first=bool(inputs["nan_first"]),
    )
    slots = spec.slots(
        ids,
        page_size=inputs.get("page_size", 1),
        **{name: inputs.get(name) for name in ("page_table", "requests", "offsets")},
    )
    return spec.scores_at(scores, ids, starts), slots, ids


def served_outputs(case, inputs):
    """The same for a case with serving inputs; the logical ids too where there is an expert map."""
    from router_runtime import spec
    from router_runtime.verification.inputs import ROW_INPUT

    given = SimpleNamespace(**inputs)
    rows = torch.arange(len(inputs[ROW_INPUT[case.kernel]]))
    padding = spec.padding_rows(rows, inputs.get("is_padding"), inputs.get("num_valid_tokens"))
    if case.kernel == "hash_router":
        values, ids = spec.hash_router(
            given.token_ids, given.table, given.top_k, spec.NO_EXPERT, padding
        )
    elif "table" in inputs:
        values, ids = spec.hash_gate(
            *(given.hidden_states, given.token_ids, given.weight, given.table, given.scale),
            bool(given.renormalize),
            spec.NO_EXPERT,
            padding=padding,
            **{name: inputs.get(name) for name in _MAY_HAVE},
            **rule_of(case),
        )
    else:
        logits = inputs.get("logits")
        if logits is None:
            logits = spec.dense_logits(given.hidden_states, given.weight, 128)
        values, ids = spec.activation_topk(
            logits,
            given.bias,
            case.sizes["top_k"],
            given.scale,
            bool(given.renormalize),
            padding=padding,
            **{name: inputs.get(name) for name in _MAY_HAVE},
            **rule_of(case),
        )
    if "expert_map" not in inputs:
        return values, spec.with_sentinel(ids, given.sentinel)
    maps = given.expert_map, given.replica_counts
    order = given.replica_start, given.replica_step
    physical = spec.physical_ids(ids, rows, *maps, given.sentinel, *order)
    return values, physical, spec.with_sentinel(ids, given.sentinel)


@pytest.fixture(scope="session")
def outputs():
    return oracle_outputs


#: (kernel, constants, limits) of small entries that together cover every kernel of the suite.
SUBJECTS = {
    "hash_router": ("hash_router", {}, {"top_k": (1, 32)}),
    "topk_select-short": ("topk_select", {}, {"row_length": (1, 1024), "top_k": (1, 32)}),
    "topk_select-long": ("topk_select", {}, {"row_length": (1025, 65536), "top_k": (1, 32)}),
    "topk_indices": (
        "topk_indices",
        {"SCORE_BYTES": 4, "SAMPLES": 512},
        {"rows": (1, 300), "row_length": (1, 5003), "top_k": (1, 512)},
    ),
    "topk_indices-bf16": (
        "topk_indices",
        {"SCORE_BYTES": 2, "SAMPLES": 512},
        {"rows": (1, 300), "row_length": (1, 1000), "top_k": (1, 2048)},
    ),
    "activation_topk-256": ("activation_topk", {}, {"experts": (1, 256), "top_k": (1, 32)}),
    "activation_topk-1024": ("activation_topk", {}, {"experts": (385, 1024), "top_k": (1, 32)}),
    "activation_topk-sigmoid": (
        "activation_topk",
        scoring_constants("sigmoid", 1.0),
        {"experts": (1, 384), "top_k": (1, 32)},
    ),
    "hash_gate": (
        "hash_gate",
        {"HIDDEN": 320, "EXPERTS": 40, "TOP_K": 6, "IMAGES": 1},
        {"tokens": (1, 2**31 - 1)},
    ),
    "hash_gate-temperature": (
        "hash_gate",
        {
            "HIDDEN": 192,
            "EXPERTS": 24,
            "TOP_K": 4,
            "IMAGES": 1,
            **scoring_constants("sigmoid", 0.7),
        },
        {"tokens": (1, 2**31 - 1)},
    ),
    "dense_router_decode-sigmoid": (
        "dense_router_decode",
        {"HIDDEN": 256, "EXPERTS": 48, "TOP_K": 8, **scoring_constants("sigmoid", 1.0)},
        {"tokens": (1, 64)},
    ),
    "dense_router_prefill-sigmoid-temperature": (
        "dense_router_prefill",
        {"HIDDEN": 192, "EXPERTS": 40, "TOP_K": 4, **scoring_constants("sigmoid", 1.7)},
        {"tokens": (1, 2**31 - 1)},
    ),
    "dense_router_decode-temperature": (
        "dense_router_decode",
        {"HIDDEN": 256, "EXPERTS": 48, "TOP_K": 6, **scoring_constants("sqrtsoftplus", 0.3)},
        {"tokens": (1, 64)},
    ),
    "dense_router_decode": (
        "dense_router_decode",
        {"HIDDEN": 256, "EXPERTS": 48, "TOP_K": 6},
        {"tokens": (1, 64)},
    ),
    "dense_router_prefill": (
        "dense_router_prefill",
        {"HIDDEN": 192, "EXPERTS": 40, "TOP_K": 4},
        {"tokens": (1, 2**31 - 1)},
    ),
}


@pytest.fixture(params=list(SUBJECTS.values()), ids=list(SUBJECTS))
def subject(request):
    return request.param
