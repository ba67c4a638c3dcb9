"""Why a MoE block of SGLang is left alone, as far as that is known before its first batch."""

from __future__ import annotations

from typing import Any

from router_runtime.integrations.engines.reasons import (
    SCORING,
    reason,
    why_not_bias,
    why_not_table,
    why_not_weight,
)
from router_runtime.integrations.sglang.engine import Engine


def is_deepseek_v4(moe: Any) -> bool:
    """Whether the block routes as DeepSeek-V4 does."""
    return bool(moe.is_deepseek_v4)


def why_not(engine: Engine, moe: Any) -> str | None:
    """What the block has that is not served, as expected and found; None if it can be served."""
    gate, topk = moe.gate, moe.topk
    if type(moe) is not engine.moe:
        return reason("a MoE block", engine.moe.__name__, type(moe).__name__)
    if not moe.is_deepseek_v4:
        return reason("a model", "DeepSeek-V4", "an earlier one")
    if type(gate) is not engine.gate:
        return reason("a gate", engine.gate.__name__, type(gate).__name__)
    if "forward" in vars(gate):
        return reason("a gate's forward", "the one of its class", "another")
    if gate.e_score_correction_bias_vl is not None:
        return reason("a gate", "no bias for image tokens", "one, by which SGLang routes itself")
    found = why_not_weight(gate.weight)
    if found is not None:
        return found
    if type(topk) is engine.hash_topk:
        return _why_not_hash(moe)
    if type(topk) is engine.topk:
        return _why_not_dense(engine, moe)
    return reason("a router", engine.topk.__name__, type(topk).__name__)


def _why_not_hash(moe: Any) -> str | None:
    topk = moe.topk
    if topk.score_func != SCORING:
        return reason("a scoring function", SCORING, topk.score_func)
    if topk.num_shared_topk_slots:
        return reason("shared experts", "beside the routed ones", "in places after them")
    if "forward" in vars(moe):
        return reason("a MoE block's forward", "the one of its class", "another")
    return why_not_table(topk.tid2eid, topk.topk)


def _why_not_dense(engine: Engine, moe: Any) -> str | None:
    gate, config = moe.gate, moe.topk.topk_config
    if config.scoring_func != SCORING:
        return reason("a scoring function", SCORING, config.scoring_func)
    if config.num_shared_topk_slots:
        return reason("shared experts", "beside the routed ones", "in places after them")
    if config.use_grouped_topk:
        return reason("a router", "no groups of experts", "some")
    if config.custom_routing_function is not None:
        return reason("a router", "no custom routing function", "one")
    if gate.e_score_correction_bias is None:
        return reason("a gate", "a bias or a hash table", "neither")
    return why_not_format(engine, config) or why_not_bias(
        "a gate's bias", gate.e_score_correction_bias, gate.weight.shape[0]
    )


def why_not_format(engine: Engine, config: Any) -> str | None:
    """Why the experts take something else than the weights and the ids."""
    if config.output_format is not engine.standard:
        return "its experts take logits and route by themselves"
    return None
