"""PTX instructions that the CuTe DSL kernels need one by one, as functions on scalars.

Addresses are integers: 64-bit for global memory, 32-bit for the shared window. The arithmetic
functions fix the rounding (``.rn``, subnormals kept): the DSL would otherwise contract ``a * b +
c`` on its own, and section 3 of the design forbids that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from cutlass import Boolean, Float32, Int32, Int64
from cutlass._mlir.dialects import arith
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common.inline import asm, pure, struct, unpack

Number = TypeVar("Number", Int32, Float32)


# --- arithmetic -----------------------------------------------------------------------------------


def add_rn(a: Float32, b: Float32) -> Float32:
    return Float32(pure(T.f32(), [a, b], "add.rn.f32 $0, $1, $2;", "=f,f,f"))


def mul_rn(a: Float32, b: Float32) -> Float32:
    return Float32(pure(T.f32(), [a, b], "mul.rn.f32 $0, $1, $2;", "=f,f,f"))


def fma_rn(a: Float32, b: Float32, c: Float32) -> Float32:
    return Float32(pure(T.f32(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"))


def div_rn(a: Float32, b: Float32) -> Float32:
    return Float32(pure(T.f32(), [a, b], "div.rn.f32 $0, $1, $2;", "=f,f,f"))


def rsqrt_approx(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "rsqrt.approx.ftz.f32 $0, $1;", "=f,f"))


def max_f32(a: Float32, b: Float32) -> Float32:
    """max.f32: a NaN operand loses."""
    return Float32(pure(T.f32(), [a, b], "max.f32 $0, $1, $2;", "=f,f,f"))


def min_f32(a: Float32, b: Float32) -> Float32:
    """min.f32: a NaN operand loses."""
    return Float32(pure(T.f32(), [a, b], "min.f32 $0, $1, $2;", "=f,f,f"))


def abs_f32(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "abs.f32 $0, $1;", "=f,f"))


def neg_f32(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "neg.f32 $0, $1;", "=f,f"))


def unordered(a: Float32, b: Float32) -> Boolean:
    """True if a or b is a NaN."""
    return Boolean(arith.cmpf(arith.CmpFPredicate.UNO, a.ir_value(), b.ir_value()))


def bits(a: Float32) -> Int32:
    return Int32(pure(T.i32(), [a], "mov.b32 $0, $1;", "=r,f"))


def from_bits(a: Int32) -> Float32:
    return Float32(pure(T.f32(), [a], "mov.b32 $0, $1;", "=f,r"))


def max_u32(a: Int32, b: Int32) -> Int32:
    return Int32(pure(T.i32(), [a, b], "max.u32 $0, $1, $2;", "=r,r,r"))


def max_of(values: Sequence[Int32]) -> Int32:
    """The largest unsigned value, by a tree."""
    level = list(values)
    while len(level) > 1:
        paired = [max_u32(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def min_s32(a: Int32, b: Int32) -> Int32:
    return Int32(pure(T.i32(), [a, b], "min.s32 $0, $1, $2;", "=r,r,r"))


def max_s32(a: Int32, b: Int32) -> Int32:
    return Int32(pure(T.i32(), [a, b], "max.s32 $0, $1, $2;", "=r,r,r"))


def quotient(a: Int32, b: int | Int32) -> Int32:
    """a // b for a that is not negative."""
    return Int32(arith.divui(a.ir_value(), Int32(b).ir_value()))


def remainder(a: Int32, b: int) -> Int32:
    """a % b for a that is not negative."""
    return Int32(arith.remui(a.ir_value(), Int32(b).ir_value()))


def modulo(a: Int32, b: Int32) -> Int32:
    """a % b for a that is not negative and b that is positive."""
    return Int32(arith.remui(a.ir_value(), b.ir_value()))


def equal(a: Int32, b: Int32) -> Boolean:
    return Boolean(arith.cmpi(arith.CmpIPredicate.eq, a.ir_value(), b.ir_value()))


def at_least_u32(a: Int32, b: Int32) -> Boolean:
    """a >= b as unsigned numbers."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.uge, a.ir_value(), b.ir_value()))


def less(a: Int32, b: Int32) -> Boolean:
    return Boolean(arith.cmpi(arith.CmpIPredicate.slt, a.ir_value(), b.ir_value()))


def both(a: Boolean, b: Boolean) -> Boolean:
    return Boolean(arith.andi(a.ir_value(), b.ir_value()))


def select(condition: Boolean, if_true: Number, if_false: Number) -> Number:
    """A choice without a branch."""
    return type(if_true)(
        arith.select(condition.ir_value(), if_true.ir_value(), if_false.ir_value())
    )


def kept(a: Int32) -> Int32:
    """``a``, computed here and kept in a register: not computed again at every use."""
    return Int32(asm(T.i32(), [a], "mov.b32 $0, $1;", "=r,r"))


def kept_wide(a: Int64) -> Int64:
    """``kept`` for 64 bits."""
    return Int64(asm(T.i64(), [a], "mov.b64 $0, $1;", "=l,l"))


# --- tensor core ----------------------------------------------------------------------------------


def mma_m16n8k16(acc: list[Float32], a: Sequence[Int32], b: Sequence[Int32]) -> list[Float32]:
    """D = A B + C for bf16 A (16 x 16), B (16 x 8) and fp32 C: one k16 step.

    Issued where it stands: taken for pure arithmetic, it would be hoisted out of branches not
    taken.
    """
    result = asm(
        struct(T.f32(), 4),
        [*a, *b, *acc],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )
    return unpack(result, Float32, T.f32(), 4)


def ldmatrix_x4(address: Int32) -> list[Int32]:
    """Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l /
    8."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
    )
    return unpack(result, Int32, T.i32(), 4)


# --- memory ---------------------------------------------------------------------------------------


def load_weight_v4(address: Int64) -> list[Int32]:
    """16 bytes of a buffer that no launch writes while kernels may read it."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,l",
    )
    return unpack(result, Int32, T.i32(), 4)


def copy_bulk(shared: Int32, address: Int64, size: Int32, barrier: Int32) -> None:
    """Copy ``size`` bytes (a multiple of 16) from global memory; the mbarrier counts them."""
    asm(
        None,
        [shared, address, size, barrier],
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        "r,l,r,r,~{memory}",
    )


def copy_bulk_multicast(
    shared: Int32, address: Int64, size: Int32, barrier: Int32, blocks: Int32
) -> None:
    """copy_bulk into every block of the cluster whose bit is set, each at the same offsets."""
    asm(
        None,
        [shared, address, size, barrier, blocks],
        "{ .reg .b16 mask; cvt.u16.u32 mask, $4;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[$0], [$1], $2, [$3], mask; }",
        "r,l,r,r,r,~{memory}",
    )


def copy_bulk_to_peer(remote: Int32, shared: Int32, size: Int32, barrier: Int32) -> None:
    """Copy own shared memory into a peer's; the peer's mbarrier counts the bytes."""
    asm(
        None,
        [remote, shared, size, barrier],
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        "[$0], [$1], $2, [$3];",
        "r,r,r,r,~{memory}",
    )


def fence_async_shared() -> None:
    """Order this thread's shared-memory stores before bulk copies that read them."""
    asm(None, [], "fence.proxy.async.shared::cta;", "~{memory}")


def load_shared_f32(address: Int32) -> Float32:
    return Float32(asm(T.f32(), [address], "ld.shared.f32 $0, [$1];", "=f,r,~{memory}"))


def load_shared_b32(address: Int32) -> Int32:
    return Int32(asm(T.i32(), [address], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}"))


def load_shared_v2(address: Int32) -> list[Int32]:
    result = asm(
        struct(T.i32(), 2), [address], "ld.shared.v2.b32 {$0,$1}, [$2];", "=r,=r,r,~{memory}"
    )
    return unpack(result, Int32, T.i32(), 2)


def load_shared_v4(address: Int32) -> list[Int32]:
    result = asm(
        struct(T.i32(), 4),
        [address],
        "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
    )
    return unpack(result, Int32, T.i32(), 4)


def store_shared_b32(address: Int32, value: Int32) -> None:
    asm(None, [address, value], "st.shared.b32 [$0], $1;", "r,r,~{memory}")


def store_shared_v4(address: Int32, values: Sequence[Int32]) -> None:
    asm(
        None,
        [address, *values],
        "st.shared.v4.b32 [$0], {$1,$2,$3,$4};",
        "r,r,r,r,r,~{memory}",
    )


def store_shared_f32(address: Int32, value: Float32) -> None:
    asm(None, [address, value], "st.shared.f32 [$0], $1;", "r,f,~{memory}")


def store_shared_v2(address: Int32, a: Int32, b: Int32) -> None:
    asm(None, [address, a, b], "st.shared.v2.b32 [$0], {$1,$2};", "r,r,r,~{memory}")


def map_shared(address: Int32, rank: Int32) -> Int32:
    """The address of the same shared-memory location in block ``rank`` of the cluster."""
    return Int32(pure(T.i32(), [address, rank], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r"))


def store_remote(address: Int32, barrier: Int32, words: Sequence[Int32]) -> None:
    """Store 2 or 4 words into a peer's shared memory and count them on the peer's mbarrier."""
    count = len(words)
    values = ",".join(f"${1 + i}" for i in range(count))
    asm(
        None,
        [address, *words, barrier],
        f"st.async.shared::cluster.mbarrier::complete_tx::bytes.v{count}.b32 "
        f"[$0], {{{values}}}, [${1 + count}];",
        f"{'r,' * (2 + count)}~{{memory}}",
    )


def load_global_f32(address: Int64) -> Float32:
    return Float32(asm(T.f32(), [address], "ld.global.f32 $0, [$1];", "=f,l"))


def load_global_u8(address: Int64) -> Int32:
    return Int32(asm(T.i32(), [address], "ld.global.u8 $0, [$1];", "=r,l"))


def load_global_b32(address: Int64) -> Int32:
    return Int32(asm(T.i32(), [address], "ld.global.b32 $0, [$1];", "=r,l"))


def load_global_b64(address: Int64) -> Int64:
    return Int64(asm(T.i64(), [address], "ld.global.b64 $0, [$1];", "=l,l"))


def store_global_b32(address: Int64, value: Int32) -> None:
    asm(None, [address, value], "st.global.b32 [$0], $1;", "l,r,~{memory}")


def store_global_b64(address: Int64, value: Int64) -> None:
    asm(None, [address, value], "st.global.b64 [$0], $1;", "l,l,~{memory}")


def store_record(address: Int64, words: Sequence[Int32]) -> None:
    """Publish 16 bytes to other blocks: two 64-bit words, each of which arrives whole."""
    asm(
        None,
        [address, *words],
        "{ .reg .b64 a, b; mov.b64 a, {$1,$2}; mov.b64 b, {$3,$4};\n"
        "st.relaxed.gpu.global.v2.b64 [$0], {a,b}; }",
        "l,r,r,r,r,~{memory}",
    )


def load_record(address: Int64) -> list[Int32]:
    """Read what store_record published: two 64-bit words, each of them old or new."""
    result = asm(
        struct(T.i32(), 4),
        [address],
        "{ .reg .b64 a, b; ld.relaxed.gpu.global.v2.b64 {a,b}, [$4];\n"
        "mov.b64 {$0,$1}, a; mov.b64 {$2,$3}, b; }",
        "=r,=r,=r,=r,l,~{memory}",
    )
    return unpack(result, Int32, T.i32(), 4)


def atomic_add_relaxed(address: Int64, value: Int32) -> Int32:
    return Int32(
        asm(
            T.i32(),
            [address, value],
            "atom.relaxed.gpu.global.add.u32 $0, [$1], $2;",
            "=r,l,r,~{memory}",
        )
    )


def exit_thread() -> None:
    """End this thread here: what follows is not reached."""
    asm(None, [], "exit;", "~{memory}")


# --- synchronisation ------------------------------------------------------------------------------


def barrier_init(address: Int32, arrivals: Int32 | int) -> None:
    count = Int32(arrivals)
    asm(None, [address, count], "mbarrier.init.shared.b64 [$0], $1;", "r,r,~{memory}")


def barrier_init_fence() -> None:
    asm(None, [], "fence.mbarrier_init.release.cluster;", "~{memory}")


def barrier_expect(address: Int32, transaction_bytes: Int32) -> None:
    """Arrive once and expect so many bytes of asynchronous stores in this phase."""
    asm(
        None,
        [address, transaction_bytes],
        "mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;",
        "r,r,~{memory}",
    )


def barrier_wait(address: Int32) -> None:
    """Wait for phase 0 and see what its bytes brought, from copies and from peers.

    At block scope: shared memory has no cache to invalidate, and an acquire at cluster scope would
    invalidate L1 for nothing.
    """
    asm(
        None,
        [address],
        "{ .reg .pred p;\n"
        "WAIT_${:uid}:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0;\n"
        "@!p bra WAIT_${:uid};\n"
        "}",
        "r,~{memory}",
    )


def ballot(condition: Boolean) -> Int32:
    """The lanes of a full warp for which the condition holds."""
    text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return Int32(asm(T.i32(), [select(condition, Int32(1), Int32(0))], text, "=r,r"))


def lower_lanes() -> Int32:
    """The mask of the lanes below this one."""
    return Int32(pure(T.i32(), [], "mov.u32 $0, %lanemask_lt;", "=r"))


def redux_max_u32(value: Int32) -> Int32:
    return Int32(asm(T.i32(), [value], "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r"))


def broadcast(value: Int32, lane: Int32) -> Int32:
    return Int32(
        asm(T.i32(), [value, lane], "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r")
    )
