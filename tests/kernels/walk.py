"""Kernels run as the Python that they are, against the model of the hardware in tensor_core.py."""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np
import pytest

from build_kernels.kernels.dense.geometry.common import LANES
from router_runtime.format.contract import Contract
from tests.kernels.tensor_core import Block, Sums, to_bf16


class Running:
    """Stands for modules of kernels/common/ptx: the functions of the block that runs here."""

    def __init__(self) -> None:
        self.own = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own.block, name)

    def module(self, prefix: str) -> Prefixed:
        """A module whose functions have a prefix in ``Block``."""
        return Prefixed(self, prefix)

    def as_thread(self, block: Block, thread: int) -> None:
        self.own.block = block
        block.here.thread = thread


#: How the kernels of a walk score: not at all, because a walk follows sums.
NO_SCORES: Any = types.SimpleNamespace(score=lambda logit: np.float32(0))


class Prefixed:
    def __init__(self, running: Running, prefix: str) -> None:
        self.running, self.prefix = running, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.running, self.prefix + name)


def as_python(monkeypatch: pytest.MonkeyPatch, *modules: types.ModuleType) -> Running:
    """Put the model in the place of what these modules import of the DSL and of kernels/common."""
    proxy = Running()
    language = types.SimpleNamespace(
        range=lambda *bounds, unroll: range(*bounds), range_constexpr=range, const_expr=bool
    )
    arch = types.SimpleNamespace(
        lane_idx=lambda: proxy.here.thread % LANES,
        sync_warp=lambda: proxy.sync_warp(),
        make_warp_uniform=lambda value: value,
        barrier=lambda barrier_id, number_of_threads: proxy.sync_consumers(),
        # Walks through code that calls it run one thread after the other.
        sync_threads=lambda: None,
    )
    cute = types.SimpleNamespace(
        arch=arch, make_rmem_tensor=lambda size, kind: [None] * size, size=len
    )
    scoring = types.SimpleNamespace(
        ordered_key=lambda logit, score, bias: 0,
        stored_logit=lambda logit: int(np.float32(logit).view(np.uint32)),
    )
    replaced: dict[str, Any] = dict.fromkeys(("arith", "memory", "warp_ops", "tcgen05"), proxy)
    replaced |= {"async_copy": proxy.module("copy_"), "mbarrier": proxy.module("barrier_")}
    replaced |= {"cutlass": language, "cute": cute}
    replaced |= {"Int32": int, "Int64": int, "Float32": np.float32, "scoring": scoring}
    for module in modules:
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return proxy


def plain(kind: type) -> Any:
    """The class with its methods as they were written, without the tracer's decorators."""
    written = {
        name: method.__wrapped__
        for base in reversed(kind.__mro__)
        for name, method in vars(base).items()
        if hasattr(method, "__wrapped__")
    }
    return type(kind.__name__, (kind,), written)


def packed(launch: Contract, weight: Sums) -> Any:
    """The weights as the runtime packs them, by the contract's recipe."""
    (recipe,) = launch.repacks
    padded = np.zeros((recipe.rows, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    return to_bf16(padded).reshape(recipe.shape).transpose(recipe.order)


def packed_place(expert: Any, k: Any) -> Any:
    """Where hidden element ``k`` of a packed expert lies in a stage of weights, in bytes."""
    return expert // 8 * 1024 + k // 8 * 128 + expert % 8 * 16 + k % 8 * 2


def swizzled_place(token: Any, k: Any) -> Any:
    """Where hidden element ``k`` of a token lies in a stage of hidden states, in bytes."""
    return token * 128 + (k // 8 ^ token % 8) * 16 + k % 8 * 2
