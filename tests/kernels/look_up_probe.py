"""A kernel that stores what the look-up of the dense kernels finds: a CTA a token, a lane a rank.
Run as a program, it prints its PTX.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64, cute

from build_kernels.kernels.common import epilogue
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import memory
from build_kernels.kernels.dense.program import program as dense_program
from build_kernels.plan import plan

TOP_K, EXPERTS = 6, 40
#: What is stored for a token that selects its experts.
SELECTS = -2


class Probe:
    @cute.jit
    def __call__(self, routing: Routing) -> None:
        self.kernel(routing).launch(grid=(routing.tokens, 1, 1), block=(32, 1, 1))

    @cute.kernel
    def kernel(self, routing: Routing) -> None:
        lane, token = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        if lane < TOP_K:
            expert = Int32(SELECTS)
            if epilogue.is_given(routing, token) != 0:
                expert = epilogue.given_id(routing, token, lane, TOP_K, EXPERTS)
            place = Int64(token) * TOP_K + Int64(lane)
            memory.store_global_b32(routing.ids_out.toint() + place * 4, expert)


def program(_: Any) -> tuple[Any, tuple[object, ...]]:
    # The last argument of every dense kernel.
    (job, *_) = plan(targets=["sm_90a"], models=["dsv4-flash"], kernels=["dense_router_decode"])
    return Probe(), dense_program(job.constants)[1][-1:]


if __name__ == "__main__":
    from build_kernels.compile import cutedsl

    print(cutedsl.compile_ptx("tests.kernels.look_up_probe", {}, "sm_90a"))
