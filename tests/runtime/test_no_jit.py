"""Serving compiles, writes and starts nothing: what can be proved without a GPU.

The GPU's part is ``tests/gpu/test_no_jit_gpu.py``; both use ``tests/nojit``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from router_runtime.artifacts import read_cubin, read_manifest
from router_runtime.manifest import MANIFEST_NAME
from tests.nojit import fresh

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(build: SimpleNamespace, tmp_path: Path) -> Path:
    path: Path = build.artifacts(tmp_path / "artifacts", build.small())
    return path


def test_every_op_serves_and_every_file_is_read(folder: Path, tmp_path: Path) -> None:
    done = fresh.run(fresh.make_site(tmp_path / "site", folder), "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("dense_router", "dense_router_logits", "hash_router", "topk_select"):
        assert f"ran {op} " in done.stdout


def test_one_kernel_exchanged_for_ptx_fails_it(folder: Path, tmp_path: Path) -> None:
    """With a manifest that has the PTX's digest right: a driver would have compiled it."""
    fresh.exchange_for_ptx(folder, "sm_90a")
    done = fresh.run(fresh.make_site(tmp_path / "site", folder), "cpu")
    assert done.returncode == 1
    assert "expected machine code for sm_90a" in done.stdout, done.stderr


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
    """Code that tries and goes on as if nothing had happened is caught all the same."""
    done = locked(
        f"lockdown.enter()\nlockdown.seal()\ntry: exec({attempt!r})\n"
        "except ImportError: print('no such module')\n"
        "except OSError: print('refused')\n"
        "else: print('it went through')\nprint(len(lockdown.violations()))",
        tmp_path,
    )
    said, remembered = done.stdout.splitlines()
    if said == "refused":
        assert int(remembered) >= 1
    else:
        assert said == "no such module", done.stderr
    assert not list(tmp_path.iterdir())


#: Past Python: a library's own calls. errno by ctypes, so that no audit event is raised.
BY_THE_KERNEL = {
    "open to create": "c.open(b'made', os.O_CREAT | os.O_WRONLY, 0o600)",
    "mkdir": "c.mkdir(b'made', 0o700)",
    "rename": "c.rename(b'there', b'made')",
    "unlink": "c.unlink(b'there')",
    "truncate": "c.truncate(b'there', 0)",
    "write into what is there": "c.write(there, b'x', 1)",
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
