"""Instructions that only the expert-rows form needs, in the manner of common/ptx.py."""

from __future__ import annotations

from cutlass import Float32, Int32
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.inline import asm, pure


def store_cluster_b32(address: Int32, value: Int32) -> None:
    """Store to the shared memory of any block of the cluster."""
    asm(None, [address, value], "st.shared::cluster.b32 [$0], $1;", "r,r,~{memory}")


def store_cluster_v2(address: Int32, a: Int32, b: Int32) -> None:
    asm(None, [address, a, b], "st.shared::cluster.v2.b32 [$0], {$1,$2};", "r,r,r,~{memory}")


def population(mask: Int32) -> Int32:
    """How many bits are set."""
    return Int32(pure(T.i32(), [mask], "popc.b32 $0, $1;", "=r,r"))


def kept(value: Float32) -> Float32:
    """The value, read here and now: an accumulator's next MMAs may begin afterwards."""
    return Float32(asm(T.f32(), [value], "mov.f32 $0, $1;", "=f,f"))
