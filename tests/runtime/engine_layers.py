"""The small MoE layer that the tests of the plug-ins route: its sizes, weights and inputs."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import torch
from torch import Tensor

H, E, K, V, SCALE = 128, 24, 4, 50, 1.5

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def load_entry_points(group: str) -> None:
    """Call this package's entry points of a group, as an engine does in each of its processes."""
    for name, value in ENTRY_POINTS[group].items():
        importlib.metadata.EntryPoint(name, value, group).load()()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(E, H).bfloat16() / 8, draw(E, seed=1)
TABLE = torch.rand(V, E, generator=torch.Generator().manual_seed(3)).topk(K).indices.int()


def states(tokens: int, seed: int = 0) -> Tensor:
    return draw(tokens, H, seed=100 * tokens + seed).bfloat16()


def words(tokens: int) -> Tensor:
    """Token ids, spread over the vocabulary: some are image tokens to a layer with image biases."""
    return torch.arange(tokens) * 7 % V
