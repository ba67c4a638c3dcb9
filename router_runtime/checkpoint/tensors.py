"""The tensors of a gate in a released checkpoint.

Two ways of naming a gate's tensors are in use, and each is recognised (``N`` is the layer)::

    Hugging Face   model.layers.N.mlp.gate.  weight  e_score_correction_bias  tid2eid
    original       layers.N.ffn.gate.        weight  bias                     tid2eid

Vision checkpoints add a bias for image tokens: ``bias_vl``, or ``e_score_correction_bias_vl`` once
renamed. Tensors are read by name, one at a time: a checkpoint of many files is never loaded whole.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from router_runtime.checkpoint.configs import read_json
from router_runtime.errors import InputError, explain, install_extra
from router_runtime.format import system_errors

INDEX_NAME = "model.safetensors.index.json"

#: What a gate's tensors are called, by the last parts of the gate's own name.
_SCHEMES = {
    "mlp.gate": {
        "weight": "weight",
        "bias": "e_score_correction_bias",
        "image_bias": "e_score_correction_bias_vl",
        "table": "tid2eid",
    },
    "ffn.gate": {
        "weight": "weight",
        "bias": "bias",
        "image_bias": "bias_vl",
        "table": "tid2eid",
    },
}
#: The prefixes of ``layers.N`` that are in use.
_PREFIXES = ("", "model.", "model.language_model.", "language_model.", "language_model.model.")

#: Which tensors a router of each mode is built from.
TENSORS = {"dense": ("weight", "bias"), "hash": ("table",), "hash_gate": ("weight", "table")}
#: Modes that score experts, and so may select those of image tokens by a bias of their own.
_SCORING = ("dense", "hash_gate")


class _Source(Protocol):
    """Tensors by name, read one at a time."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> list[int]: ...

    def read(self, name: str) -> Tensor: ...

    def __str__(self) -> str: ...


class _InMemory:
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Collection[str]:
        return [name for name in self._tensors if isinstance(name, str)]

    def shape(self, name: str) -> list[int]:
        return list(self.read(name).shape)

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            found = "a meta tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _bad_tensor(name, self, "a tensor with values", found)
        return tensor

    def __str__(self) -> str:
        return "the given mapping"


class _Files:
    """``safetensors`` files: one, or those of a checkpoint's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = _safe_open()
        index = path / INDEX_NAME
        if path.is_file():
            self._where = self._listed([path])
        elif index.is_file():
            self._where = self._indexed(index)
        else:
            self._where = self._listed(sorted(path.glob("*.safetensors")))
        if not self._where:
            raise InputError(
                explain(
                    "checkpoint",
                    expected=f"a safetensors file, or a folder with {INDEX_NAME} or such files",
                    found=f"none at {path}",
                    remedy="name the folder that the checkpoint was downloaded to",
                )
            )

    def _listed(self, files: list[Path]) -> dict[str, Path]:
        where: dict[str, Path] = {}
        for file in files:
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name in where:
                        raise _ambiguous(name, [str(where[name]), str(file)])
                    where[name] = file
        return where

    def _indexed(self, index: Path) -> dict[str, Path]:
        content = read_json(index, "index of the checkpoint")
        names = content.get("weight_map") if isinstance(content, Mapping) else None
        if not isinstance(names, Mapping) or not all(
            isinstance(file, str) and file == Path(file).name for file in names.values()
        ):
            raise InputError(
                explain(
                    f"index of the checkpoint, {index}",
                    expected="a weight_map of tensor names to plain file names",
                    found="something else",
                    remedy="download the checkpoint again",
                )
            )
        return {name: self._path / file for name, file in names.items()}

    def names(self) -> Collection[str]:
        return self._where.keys()

    def shape(self, name: str) -> list[int]:
        with self._opened(self._where[name]) as opened:
            self._check_listed(opened, name)
            return list(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with self._opened(self._where[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def _check_listed(self, opened: Any, name: str) -> None:
        if name not in opened.keys():  # noqa: SIM118 (no mapping)
            found = "none: the index and the file disagree"
            raise _bad_tensor(name, self, f"that tensor in {self._where[name]}", found)

    def _opened(self, file: Path) -> Any:
        try:
            return self._open(file, framework="pt", device="cpu")
        except Exception as error:  # the package raises its own type, and OSError
            found, remedy = f"{type(error).__name__}: {error}", "download that file again"
            try:
                # It says "no such file" whatever kept it from opening one.
                file.open("rb").close()
            except OSError as cause:
                found, remedy = system_errors.found(cause), system_errors.remedy(cause, remedy)
            raise InputError(
                explain(
                    f"checkpoint file {file}",
                    expected="a whole safetensors file",
                    found=found,
                    remedy=remedy,
                )
            ) from error

    def __str__(self) -> str:
        return str(self._path)


def _safe_open() -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise InputError(
            explain(
                "checkpoint files",
                expected="the package safetensors",
                found=error,
                remedy=f"{install_extra('safetensors')}, or pass a mapping of names to tensors",
            )
        ) from error
    return safe_open


def gate_tensors(
    mode: str,
    sizes: Mapping[str, int | None],
    tensors: Mapping[str, Tensor] | str | os.PathLike[str],
    layer: int | str,
) -> dict[str, Tensor]:
    """The tensors of one gate, by the names of the Router's arguments.

    Tensors are read by name, one at a time: a checkpoint of many files is never loaded whole.

    Args:
        mode: the mode of the router: which tensors it needs.
        sizes: ``hidden_size``, ``num_experts``, ``top_k`` and ``vocab_size``.
        tensors: a mapping of names to tensors, a ``safetensors`` file, or a checkpoint's folder.
        layer: the number of a layer, or the whole name of a gate (``"mtp.0.ffn.gate"``).

    Returns:
        The weight as bf16, the biases as fp32, the table as it is; by name.

    Raises:
        InputError: a tensor is missing, ambiguous or of another shape, or has a value that the
            conversion would round. The error names what was looked for.

    """
    source: _Source
    source = _InMemory(tensors) if isinstance(tensors, Mapping) else _Files(Path(tensors))
    gate, names = _gate(source, layer)
    needed = TENSORS[mode]
    if mode == "dense" and "table" in names:
        raise InputError(
            explain(
                f"gate {gate} in {source}",
                expected="the tensors of a dense router",
                found=f"{names['table']}: it is a hash layer",
                remedy=f"use RouterConfig.from_hf(config, layer={layer!r}), mode 'hash_gate'",
            )
        )
    for role in needed:
        if role not in names:
            raise _missing(source, gate, role, mode)
    wanted = [*needed, *(["image_bias"] if mode in _SCORING and "image_bias" in names else [])]
    experts = sizes["num_experts"]
    shapes = {
        "weight": [experts, sizes["hidden_size"]],
        "bias": [experts],
        "image_bias": [experts],
        "table": [sizes["vocab_size"], sizes["top_k"]],
    }
    for role in wanted:  # before anything is read
        shape = source.shape(names[role])
        if shape != shapes[role]:
            raise _bad_tensor(names[role], source, f"shape {shapes[role]}", f"shape {shape}")
    found = {role: source.read(names[role]) for role in wanted}
    types = {"weight": torch.bfloat16, "bias": torch.float32, "image_bias": torch.float32}
    return {
        role: _exact(names[role], source, tensor, types[role]) if role in types else tensor
        for role, tensor in found.items()
    }


def _gate(source: _Source, layer: int | str) -> tuple[str, dict[str, str]]:
    """The gate of ``layer``: its name, and what its tensors are called by role."""
    present = source.names()
    if isinstance(layer, str):
        candidates = [(layer, roles) for roles in _SCHEMES.values()]
    else:
        candidates = [
            (f"{prefix}layers.{layer}.{gate}", roles)
            for prefix in _PREFIXES
            for gate, roles in _SCHEMES.items()
        ]
    found: dict[str, dict[str, str]] = {}
    for gate, roles in candidates:
        for role, leaf in roles.items():
            name = f"{gate}.{leaf}"
            if name in present:
                known = found.setdefault(gate, {})
                if known.setdefault(role, name) != name:
                    raise _ambiguous(f"{role} of gate {gate} in {source}", [known[role], name])
    if len(found) > 1:
        raise _ambiguous(f"gate of layer {layer} in {source}", sorted(found))
    if not found:
        looked_for = sorted({f"{gate}.weight" for gate, _ in candidates})
        raise InputError(
            explain(
                f"gate of layer {layer!r} in {source}",
                expected=f"tensors of one of {looked_for}",
                found=f"none; similar names: {_similar(looked_for[0], present)}",
                remedy="correct the layer, or pass the gate's whole name as the layer",
            )
        )
    return next(iter(found.items()))


def _missing(source: _Source, gate: str, role: str, mode: str) -> InputError:
    leaves = sorted({roles[role] for end, roles in _SCHEMES.items() if gate.endswith(end)})
    leaves = leaves or sorted({roles[role] for roles in _SCHEMES.values()})
    there = sorted(name for name in source.names() if name.startswith(f"{gate}."))
    return InputError(
        explain(
            f"{role} of a {mode} router",
            expected=f"{' or '.join(f'{gate}.{leaf}' for leaf in leaves)} in {source}",
            found=f"none; the gate has {there}",
            remedy="pass the whole checkpoint, and the layer's own RouterConfig.from_hf",
        )
    )


def _similar(wanted: str, names: Collection[str]) -> list[str]:
    """A few names that the caller may have meant."""
    gates = [name for name in names if "gate." in name and name.endswith("weight")]
    return difflib.get_close_matches(wanted, gates or names, n=4, cutoff=0.5) or sorted(names)[:4]


def _ambiguous(what: str, found: list[str]) -> InputError:
    return InputError(
        explain(
            what,
            expected="one of that name",
            found=f"{len(found)}: {found}",
            remedy="pass the gate's whole name as the layer, or drop the others",
        )
    )


def _bad_tensor(name: str, source: _Source, expected: object, found: object) -> InputError:
    return InputError(
        explain(
            f"{name} in {source}",
            expected=expected,
            found=found,
            remedy="pass the checkpoint that the configuration belongs to",
        )
    )


def _exact(name: str, source: _Source, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``dtype``. Refuses one that would be rounded: routing would silently change."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise _bad_tensor(name, source, dtype, tensor.dtype)
    converted = tensor.to(dtype)
    rounded = (converted.to(tensor.dtype) != tensor) & ~tensor.isnan()
    if bool(rounded.any()):
        first = rounded.nonzero()[0].tolist()
        raise InputError(
            explain(
                f"{name} in {source}",
                expected=f"{dtype}, or {tensor.dtype} that it holds exactly",
                found=f"{int(rounded.sum())} of {rounded.numel()} values that it would round, "
                f"the first at {first}: {float(tensor[*first])}",
                remedy="pass the released tensor, or round it yourself and say so: "
                f"tensor.to({dtype})",
            )
        )
    return converted
