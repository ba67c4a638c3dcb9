"""Serving compiles, writes and starts nothing: what can be proved without a GPU.

The GPU's part is ``tests/gpu/test_no_jit_gpu.py``; both use ``tests/nojit``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from router_runtime.device import driver
from router_runtime.device.artifact_store import read_cubin, read_manifest
from router_runtime.format.manifest import MANIFEST_NAME
from router_runtime.verification import verify
from tests.nojit import fresh, lockdown, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(build: SimpleNamespace, tmp_path: Path) -> Path:
    path: Path = build.artifacts(tmp_path / "artifacts", build.small())
    return path


def test_every_op_serves_and_every_file_is_read(folder: Path, tmp_path: Path) -> None:
    done = fresh.run(fresh.make_site(tmp_path / "site", folder), "cpu")
    assert done.returncode == 0, fresh.report(done)
    for op in ("dense_router", "dense_router_logits", "hash_router", "topk_select"):
        assert f"ran {op} " in done.stdout


def test_one_kernel_exchanged_for_ptx_fails_it(folder: Path, tmp_path: Path) -> None:
    """With a manifest that has the PTX's digest right: a driver would have compiled it."""
    fresh.exchange_for_ptx(folder, "sm_90a")
    done = fresh.run(fresh.make_site(tmp_path / "site", folder), "cpu")
    assert done.returncode == 1
    assert "expected machine code for sm_90a" in done.stdout, fresh.report(done)


def test_the_command_says_everything_of_a_run_that_fails(folder, tmp_path, capsys):
    """Anyone can run it; without a GPU it serves on the CPU."""
    arguments = ["--device", "cpu", "--artifacts", str(folder)]
    assert fresh.main(arguments) == 0
    said = capsys.readouterr().out
    assert "exit status 0" in said
    assert "ran dense_router " in said
    assert "without the lock" not in said
    fresh.exchange_for_ptx(folder, "sm_90a")
    assert fresh.main(arguments) == 1
    said = capsys.readouterr().out
    assert said.count("expected machine code for sm_90a") == 1 + len(lockdown.LOCKS)
    assert all(f"without the lock '{lock}': exit status 1" in said for lock in lockdown.LOCKS)
    assert f"torch {importlib.metadata.version('torch')} in " in said


def test_evidence_can_be_made_for_the_command(folder, monkeypatch, capsys):
    """For a GPU whose evidence is stale: what was copied is examined, and serves if it is right."""
    examined = []
    right = True

    def verified(copy, record, echo):
        examined.append((copy, record))
        assert len(list(copy.glob("*.cubin"))) == len(read_manifest(copy).entries)
        return SimpleNamespace(passed=right)

    monkeypatch.setattr(verify, "run", verified)
    arguments = ["--device", "cpu", "--artifacts", str(folder), "--verify"]
    assert fresh.main(arguments) == 0, capsys.readouterr().out
    assert [record for _, record in examined] == [True]
    assert examined[0][0] != folder
    right = False
    with pytest.raises(SystemExit, match="expected kernels that pass the oracle suite"):
        fresh.main(arguments)


def test_a_part_that_is_required_as_an_extra_is_there(monkeypatch):
    """As torch requires the libraries of CUDA."""
    listed = {
        "torch": ["cuda-toolkit[cublas]==13.0; platform_system == 'Linux'", "triton"],
        "cuda-toolkit": ["nvidia-cublas; extra == 'cublas'", "nvidia-npp; extra == 'npp'"],
        "nvidia-cublas": None,
        "nvidia-npp": None,
        "triton": None,
    }

    def distribution(name):
        if name not in listed:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(requires=listed[name])

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert fresh._closure() == {"torch", "cuda-toolkit", "nvidia-cublas"}


def test_compilers_look_uninstalled(tmp_path):
    """To code that looks for them, as torch looks for Triton when it initialises CUDA: an error
    would end that.
    """
    absent = ("triton", "cutlass", "cuda.core", "cuda.bindings.nvrtc", "build_kernels")
    assert set(absent) <= set(lockdown.COMPILERS)
    done = locked(
        "from importlib import metadata, util\nlockdown.enter()\n"
        f"print([util.find_spec(name) for name in {absent}])\n"
        "print(util.find_spec('cuda.bindings.driver') is not None, metadata.version('torch'))",
        tmp_path,
    )
    version = importlib.metadata.version("torch")
    assert done.stdout == f"{[None] * len(absent)}\nTrue {version}\n", done.stderr


def test_the_drivers_compiler_may_be_there_if_it_compiles_nothing(capsys):
    """It is left to the driver, unless the driver would take PTX."""
    compiler = ["/usr/lib/libnvidia-ptxjitcompiler.so.580"]
    disabled, compiled, invalid = 223, 0, 218
    assert serve.would_have_compiled([], disabled) == []
    assert serve.would_have_compiled([], compiled) == []
    assert serve.would_have_compiled(compiler, disabled) == []
    for control in (compiled, invalid):
        (problem,) = serve.would_have_compiled(compiler, control)
        assert compiler[0] in problem
    said = capsys.readouterr().out
    assert "PTX then: CUDA_ERROR_JIT_COMPILATION_DISABLED" in said
    assert "PTX then: compiled" in said


@pytest.mark.parametrize(
    ("code", "status"), [(0, [0, 0, 0, 0]), (223, [223]), (221, [0, 0, 221]), (218, [0, 0, 0, 218])]
)
def test_the_control_goes_as_far_as_the_function(monkeypatch, code, status):
    """A driver that loads lazily compiles when the function is looked up."""
    left = list(status)

    class Api:
        def __getattr__(self, name):
            assert name.startswith("cu")
            return lambda *_: (left.pop(0),) if name == "cuFuncLoad" else (left.pop(0), object())

    monkeypatch.setattr(driver, "context", lambda _: contextlib.nullcontext(Api()))
    assert serve.ptx_in_the_driver("cuda:0") == code
    assert not left


@pytest.mark.parametrize(
    "attempt",
    [
        "import triton",
        "import cuda.bindings.nvrtc",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "open('made', 'w')",
        "import os; os.mkdir('made')",
        "import tempfile; tempfile.mkstemp()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import ctypes; ctypes.CDLL('libnvrtc.so.13')",
        "import ctypes; ctypes.CDLL('libnvidia-ptxjitcompiler.so.1')",
    ],
)
def test_the_locks_hold_and_remember(tmp_path: Path, attempt: str) -> None:
    """Code that tries and then swallows the error is caught too."""
    done = locked(
        f"lockdown.enter()\nlockdown.seal()\ntry: exec({attempt!r})\n"
        "except ImportError: print('no such module')\n"
        "except OSError: print('refused')\n"
        "else: print('it went through')\n"
        "found = lockdown.violations(); print(len(found), *found, sep='\\n')",
        tmp_path,
    )
    said, remembered, *found = done.stdout.splitlines()
    if said == "refused":
        assert int(remembered) >= 1
        callers = found[0].partition(", called by ")[2].split(" < ")
        assert callers[-1].startswith("<string>:")
    else:
        assert said == "no such module", done.stderr
    assert not list(tmp_path.iterdir())


#: Calls inside C libraries. errno by ctypes, so that no audit event is raised.
BY_THE_KERNEL = {
    "open to create": "c.open(b'made', os.O_CREAT | os.O_WRONLY, 0o600)",
    "mkdir": "c.mkdir(b'made', 0o700)",
    "rename": "c.rename(b'there', b'made')",
    "unlink": "c.unlink(b'there')",
    "truncate": "c.truncate(b'there', 0)",
    "write into an open file": "c.write(there, b'x', 1)",
    "fork": "c.fork()",
    "vfork and exec": "c.system(b'true') - (c.system(b'true') != 0)",
    "exec": "c.execve(b'/bin/true', None, None)",
    "internet": "c.socket(2, 1, 0)",
    "internet 6": "c.socket(10, 1, 0)",
}


@pytest.mark.parametrize("call", BY_THE_KERNEL)
def test_the_seal_holds_for_libraries(tmp_path: Path, call: str) -> None:
    (tmp_path / "there").write_text("kept")
    code = (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "there = os.open('there', os.O_RDWR)\nlockdown.seal()\n"
        f"print({BY_THE_KERNEL[call]})"
    )
    done = locked(code, tmp_path)
    assert done.stdout.split() == ["-1"] or "vfork" in call, done.stderr
    assert "vfork" not in call or int(done.stdout) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


#: What each lock alone stops; the hook raises, the others return -1.
BY_ONE_LOCK = {
    "limit": "c.write(there, b'x', 1)",
    "filter": "c.mkdir(b'made', 0o700)",
    "hook": "os.mkdir('made')",
}


@pytest.mark.parametrize("lock", BY_ONE_LOCK)
def test_a_lock_can_be_left_open_to_find_who_runs_into_it(tmp_path, lock):
    (tmp_path / "there").write_text("kept")
    everything = set(lockdown.LOCKS)
    # The kernel's locks stop what the hook would, so it is tried without them.
    others = {"filter", "limit"} if lock == "hook" else {"hook"}
    for without, stopped in ((others, True), (others | {lock}, False)):
        assert without <= everything
        code = (
            "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
            f"there = os.open('there', os.O_RDWR)\nlockdown.seal({tuple(without)})\n"
            f"try: print({BY_ONE_LOCK[lock]} == -1)\nexcept PermissionError: print(True)"
        )
        assert locked(code, tmp_path).stdout == f"{stopped}\n"


def test_the_seal_lets_threads_and_reading_pass(tmp_path: Path) -> None:
    code = (
        "import threading\nlockdown.seal()\nfound = []\n"
        "thread = threading.Thread(target=lambda: found.append(open('/proc/self/maps').read()))\n"
        "thread.start(); thread.join(); print(len(found), lockdown.violations())"
    )
    assert locked(code, tmp_path).stdout == "1 []\n"


def locked(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'nojit')!r})\nimport lockdown\n"
    return subprocess.run(
        [sys.executable, "-I", "-B", "-c", path + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


BUILT = ROOT / "artifacts"


@pytest.mark.skipif(not (BUILT / MANIFEST_NAME).exists(), reason="run: make build-cubins")
def test_what_was_built_is_machine_code() -> None:
    """Every cubin passes the check that refuses PTX, and holds none in a section or as text."""
    manifest = read_manifest(BUILT)
    assert manifest.entries
    for entry in manifest.entries:
        code = read_cubin(entry, BUILT)
        for trace in (b".nv_fatbin", b"nv_debug_ptx", b".visible .entry", b".address_size"):
            assert trace not in code, f"{entry.key} holds {trace!r}"
