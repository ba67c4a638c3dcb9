"""What the ``config.json`` of a released model says about its routers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_runtime.errors import InputError, explain
from router_runtime.format import system_errors
from router_runtime.format.scoring import SCORINGS, SIGMOID, SQRT_SOFTPLUS

CONFIG_NAME = "config.json"

#: The entries under which a model routes as ``spec.py`` does: name -> its values, and how an error
#: says them. A model with another value would load and route wrongly. An entry that is absent has
#: one of these values.
_NO_GROUPS = "1: no kernel limits a token's experts to some groups of them"
_EXPECTED: dict[str, tuple[tuple[object, ...], str]] = {
    "scoring_func": (SCORINGS, " or ".join(SCORINGS)),
    "topk_method": (("noaux_tc",), "noaux_tc"),
    "n_group": ((None, 0, 1), _NO_GROUPS),
    "topk_group": ((None, 0, 1), _NO_GROUPS),
}


def config_fields(config: Any, layer: int | None) -> dict[str, Any]:
    """The fields of a ``RouterConfig`` for one layer of a model, by name.

    Args:
        config: a transformers configuration, its dict, a ``config.json``, or the folder that holds
            one.
        layer: the number of the layer; None for those that select experts by score.

    Raises:
        InputError: the model routes in another way, or an entry is missing.

    """
    values = _values(config)
    for name, (expected, said) in _EXPECTED.items():
        if values.get(name, expected[0]) not in expected:
            raise _unfit(f"{name} of the configuration", said, values[name])
    scoring = values.get("scoring_func", SQRT_SOFTPLUS)
    experts = _first(values, "n_routed_experts", "num_local_experts")
    fields: dict[str, Any] = {
        "hidden_size": _first(values, "hidden_size"),
        "num_experts": experts,
        "top_k": _first(values, "num_experts_per_tok"),
        "routed_scaling_factor": _scale(values, scoring),
        "renormalize": values.get("norm_topk_prob", True),
        "mode": "dense",
        "scoring": scoring,
        "gate_temperature": _or(values, "gate_temp", 1.0),
    }
    if layer is not None and _is_hash_layer(values, layer):
        fields |= {"mode": "hash_gate", "vocab_size": _first(values, "vocab_size")}
    return fields


def _values(config: Any) -> Mapping[str, Any]:
    """The configuration of the language model as a mapping."""
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / CONFIG_NAME if path.is_dir() else path
        config = read_json(path, "configuration")
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise InputError(
            explain(
                "configuration",
                expected="a transformers configuration, a dict, or the path of a config.json",
                found=type(config).__name__,
                remedy="pass one of these",
            )
        )
    inner = config.get("text_config")  # beside the vision_config of a model that has one
    return inner if isinstance(inner, Mapping) else config


def _first(values: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of ``names`` that is present."""
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise _unfit("configuration", f"the entry {' or '.join(names)}", f"{sorted(values)}")


def _or(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value under ``name``, or ``default`` if there is none."""
    found = values.get(name)
    return default if found is None else found


def _scale(values: Mapping[str, Any], scoring: str) -> Any:
    """The routed scaling factor. Where scores are a sigmoid, null means 1 in the configurations
    that are published. One without the entry is refused: its default depends on the model.
    """
    name = "routed_scaling_factor"
    if scoring == SIGMOID and name in values:
        return _or(values, name, 1.0)
    return _first(values, name)


def _is_hash_layer(values: Mapping[str, Any], layer: int) -> bool:
    layers = _first(values, "num_hidden_layers")
    if not 0 <= layer < layers:
        raise _unfit("layer", f"an integer from 0 to {layers - 1}", layer)
    if layer < (values.get("first_k_dense_replace") or 0):
        raise _unfit(
            f"layer {layer}",
            "a layer with a router",
            f"first_k_dense_replace {values['first_k_dense_replace']}: it has one plain MLP",
        )
    kinds = values.get("mlp_layer_types")
    if kinds is not None:
        kind = kinds[layer] if layer < len(kinds) else "nothing"
        if kind not in ("hash_moe", "moe", "sparse"):
            expected = "'hash_moe', 'moe' or 'sparse'"
            raise _unfit(f"mlp_layer_types[{layer}]", expected, repr(kind))
        return bool(kind == "hash_moe")
    # A hash layer that is taken for a dense one would route wrongly, so an absent number is not 0,
    # except for architectures without hash layers: those that score by a sigmoid, and V4.1.
    sigmoid = values.get("scoring_func") == SIGMOID
    absent = 0 if sigmoid or values.get("model_type") == "deepseek_v41" else None
    count = values.get("num_hash_layers", absent)
    if count is None:
        raise _unfit(
            "configuration", "the entry mlp_layer_types or num_hash_layers", f"{sorted(values)}"
        )
    return bool(layer < count)


def _unfit(what: str, expected: object, found: object) -> InputError:
    remedy = "pass the model's own config.json, or build the RouterConfig by hand"
    return InputError(explain(what, expected=expected, found=found, remedy=remedy))


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file. Raises InputError, starting with ``what``, if there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found: object = error
        remedy = "check the path"
        if isinstance(error, OSError):
            found, remedy = system_errors.found(error), system_errors.remedy(error, remedy)
        raise InputError(
            explain(what, expected=f"readable JSON at {path}", found=found, remedy=remedy)
        ) from error
