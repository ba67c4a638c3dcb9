"""Loads and stores by one thread: global memory, shared memory, shared memory of a peer.

Addresses are integers: 64 bits for global memory, 32 bits for the shared window. An address in the
shared memory of another CTA of the cluster comes from ``map_shared``.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.ptx.inline import asm, pure, struct, unpack


def load_weight_v4(address: Int64) -> list[Int32]:
    """Load 16 bytes of a buffer that no launch writes while kernels may read it."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,l",
    )
    return unpack(result, Int32, T.i32(), 4)


def load_shared_f32(address: Int32) -> Float32:
    """Load a float of this CTA's shared memory."""
    return Float32(asm(T.f32(), [address], "ld.shared.f32 $0, [$1];", "=f,r,~{memory}"))


def load_shared_b32(address: Int32) -> Int32:
    """Load one word of this CTA's shared memory."""
    return Int32(asm(T.i32(), [address], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}"))


def load_shared_v2(address: Int32) -> list[Int32]:
    """Load 2 words of this CTA's shared memory; the address is a multiple of 8."""
    result = asm(
        struct(T.i32(), 2), [address], "ld.shared.v2.b32 {$0,$1}, [$2];", "=r,=r,r,~{memory}"
    )
    return unpack(result, Int32, T.i32(), 2)


def load_shared_v4(address: Int32) -> list[Int32]:
    """Load 4 words of this CTA's shared memory; the address is a multiple of 16."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
    )
    return unpack(result, Int32, T.i32(), 4)


def load_shared_f32x2(address: Int32) -> list[Float32]:
    """Load 2 floats of this CTA's shared memory; the address is a multiple of 8."""
    result = asm(
        struct(T.f32(), 2), [address], "ld.shared.v2.f32 {$0,$1}, [$2];", "=f,=f,r,~{memory}"
    )
    return unpack(result, Float32, T.f32(), 2)


def store_shared_b32(address: Int32, value: Int32) -> None:
    """Store one word to this CTA's shared memory."""
    asm(None, [address, value], "st.shared.b32 [$0], $1;", "r,r,~{memory}")


def store_shared_f32(address: Int32, value: Float32) -> None:
    """Store a float to this CTA's shared memory."""
    asm(None, [address, value], "st.shared.f32 [$0], $1;", "r,f,~{memory}")


def store_shared_v2(address: Int32, a: Int32, b: Int32) -> None:
    """Store 2 words to this CTA's shared memory; the address is a multiple of 8."""
    asm(None, [address, a, b], "st.shared.v2.b32 [$0], {$1,$2};", "r,r,r,~{memory}")


def store_shared_v4(address: Int32, values: Sequence[Int32]) -> None:
    """Store 4 words to this CTA's shared memory; the address is a multiple of 16."""
    asm(
        None,
        [address, *values],
        "st.shared.v4.b32 [$0], {$1,$2,$3,$4};",
        "r,r,r,r,r,~{memory}",
    )


def store_shared_f32x2(address: Int32, a: Float32, b: Float32) -> None:
    """Store 2 floats to this CTA's shared memory; the address is a multiple of 8."""
    asm(None, [address, a, b], "st.shared.v2.f32 [$0], {$1,$2};", "r,f,f,~{memory}")


def map_shared(address: Int32, rank: Int32) -> Int32:
    """Return the address of the same place in the shared memory of CTA ``rank`` of the cluster."""
    return Int32(pure(T.i32(), [address, rank], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r"))


def load_cluster_f32(address: Int32) -> Float32:
    """Load from the shared memory of any CTA of the cluster."""
    return Float32(asm(T.f32(), [address], "ld.shared::cluster.f32 $0, [$1];", "=f,r,~{memory}"))


def load_cluster_b32(address: Int32) -> Int32:
    """Load one word from the shared memory of any CTA of the cluster."""
    return Int32(asm(T.i32(), [address], "ld.shared::cluster.b32 $0, [$1];", "=r,r,~{memory}"))


def store_cluster_b32(address: Int32, value: Int32) -> None:
    """Store to the shared memory of any CTA of the cluster."""
    asm(None, [address, value], "st.shared::cluster.b32 [$0], $1;", "r,r,~{memory}")


def store_cluster_v2(address: Int32, a: Int32, b: Int32) -> None:
    """Store 2 words to any CTA of the cluster; the address is a multiple of 8."""
    asm(None, [address, a, b], "st.shared::cluster.v2.b32 [$0], {$1,$2};", "r,r,r,~{memory}")


def load_global_u8(address: Int64) -> Int32:
    """Load a byte, zero-extended."""
    return Int32(asm(T.i32(), [address], "ld.global.u8 $0, [$1];", "=r,l"))


def load_global_b32(address: Int64) -> Int32:
    """Load one word; the address is a multiple of 4."""
    return Int32(asm(T.i32(), [address], "ld.global.b32 $0, [$1];", "=r,l"))


def load_global_b64(address: Int64) -> Int64:
    """Load 64 bits; the address is a multiple of 8."""
    return Int64(asm(T.i64(), [address], "ld.global.b64 $0, [$1];", "=l,l"))


def load_global_f32(address: Int64) -> Float32:
    """Load a float; the address is a multiple of 4."""
    return Float32(asm(T.f32(), [address], "ld.global.f32 $0, [$1];", "=f,l"))


def store_global_b16(address: Int64, value: Int32) -> None:
    """Store the lower half of a word; the address is a multiple of 2."""
    asm(
        None,
        [address, value],
        "{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.b16 [$0], h; }",
        "l,r,~{memory}",
    )


def store_global_b32(address: Int64, value: Int32) -> None:
    """Store one word; the address is a multiple of 4."""
    asm(None, [address, value], "st.global.b32 [$0], $1;", "l,r,~{memory}")


def store_global_b64(address: Int64, value: Int64) -> None:
    """Store 64 bits; the address is a multiple of 8."""
    asm(None, [address, value], "st.global.b64 [$0], $1;", "l,l,~{memory}")


def store_record(address: Int64, words: Sequence[Int32]) -> None:
    """Publish 16 bytes to other CTAs: two 64-bit words, each of which arrives whole."""
    asm(
        None,
        [address, *words],
        "{ .reg .b64 a, b; mov.b64 a, {$1,$2}; mov.b64 b, {$3,$4};\n"
        "st.relaxed.gpu.global.v2.b64 [$0], {a,b}; }",
        "l,r,r,r,r,~{memory}",
    )


def load_record(address: Int64) -> list[Int32]:
    """Read what ``store_record`` published: two 64-bit words, each either old or new."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "{ .reg .b64 a, b; ld.relaxed.gpu.global.v2.b64 {a,b}, [$4];\n"
        "mov.b64 {$0,$1}, a; mov.b64 {$2,$3}, b; }",
        "=r,=r,=r,=r,l,~{memory}",
    )
    return unpack(result, Int32, T.i32(), 4)


def atomic_add_relaxed(address: Int64, value: Int32) -> Int32:
    """Add to a word of global memory and return what it held before.

    Atomic for the whole GPU; it orders no other loads or stores.
    """
    return Int32(
        asm(
            T.i32(),
            [address, value],
            "atom.relaxed.gpu.global.add.u32 $0, [$1], $2;",
            "=r,l,r,~{memory}",
        )
    )


def add_relaxed(address: Int64, value: Int32) -> None:
    """Add to a word of global memory, atomically for the whole GPU; orders nothing else."""
    asm(None, [address, value], "red.relaxed.gpu.global.add.u32 [$0], $1;", "l,r,~{memory}")
