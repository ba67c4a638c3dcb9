"""Host time of an eager call, without a GPU: ``python -m tests.runtime.host_time``.

Everything runs as on a GPU but the driver's launch, torch's current stream and the question whether
it is being captured, which cost nothing here. Figures of one machine in one run compare; nothing
else does. The host time on a GPU is what ``make bench`` reports.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import router_runtime as rt
from router_runtime.device import kernels
from router_runtime.routing.placement import Placement
from tests.fake_driver.artifacts import small_entries, write_artifacts
from tests.fake_driver.calls import SUCCESS, FakeDriver
from tests.fake_driver.install import installed, serve_cpu_memory
from tests.runtime.routers import build_on_the_fake_gpu

H, E, K, V = 128, 24, 4, 50
BATCHES, CALLS = 100, 1000


def calls() -> dict[str, Callable[[], Any]]:
    """Return the calls that are timed, by name."""
    dense = rt.Router(
        rt.RouterConfig(H, E, K, 1.5),
        weight=torch.zeros(E, H, dtype=torch.bfloat16),
        bias=torch.zeros(E),
        device="cpu",
    )
    hashed = rt.Router(
        rt.RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V),
        table=torch.zeros(V, K, dtype=torch.int32),
        device="cpu",
    )
    x, token_ids = torch.zeros(4, H, dtype=torch.bfloat16), torch.arange(4)
    padding, router_id = torch.zeros(4, dtype=torch.bool), rt.register_router(dense)
    op = torch.ops.dsv4
    return {
        "Router, dense": lambda: dense(x),
        "Router, hash": lambda: hashed(token_ids),
        "Router, dense, with padding": lambda: dense(x, is_padding=padding),
        "torch.ops.dsv4.dense_router": lambda: op.dense_router.default(x, router_id, E, K),
        "router_runtime.dense_router": lambda: rt.dense_router(x, router_id, E, K),
        "dense_router.by_buffer": lambda: op.dense_router.by_buffer(x, dense.weight, E, K),
    }


def main() -> None:
    """Print microseconds per call: the tenth percentile and the median of the batches."""
    torch.set_num_threads(1)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        installed(patch) as fake,
    ):
        print(measured(patch, fake, Path(folder)))


def measured(patch: pytest.MonkeyPatch, fake: FakeDriver, folder: Path) -> str:
    """Microseconds of the calling thread for each call, as text."""
    fake.entries = small_entries()
    patch.setenv("ROUTER_RUNTIME_ARTIFACTS", str(write_artifacts(folder / "a", fake.entries)))
    patch.setattr(kernels, "status", lambda *_: "verified")
    patch.setattr(fake, "cuLaunchKernelEx", lambda *_: (SUCCESS,), raising=False)
    stream = Placement.stream
    serve_cpu_memory(patch)
    patch.setattr(Placement, "stream", stream)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    build_on_the_fake_gpu(patch)
    subjects = calls()
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for batch in range(BATCHES + 2):
        for name, call in subjects.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            if batch >= 2:
                times[name].append((time.thread_time() - start) / CALLS * 1e6)
    return "\n".join(
        f"{name:32} {sorted(found)[BATCHES // 10]:7.2f} {statistics.median(found):7.2f} us"
        for name, found in times.items()
    )


if __name__ == "__main__":
    main()
