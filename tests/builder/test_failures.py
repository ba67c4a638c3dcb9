"""Errors in sources: each once, where it is in the project, and what was not tried."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from build_kernels import contracts, failures
from build_kernels.compile.diagnostics import diagnostics
from build_kernels.errors import BuildError, JobError
from build_kernels.source_error import explained, located
from tests.builder.conftest import KEYS, Compile, Project

FACTOR = "build_kernels/kernels/common/factor.cuh"


def _failed(project: Project, *arguments: str) -> str:
    result = project.run("build", "--out", "out", "--jobs", "1", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stdout
    assert str(project.root) not in result.stdout
    assert not (project.root / "out").exists()
    return result.stdout


def test_an_error_in_a_shared_header_is_said_once(project: Project) -> None:
    project.kernel_file("common/factor.cuh").write_text(
        "__device__ inline float factor() { return FACTOR }\n__device__ int x = y;\n"
    )
    said = _failed(project, "--kernel", "scale", "--keep-going")
    assert said.count("error: ") == 2
    for line in (1, 2):
        assert said.count(f"{FACTOR}:{line}: error: ") == 1
    assert said.count("  in scale/any/sm_100a/one and 1 other\n") == 2
    assert "2 of 2 failed; nothing was published; next: correct the sources" in said


SHARED = """
def added(value):
    return value + {error}
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("NOTHING", "3: NameError: name 'NOTHING' is not defined\n    return value + NOTHING\n"),
        ("value.nothing", "3: AttributeError: "),
    ],
)
def test_an_error_in_a_shared_python_source_is_said_once(
    project: Project, error: str, message: str
) -> None:
    shared = project.kernel_file("common/shared.py")
    shared.write_text(SHARED.format(error=error))
    source = project.kernel_file("shift/shift.py")
    text = source.read_text().replace("cutlass.Float32(self.top_k)", "added(source[i])")
    source.write_text("from build_kernels.kernels.common.shared import added\n" + text)
    said = _failed(project, "--kernel", "shift", "--keep-going")
    assert said.count(f"build_kernels/kernels/common/shared.py:{message}") == 1
    # The line that called it, and not the hundreds of the compiler's own.
    assert re.search(r"\n  from build_kernels/kernels/shift/shift\.py:\d+, in ", said)
    assert "site-packages" not in said
    assert "  in shift/dsv4-flash/sm_100a/only and 3 others\n" in said
    assert len(said.splitlines()) < 20


def test_a_syntax_error_is_found_before_anything_is_compiled(project: Project) -> None:
    with project.kernel_file("shift/shift.py").open("a") as file:
        file.write("def (\n")
    said = _failed(project)
    assert re.fullmatch(
        r"Error: kernel shift: build_kernels/kernels/shift/shift\.py:\d+: expected Python, found "
        r"invalid syntax; next: correct it\n",
        said,
    )


def test_the_first_error_ends_a_build_unless_it_is_to_keep_going(project: Project) -> None:
    project.kernel_file("shift/shift.py").write_text("import nothing_of_this_name\n")
    said = _failed(project)
    assert said.count("  FAILED  ") == 1
    assert "1 of 6 failed, 5 were not tried (build --keep-going tries them)" in said
    said = _failed(project, "--keep-going")
    assert said.count("  FAILED  ") == 4
    assert said.count("  reused  ") == 2
    assert "4 of 6 failed; nothing was published" in said
    assert said.count("No module named 'nothing_of_this_name'") == 1
    result = project.run("check", "--jobs", "1", "-k")
    assert "4 of 6 failed; nothing was published" in result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def contract(constants):\n    return None.nothing\n", "2: AttributeError: 'NoneType'"),
        ("import nothing_there\n", "1: ModuleNotFoundError: No module named 'nothing_there'"),
        ("def contract(constants):\n    return 1\n", "expected a Contract, found 1"),
        (
            "def contract(constants):\n    raise ValueError('expected a smaller FACTOR')\n",
            "expected a contract for these constants, found ValueError",
        ),
        (
            "def derive(constants):\n    return constants['NOTHING']\ndef contract(c): ...\n",
            "2: KeyError: 'NOTHING'",
        ),
        (
            "from router_runtime.format.contract import Contract, GridAxis\n"
            "def contract(constants):\n"
            "    axis = GridAxis('constant')\n"
            "    return Contract(parameters=(), grid=(axis, axis, axis), block=(2048, 1, 1))\n",
            "expected at most 1024 threads per block, found 2048; next: correct build_kernels/",
        ),
    ],
)
def test_an_exception_in_a_contract_is_an_error_of_the_build(
    project: Project, text: str, message: str
) -> None:
    project.kernel_file("scale/contract.py").write_text(text)
    said = _failed(project, "--kernel", "scale")
    assert message in said
    assert "next: " in said
    assert "compiled" not in said.replace("nothing was compiled", "")
    if message[0].isdigit():
        assert f"build_kernels/kernels/scale/contract.py:{message}" in said


@pytest.mark.parametrize("file", ["models", "kernels", "targets"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODELS = MODELS + (Modl(1),)\n", "NameError: name '"),
        ("def (\n", "SyntaxError: invalid syntax\n    def (\n"),
    ],
)
def test_an_exception_in_the_catalog_is_an_error_of_the_build(
    project: Project, file: str, text: str, message: str
) -> None:
    path = project.root / "build_kernels" / "catalog" / f"{file}.py"
    line = len(path.read_text().splitlines()) + 1
    project.append(f"catalog/{file}.py", text)
    for command in ("build", "list"):
        result = project.run(command)
        assert result.returncode == 1
        assert f"Error: build_kernels/catalog/{file}.py:{line}: {message}" in result.stdout
        assert result.stdout.endswith("next: correct that line and run the command again\n")
        assert "Traceback" not in result.stdout


def test_an_exception_of_the_builder_itself_keeps_its_traceback(project: Project) -> None:
    project.append("lock.py", "NOTHING\n")
    assert "Traceback" in project.run("list").stdout


def test_each_text_is_reported_with_the_jobs_that_have_it() -> None:
    report = failures.report(
        [
            JobError("b", "two", "  from there"),
            JobError("c", "one"),
            JobError("a", "one", "  from here"),
            JobError("d", "one"),
        ]
    )
    assert report == "one\n  from here\n  in a and 2 others\n\ntwo\n  from there\n  in b"
    assert str(JobError("a", "one", "  from here")) == "a: one\n  from here"


NVRTC = """expected scale.cu to compile with --gpu-architecture=sm_90a without a word, found:
scale.cu(3): warning #177-D: variable "a" was declared but never referenced
  int a;
      ^

common/factor.cuh(7): error: expected a ";"

/usr/include/x.h(9): catastrophic error: cannot open source file "y.h"
  #include "y.h"

2 errors detected in the compilation of "scale.cu".
Compilation terminated.
next: correct the source and run the command again"""


def test_what_nvrtc_prints_is_split_into_its_errors() -> None:
    assert diagnostics("scale", NVRTC) == [
        'build_kernels/kernels/scale/scale.cu:3: warning #177-D: variable "a" was declared but '
        "never referenced\n  int a;\n      ^",
        'build_kernels/kernels/common/factor.cuh:7: error: expected a ";"',
        '/usr/include/x.h:9: catastrophic error: cannot open source file "y.h"\n  #include "y.h"',
    ]
    assert diagnostics("scale", "NVRTC_ERROR_OUT_OF_MEMORY") == ["NVRTC_ERROR_OUT_OF_MEMORY"]


def test_nvrtc_prints_what_is_expected_of_it(compile_cuda: Compile) -> None:
    with pytest.raises(BuildError) as failure:
        compile_cuda('extern "C" __global__ void test() { int a = b; }\nint c = d;\n')
    found = diagnostics("test", str(failure.value))
    assert [text.split(": ")[:2] for text in found] == [
        ["build_kernels/kernels/test/test.cu:1", "error"],
        ["build_kernels/kernels/test/test.cu:2", "error"],
    ]


def test_an_exception_elsewhere_has_no_place_in_our_sources() -> None:
    with pytest.raises(FileNotFoundError) as failure:
        subprocess.run(["/nonexistent"], check=True)
    assert located(failure.value) is None
    assert explained(failure.value).text.startswith("the compiler failed:\nTraceback")


def test_a_contract_of_nothing_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"kernel none: expected build_kernels/kernels/none/con"):
        contracts.module("none")
    assert not Path("build_kernels/kernels/none").exists()


def test_there_are_six_jobs_in_the_small_project() -> None:
    assert len(KEYS) == 6  # the numbers above
