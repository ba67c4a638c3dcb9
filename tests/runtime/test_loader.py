"""The loader against a driver that is not there: every check, each with its message."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import driver as real

from router_runtime.device import driver
from router_runtime.device.loader import load_entry
from router_runtime.errors import ArtifactError, DriverError
from router_runtime.format.target import Target


@pytest.fixture
def load(build: SimpleNamespace, fake: Any, tmp_path: Path) -> Any:
    """Load an entry of a folder that holds the small model's."""
    fake.entries = build.small()
    folder = build.artifacts(tmp_path / "artifacts", fake.entries)

    def loading(entry: Any, device: int = 0) -> Any:
        return load_entry(entry, build.manifest(fake.entries), folder, device)

    return loading


@pytest.fixture
def dense(build: SimpleNamespace) -> Any:
    return build.small()[-1]


def test_everything_happens_at_load(load: Any, fake: Any, dense: Any) -> None:
    kernel = load(dense)
    assert kernel.entry == dense
    assert kernel.multiprocessors == 132
    assert fake.attributes == {
        ("dense_router_decode", "MAX_DYNAMIC_SHARED_SIZE_BYTES"): 100 * 1024,
        ("dense_router_decode", "NON_PORTABLE_CLUSTER_SIZE_ALLOWED"): 1,
    }
    assert fake.calls == [
        *("push 1000", "cuLibraryLoadData", "cuFuncLoad dense_router_decode"),
        *("cuOccupancyMaxActiveClusters", "pop"),
    ]


def test_loaded_once_for_each_device(load: Any, fake: Any, dense: Any) -> None:
    fake.devices = 2
    first = load(dense)
    assert load(dense) is first
    second = load(dense, 1)
    assert second is not first
    assert second.device == 1
    assert fake.calls.count("cuLibraryLoadData") == 2
    assert "push 1001" in fake.calls


def test_threads_get_one_kernel(load: Any, fake: Any, dense: Any) -> None:
    barrier = threading.Barrier(8)
    found: list[Any] = []

    def work() -> None:
        barrier.wait()
        found.append(load(dense))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(kernel) for kernel in found}) == 1


def test_small_kernel_needs_no_opt_in(load: Any, fake: Any, build: SimpleNamespace) -> None:
    load(build.small()[0])
    assert fake.attributes == {}
    assert "cuOccupancyMaxActiveClusters" not in fake.calls


def test_foreign_target(load: Any, fake: Any, dense: Any) -> None:
    fake.capability = (10, 0)
    with pytest.raises(ArtifactError, match=r"found target sm_90a.*--target sm_100f"):
        load(dense)
    assert "cuLibraryLoadData" not in fake.calls


def test_code_that_the_driver_refuses(load: Any, fake: Any, dense: Any) -> None:
    fake.load = real.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(ArtifactError, match="CUDA_ERROR_NO_BINARY_FOR_GPU from cuLibraryLoadData"):
        load(dense)
    assert fake.calls[-1] == "pop"


@pytest.mark.parametrize("change", ["offset", "fewer", "more"])
def test_parameters_that_differ(load: Any, fake: Any, dense: Any, change: str) -> None:
    layout = list(dense.contract.parameter_layout(Target.parse(dense.target)))
    if change == "offset":
        layout[1] = (16, 8)
    elif change == "fewer":
        layout.pop()
    else:
        layout.append((80, 4))
    fake.layouts[dense.symbol] = tuple(layout)
    with pytest.raises(ArtifactError, match=r"\(offset, size\) .* by its contract, found"):
        load(dense)
    assert fake.calls[-2:] == ["cuLibraryUnload", "pop"]


def test_a_tensor_map_is_aligned_by_its_address(
    load: Any, fake: Any, build: SimpleNamespace
) -> None:
    """A driver reports offsets from 0x210 on sm_90a, and 0x240 is the first multiple of 64."""
    prefill = next(entry for entry in fake.entries if entry.contract.tensor_maps)
    layout = prefill.contract.parameter_layout(Target.parse(prefill.target))
    assert layout[:6] == ((0x30, 128), (0xB0, 8), (0xB8, 8), (0xC0, 8), (0xC8, 8), (0xD0, 4))
    fake.layouts[prefill.symbol] = tuple((offset - 0x30, size) for offset, size in layout)
    with pytest.raises(ArtifactError, match=r"\[\(48, 128\), \(176, 8\).* its contract, found"):
        load(prefill)
    fake.layouts[prefill.symbol] = layout
    load(prefill)


def test_block_too_large(load: Any, fake: Any, dense: Any) -> None:
    fake.max_threads = 128
    with pytest.raises(ArtifactError, match="blocks of 256 threads, found at most 128"):
        load(dense)


def test_cluster_without_room(load: Any, fake: Any, dense: Any) -> None:
    fake.clusters = 0
    with pytest.raises(DriverError, match=r"room for a cluster of 16 blocks.*MIG"):
        load(dense)


def test_altered_cubin_reaches_no_driver(
    load: Any, fake: Any, build: SimpleNamespace, dense: Any, tmp_path: Path
) -> None:
    folder = build.artifacts(tmp_path / "altered", [dense])
    (folder / dense.file).write_bytes(b"\0" * dense.size)
    with pytest.raises(ArtifactError, match="altered"):
        load_entry(dense, build.manifest([dense]), folder, 0)
    assert "cuLibraryLoadData" not in fake.calls


def test_entry_of_another_manifest(build: SimpleNamespace, fake: Any, tmp_path: Path) -> None:
    entries = build.small()
    with pytest.raises(ArtifactError, match="an entry of the manifest"):
        load_entry(entries[0], build.manifest(entries[1:]), tmp_path, 0)


def test_no_driver(fake: Any) -> None:
    fake.init = RuntimeError("libcuda.so.1 not found")
    with pytest.raises(DriverError, match=r"libcuda.*not found.*release 580.*device='cpu'"):
        driver.device_facts(0)
    with pytest.raises(DriverError, match=r"found none: libcuda.so.1 not found; .* or newer$"):
        driver.initialise(needs_gpu=True)


def test_no_usable_gpu(fake: Any) -> None:
    fake.init = real.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(DriverError, match="CUDA_ERROR_NO_DEVICE from cuInit"):
        driver.device_facts(0)


def test_device_index_out_of_range(fake: Any) -> None:
    with pytest.raises(DriverError, match=r"cuda:3: expected an index below 1"):
        driver.device_facts(3)


def test_failing_call_names_itself(fake: Any) -> None:
    with pytest.raises(DriverError, match=r"cuFuncLoad.*CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.check((real.CUresult.CUDA_ERROR_INVALID_VALUE,), "cuFuncLoad")


def test_forked_child_is_refused(load: Any, fake: Any, dense: Any) -> None:
    """In the child, loading and launching kernels of the parent both refuse."""
    kernel = load(dense)
    arguments = dict.fromkeys(kernel.arguments, 0)
    kernel.launch(0, **arguments)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking with threads about: that is the point
        child = os.fork()
    if child == 0:
        messages = []
        for action in (lambda: load(dense), lambda: kernel.launch(0, **arguments)):
            try:
                action()
                messages.append("served")
            except DriverError as error:
                messages.append(str(error))
        os.write(writer, "\n".join(messages).encode())
        os._exit(0)
    os.waitpid(child, 0)
    messages = os.read(reader, 10000).decode().split("\n")
    assert len(messages) == 2
    assert all("forked child" in message and "spawn" in message for message in messages)
    kernel.launch(0, **arguments)
