"""CUDA graphs of calls on the current device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(call: Callable[[], T], warmups: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture ``call`` after ``warmups`` calls on a side stream.

    Returns:
        The graph, and what the captured call returned: every replay writes these tensors.

    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs
