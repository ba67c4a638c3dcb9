"""Runs other projects' kernels in software: ``python -m tests.emulation.conformance FOLDER``.

FOLDER is what ``make conformance`` made. Needs a Hopper GPU, torch and cuda-python; no compiler.
Every element of every result has to have the bits that the package ``mmasim``, in FOLDER, computes
for a B200.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from build_kernels.emulation.interface import MODES
from router_runtime.device import driver
from router_runtime.errors import RouterRuntimeError
from tests.emulation.library import Library

DEVICE = "cuda:0"
#: Milliseconds after which a wait does not end.
LIMIT_MS = 20000
#: Rows that mmasim computes at a time: it holds every product of them.
ROWS = 32

#: A (M, K), B (K, N), C (M, N) -> A B + C as a B200 computes it.
Simulator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        name: What it is.
        a: (M, K), on the CPU.
        b: (K, N), on the CPU.
        c: (M, N) in FP32, on the CPU: what is added.
        expected: (M, N) in FP32, on the CPU.

    """

    name: str
    a: Tensor
    b: Tensor
    c: Tensor
    expected: Tensor


class Kernel:
    """A kernel that has been made for sm_90a, loaded."""

    def __init__(self, folder: Path, name: str, record: Mapping[str, Any]) -> None:
        self._record = record
        self._api = driver.bindings()
        code = (folder / f"{name}.cubin").read_bytes()
        loaded = self._api.cuLibraryLoadData(code, [], [], 0, [], [], 0)
        handle = driver.check(loaded, f"cuLibraryLoadData of {name}")
        found = self._api.cuLibraryGetKernel(handle, record["symbol"].encode())
        kernel = driver.check(found, "cuLibraryGetKernel")
        function = self._api.cuKernelGetFunction(kernel)
        self._function = driver.check(function, "cuKernelGetFunction")
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        allowed = self._api.cuFuncSetAttribute(self._function, attribute, record["shared"])
        driver.check(allowed, "cuFuncSetAttribute")
        self.library = Library(handle, cluster=1)

    def __call__(self, case: Case) -> Tensor:
        """Launch, and return the result on the CPU."""
        result = case.c.to(DEVICE)
        arguments = _mma if self._record["tile"] is None else _matmul
        grid, tensors, numbers = arguments(self._record, case, result)
        # Addresses, then sizes. Triton's kernels have two more addresses, of scratch memory that is
        # not used here; of the others' launches the driver reads no more than they have.
        values = (*(tensor.data_ptr() for tensor in tensors), *numbers, 0, 0)
        pointer = ctypes.c_void_p
        kinds = (*(pointer for _ in tensors), *(ctypes.c_uint32 for _ in numbers), pointer, pointer)
        launched = self._api.cuLaunchKernel(
            *(self._function, *grid, 1, self._record["threads"], 1, 1, self._record["shared"]),
            *(torch.cuda.current_stream().cuda_stream, (values, kinds), 0),
        )
        driver.check(launched, "cuLaunchKernel")
        return result.cpu()


Arguments = tuple[tuple[int, int], tuple[Tensor, ...], tuple[int, ...]]


def _mma(record: Mapping[str, Any], case: Case, result: Tensor) -> Arguments:
    """Return the grid, tensors and sizes of a kernel of mmasim-kernels. It adds to the result."""
    return (1, 1), (result, _stored(case.a, True), _stored(case.b, False)), tuple(result.shape)


def _matmul(record: Mapping[str, Any], case: Case, result: Tensor) -> Arguments:
    """Return the same for our matmul in Triton."""
    (m, k), n, tile = case.a.shape, case.b.shape[1], record["tile"]
    a, b = _stored(case.a, record["a_rows"]), _stored(case.b, not record["b_columns"])
    return (m // tile[0], n // tile[1]), (a, b, result), (m, n, k)


def _stored(matrix: Tensor, rows: bool) -> Tensor:
    """Return a copy on the GPU, contiguous by rows or by columns."""
    return (matrix if rows else matrix.T).contiguous().to(DEVICE)


def simulator(folder: Path, kind: str) -> Simulator:
    """Return mmasim's B200 for operands of a type."""
    # Last: torch keeps the Triton that it came with.
    sys.path.append(str(folder / "packages"))
    # It compiles C++ when it is imported, and is for FP64 only.
    sys.modules["mmasim.arithmetic.fma"] = types.ModuleType("mmasim.arithmetic.fma")
    from mmasim.nv_ptx.sim import TCGen05MMA

    operation = TCGen05MMA("Blackwell", f"m64n8k16.kind::f16.f32.{kind}.{kind}").arithmetic_op

    def simulated(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        parts = [slice(first, first + ROWS) for first in range(0, len(a), ROWS)]
        return torch.cat([operation(a[rows], b, c[rows]) for rows in parts])

    return simulated


def _random(kind: str, shape: tuple[int, int], scale: int, bits: torch.Generator) -> Tensor:
    """Return numbers whose exponents differ by up to ``scale``, some of them zero."""
    exponents = torch.randint(-scale, 1, shape, generator=bits)
    numbers = torch.randn(shape, generator=bits) * torch.exp2(exponents.float())
    numbers[torch.rand(shape, generator=bits) < 0.05] = 0
    return numbers.to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[kind])


def cases(record: Mapping[str, Any], simulated: Simulator) -> Iterator[Case]:
    """Return the launches of a kernel: all shapes, products of like and of unlike sizes."""
    kind, adds = record["kind"], record["tile"] is None
    bits = torch.Generator().manual_seed(12)
    for (m, n, k), scale in itertools.product(record["sizes"], (0, 12)):
        a = _random(kind, (m, k), scale, bits)
        b = _random(kind, (k, n), scale, bits)
        c = _random("f32", (m, n), 2 * scale, bits) if adds else torch.zeros(m, n)
        yield Case(f"{m}x{n}x{k}, exponents over {scale}", a, b, c, simulated(a, b, c))


def run(folder: Path, only: str, modes: list[str]) -> int:
    """Run the kernels of a folder, and return how many launches were wrong."""
    document = json.loads((folder / "conformance.json").read_text())
    print(f"packages {document['packages']}, model {document['model_sha256'][:16]}")
    launches = wrong = elements = 0
    for name, record in document["kernels"].items():
        if only not in name:
            continue
        kernel = Kernel(folder, name, record)
        for case in cases(record, simulator(folder, record["kind"])):
            for mode in modes:
                kernel.library.start(mode, LIMIT_MS)
                found = kernel(case)
                errors = kernel.library.report().errors
                differ = int((found.view(torch.int32) != case.expected.view(torch.int32)).sum())
                launches += 1
                elements += found.numel()
                wrong += bool(differ or errors)
                print(
                    f"{'FAIL' if differ or errors else 'pass'}  {name}  {case.name}  {mode}  "
                    f"{differ} of {found.numel()} differ",
                    flush=True,
                )
                for error, text in errors.items():
                    print(f"      error {error}: {text}")
    print(f"{launches} launches, {elements} elements, {wrong} launches wrong")
    return wrong


def main() -> int:
    """Run what the arguments choose."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulation.conformance", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--mode", action="append", choices=MODES, help="one mode; repeatable")
    options = parser.parse_args()
    driver.initialise()
    torch.zeros(1, device=DEVICE)
    with driver.context(0):
        return run(options.folder, options.only, options.mode or list(MODES))


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (OSError, RouterRuntimeError) as error:
        sys.exit(f"{error}")
