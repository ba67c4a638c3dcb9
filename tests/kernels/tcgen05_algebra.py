"""Prints, as JSON, what the DSL's own layout algebra says about MMAs on sm_100a.

Run in a scratch folder with CUTE_DSL_ARCH=sm_100a: tcgen05_algebra.py EXPERTSxTOKENS ... The
operands are declared by their layouts in memory alone, the weights' packed stages and the hidden
states' swizzled rows; the descriptors are read off the PTX, for every step of two stages.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

STAGES = 2
K_BLOCK = 64
#: Registers of a thread in a load of 16 columns.
LOADED = 8


#: What does not depend on the experts, by tokens: a query of every element takes seconds.
_by_tokens: dict[int, dict[str, Any]] = {}


class Algebra:
    def __init__(self, experts: int, tokens: int) -> None:
        self.experts, self.tokens = experts, tokens
        self.found: dict[str, Any] = {}

    @cute.jit
    def __call__(self) -> None:
        self.kernel().launch(grid=(1, 1, 1), block=(128, 1, 1), smem=128 * 1024)

    @cute.kernel
    def kernel(self) -> None:
        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        op = tcgen05.MmaF16BF16Op(
            BFloat16,
            Float32,
            (128, self.tokens, 16),
            tcgen05.CtaGroup.ONE,
            tcgen05.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        mma = cute.make_tiled_mma(cute.make_mma_atom(op))
        smem = cute.AddressSpace.smem
        weight = cute.make_tensor(
            cute.make_ptr(BFloat16, shared, smem, assumed_align=1024),
            cute.make_layout(
                ((8, 16), (8, K_BLOCK // 8), STAGES),
                stride=((8, 8 * K_BLOCK), (1, 64), self.experts * K_BLOCK),
            ),
        )
        hidden = cute.make_tensor(
            cute.recast_ptr(
                cute.make_ptr(BFloat16, shared, smem, assumed_align=1024),
                cute.make_swizzle(3, 4, 3),
                dtype=BFloat16,
            ),
            cute.make_layout(
                (self.tokens, K_BLOCK, STAGES), stride=(K_BLOCK, 1, self.tokens * K_BLOCK)
            ),
        )
        part = mma.get_slice(0)
        a = part.make_fragment_A(part.partition_A(weight))
        b = part.make_fragment_B(part.partition_B(hidden))
        sums = mma.make_fragment_C(mma.partition_shape_C((128, self.tokens)))
        for step in cutlass.range_constexpr(K_BLOCK // 16):
            for stage in cutlass.range_constexpr(STAGES):
                cute.gemm(mma, sums, a[None, None, step, stage], b[None, None, step, stage], sums)
        load = tcgen05.make_tmem_copy(
            cute.make_copy_atom(
                tcgen05.Ld16x256bOp(tcgen05.Repetition.x2, tcgen05.Pack.NONE), Float32
            ),
            sums[(None, None), 0, 0],
        )
        self.found |= self.fragments(sums, load)

    def fragments(self, sums: Any, load: Any) -> dict[str, Any]:
        """Where the accumulator's elements lie, and which of them a load brings to which thread."""
        if self.tokens not in _by_tokens:
            layout, (rows, columns) = sums.layout, load.tiler_mn
            _by_tokens[self.tokens] = {
                "accumulator": [
                    [
                        int(cute.crd2idx(((row, column), 0, 0), layout))
                        for column in range(self.tokens)
                    ]
                    for row in range(128)
                ],
                "load": [
                    [
                        self.place(load, rows, columns, thread, register)
                        for register in range(LOADED)
                    ]
                    for thread in range(128)
                ],
            }
        return _by_tokens[self.tokens]

    def place(
        self, load: Any, rows: Any, columns: Any, thread: int, register: int
    ) -> tuple[int, int]:
        """(row, column) of the accumulator that a load leaves in a register of a thread."""
        number = int(cute.crd2idx((thread, register), load.layout_dst_tv_tiled))
        return (
            int(cute.crd2idx(number % 64, rows)),
            int(cute.crd2idx(number // 64, columns)),
        )


def multiplications(ptx: str) -> list[tuple[int, int, int]]:
    """(descriptor of A, of B, of the instruction) of every MMA, operands at shared address 0."""
    constants = dict(re.findall(r"(?:or\.b64|add\.s64)\s+(%rd\d+), %rd\d+, (\d+);", ptx))
    values = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    issued = re.findall(r"tcgen05\.mma\S+ \[%r\d+\], (%rd\d+), (%rd\d+), (%r\d+)", ptx)
    return [(int(constants[a]), int(constants[b]), int(values[i])) for a, b, i in issued]


def main() -> None:
    options = (cute.OptLevel(3), cute.GPUArch("sm_100a"), cute.KeepPTX(True), cute.KeepCUBIN(True))
    said = {}
    for stage in sys.argv[1:]:
        algebra = Algebra(*map(int, stage.split("x")))
        algebra.found["mma"] = multiplications(cute.compile[options](algebra).__ptx__)
        said[stage] = algebra.found
    print(json.dumps(said))


if __name__ == "__main__":
    main()
