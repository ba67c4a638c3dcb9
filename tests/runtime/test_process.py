"""A process that serves: many routers, threads and devices, captures, forks, failures, no files."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real
from torch import Tensor

import router_runtime as rt
from router_runtime import spec
from router_runtime.device import driver
from router_runtime.device.kernels import kernels_on
from router_runtime.errors import ArtifactError, DriverError, InputError
from router_runtime.format import advice
from router_runtime.routing import placement, row_kernels
from router_runtime.routing import row_ops as rows
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.cuda_dense import CudaDense
from router_runtime.routing.cuda_hash import CudaHash
from router_runtime.routing.placement import Placement
from router_runtime.routing.router import Router
from router_runtime.routing.selection import Selection
from router_runtime.routing.weights import Weights
from tests.runtime.routers import build_on_the_fake_gpu

ROOT = Path(__file__).resolve().parents[2]
H, E, K, V = 128, 24, 4, 50
CONFIG = RouterConfig(H, E, K, 1.5)
HASH = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V)


def weights_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, H, generator=generator).bfloat16()
    return weight, torch.randn(E, generator=generator) * 0.1


def hidden(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)).bfloat16()


def served(seed: int = 0, device: int = 0) -> CudaDense:
    """The CUDA path of a dense router, on CPU memory."""
    weights = Weights(CONFIG, torch.device("cpu"))
    path = CudaDense(CONFIG, weights, kernels_on(device), Selection())
    weights.write(dict(zip(("weight", "bias"), weights_of(seed), strict=True)))
    return path


def zero_table() -> Weights:
    weights = Weights(HASH, torch.device("cpu"))
    weights.write({"table": torch.zeros(V, K, dtype=torch.int32)})
    return weights


def expected(seed: int, x: Tensor) -> tuple[Tensor, Tensor]:
    return spec.dense_router(x, *weights_of(seed), K, 1.5)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- many ---


def test_many_routers_share_the_loaded_kernels(gpu: Any) -> None:
    paths = [served(seed) for seed in range(61)]
    assert gpu.calls.count("cuLibraryLoadData") == 2
    for seed, path in enumerate(paths):
        same(path.route(hidden(3, seed)), expected(seed, hidden(3, seed)))


def test_many_threads_with_routers_of_their_own(gpu: Any) -> None:
    """Built and called by eight threads at once, each with its own results."""
    barrier, problems = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            barrier.wait(timeout=30)
            path = served(number)
            for turn in range(20):
                x = hidden(1 + turn % 12, 100 * number + turn)
                same(path.route(x), expected(number, x))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert gpu.calls.count("cuLibraryLoadData") == 2


def test_each_device_loads_its_own(gpu: Any) -> None:
    gpu.devices = 2
    first, second = served(1, device=0), served(2, device=1)
    assert gpu.calls.count("cuLibraryLoadData") == 4
    assert gpu.calls.count("push 1000") == gpu.calls.count("push 1001") > 0
    same(first.route(hidden(3)), expected(1, hidden(3)))
    same(second.route(hidden(3)), expected(2, hidden(3)))
    assert gpu.calls[-2:] == ["set 1000", "set 1001"]  # each thread without a context gets its own
    with pytest.raises(DriverError, match=r"cuda:2: expected an index below 2"):
        served(3, device=2)


# --- graphs that were captured ---


@pytest.fixture
def capturing(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``capturing.now`` says whether the current stream is being captured."""
    state = SimpleNamespace(now=False, asked=0)

    def asked() -> bool:
        state.asked += 1
        return bool(state.now)

    build_on_the_fake_gpu(monkeypatch)
    monkeypatch.setattr(Placement, "stream", STREAM)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    return state


STREAM = Placement.stream


def dense_router() -> tuple[Router, Callable[[], Any]]:
    """A router that launches on the fake GPU, and a call of it."""
    weight, bias = weights_of(0)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    return router, lambda: router(hidden(3))


def hash_router() -> tuple[Router, Callable[[], Any]]:
    table = torch.zeros(V, K, dtype=torch.int32)
    router = Router(HASH, table=table, device="cpu")
    return router, lambda: router(torch.arange(3))


MAKE = pytest.mark.parametrize("make", [dense_router, hash_router])


@MAKE
def test_a_captured_router_stays_registered(
    gpu: Any, capturing: SimpleNamespace, make: Callable[[], Any]
) -> None:
    router, call = make()
    router_id = rt.register_router(router)
    call()
    capturing.now = True
    call()
    capturing.now = False
    call()
    with pytest.raises(InputError, match=r"no CUDA graph has captured.*force=True"):
        rt.unregister_router(router_id)
    assert rt.get_router(router_id) is router
    rt.unregister_router(router_id, force=True)
    # From here on it is like new: it may be captured again.
    again = rt.register_router(router)
    call()
    capturing.now = True
    call()
    with pytest.raises(InputError, match="force=True"):
        rt.unregister_router(again)
    rt.unregister_router(again, force=True)


@MAKE
def test_a_capture_registers_what_was_not(
    gpu: Any, capturing: SimpleNamespace, make: Callable[[], Any]
) -> None:
    """The registry keeps it alive after its owner has dropped it."""
    router, call = make()
    capturing.now = True
    call()
    router_id, reference = router.router_id, weakref.ref(router)
    del router, call
    gc.collect()
    assert reference() is not None
    rt.unregister_router(router_id, force=True)
    gc.collect()
    assert reference() is None


@MAKE
def test_eager_routers_are_not_pinned(
    gpu: Any, capturing: SimpleNamespace, make: Callable[[], Any]
) -> None:
    router, call = make()
    call()
    assert router.is_registered is False
    rt.unregister_router(rt.register_router(router))


@MAKE
def test_asking_stops_once_captured(
    gpu: Any, capturing: SimpleNamespace, make: Callable[[], Any]
) -> None:
    router, call = make()
    capturing.now, capturing.asked = True, 0
    for _ in range(5):
        call()
    assert capturing.asked == 1
    rt.unregister_router(router.router_id, force=True)


# --- failures of the device ---

CASES = [
    ("CUDA_ERROR_ILLEGAL_ADDRESS", "restart the process.*compute-sanitizer"),
    ("CUDA_ERROR_ASSERT", "an earlier kernel or copy .* failed"),
    ("CUDA_ERROR_LAUNCH_FAILED", "restart the process"),
    ("CUDA_ERROR_ECC_UNCORRECTABLE", "restart the process"),
    ("CUDA_ERROR_OUT_OF_MEMORY", "free device memory"),
    ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "end the capture"),
    ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "end the capture"),
    ("CUDA_ERROR_INVALID_VALUE", re.escape(advice.runtime("doctor"))),
]


@pytest.mark.parametrize(("name", "message"), CASES)
def test_failed_launches_say_what_to_do(gpu: Any, name: str, message: str) -> None:
    path = served()
    gpu.launch_status = getattr(real.CUresult, name)
    with pytest.raises(DriverError, match=rf"launch of dense_router_decode.*{name}.*{message}"):
        path.route(hidden(3))
    gpu.launch_status = real.CUresult.CUDA_SUCCESS
    same(path.route(hidden(3)), expected(0, hidden(3)))


def test_a_lost_context_is_said_before_the_launch(
    gpu: Any, capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> bool:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    _, call = dense_router()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    with pytest.raises(DriverError, match=r"found CUDA error: device-side .*; .*restart the proc"):
        call()
    assert not gpu.launches


@pytest.mark.parametrize(("name", "message"), CASES[:-1])
def test_failed_loads_say_what_to_do(gpu: Any, name: str, message: str) -> None:
    """And are not reported as a fault of the artifacts; the next attempt starts anew."""
    gpu.load = getattr(real.CUresult, name)
    with pytest.raises(DriverError, match=rf"cuLibraryLoadData of dense.*{name}.*{message}"):
        served()
    gpu.load = real.CUresult.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(ArtifactError, match="run: make build-cubins"):
        served()
    gpu.load = real.CUresult.CUDA_SUCCESS
    same(served().route(hidden(3)), expected(0, hidden(3)))


def test_numbers_of_results_are_the_drivers() -> None:
    assert all(real.CUresult(number).name.startswith("CUDA_ERROR_") for number in driver.REMEDIES)
    lost = {
        real.CUresult(number).name for number, text in driver.REMEDIES.items() if "restart" in text
    }
    for name in ("ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "INVALID_PC", "HARDWARE_STACK_ERROR"):
        assert f"CUDA_ERROR_{name}" in lost


# --- fork and spawn ---


def in_forked_child(action: Callable[[], str]) -> str:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking with threads about: that is the point
        child = os.fork()
    if child == 0:
        try:
            text = action()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode()


def test_every_call_is_refused_in_a_forked_child(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = served()
    lookup = CudaHash(HASH, zero_table(), kernels_on(0), Selection())
    scores = torch.randn(3, 9)

    def select() -> Any:
        return rows.topk_select_cuda(scores, 2)

    calls = [lambda: path.route(hidden(3)), lambda: lookup.route(torch.arange(3)), select]
    for call in calls:
        call()
    # On a machine with a GPU they are there by themselves; none of these is on one.
    for own in (
        path.placement,
        lookup.placement,
        row_kernels._loaded["topk_select", scores.device].placement,
    ):
        placement._on_gpus.add(own)

    def stream(self: Placement) -> int:
        raise AssertionError("torch was called")  # on a GPU its own error would come first

    for call in calls:

        def refused(call: Callable[[], Any] = call) -> str:
            monkeypatch.setattr(Placement, "stream", stream)
            return str(call())

        text = in_forked_child(refused)
        assert text.startswith("DriverError: CUDA after fork"), text
        assert "'spawn'" in text
        call()  # the parent goes on
    # A first call of an op, which would load its kernels, and a new router.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    bias = torch.zeros(9)
    for start in (
        lambda: str(rows.activation_topk_cuda(scores, bias, 2, 1.0, True)),
        lambda: str(Router(CONFIG, weight=None, bias=None, device="cuda")),
    ):
        text = in_forked_child(start)
        assert text.startswith("DriverError: CUDA after fork"), text


def test_cpu_routers_serve_in_a_forked_child() -> None:
    weight, bias = weights_of(0)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    wanted = router(hidden(3))[1].tolist()
    # One thread: forking with torch's own pool of threads in use is not supported by torch.
    assert in_forked_child(
        lambda: str(torch.set_num_threads(1) or router(hidden(3))[1].tolist())
    ) == str(wanted)


def test_a_child_of_a_parent_whose_torch_used_cuda(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    weight, bias = weights_of(0)
    with pytest.raises(DriverError, match=r"CUDA after fork.*'spawn'"):
        Router(CONFIG, weight=weight, bias=bias, device="cuda")
    fake.init = real.CUresult.CUDA_ERROR_NOT_INITIALIZED
    with pytest.raises(
        DriverError, match=r"NOT_INITIALIZED from cuInit; start workers with the 'sp"
    ):
        driver.initialise()


def test_routers_are_not_pickled() -> None:
    weight, bias = weights_of(0)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    model = torch.nn.Sequential(router)
    for attempt in (
        lambda: pickle.dumps(router),
        lambda: torch.save(model, io.BytesIO()),
        lambda: copy.copy(router),
    ):
        with pytest.raises(InputError, match=r"send the config and state_dict.*build it there"):
            attempt()
    assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG


def build_and_route(seed: int) -> list[list[int]]:
    """What a spawned worker does."""
    weight, bias = weights_of(seed)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    router_id = rt.register_router(router)
    ids: list[list[int]] = rt.dense_router(hidden(3), router_id, E, K)[1].tolist()
    return ids


def test_spawned_workers_build_their_own() -> None:
    code = (
        "import sys, multiprocessing, importlib.util\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import tests.runtime.test_process as module\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        print(pool.map(module.build_and_route, [1, 2]))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "main.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
        )
    assert done.stdout.strip() == str([build_and_route(1), build_and_route(2)]), done.stderr


# --- files ---

#: Audit events of the interpreter that change a file system or lock a file.
CHANGES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "fcntl.flock", "fcntl.lockf", "shutil.move"),
)

AUDIT = f"""
import os, sys
CHANGES = {CHANGES!r}
changes = []

def audit(event, arguments):
    if event in CHANGES:
        changes.append((event, *map(str, arguments)))
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[0] != os.devnull:
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            changes.append((event, *map(str, arguments)))

sys.addaudithook(audit)
"""


class Audit:
    """What this process did to files while it was on. An audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self._space: dict[str, Any] = {}
        exec(AUDIT, self._space)

    @property
    def changes(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = self._space["changes"]
        return found


@pytest.fixture(scope="module")
def audit() -> Audit:
    return Audit()


def test_nothing_is_written_and_nothing_is_locked(gpu: Any, audit: Audit) -> None:
    """Loading, building, every kind of call, update, registration: on the (fake) GPU's path."""
    artifacts = Path(os.environ["ROUTER_RUNTIME_ARTIFACTS"])
    before = sorted((path, path.stat().st_mtime_ns) for path in artifacts.rglob("*"))
    audit.changes.clear()
    path = served()
    lookup = CudaHash(HASH, zero_table(), kernels_on(0), Selection())
    for tokens in (1, 9, 40):
        path.route(hidden(tokens))
        path.route_with_logits(hidden(tokens))
        lookup.route(torch.arange(tokens))
        rows.topk_select_cuda(torch.randn(tokens, 9), 2)
        rows.activation_topk_cuda(torch.randn(tokens, 9), torch.zeros(9), 2, 1.0, True)
    weight, bias = weights_of(0)
    router = Router(CONFIG, weight=weight, bias=bias, device="cpu")
    router.update_weights(weight=weight, bias=bias)
    router.warmup()
    rt.unregister_router(rt.register_router(router))
    assert audit.changes == []
    assert sorted((path, path.stat().st_mtime_ns) for path in artifacts.rglob("*")) == before
    (artifacts / "canary").write_text("the audit sees what it should")
    assert len(audit.changes) == 1


def test_an_unprivileged_user_with_nothing_to_write_to(gpu: Any) -> None:
    """The package and the artifacts as read-only copies, no home, no temporary folder, the root as
    working folder; as another user if this one is privileged.
    """
    place = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(ROOT / "router_runtime", place / "lib" / "router_runtime")
        shutil.copytree(os.environ["ROUTER_RUNTIME_ARTIFACTS"], place / "artifacts")
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = subprocess.run(
            [sys.executable, "-B", "-c", AUDIT + SERVE],
            cwd="/",
            env={
                "PATH": os.environ.get("PATH", ""),
                "PYTHONPATH": str(place / "lib"),
                "ROUTER_RUNTIME_ARTIFACTS": str(place / "artifacts"),
                **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), "/nonexistent"),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.stdout.strip().endswith("served"), done.stdout + done.stderr
    finally:
        for path in (place, *place.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(place)


SERVE = f"""
import grp, resource, shlex  # of the standard library, as the package imports them
import torch
import cuda.bindings.driver

if os.geteuid() == 0:  # only now: the interpreter may be where no other user may read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    assert not os.access("/", os.W_OK)

import router_runtime as r
from router_runtime.cli import diagnosis, screen
from router_runtime.device.artifact_store import find_artifacts, read_cubin, read_manifest

config = r.RouterConfig({H}, {E}, {K}, 1.5)
weight = torch.randn({E}, {H}).bfloat16()
router = r.Router(config, weight=weight, bias=torch.zeros({E}), device="cpu")
x = torch.randn(3, {H}).bfloat16()
r.dense_router(x, r.register_router(router), {E}, {K})
r.topk_select(torch.randn(3, 9), 2)
folder = find_artifacts()
for entry in read_manifest(folder).entries:
    read_cubin(entry, folder)
list(screen.lines(diagnosis.diagnose(None)))
assert not changes, changes
print("served")
"""
