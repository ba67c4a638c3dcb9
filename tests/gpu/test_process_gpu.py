"""One process that serves: overlapping launches of one router, captures that fail, graphs that pin,
threads, memory that runs out, a lost context, forks, and nothing written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from router_runtime import (
    DriverError,
    InputError,
    get_router,
    register_router,
    unregister_router,
)
from router_runtime.device.driver import bindings
from tests.gpu.graphs import captured

ROOT = Path(__file__).resolve().parents[2]


def batch_sizes(router):
    """One batch for each kernel that the router dispatches to, its largest up to 300 tokens."""
    return [min(each.high, max(each.low, 300)) for each in router.token_ranges]


@pytest.fixture
def forget():
    """Unregisters what captures registered."""
    routers = []
    yield routers.append
    torch.cuda.synchronize()
    for router in routers:
        if router.is_registered:
            unregister_router(router.router_id, force=True)


# --- overlapping launches of one router (programmatic dependent launch) ---


def chained(router, x, depth):
    """A chain of launches of one router. Half follow each other with nothing between, so that the
    next may start while the last still runs; the others read what the last one wrote.
    """
    results = []
    for step in range(depth):
        results.append(router(x))
        if step % 2:
            weights, ids = results[-1]
            x = x.clone()
            x[:, 0] = weights[:, 0].bfloat16()
            x[:, 1] = ids[:, 0].bfloat16()
    return results


def test_two_chains_of_one_router_at_once(make_router, draw, same):
    router = make_router()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for tokens in (1, 7, *batch_sizes(router)):
        inputs = [draw(tokens, router.config.hidden_size, seed) for seed in (5, 6)]
        expected = [chained(router, x, 16) for x in inputs]
        torch.cuda.synchronize()
        for _ in range(10):
            found = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(chained(router, x, 16))
            torch.cuda.synchronize()
            for results, wanted in zip(found, expected, strict=True):
                for one, other in zip(results, wanted, strict=True):
                    same(one, other)


def test_two_graphs_of_chains_replayed_at_once(make_router, draw, same, forget):
    """Both graphs hold chains of the same router, and stay in flight over and over together."""
    router = make_router()
    forget(router)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for tokens in (1, 7, *batch_sizes(router)):
        inputs = [draw(tokens, router.config.hidden_size, seed) for seed in (5, 6)]
        expected = [chained(router, x, 12) for x in inputs]
        graphs = [captured(lambda x=x: chained(router, x, 12)) for x in inputs]
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, results), wanted in zip(graphs, expected, strict=True):
            for one, other in zip(results, wanted, strict=True):
                same(one, other)


def test_eager_calls_beside_a_replay(make_router, draw, same, forget):
    router = make_router()
    forget(router)
    side = torch.cuda.Stream()
    for tokens in (1, 7, *batch_sizes(router)):
        x, y = (draw(tokens, router.config.hidden_size, seed) for seed in (5, 6))
        expected = router(y)
        graph, outputs = captured(lambda x=x: router(x))
        graph.replay()
        torch.cuda.synchronize()
        wanted = [output.clone() for output in outputs]
        torch.cuda.synchronize()
        for _ in range(50):
            with torch.cuda.stream(side):
                graph.replay()
            found = router(y)
        same(found, expected)
        same(outputs, wanted)


# --- captures that fail ---


def begin_capture(stream):
    api = bindings()
    mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    assert not api.cuStreamBeginCapture(stream.cuda_stream, mode)[0]


def end_capture(stream):
    """The status of the end: of an invalidated capture it is no success, and there is no graph."""
    return bindings().cuStreamEndCapture(stream.cuda_stream)[0]


@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_after_an_invalidated_capture(tokens, make_router, draw, same, forget):
    """The driver invalidates a capture in which something waits for its stream. A launch into it is
    refused in words; eager calls and the next capture are as right as before.
    """
    router = make_router()
    forget(router)
    x = draw(tokens, router.config.hidden_size)
    expected = router(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        router(x)  # torch's allocator has memory for this stream
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(stream):
            begin_capture(stream)
            router(x)
            assert bindings().cuStreamSynchronize(stream.cuda_stream)[0]  # breaks the capture
            with pytest.raises(DriverError, match=r"STREAM_CAPTURE_INVALIDATED.*end the capture"):
                router(x)
            assert end_capture(stream)
        for _ in range(5):
            same(router(x), expected)
        with torch.cuda.stream(stream):
            found = router(x)
        same(found, expected)
        graph, outputs = captured(lambda: router(x))
        for _ in range(3):
            for output in outputs:
                output.fill_(-5)
            graph.replay()
            same(outputs, expected)


def test_after_an_exception_inside_a_capture(make_router, draw, same, forget):
    router = make_router()
    forget(router)
    x = draw(8, router.config.hidden_size)
    expected = router(x)

    def failing():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            router(x)
            raise KeyError("by the caller")

    with pytest.raises(KeyError):
        failing()
    same(router(x), expected)
    graph, outputs = captured(lambda: router(x))
    graph.replay()
    same(outputs, expected)


# --- a graph pins its router ---


def test_a_graph_outlives_every_other_reference(make_router, draw, same):
    import gc

    router = make_router(seed=41)
    x = draw(8, router.config.hidden_size)
    expected = [output.clone() for output in router(x)]
    router_id = register_router(router)
    graph, outputs = captured(lambda: get_router(router_id)(x))
    del router
    with pytest.raises(InputError, match=r"no CUDA graph has captured.*force=True"):
        unregister_router(router_id)
    gc.collect()
    # Were the weights free, this would be written over them.
    noise = [torch.full((2**20,), 7.0, device="cuda") for _ in range(64)]
    graph.replay()
    same(outputs, expected)
    del noise, graph, outputs
    unregister_router(router_id, force=True)


def test_a_capture_registers_a_router(make_router, draw, same):
    router = make_router(seed=42)
    x = draw(8, router.config.hidden_size)
    expected = [output.clone() for output in router(x)]
    assert router.is_registered is False
    graph, outputs = captured(lambda: router(x))
    router_id = router.router_id
    graph.replay()
    same(outputs, expected)
    unregister_router(router_id, force=True)


def test_eager_use_pins_nothing(make_router, draw):
    router = make_router(seed=43)
    router_id = register_router(router)
    for tokens in (1, 100):
        router(draw(tokens, router.config.hidden_size))
    unregister_router(router_id)


# --- threads ---


def test_threads_with_their_own_streams(make_router, draw, same):
    """Eight threads, four routers, each thread on a stream of its own, all at once."""
    routers = [make_router(seed) for seed in range(50, 54)]
    hidden = routers[0].config.hidden_size
    jobs = []
    for number in range(8):
        router = routers[number % 4]
        x = draw(1 + 9 * number, hidden, seed=number)
        jobs.append((router, x, [output.clone() for output in router(x)]))
    torch.cuda.synchronize()
    barrier, found, problems = threading.Barrier(8), [[] for _ in jobs], []

    def work(number):
        try:
            router, x, _ = jobs[number]
            stream = torch.cuda.Stream()
            barrier.wait(timeout=60)
            with torch.cuda.stream(stream):
                for _ in range(100):
                    found[number].append(router(x))
            stream.synchronize()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    for results, (_, _, wanted) in zip(found, jobs, strict=True):
        for result in results:
            same(result, wanted)


# --- memory, lost contexts, forks: each in a process of its own ---

PRELUDE = """
import os, sys, torch
import router_runtime as r
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router

torch.set_num_threads(1)  # a forked child has none of torch's other threads
hidden, experts, k = map(int, sys.argv[1:4])
config = RouterConfig(hidden, experts, k, 1.5)
weight = torch.randn(experts, hidden).bfloat16()
bias = torch.zeros(experts)

def build():
    return Router(config, weight=weight, bias=bias, device="cuda")

def states(tokens):
    return torch.randn(tokens, hidden, device="cuda").bfloat16()
"""


def in_a_process(code, model, **environment):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, model)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_out_of_memory_is_survived(models):
    done = in_a_process(
        """
router = build()
x = states(8)
expected = router(x)
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
kept = []
try:
    while True:
        kept.append(build())
except torch.OutOfMemoryError as error:
    print("refused:", "out of memory" in str(error))
del kept
torch.cuda.empty_cache()
torch.cuda.set_per_process_memory_fraction(1.0)
again = build()(x)
torch.cuda.synchronize()
print(all(torch.equal(a, b) for a, b in zip(again, expected)))
""",
        models[0],
    )
    assert done.stdout.split("\n")[:2] == ["refused: True", "True"], done.stdout + done.stderr


def test_a_lost_context_ends_in_words(models):
    """After a failed assertion in another kernel, every later launch of the process fails."""
    done = in_a_process(
        """
router = build()
x = states(8)
router(x)
torch.cuda.synchronize()
torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    router(x)
    print("served")
except r.DriverError as error:
    print(error)
sys.stdout.flush()
os._exit(0)
""",
        models[0],
    )
    assert "restart the process" in done.stdout, done.stdout + done.stderr
    assert "served" not in done.stdout


def test_a_forked_child_is_refused(models):
    done = in_a_process(
        """
router = build()
x = states(8)
scores = torch.randn(3, 99, device="cuda")
r.topk_select(scores, 4)
expected = router(x)
torch.cuda.synchronize()
sys.stdout.flush()
child = os.fork()
if child == 0:
    for call in (lambda: router(x), lambda: r.topk_select(scores, 4), build):
        try:
            call()
            print("served")
        except r.DriverError as error:
            print("fork" if "CUDA after fork" in str(error) and "spawn" in str(error) else error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
again = router(x)
torch.cuda.synchronize()
print(all(torch.equal(a, b) for a, b in zip(again, expected)))
""",
        models[0],
    )
    assert done.stdout.split() == ["fork", "fork", "fork", "True"], done.stdout + done.stderr


def test_a_fork_before_the_first_call_may_serve(models):
    done = in_a_process(
        """
child = os.fork()
if child == 0:
    weights, ids = build()(states(8))
    print(tuple(ids.shape))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
print(tuple(build()(states(4))[1].shape))
""",
        models[0],
    )
    k = models[0][2]
    assert done.stdout.split("\n")[:2] == [f"(8, {k})", f"(4, {k})"], done.stdout + done.stderr


def test_nothing_is_written_and_no_privilege_is_needed(models):
    """As another user if this one is privileged, without a home or a temporary folder, in a folder
    that it may not write; the interpreter reports every file that is opened to be written and every
    lock that is taken.
    """
    done = in_a_process(
        """
from router_runtime.device.artifact_store import find_artifacts
from tests import caches

def serve():
    router = build()
    for tokens in (1, 70, 300):
        router(states(tokens))
        router.forward_with_logits(states(tokens))
    floats = torch.randn(3, 99, device="cuda")
    r.topk_select(floats, 4)
    r.activation_topk(floats, floats[0], 4, 1.5, True)
    router.update_weights(bias=bias)
    r.unregister_router(r.register_router(router))
    torch.cuda.synchronize()

serve()  # now everything is imported: the interpreter may be where no other user may read
caches.clear()
folder = str(find_artifacts())
os.chdir("/")
if os.geteuid() == 0:
    os.system(f"chmod -R a+rX {folder}")
    parent = os.path.dirname(folder)
    while parent != "/":
        os.chmod(parent, os.stat(parent).st_mode | 0o011)
        parent = os.path.dirname(parent)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
changes = []

def audit(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.link", "fcntl.flock", "fcntl.lockf"):
        changes.append((event, arguments))
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            changes.append((event, arguments))

sys.addaudithook(audit)
serve()
print(changes)
""",
        models[0],
        HOME="/nonexistent",
        TMPDIR="/nonexistent",
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
