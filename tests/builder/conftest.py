"""A small project to build: a copy of the builder with two tiny kernels instead of the real."""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from build_kernels.compile import nvrtc, toolchain
from build_kernels.compile.job import Job
from build_kernels.emulation.sources import Source, emulated_jobs, sources
from tests.builder.machine_code import Code, compiler
from tests.builder.remembered import REMEMBERED

ROOT = Path(__file__).parents[2]

CATALOG = """
KERNELS = (
    Kernel("scale", "cuda", False, False, (Variant("one", {"FACTOR": 2.0}),)),
    Kernel("shift", "cutedsl", True, True, (Variant("only"),)),
)
"""

TARGETS = """
DEFAULT_TARGETS = ("sm_90a", "sm_100a")
TARGETS = (*DEFAULT_TARGETS, "sm_100f")
"""

#: What a plan reads of the kernels' sources, whichever kernels there are.
PLANNED = (
    "common/numerics.py",
    "common/ptx/tcgen05_layout.py",
    "dense/summation.py",
    "dense/geometry/*.py",
)

MODELS = """
MODELS = MODELS[:2]
"""

#: Module of the builder -> lines to append, which wrap its functions by those of remembered.py.
REMEMBERING = {
    "compile/worker_process.py": """
from build_kernels.compile import remembered
WorkerProcess = remembered.remembering(WorkerProcess)
""",
    "compile/installed.py": """
from build_kernels.compile import remembered
altered = remembered.once(altered)
""",
    "compile/instructions.py": """
from build_kernels.compile import remembered
_disassembled = remembered.disassembled(_disassembled)
""",
}

#: A case of the oracle suite for a small kernel, so that there can be evidence for it.
SUITE = """
_CASES["scale"] = lambda constants, limits: (Case("scale", "only", "normal", {"tokens": 1}),)
"""

SCALE = """
#include "common/factor.cuh"
#include "own.cuh"
extern "C" __global__ void __launch_bounds__(THREADS) scale(const float* x, float* y, int tokens)
{
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < tokens) y[i] = x[i] * factor();
}
"""

SHIFT = """
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_ptr


class Shift:
    def __init__(self, top_k):
        self.top_k = top_k

    @cute.jit
    def __call__(self, x: cute.Pointer, y: cute.Pointer, tokens: cutlass.Int32):
        self.shift(x, y, tokens).launch(grid=[1, 1, 1], block=[128, 1, 1])

    @cute.kernel
    def shift(self, x: cute.Pointer, y: cute.Pointer, tokens: cutlass.Int32):
        i = cute.arch.block_idx()[0] * 128 + cute.arch.thread_idx()[0]
        if i < tokens:
            source = cute.make_tensor(x, cute.make_layout(tokens))
            target = cute.make_tensor(y, cute.make_layout(tokens))
            target[i] = source[i] + cutlass.Float32(self.top_k)


def program(constants):
    pointer = make_ptr(cutlass.Float32, 16, cute.AddressSpace.gmem, assumed_align=16)
    return Shift(constants["TOP_K"]), (pointer, pointer, cutlass.Int32(1))
"""

CONTRACT = """
from router_runtime.format.contract import Contract, GridAxis, Parameter


def contract(constants):
    return Contract(
        parameters=(
            Parameter("x", "ptr:f32"), Parameter("y", "ptr:f32"), Parameter("tokens", "i32"),
        ),
        grid=(
            GridAxis("ceil", argument="tokens", divisor=128),
            GridAxis("constant"),
            GridAxis("constant"),
        ),
        block=(128, 1, 1),
    )
"""

FILES = {
    "common/factor.cuh": "__device__ inline float factor() { return FACTOR; }\n",
    "scale/own.cuh": "constexpr int THREADS = 128;\n",
    "scale/scale.cu": SCALE,
    "scale/contract.py": CONTRACT,
    "shift/shift.py": SHIFT,
    "shift/contract.py": CONTRACT,
}

#: What the project of the release tests builds instead: fast, for no test of
#: releases is about compilers.
RELEASED_CATALOG = """
KERNELS = (
    Kernel(
        "scale", "cuda", False, False,
        (Variant("one", {"FACTOR": 2.0}), Variant("two", {"FACTOR": 5.0})),
    ),
)
"""
RELEASED_KEYS = tuple(
    f"scale/any/{target}/{variant}"
    for target in ("sm_100a", "sm_90a")
    for variant in ("one", "two")
)

#: The keys of the small project's full build.
KEYS = (
    "scale/any/sm_100a/one",
    "scale/any/sm_90a/one",
    "shift/dsv4-flash/sm_100a/only",
    "shift/dsv4-flash/sm_90a/only",
    "shift/dsv4-pro/sm_100a/only",
    "shift/dsv4-pro/sm_90a/only",
)


#: A model file.
MODEL = """
name = "pruned"
hidden = 4096
experts = 144
top_k = 6
scale = 1.5
hash_layers = 3
vocab = 129280
"""


@dataclass(frozen=True)
class Project:
    """A checkout of the small project and the ways to run its builder."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def kernel_file(self, name: str) -> Path:
        return self.root / "build_kernels" / "kernels" / name

    def append(self, name: str, text: str) -> None:
        """Add lines to a file of the builder."""
        with (self.root / "build_kernels" / name).open("a") as file:
            file.write(text)

    def environment(self, changes: Mapping[str, str] = {}) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root), **changes}

    def run(
        self, *arguments: str | Path, env: Mapping[str, str] = {}, umask: int = 0o022
    ) -> subprocess.CompletedProcess[str]:
        """Run ``build-kernels`` and return its exit status and output, errors included."""
        return subprocess.run(
            [sys.executable, "-m", "build_kernels", *arguments],
            cwd=self.root,
            env=self.environment(env),
            umask=umask,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def git(self, *arguments: str) -> str:
        """Run git under a name of its own, without the user's settings."""
        identity = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        for role in ("AUTHOR", "COMMITTER"):
            identity |= {f"GIT_{role}_NAME": "A Releaser", f"GIT_{role}_EMAIL": "a@example.org"}
        result = subprocess.run(
            ["git", *arguments],
            cwd=self.root,
            env={**os.environ, **identity},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.strip()

    def commit(self) -> str:
        """Commit everything that is not ignored, and return the commit."""
        if not (self.root / ".git").exists():
            self.git("init", "--quiet", "--template=", "--initial-branch=main")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "a change")
        return self.git("rev-parse", "HEAD")

    def build(self, *arguments: str | Path, **settings: object) -> str:
        """Run a build that has to succeed, and return its output."""
        result = self.run("build", *arguments, **settings)  # type: ignore[arg-type]
        assert result.returncode == 0, result.stdout
        return result.stdout

    def release(self, *arguments: str | Path, **settings: object) -> Path:
        """Make a release that has to succeed, and return the folder of its files."""
        result = self.run("release", "--jobs", "1", *arguments, **settings)  # type: ignore[arg-type]
        assert result.returncode == 0, result.stdout
        return self.root / result.stdout.splitlines()[-1].split(", in ")[-1]

    def python(self, script: str, **settings: object) -> subprocess.CompletedProcess[str]:
        """Run a script inside the project, with the builder importable."""
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def write_project(root: Path) -> None:
    """The small project's sources, unbuilt, in a new folder."""
    package = root / "build_kernels"
    unwanted = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "build_kernels", package, ignore=unwanted)
    shutil.copytree(ROOT / "router_runtime", root / "router_runtime", ignore=unwanted)
    (root / "tests").mkdir()
    for name in (
        *("pyproject.toml", ".gitignore", "LICENSE", "NOTICE", "README.md", "CHANGELOG.md"),
        *("tests/torch-oldest.txt", "tests/torch-newest.txt"),
    ):
        shutil.copy(ROOT / name, root / name)
    project = Project(root)
    project.append("catalog/kernels.py", CATALOG)
    project.append("catalog/targets.py", TARGETS)
    project.append("catalog/models.py", MODELS)
    shutil.copy(Path(__file__).with_name("remembered.py"), package / "compile")
    for name, text in REMEMBERING.items():
        project.append(name, text)
    with (root / "router_runtime" / "evidence" / "cases.py").open("a") as file:
        file.write(SUITE)
    (package / "catalog" / "latency.toml").write_text("tokens = [1]\n")
    for name in PLANNED:
        for path in sorted((ROOT / "build_kernels" / "kernels").glob(name)):
            copy = package / path.relative_to(ROOT / "build_kernels")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for name, text in FILES.items():
        path = package / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="session")
def machine_code() -> Iterator[Callable[[Job], Code]]:
    """Compiles a job of the real project: names and operands of its instructions, in order."""
    with compiler() as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let small projects share a cache of compiler results (remembered.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REMEMBERED, str(tmp_path_factory.mktemp("remembered")))
        yield


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn that cache off: small projects start compilers for every request, as real ones do."""
    monkeypatch.setenv(REMEMBERED, "")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project's sources, unbuilt. Tests work on copies."""
    root = tmp_path_factory.mktemp("pristine") / "project"
    write_project(root)
    _keep_bytecode(root)
    return root


def _keep_bytecode(root: Path) -> None:
    """Write the bytecode of a project's modules, so that no command in a copy has to.

    It is checked by the source's hash, not by its time: tests change a source more than once in a
    second.
    """
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    for package in ("build_kernels", "router_runtime"):
        assert compileall.compile_dir(root / package, quiet=1, invalidation_mode=checked)


@pytest.fixture(scope="session")
def prebuilt(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project after a full build with a recorded lock."""
    root = tmp_path_factory.mktemp("prebuilt") / "project"
    shutil.copytree(pristine, root)
    Project(root).build("--update-lock")
    return root


#: What the two scripts below begin with: the fields that both kinds of record share. It has no
#: braces, because ``EVIDENCE`` is a format string.
_EXAMINED = """
from pathlib import Path
from router_runtime.evidence import cases as suite
from router_runtime.evidence.record import CaseRecord
from router_runtime.evidence.status import toolchain_sha256
from router_runtime.evidence.store import write_record
from router_runtime.evidence.suite import cases_of, cases_sha256
from router_runtime.format.manifest import loads

built = loads(Path("artifacts/manifest.json").read_bytes())

def examined(entry, capability):
    return dict(
        entry=entry.key,
        kernel=entry.kernel,
        constants=entry.constants,
        limits=entry.contract.limits,
        target=entry.target,
        file=entry.file,
        sha256=entry.sha256,
        source_sha256=entry.source_sha256,
        toolchain_sha256=toolchain_sha256(built.toolchain),
        suite_version=suite.SUITE_VERSION,
        cases_sha256=cases_sha256(entry.kernel),
        device="Example GPU",
        compute_capability=capability,
        driver=13000,
        torch="2.13.0",
        cases=tuple(
            CaseRecord(case.name, case.seed, "0" * 64, 1, 1, 0, "0" * 64, dict())
            for case in cases_of(entry.kernel, entry.constants, entry.contract.limits)
        ),
    )

"""


#: Run inside a project: a record for every entry of the targets named.
EVIDENCE = (
    _EXAMINED
    + """
from router_runtime.evidence.record import Record
from router_runtime.format.target import Target

for entry in built.entries:
    if entry.target in {targets!r}:
        target = Target.parse(entry.target)
        record = Record(**examined(entry, (target.major, target.minor)))
        write_record(record, Path("artifacts/evidence"))
"""
)


#: Run inside a project, after a build: records of emulation for the entries of sm_100a alone, the
#: one of variant ``two`` by another model than the checkout's.
EMULATION = (
    _EXAMINED
    + """
from build_kernels.emulation.identity import model_sha256
from router_runtime.evidence.emulation_record import MODES, EmulationRecord

folder = Path("artifacts/evidence")
for path in folder.iterdir():
    path.unlink()
for entry in built.entries:
    if entry.target == "sm_100a":
        record = EmulationRecord(
            **examined(entry, (9, 0)),
            ptx_sha256="1" * 64,
            model_sha256="2" * 64 if entry.variant == "two" else model_sha256(),
            ptxas="13.5.37",
            ran_target="sm_90a",
            ran_sha256="3" * 64,
            modes=MODES,
        )
        write_record(record, folder)
"""
)


@dataclass(frozen=True)
class Released:
    """A committed project with evidence for sm_90a, and one signed release of it."""

    project: Project
    commit: str
    folder: Path
    key: Path
    public: Path

    @property
    def stem(self) -> str:
        """What the names of its files start with."""
        return self.folder.name


def write_keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A new ed25519 key pair: the private and the public PEM file."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    made = ed25519.Ed25519PrivateKey.generate()
    private.touch(mode=0o600)
    private.write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        made.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="session")
def released(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Released:
    """The small project's full release. Tests leave it as it is and work on copies."""
    place = tmp_path_factory.mktemp("released")
    project = Project(Path(shutil.copytree(pristine, place / "project")))
    project.append("catalog/kernels.py", RELEASED_CATALOG)
    project.build("--update-lock")
    result = project.python(EVIDENCE.format(targets=["sm_90a"]))
    assert result.returncode == 0, result.stderr
    commit = project.commit()
    key, public = write_keys(place)
    folder = project.release("--out", place / "dist", "--key", key)
    return Released(project, commit, folder, key, public)


@pytest.fixture(scope="session")
def site(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the release is installed, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    (wheel,) = released.folder.glob("*.whl")
    said = pip_install(wheel, folder)
    assert said.returncode == 0, said.stdout
    return folder


@pytest.fixture
def committed(released: Released, tmp_path: Path) -> Project:
    """A clone of the committed project, unbuilt."""
    root = tmp_path / "clone"
    released.project.git("clone", "--quiet", "--template=", ".", str(root))
    for cache in released.project.root.rglob("__pycache__"):
        shutil.copytree(cache, root / cache.relative_to(released.project.root))
    return Project(root)


@pytest.fixture
def fresh(pristine: Path, tmp_path: Path) -> Project:
    """A checkout in which nothing was built yet."""
    return Project(Path(shutil.copytree(pristine, tmp_path / "checkout")))


@pytest.fixture
def project(prebuilt: Path, tmp_path: Path) -> Project:
    """A checkout in which everything was built."""
    return Project(Path(shutil.copytree(prebuilt, tmp_path / "checkout")))


def pip_install(source: Path, site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Install a wheel or a checkout into a folder of packages, with nothing fetched. The output
    has the errors; ``options`` are further ones of pip.
    """
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", "--target", str(site)),
            *(*options, str(source)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def run_installed(
    site: Path, *arguments: str | Path, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run Python where a folder (or a zip file) of packages is all that it has of this project."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={"PYTHONPATH": str(site), **env},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder, the folder included: its mode, and its bytes if it is a file."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def emulated() -> tuple[Source, ...]:
    """The PTX of every kernel that is emulated, of this checkout."""
    return tuple(sources(emulated_jobs(), 2))


Compile = Callable[..., bytes]


@pytest.fixture(scope="session")
def compile_cuda() -> Compile:
    """Compile CUDA C++ text to cubin bytes, in this process."""

    def compiled(source: str, target: str = "sm_90a", **arguments: object) -> bytes:
        settings: dict[str, object] = {"name": "test", "headers": {}, "constants": {}} | arguments
        return nvrtc.compile_cubin(
            source=source,
            target=target,
            include_directories=toolchain.include_directories(),
            **settings,  # type: ignore[arg-type]
        )

    return compiled
