"""The kernels of the package ``mmasim-kernels``: one MMA each, of operands without a swizzle.

Its CUDA C++ is compiled up to its launchers, with one instance of its kernel. One thread issues the
MMA and its commit, and M and N are arguments.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from build_kernels.compile.worker_process import WorkerProcess

PACKAGE = "mmasim-kernels"
TYPES = ("f16", "bf16")
#: M and N of the MMAs.
SHAPES = ((64, 8), (64, 24), (64, 64), (64, 256), (128, 16), (128, 96), (128, 256))

_SOURCE, _HEADER = "tcgen05mma_sm100a.cu", "tcgen05mma.h"
#: Where the source stops defining kernels and begins to launch them.
_LAUNCHERS = "#define TCGEN05_DTYPE_f32"
#: What the source needs of the C++ library.
_LIBRARY = {
    "stdint.h": (
        "typedef unsigned char uint8_t;\n"
        "typedef unsigned short uint16_t;\n"
        "typedef unsigned int uint32_t;\n"
        "typedef unsigned long long uint64_t;\n"
    ),
    "type_traits": (
        "namespace std {\n"
        "template <class A, class B> struct is_same { static constexpr bool value = false; };\n"
        "template <class A> struct is_same<A, A> { static constexpr bool value = true; };\n"
        "}\n"
    ),
}
_INSTANCE = """
template __global__ void tcgen05mma_kernel<TCGen05Kind::f16, TCGen05Type::{0}, TCGen05Type::{0},
    uint32_t>(uint32_t*, const void*, const void*, uint32_t, uint32_t);
"""


def ptx(kind: str) -> str:
    """Return the PTX for sm_100a of the kernel for operands of a type."""
    distribution = importlib.metadata.distribution(PACKAGE)
    folder = Path(str(distribution.locate_file("mmasim_kernels/nv_ptx/kernels")))
    kernels, _, launchers = (folder / _SOURCE).read_text().partition(_LAUNCHERS)
    assert launchers, f"expected {_LAUNCHERS} in {_SOURCE} of {PACKAGE}, found none"
    headers = {_HEADER: (folder / _HEADER).read_text(), **_LIBRARY}
    worker = WorkerProcess(None)
    try:
        source = kernels + _INSTANCE.format(kind)
        return worker.library(f"{PACKAGE}-{kind}", source, headers, {}, "compute_100a")
    finally:
        worker.close()
