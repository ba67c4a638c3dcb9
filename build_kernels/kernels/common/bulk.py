"""PTX instructions of the prefill pipeline: tensor-map copies, phased and remote mbarriers,
screening.

The same conventions as kernels/common/ptx.py: scalars in, scalars out, addresses are integers.
"""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, cute_nvgpu
from cutlass.cutlass_dsl import T

from build_kernels.kernels.common import ptx
from build_kernels.kernels.common.inline import asm, pure, struct, unpack

# --- tensor maps ----------------------------------------------------------------------------------


def tensor_map_address(atom: cute.CopyAtom) -> Int64:
    """The address of the 128-byte kernel parameter that a TMA copy atom stands for."""
    kind = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<64>>")
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value)
    return Int64(cute_nvgpu.get_tma_desc_addr(kind, executable).toint())


def prefetch_tensor_map(tensor_map: Int64) -> None:
    asm(None, [tensor_map], "prefetch.tensormap [$0];", "l,~{memory}")


def copy_tile(shared: Int32, tensor_map: Int64, x: Int32, y: Int32, barrier: Int32) -> None:
    """Copy the map's box at (x, y), innermost first; the mbarrier counts the bytes."""
    asm(
        None,
        [shared, tensor_map, x, y, barrier],
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[$0], [$1, {$2, $3}], [$4];",
        "r,l,r,r,r,~{memory}",
    )


def copy_tile_multicast(
    shared: Int32, tensor_map: Int64, x: Int32, y: Int32, barrier: Int32, blocks: Int32
) -> None:
    """copy_tile into every block of the cluster whose bit is set, each at the same offsets."""
    asm(
        None,
        [shared, tensor_map, x, y, barrier, blocks],
        "{ .reg .b16 mask; cvt.u16.u32 mask, $5;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [$0], [$1, {$2, $3}], [$4], mask; }",
        "r,l,r,r,r,r,~{memory}",
    )


# --- mbarriers ------------------------------------------------------------------------------------


def wait(barrier: Int32, parity: Int32) -> None:
    """Wait until the phase of that parity has completed."""
    asm(
        None,
        [barrier, parity],
        "{ .reg .pred p;\n"
        "WAIT_${:uid}:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n"
        "@!p bra WAIT_${:uid};\n"
        "}",
        "r,r,~{memory}",
    )


def arrive(barrier: Int32) -> None:
    """Arrive on a barrier of this block."""
    asm(None, [barrier], "mbarrier.arrive.shared::cta.b64 _, [$0];", "r,~{memory}")


def arrive_remote(barrier: Int32) -> None:
    """Arrive on a barrier of any block of the cluster (an address from map_shared).

    Orders only what this thread's block sees: enough for a thread that has merely read, and whose
    reads have completed. A release at cluster scope would flush memory each time.
    """
    asm(
        None,
        [barrier],
        "mbarrier.arrive.shared::cluster.b64 _, [$0];",
        "r,~{memory}",
    )


# --- between blocks -------------------------------------------------------------------------------


@cute.jit
def copy_to_block(
    target: Int32,
    source: Int32,
    size: cutlass.Constexpr[int],
    barrier: Int32,
    block: Int32,
    own_block: Int32,
    lane: Int32,
) -> None:
    """Copy ``size`` bytes (a multiple of 16) of shared memory to ``target`` in a block of the
    cluster, by a whole warp; the mbarrier at ``barrier`` there counts the bytes.

    A bulk copy between blocks must not lead to its own: there every lane copies a part, and
    arrives.
    """
    if block == own_block:
        for offset in cutlass.range(lane * 16, size, 32 * 16, unroll=1):
            ptx.store_shared_v4(target + offset, ptx.load_shared_v4(source + offset))
        arrive(barrier)
    elif lane == 0:
        ptx.copy_bulk_to_peer(
            ptx.map_shared(target, block), source, Int32(size), ptx.map_shared(barrier, block)
        )


# --- shared memory --------------------------------------------------------------------------------


def load_shared_f32x2(address: Int32) -> list[Float32]:
    result = asm(
        struct(T.f32(), 2), [address], "ld.shared.v2.f32 {$0,$1}, [$2];", "=f,=f,r,~{memory}"
    )
    return unpack(result, Float32, T.f32(), 2)


def store_shared_f32x2(address: Int32, a: Float32, b: Float32) -> None:
    asm(None, [address, a, b], "st.shared.v2.f32 [$0], {$1,$2};", "r,f,f,~{memory}")


def load_cluster_f32(address: Int32) -> Float32:
    """Load from the shared memory of any block of the cluster."""
    return Float32(asm(T.f32(), [address], "ld.shared::cluster.f32 $0, [$1];", "=f,r,~{memory}"))


def load_cluster_b32(address: Int32) -> Int32:
    return Int32(asm(T.i32(), [address], "ld.shared::cluster.b32 $0, [$1];", "=r,r,~{memory}"))


# --- approximate arithmetic, for screening only ---------------------------------------------------


def exp2_approx(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))


def log2_approx(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "lg2.approx.ftz.f32 $0, $1;", "=f,f"))


def sqrt_approx(a: Float32) -> Float32:
    return Float32(pure(T.f32(), [a], "sqrt.approx.ftz.f32 $0, $1;", "=f,f"))


def shift_in_sign(mask: Int32, a: Float32) -> Int32:
    """The mask, shifted left, with the sign of ``a`` as its lowest bit."""
    return Int32(pure(T.i32(), [a, mask], "shf.l.wrap.b32 $0, $1, $2, 1;", "=r,f,r"))


# --- 64-bit ranks ---------------------------------------------------------------------------------


def pack(high: Int32, low: Int32) -> Int64:
    return Int64(pure(T.i64(), [low, high], "mov.b64 $0, {$1,$2};", "=l,r,r"))


def halves(value: Int64) -> tuple[Int32, Int32]:
    """(high, low)"""
    result = pure(struct(T.i32(), 2), [value], "mov.b64 {$0,$1}, $2;", "=r,=r,l")
    low, high = unpack(result, Int32, T.i32(), 2)
    return high, low


def above(a: Int64, b: Int64) -> Boolean:
    """a > b as unsigned numbers."""
    return Boolean(arith.cmpi(arith.CmpIPredicate.ugt, a.ir_value(), b.ir_value()))


def shuffle_xor(value: Int32, lanes: int) -> Int32:
    text = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"
    return Int32(asm(T.i32(), [value], text, "=r,r"))


def lowest_bit(mask: Int32) -> Int32:
    """Index of the lowest set bit of a mask that is not zero."""
    text = "{ .reg .b32 t; brev.b32 t, $1; bfind.shiftamt.u32 $0, t; }"
    return Int32(pure(T.i32(), [mask], text, "=r,r"))
