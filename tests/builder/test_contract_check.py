"""A contract that does not match its cubin is refused, be the contract or the cubin wrong."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import pytest

from build_kernels.compile.contract_check import REGISTER_FILE, SHARED_MEMORY_LIMIT, check_contract
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format.contract import Contract, GridAxis, Parameter
from router_runtime.format.cubin import Cubin, read
from router_runtime.format.target import Target
from tests.builder.conftest import Compile, Project

CONSTANT = GridAxis("constant")
CONTRACT = Contract(
    parameters=(Parameter("x", "ptr:f32"), Parameter("tokens", "i32"), Parameter("scale", "f32")),
    grid=(GridAxis("ceil", argument="tokens", divisor=4), CONSTANT, CONSTANT),
    block=(64, 2, 1),
)
CUBIN = Cubin(
    symbol="test",
    target="sm_90a",
    tool="ptxas",
    parameters=((0, 8), (8, 4), (12, 4)),
    registers=32,
    local_memory=0,
    static_shared_memory=0,
    max_threads=None,
    required_block=None,
    required_cluster=None,
)
WAIT = {"ACQBULK": 1}
TENSOR_CORE = {
    "LDTM.16": 1,
    "UTCATOMSWS.AND": 1,
    "UTCATOMSWS.FIND_AND_SET.ALIGN": 2,
    "UTCBAR": 1,
    "UTCBAR.MULTICAST": 1,
    "UTCHMMA": 8,
}
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def _check(
    contract: Mapping[str, Any] = NOTHING,
    cubin: Mapping[str, Any] = NOTHING,
    counts: Mapping[str, int] = NOTHING,
) -> None:
    check_contract(
        dataclasses.replace(CONTRACT, **contract), dataclasses.replace(CUBIN, **cubin), counts, "k"
    )


@pytest.mark.parametrize(
    ("contract", "cubin", "counts"),
    [
        ({}, {}, {"FADD": 3}),
        ({}, {"max_threads": 128, "required_block": (64, 2, 1)}, {}),
        ({"cluster": (1, 1, 1)}, {"required_cluster": (1, 1, 1)}, {}),
        ({"programmatic_dependent_launch": True}, {}, WAIT),
        ({"dynamic_shared_memory": SHARED_MEMORY_LIMIT - 16}, {"static_shared_memory": 16}, {}),
        ({"block": (1024, 1, 1)}, {"registers": REGISTER_FILE // 1024}, {}),
        ({}, {}, TENSOR_CORE),
    ],
)
def test_what_fits_is_accepted(
    contract: dict[str, Any], cubin: dict[str, Any], counts: dict[str, int]
) -> None:
    _check(contract, cubin, counts)


@pytest.mark.parametrize(
    ("contract", "cubin", "counts", "message"),
    [
        ({}, {"parameters": ((0, 8), (8, 4))}, {}, "expected 3 parameters"),
        ({"parameters": CONTRACT.parameters[:2]}, {}, {}, "expected 2 parameters"),
        (
            {},
            {"parameters": ((0, 8), (8, 8), (16, 4))},
            {},
            r"parameter tokens: expected offset 8 and size 4 \(i32\), found offset 8 and size 8",
        ),
        ({}, {"parameters": ((0, 8), (12, 4), (8, 4))}, {}, "expected offset 12 and size 4"),
        (
            {"grid": (GridAxis("ceil", argument="rows"), CONSTANT, CONSTANT)},
            {},
            {},
            r"grid argument 'rows': expected an integer parameter of \['tokens'\]",
        ),
        (
            {"grid": (GridAxis("ceil", argument="scale"), CONSTANT, CONSTANT)},
            {},
            {},
            "grid argument 'scale': expected an integer",
        ),
        ({}, {"required_block": (128, 1, 1)}, {}, r"found that the cubin requires \(128, 1, 1\)"),
        ({}, {"max_threads": 96}, {}, "expected 128 threads to be allowed, found at most 96"),
        ({}, {"required_cluster": (2, 1, 1)}, {}, r"cluster: .* requires \(2, 1, 1\)"),
        ({"block": (1024, 1, 1)}, {"registers": 65}, {}, "registers: expected at most 65536"),
        (
            {"dynamic_shared_memory": SHARED_MEMORY_LIMIT},
            {"static_shared_memory": 16},
            {},
            "shared memory: expected at most 232448 bytes a block, found 232464",
        ),
        (
            {"programmatic_dependent_launch": True},
            {},
            {},
            "expected a griddepcontrol.wait, found none",
        ),
        ({}, {}, WAIT, "expected no griddepcontrol.wait, found one"),
        ({"parameters": (Parameter("x", "ptr:f99"),)}, {}, {}, "expected a type of"),
        ({"block": (2048, 1, 1)}, {}, {}, "expected at most 1024 threads"),
        (
            {},
            {},
            {**TENSOR_CORE, "UTCATOMSWS.AND": 0},
            "every allocation to be given back, found 2 instructions that allocate and 0",
        ),
        ({}, {}, {"UTCATOMSWS.AND": 1}, "found 0 instructions that allocate and 1"),
        ({}, {}, {"UTCHMMA": 4}, "to be allocated, committed and loaded, found .*allocations=0"),
        ({}, {}, {**TENSOR_CORE, "LDTM.16": 0}, "found .*commits=2, loads=0"),
        ({}, {}, {**TENSOR_CORE, "UTCBAR": 0, "UTCBAR.MULTICAST": 0}, "found .*commits=0"),
    ],
)
def test_what_does_not_fit_is_named(
    contract: dict[str, Any], cubin: dict[str, Any], counts: dict[str, int], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        _check(contract, cubin, counts)


def test_every_mismatch_is_named_at_once() -> None:
    with pytest.raises(BuildError, match=r"(?s)expected 3 parameters.*allowed, found at most 96"):
        _check(cubin={"parameters": (), "max_threads": 96})


MAP = "const __grid_constant__ Map"


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_100f", "sm_103a"])
@pytest.mark.parametrize(
    "signature",
    [
        {"m": "tensormap", "n": "i32", "p": "ptr:f32"},
        {"n": "i32", "m": "tensormap", "s": "f32", "p": "ptr:f32"},
        {"a": "i64", "m": "tensormap", "o": "tensormap", "p": "ptr:f32"},
        {**{f"a{i}": "i64" for i in range(6)}, "m": "tensormap", "p": "ptr:f32"},
        {**{f"a{i}": "i64" for i in range(7)}, "m": "tensormap", "n": "i32", "p": "ptr:f32"},
    ],
    ids=["first", "after an int", "two", "after 48 bytes", "after 56 bytes"],
)
def test_tensor_maps_are_where_the_compiler_puts_them(
    compile_cuda: Compile, target: str, signature: dict[str, str]
) -> None:
    """Aligned by address: parameters start at 0x210 on sm_90a and at 0x380 on sm_100a."""
    kinds = {"tensormap": MAP, "i32": "int", "i64": "long long", "f32": "float"}
    kinds["ptr:f32"] = "float*"
    listed = ", ".join(f"{kinds[kind]} {name}" for name, kind in signature.items())
    used = " + ".join(
        f"{name}.bytes[threadIdx.x]" if kind == "tensormap" else f"static_cast<float>({name})"
        for name, kind in signature.items()
        if name != "p"
    )
    source = (
        "struct alignas(64) Map { unsigned char bytes[128]; };\n"
        f'extern "C" __global__ void test({listed}) {{ *p = {used}; }}\n'
    )
    contract = Contract(
        parameters=tuple(Parameter(name, kind) for name, kind in signature.items()),
        grid=(CONSTANT, CONSTANT, CONSTANT),
        block=(32, 1, 1),
    )
    found = read(compile_cuda(source, target), "test").parameters
    assert contract.parameter_layout(Target.parse(target)) == found
    if next(iter(signature)) == "m":
        assert found[0] == ((0x30, 128) if target == "sm_90a" else (0, 128))


def test_a_target_without_a_known_parameter_space_is_refused() -> None:
    with pytest.raises(FormatError, match=r"major version \[9, 10\], found sm_120a"):
        CONTRACT.parameter_layout(Target.parse("sm_120a"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("scale/contract.py", '"i32"', '"i64"', "parameter tokens: expected offset 16 and size 8"),
        ("scale/scale.cu", "int tokens", "long long tokens", "found offset 16 and size 8"),
        ("scale/contract.py", "(128, 1, 1)", "(256, 1, 1)", "expected 256 threads to be allowed"),
        ("shift/contract.py", "(128, 1, 1)", "(64, 1, 1)", "the cubin requires (128, 1, 1)"),
        ("scale/scale.cu", "scale(const", "other(const", "__global__ scale, found other"),
        ("scale/contract.py", "return Contract(", "return dict(", "expected a Contract, found {"),
        ("scale/contract.py", "return Contract", "raise ValueError('no')\n    Contract", "'no'"),
    ],
)
def test_a_build_with_a_mismatch_publishes_nothing(
    fresh: Project, file: str, old: str, new: str, message: str
) -> None:
    path = fresh.kernel_file(file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    kernel = file.split("/")[0]
    result = fresh.run("build", "--kernel", kernel, "--target", "sm_90a", "--out", "out")
    assert result.returncode == 1
    assert message in result.stdout
    assert f"{kernel}/" in result.stdout
    assert "Traceback" not in result.stdout
    assert not (fresh.root / "out").exists()
