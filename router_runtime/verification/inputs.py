"""The input tensors of a case of the oracle suite, bit for bit the same everywhere.

Evidence stores digests of inputs, so every value comes from ``prng.Random``, whose arithmetic is
exact.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from router_runtime.evidence.cases import Case
from router_runtime.verification.prng import Random
from router_runtime.verification.score_rows import (
    NANS,
    floats,
    indexer_inputs,
    score_rows,
    strided,
)

#: The inputs of a kernel, under the names of its contract. ``weight`` is row-major; where a kernel
#: reads another order, ``kernel_run.py`` repacks it.
Inputs = Mapping[str, Tensor | int | float]

#: The input of each kernel that has one row per token; its length is the number of tokens.
ROW_INPUT: Mapping[str, str] = {
    "hash_router": "token_ids",
    "hash_gate": "hidden_states",
    "topk_select": "scores",
    "topk_indices": "scores",
    "activation_topk": "logits",
    "dense_router_decode": "hidden_states",
    "dense_router_prefill": "hidden_states",
}


def make_inputs(case: Case) -> Inputs:
    """The inputs of a case on the CPU."""
    inputs = _MAKERS[case.kernel](case, Random(case.seed))
    return {**inputs, **_serving(case, Random(~case.seed))} if case.serving else inputs


def digest(tensors: Mapping[str, Tensor | int | float]) -> str:
    """SHA-256 in hex over tensors and numbers: names, dtypes, shapes, strides and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, Tensor):
            rows = value.detach().cpu().contiguous()
            state.update(f"{name} {value.dtype} {tuple(value.shape)} {value.stride()}\n".encode())
            state.update(ctypes.string_at(rows.data_ptr(), rows.nbytes) if rows.nbytes else b"")
        else:
            state.update(f"{name} {value!r}\n".encode())
    return state.hexdigest()


_INF, _NAN, _MAX = math.inf, math.nan, torch.finfo(torch.float32).max
_TINY = 2.0**-149
_SPECIAL_BIAS = floats(_INF, -_INF, _NAN, -0.0, 0.0, _MAX, -_MAX, _TINY, -1.0, 0.25, 0.5)


def _hash_router(case: Case, random: Random) -> Inputs:
    sizes = case.sizes
    return {
        "token_ids": _token_ids(case, random),
        "table": random.integers(0, sizes["experts"], sizes["vocab"], sizes["top_k"]).int(),
        "top_k": sizes["top_k"],
        "sentinel": sizes["sentinel"],
    }


def _token_ids(case: Case, random: Random) -> Tensor:
    tokens, vocab = case.sizes["tokens"], case.sizes["vocab"]
    dtype = torch.int64 if case.sizes["index_bits"] == 64 else torch.int32
    if case.pattern != "out_of_range":
        return random.integers(0, vocab, tokens).to(dtype)
    return _outside_too(random, vocab, tokens, dtype)


def _outside_too(random: Random, vocab: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Token ids at both ends of the vocabulary and outside it."""
    edges = [0, -1, vocab - 1, vocab, vocab + 1, 2**31 - 1, -(2**31)]
    if dtype == torch.int64:
        # Their low 32 bits are valid ids: a kernel that truncates would read the table.
        edges += [2**32, 2**32 + vocab - 1, -(2**32), 2**63 - 1, -(2**63)]
    return random.choice(torch.tensor(edges), tokens).to(dtype)


def _hash_gate(case: Case, random: Random) -> Inputs:
    """The inputs of a dense router, token ids and a table."""
    sizes = case.sizes
    table = random.integers(0, sizes["experts"], sizes["vocab"], sizes["top_k"])
    match case.pattern:
        case "repeated":
            # Rows are returned verbatim, also where one holds an expert twice.
            table = table[:, :1].expand_as(table)
        case "one_expert":
            table = torch.full_like(table, sizes["experts"] - 1)
    inputs = {
        "token_ids": _token_ids(case, random),
        "table": table.int().contiguous(),
        "sentinel": sizes["sentinel"],
        **_dense_router(case, random),
    }
    image_bias = inputs.pop("bias")
    if sizes["images"]:
        # Every third row, so that image tokens and others take turns in any arrangement.
        inputs["image_mask"] = torch.arange(sizes["tokens"]) % 3 == 1
        inputs["image_bias"] = image_bias
        inputs["wide_ids"] = 0
    return inputs


def _topk_select(case: Case, random: Random) -> Inputs:
    scores = strided(score_rows(case, random), case.sizes["padding"])
    return {"scores": scores, "top_k": case.sizes["top_k"]}


def _activation_topk(case: Case, random: Random) -> Inputs:
    shape = case.sizes["tokens"], case.sizes["experts"]
    experts = shape[1]
    logits, bias = random.normal(*shape) * 2, random.normal(experts) * 0.125
    pick = random.integers(0, 4, *shape)
    match case.pattern:
        case "ties":
            logits = random.choice(floats(-1.5, 0.25, 0.3, 2.0), *shape)
            bias = random.choice(floats(0.0, 0.5), experts)
        case "equal":
            logits, bias = torch.full(shape, 0.75), torch.zeros(experts)
        case "bias_8":
            # The ulp of a key near 9 is 2^-20: in odd rows many scores differ by less than it.
            logits[1::2] *= 2.0**-16
            bias = 8 + random.integers(-2, 3, experts).float() * 2.0**-20
        case "extremes":
            edges = floats(80, -80, 88.75, -87.5, 104, -104, 16.75, -16.75, 0.0, -0.0)
            logits = torch.where(
                pick == 0, random.choice(edges, *shape), random.uniform(-80, 80, *shape)
            )
        case "infinities":
            # All of +inf and FLT_MAX tie, and without a bias they tie exactly.
            edges = floats(_INF, -_INF, _MAX, -_MAX)
            logits = torch.where(pick == 0, random.choice(edges, *shape), logits)
            bias = torch.zeros(experts)
        case "nan":
            logits = torch.where(pick == 0, random.choice(NANS, *shape), logits)
        case "nan_rows":
            # Row i keeps its first i % 8 logits, so some rows have fewer than k numbers.
            kept = torch.arange(experts) < (torch.arange(shape[0]) % 8).unsqueeze(1)
            logits = torch.where(kept, logits, torch.full_like(logits, _NAN))
        case "any_bits":
            logits, bias = random.bits(*shape), random.bits(experts)
        case "underflow":
            # Row 0 underflows everywhere; the rest goes from -60 to -1000.
            logits = -random.uniform(60, 180, *shape)
            logits[0] = -1000
        case "special_bias":
            bias = random.choice(_SPECIAL_BIAS, experts)
    return {
        "logits": strided(logits, case.sizes["padding"]),
        "bias": bias,
        "top_k": case.sizes["top_k"],
        "scale": case.scale,
        "renormalize": int(case.renormalize),
    }


def _dense_router(case: Case, random: Random) -> Inputs:
    tokens, hidden, experts = (case.sizes[name] for name in ("tokens", "hidden", "experts"))
    # 2^-6 brings the deviation of the logits to between 1 and 2 for every hidden size served.
    x = random.normal(tokens, hidden)
    weight = random.normal(experts, hidden) * 2.0**-6
    bias = random.normal(experts) * 0.125
    row = torch.arange(tokens)
    column = random.integers(0, hidden, tokens)
    match case.pattern:
        case "ties":
            # Seven distinct experts: the others are copies, each with its original's bias.
            original = torch.arange(experts) % 7
            weight, bias = weight[original], bias[original % 3]
        case "equal":
            weight, bias = weight[:1].expand(experts, hidden), torch.zeros(experts)
        case "bias_8":
            # The ulp of a key near 9 is 2^-20: in odd rows many scores come close to it.
            x[1::2] *= 2.0**-8
            bias = 8 + random.integers(-2, 3, experts).float() * 2.0**-20
        case "extremes":
            x = x * floats(*(2.0**power for power in range(8)))[row % 8].unsqueeze(1)
        case "infinities":
            # +inf, -inf, two of them, and every fourth row finite.
            signs = floats(_INF, -_INF, _INF, 1.0)[row % 4]
            x[row, column] = signs
            x[2::4, 0] = -_INF
            bias = torch.zeros(experts)
        case "nan_rows":
            x[row[::3], column[::3]] = _NAN
            x[-1] = _NAN
        case "zero":
            x = torch.where((row % 2 == 0).unsqueeze(1), 0.0, -0.0).expand(tokens, hidden)
        case "subnormal":
            # bf16 subnormals times large weights: flushing an operand gives logits of zero.
            x = x * 2.0**-130
            weight = weight * 2.0**125
        case "cancelling":
            weight[:, 1::2] = -weight[:, ::2]
            x[:, 1::2] = x[:, ::2] + random.normal(tokens, hidden // 2) * 2.0**-6
        case "negative":
            # Every logit is far below zero, from -10 to -100, where log(1 + exp(z)) loses all.
            scale = 2.0 ** (12 - hidden.bit_length() + 1)
            x = x.abs() * scale * floats(1.0, 0.5, 0.25)[row % 3].unsqueeze(1)
            weight = -weight.abs()
        case "special_bias":
            bias = random.choice(_SPECIAL_BIAS, experts)
    return {
        "hidden_states": strided(x.bfloat16(), case.sizes["padding"]),
        "weight": weight.bfloat16().contiguous(),
        "bias": bias.contiguous(),
        "scale": case.scale,
        "renormalize": int(case.renormalize),
    }


def _serving(case: Case, random: Random) -> Inputs:
    """The serving inputs that ``cases.SERVING`` and ``cases.LOOKUPS`` name."""
    tokens, experts, top_k = (case.sizes[name] for name in ("tokens", "experts", "top_k"))
    wide = "wide" in case.serving
    marks = random.integers(0, 4, 2, tokens)
    found: dict[str, Tensor | int | float] = {"sentinel": -7, "wide_ids": int(wide)}
    if "padding" in case.serving:
        found["is_padding"] = marks[0] == 0
    if "count" in case.serving:
        found["num_valid_tokens"] = torch.tensor([tokens - tokens // 3], dtype=torch.int32)
    if "images" in case.serving:
        found["image_mask"] = marks[1] < 2
        found["image_bias"] = random.normal(experts) * 0.5
    if "map" in case.serving:
        found["expert_map"] = random.integers(0, 2**20, experts, 3).int()
        found["replica_counts"] = random.integers(1, 4, experts).int()
        found |= {"replica_start": 5, "replica_step": 2654435769}
    if "replay" in case.serving:
        given = random.integers(0, experts, tokens, top_k)
        edges = [-1, experts, 2**31 - 1, -(2**31)]
        if wide:
            # Their low 32 bits are valid ids.
            edges += [2**32, 2**32 + experts - 1, -(2**63)]
        strange = random.choice(torch.tensor(edges), tokens, top_k)
        given = torch.where(random.integers(0, 16, tokens, top_k) == 0, strange, given)
        found["given_ids"] = given if wide else given.int()
    if "table" in case.serving:
        vocab, dtype = 1009, torch.int64 if wide else torch.int32
        inside = random.integers(0, vocab, tokens).to(dtype)
        outside = _outside_too(random, vocab, tokens, dtype)
        found["token_ids"] = torch.where(random.integers(0, 4, tokens) == 0, outside, inside)
        found["table"] = random.integers(0, experts, vocab, top_k).int()
    return found


_MAKERS: Mapping[str, Callable[[Case, Random], Inputs]] = {
    "hash_router": _hash_router,
    "topk_select": _topk_select,
    "topk_indices": indexer_inputs,
    "activation_topk": _activation_topk,
    "hash_gate": _hash_gate,
    "dense_router_decode": _dense_router,
    "dense_router_prefill": _dense_router,
}
