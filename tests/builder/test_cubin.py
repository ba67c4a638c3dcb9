"""The builder reads what the compilers wrote, and refuses what this project does not ship."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from build_kernels.compile import instructions, nvrtc, toolchain
from build_kernels.entries import resources
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format import cubin
from tests.builder.conftest import Compile

PARAMETERS = """
extern "C" __global__ void __launch_bounds__(96) parameters(char a, const int* b, short c, float d,
                                                            long long e)
{
    __shared__ int shared[25];
    shared[threadIdx.x % 25] = a + c + static_cast<int>(d) + static_cast<int>(e);
    __syncthreads();
    const_cast<int*>(b)[threadIdx.x] = shared[(threadIdx.x * 7) % 25];
}
"""

# Four words stored one by one and loaded back: 16 bytes each way, with any register allocation.
LOCAL = """
extern "C" __global__ void local(int* x)
{
    volatile int kept[4];
    kept[0] = x[0];
    kept[1] = x[1];
    kept[2] = x[2];
    kept[3] = x[3];
    x[4] = kept[0] + kept[1] + kept[2] + kept[3];
}
"""

DYNAMIC = """
extern __shared__ int buffer[];
extern "C" __global__ void dynamic(int* x)
{
    buffer[threadIdx.x] = *x;
    __syncthreads();
    *x = buffer[threadIdx.x ^ 1];
}
"""

CLUSTER = """
extern "C" __global__ void __cluster_dims__(4, 2, 1) cluster(int* x) { *x = 1; }
"""

TWO = """
extern "C" __global__ void one(int* x) { *x = 1; }
extern "C" __global__ void two(int* x) { *x = 2; }
"""


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_100f", "sm_103a"])
def test_facts(compile_cuda: Compile, target: str) -> None:
    facts = cubin.read(compile_cuda(PARAMETERS, target), "test")
    assert facts.symbol == "parameters"
    assert facts.target == target
    assert facts.parameters == ((0, 1), (8, 8), (16, 2), (20, 4), (24, 8))
    assert facts.max_threads == 96
    assert facts.static_shared_memory == 100
    assert facts.local_memory == 0
    assert facts.required_block is None
    assert facts.required_cluster is None
    assert (
        facts.tool == "ptxas V" + toolchain.locked(toolchain.LOCK.read_text())["nvidia-cuda-nvrtc"]
    )


def test_required_cluster(compile_cuda: Compile) -> None:
    assert cubin.read(compile_cuda(CLUSTER), "test").required_cluster == (4, 2, 1)


def test_dynamic_shared_memory_is_not_static(compile_cuda: Compile) -> None:
    assert cubin.read(compile_cuda(DYNAMIC), "test").static_shared_memory == 0


@pytest.mark.parametrize(
    ("source", "shared"), [(PARAMETERS, True), (DYNAMIC, True), (LOCAL, False), (CLUSTER, False)]
)
def test_resources_agree_with_cuobjdump(
    compile_cuda: Compile, source: str, shared: bool, tmp_path: Path
) -> None:
    data = compile_cuda(source)
    facts = cubin.read(data, "test")
    (tmp_path / "test.cubin").write_bytes(data)
    shown = subprocess.run(
        [
            toolchain.nvdisasm().with_name("cuobjdump"),
            "--dump-resource-usage",
            tmp_path / "test.cubin",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", shown)}
    assert usage == {
        "REG": facts.registers,
        "STACK": facts.local_memory,
        "SHARED": facts.static_shared_memory + (cubin.RESERVED_SHARED_MEMORY if shared else 0),
    }


def test_spills_are_the_bytes_moved_to_and_from_local_memory(compile_cuda: Compile) -> None:
    data = compile_cuda(LOCAL)
    used = resources(
        cubin.read(data, "test"), instructions.census(instructions.sass(data, toolchain.nvdisasm()))
    )
    assert (used.spill_stores, used.spill_loads, used.local_memory) == (16, 16, 16)


def test_census_counts_instructions_by_name() -> None:
    listing = """
        .text.test:
            /*0000*/                   LDC R1, c[0x0][0x28] ;
            /*0010*/              @P0  STL.128 [R1], R4 ;
            /*0020*/             @!UP1 STL.64 [R1+0x8], R4 ;
            /*0030*/                   STL [R1+0x10], R4 ;
            /*0040*/                   STL.U8 [R1+0x14], R4 ;
        .L_x_0:
            /*1050*/              @!PT LDL.LU.64 R2, [R1] ;
            /*1060*/                   STL [R1+0x10], R5 ;
    """
    counts = instructions.census(listing)
    assert counts == {
        "LDC": 1,
        "LDL.LU.64": 1,
        "STL": 2,
        "STL.128": 1,
        "STL.64": 1,
        "STL.U8": 1,
    }
    facts = cubin.Cubin("s", "sm_90a", "ptxas", (), 8, 0, 0, None, None, None)
    used = resources(facts, counts)
    assert (used.spill_stores, used.spill_loads) == (16 + 8 + 4 + 4 + 1, 8)


# A function that is called has a section of its own.
CALL = """
__device__ __noinline__ int called(int x) { return x * x + 1; }
extern "C" __global__ void call(int* x) { *x = called(*x) + called(x[1]); }
"""


@pytest.mark.parametrize("target", ["sm_90a", "sm_100f"])
def test_cubins_are_counted_together_as_each_alone(compile_cuda: Compile, target: str) -> None:
    one, other = (compile_cuda(source, target) for source in (CALL, LOCAL))
    alone = [
        instructions.census(instructions.sass(data, toolchain.nvdisasm())) for data in (one, other)
    ]
    together = instructions.censuses((one, other, one), target, toolchain.nvdisasm())
    assert together == [alone[0], alone[1], alone[0]]
    assert alone[0] != alone[1]
    assert any(name.startswith("CALL") for name in alone[0])


def test_what_the_disassembler_refuses_is_an_error(compile_cuda: Compile) -> None:
    data = compile_cuda(TENSOR, "sm_100a")
    with pytest.raises(BuildError, match="expected nvdisasm to read the cubin, found: nvdisasm er"):
        instructions.censuses([data], "sm_90a", toolchain.nvdisasm())


TENSOR = r"""
extern "C" __global__ void tensor(int* x)
{
    __shared__ unsigned slot, barrier[2];
    unsigned where = __cvta_generic_to_shared(&slot), done = __cvta_generic_to_shared(barrier);
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 64;" ::"r"(where));
    __syncthreads();
    unsigned address = *(volatile unsigned*)&slot;
    asm volatile("{ .reg .pred p, e; setp.ne.b32 p, 0, 0; elect.sync _|e, -1;\n"
                 "@e tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %1, 136316048, p;\n"
                 "@e tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%2]; }"
                 ::"r"(address), "l"(1ull << 46), "r"(done));
    int a, b;
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%0, %1}, [%2];\n"
                 "tcgen05.wait::ld.sync.aligned;" : "=r"(a), "=r"(b) : "r"(address));
    x[threadIdx.x] = a + b;
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 64;" ::"r"(address));
}
"""


@pytest.mark.parametrize("target", ["sm_100a", "sm_103a"])
def test_the_tensor_core_is_found_in_the_census(compile_cuda: Compile, target: str) -> None:
    """Compiled, not run: the kernel does nothing useful."""
    found = instructions.tensor_core(
        instructions.census(instructions.sass(compile_cuda(TENSOR, target), toolchain.nvdisasm()))
    )
    assert found.allocations >= 1
    assert (found.releases, found.multiplications, found.commits, found.loads) == (1, 1, 1, 1)


def test_no_tensor_core_is_none(compile_cuda: Compile) -> None:
    counts = instructions.census(instructions.sass(compile_cuda(LOCAL), toolchain.nvdisasm()))
    assert instructions.tensor_core(counts) == instructions.TensorCore(0, 0, 0, 0, 0)


def test_two_entry_functions_are_refused(compile_cuda: Compile) -> None:
    with pytest.raises(FormatError, match=r"one entry function, found \['one', 'two'\]"):
        cubin.read(compile_cuda(TWO), "test")


def test_embedded_ptx_is_refused(compile_cuda: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--generate-line-info"))
    with pytest.raises(FormatError, match="machine code only, found PTX"):
        cubin.read(compile_cuda(LOCAL), "test")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"//\n.version 8.0\n.target sm_90a\n"])
def test_what_is_no_cubin_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="test: expected a cubin"):
        cubin.read(data, "test")


def test_another_machines_elf_is_refused() -> None:
    header = bytearray(64)
    header[:6], header[18] = b"\x7fELF\x02\x01", 62
    with pytest.raises(FormatError, match="expected a cubin"):
        cubin.read(bytes(header), "test")


def test_every_truncation_is_refused(compile_cuda: Compile) -> None:
    data = compile_cuda(LOCAL)
    for size in range(0, len(data), 37):
        with pytest.raises(FormatError, match="test: expected a"):
            cubin.read(data[:size], "test")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"HMMA.16816.F32.BF16": 8}, False),
        (
            {"HGMMA.64": 32, "WARPGROUP.ARRIVE": 8},
            False,
        ),
        ({"HGMMA.64": 32, "WARPGROUP.ARRIVE": 32}, True),
    ],
)
def test_wgmma_that_cannot_overlap_is_seen(counts: dict[str, int], expected: bool) -> None:
    assert instructions.serialised(counts) is expected
