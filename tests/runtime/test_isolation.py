"""What importing and serving needs, and what it must not need. Each test is a fresh interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from router_runtime.errors import EXTRAS, install_extra

ROOT = Path(__file__).resolve().parents[2]

#: Makes modules look uninstalled. An error instead would end torch's own start, which
#: imports Triton.
BLOCK = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "nojit")!r})
import lockdown
del sys.path[0]
lockdown.enter({{prefixes!r}})
"""

COMPILERS = (
    *("build_kernels", "cutlass", "triton", "cuda.core", "cuda.nvrtc", "cuda.bindings.nvrtc"),
    *("cuda.bindings.nvjitlink", "cuda.bindings.runtime", "cuda.tile", "numba"),
)


def run(
    code: str, block: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(prefixes=block) + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_import_needs_no_torch_and_no_driver() -> None:
    done = run(
        "import router_runtime, router_runtime.format.manifest\n"
        "print(router_runtime.InputError.__name__, sorted(router_runtime.__all__) "
        "== router_runtime.__all__, set(router_runtime.__all__) <= set(dir(router_runtime)))",
        block=("torch", "cuda", "click", *COMPILERS),
    )
    assert done.stdout.split() == ["InputError", "True", "True"], done.stderr


def test_every_public_name_resolves() -> None:
    done = run(
        "import router_runtime\n"
        "for name in router_runtime.__all__: getattr(router_runtime, name)\n"
        "try: router_runtime.nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert "has no attribute 'nothing'" in done.stdout, done.stderr


def test_serves_without_any_compiler(tmp_path: Path) -> None:
    """Routers of two modes and four ops, with the builder and every compiler package absent, no
    artifacts, and a working folder that must stay empty.
    """
    done = run(
        f"""
import os
os.chdir({str(tmp_path)!r})
import torch, router_runtime as r
config = r.RouterConfig(64, 16, 4, 1.5)
dense = r.Router(config, weight=torch.randn(16, 64).bfloat16(), bias=torch.zeros(16), device="cpu")
config = r.RouterConfig(64, 16, 4, 1.5, mode="hash", vocab_size=9)
hashed = r.Router(config, table=torch.zeros(9, 4, dtype=torch.int64), device="cpu")
first, second = r.register_router(dense), r.register_router(hashed)
x = torch.randn(3, 64).bfloat16()
for result in (
    dense(x),
    r.dense_router(x, first, 16, 4),
    torch.ops.dsv4.hash_router(torch.arange(3), second, 4),
    r.topk_select(torch.randn(3, 9), 4),
    r.activation_topk(torch.randn(3, 16), torch.zeros(16), 4, 1.5, True),
):
    assert result[0].shape == result[1].shape == (3, 4)
r.warmup_router_compilation(dense)
from router_runtime.cli import doctor
from router_runtime.device import driver
from router_runtime.device import kernels
from router_runtime.device import launch
from router_runtime.device import loader
from router_runtime.verification import verify
assert not [name for name in sys.modules if name.split(".")[0] in ("build_kernels", "cutlass")]
assert not os.listdir()
print("served")
""",
        block=COMPILERS,
    )
    assert done.stdout == "served\n", done.stderr


def test_driver_module_is_the_only_binding_used() -> None:
    """What the CUDA path imports, with a driver or without."""
    done = run(
        """
import torch
before = set(sys.modules)  # torch imports some of them for itself
from router_runtime.device import driver
try:
    driver.initialise()
except driver.DriverError:
    pass
extra = {"nvrtc", "nvjitlink", "runtime", "nvvm", "core"}
ours = set(sys.modules) - before
print(sorted(n for n in ours if n.startswith("cuda.") and set(n.split(".")) & extra))
"""
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_cpu_never_touches_the_driver() -> None:
    """Neither importing nor CPU Routers do, in eager and in compiled code; a CUDA one does."""
    done = run(
        """
import router_runtime as r
from router_runtime.device import driver

touched = []

def touch():
    touched.append(1)
    raise driver.DriverError("touched")

driver.bindings = touch
import torch
config = r.RouterConfig(64, 16, 4, 1.5)
weight, bias = torch.randn(16, 64).bfloat16(), torch.zeros(16)
router = r.Router(config, weight=weight, bias=bias, device="cpu")
x = torch.randn(3, 64).bfloat16()
router(x)
router.warmup()
r.dense_router(x, r.register_router(router), 16, 4)
r.topk_select(torch.randn(3, 9), 4)
torch.compile(router, backend="eager")(x)
print(touched)
try:
    driver.initialise()
except driver.DriverError as error:
    print(error)
""",
    )
    assert done.stdout.split() == ["[]", "touched"], done.stderr


def test_missing_bindings_are_named() -> None:
    done = run(
        "from router_runtime.device import driver\n"
        "try: driver.bindings()\n"
        "except driver.DriverError as error: print(error)",
        block=("cuda.bindings",),
    )
    assert "expected the package cuda-bindings" in done.stdout, done.stderr
    assert "pip install cuda-bindings" in done.stdout


def test_every_extra_that_an_error_names_is_one() -> None:
    """And some error names each extra: in its own remedy, or by ``find_engine`` for an engine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "".join(each.read_text() for each in (ROOT / "router_runtime").rglob("*.py"))
    named = set(re.findall(r"install_extra\(['\"](\w+)", sources))
    engines = {name.lower() for name in re.findall(r"find_engine\(\s*['\"](\w+)", sources)}
    assert named | engines == set(EXTRAS)
    assert {name: [needed] for name, needed in EXTRAS.items()} == project["optional-dependencies"]


def test_what_is_missing_is_installed_by_its_own_name() -> None:
    """Not as an extra of this distribution, of whose name an index may have somebody else's."""
    assert install_extra("signature") == "run: pip install 'cryptography>=42'"


def hidden(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Ask for the bindings in a working directory whose files hide them."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            code + "\nfrom router_runtime.device import driver\n"
            "try: driver.bindings()\n"
            "except driver.DriverError as error: print(error)",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("content", ["x = 1", "raise SystemError('mine')", "def (:"])
@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("cuda.py", "cuda.py"),
        ("cuda/__init__.py", "cuda"),
        ("cuda/bindings.py", "cuda/bindings.py"),
        ("cuda/bindings/__init__.py", "cuda/bindings"),
    ],
)
def test_a_file_that_hides_the_bindings_is_named(
    tmp_path: Path, path: str, named: str, content: str
) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(content)
    # torch, which this package imports where it is installed, would be the first to fail.
    done = hidden(tmp_path, "import sys; sys.modules['torch'] = None")
    # cuda-bindings 12 imports ``cuda`` when Python starts: then no file can take its place.
    if importlib.util.find_spec("_cuda_bindings_redirector") and not named.startswith("cuda/"):
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return
    assert (
        f"expected the package cuda-bindings, found {tmp_path / named}, which Python imports in "
        f"its place; rename {tmp_path / named}, or start Python in another folder" in done.stdout
    ), done.stderr


def test_a_folder_that_hides_nothing(tmp_path: Path) -> None:
    """Python looks for the parts of a package without ``__init__.py`` everywhere."""
    (tmp_path / "cuda" / "notes").mkdir(parents=True)
    done = hidden(tmp_path, "")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
