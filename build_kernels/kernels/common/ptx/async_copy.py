"""Asynchronous copies into shared memory, whose bytes an mbarrier counts.

One thread issues a copy; it runs in the async proxy. Sizes are in bytes, addresses as in memory.py.
A multicast copy writes at the same offset in every CTA of the cluster whose bit is set in ``ctas``,
and counts its bytes on the mbarrier at the same offset there.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Int32, Int64, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu

from build_kernels.kernels.common.ptx import mbarrier, memory
from build_kernels.kernels.common.ptx.inline import asm


def bulk(shared: Int32, address: Int64, size: Int32, barrier: Int32) -> None:
    """Copy ``size`` bytes, a multiple of 16, from global memory."""
    asm(
        None,
        [shared, address, size, barrier],
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        "r,l,r,r,~{memory}",
    )


def bulk_multicast(shared: Int32, address: Int64, size: Int32, barrier: Int32, ctas: Int32) -> None:
    """Copy as ``bulk`` does, into every CTA of ``ctas``."""
    asm(
        None,
        [shared, address, size, barrier, ctas],
        "{ .reg .b16 mask; cvt.u16.u32 mask, $4;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[$0], [$1], $2, [$3], mask; }",
        "r,l,r,r,r,~{memory}",
    )


def bulk_to_peer(remote: Int32, shared: Int32, size: Int32, barrier: Int32) -> None:
    """Copy shared memory of this CTA to a peer. ``remote`` and ``barrier`` lie in the peer."""
    asm(
        None,
        [remote, shared, size, barrier],
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        "[$0], [$1], $2, [$3];",
        "r,r,r,r,~{memory}",
    )


@cute.jit
def to_cta(
    target: Int32,
    source: Int32,
    size: cutlass.Constexpr[int],
    barrier: Int32,
    cta: Int32,
    own_cta: Int32,
    lane: Int32,
) -> None:
    """Copy ``size`` bytes, a multiple of 16, of shared memory to any CTA of the cluster.

    A whole warp calls this. ``target`` and ``barrier`` are offsets in the window of that CTA. The
    mbarrier there counts the bytes; if it is this CTA, to which a bulk copy between CTAs must not
    lead, every lane copies a part with plain stores and arrives: 32 arrivals and no bytes.
    """
    if cta == own_cta:
        for offset in cutlass.range(lane * 16, size, 32 * 16, unroll=1):
            memory.store_shared_v4(target + offset, memory.load_shared_v4(source + offset))
        mbarrier.arrive(barrier)
    elif lane == 0:
        bulk_to_peer(
            memory.map_shared(target, cta), source, Int32(size), memory.map_shared(barrier, cta)
        )


def store_async(address: Int32, barrier: Int32, words: Sequence[Int32]) -> None:
    """Store 2 or 4 words into a peer; the mbarrier at ``barrier`` in the peer counts the bytes."""
    count = len(words)
    values = ",".join(f"${1 + i}" for i in range(count))
    asm(
        None,
        [address, *words, barrier],
        f"st.async.shared::cluster.mbarrier::complete_tx::bytes.v{count}.b32 "
        f"[$0], {{{values}}}, [${1 + count}];",
        f"{'r,' * (2 + count)}~{{memory}}",
    )


def fence_async_shared() -> None:
    """Order this thread's stores to shared memory before bulk copies that read what they wrote."""
    asm(None, [], "fence.proxy.async.shared::cta;", "~{memory}")


def tensor_map_address(atom: cute.CopyAtom) -> Int64:
    """Return the address of the 128-byte kernel parameter that belongs to a TMA copy atom."""
    kind = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<64>>")
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value)
    return Int64(cute_nvgpu.get_tma_desc_addr(kind, executable).toint())


def prefetch_tensor_map(tensor_map: Int64) -> None:
    """Fetch the descriptor into the cache of descriptors, ahead of its first use."""
    asm(None, [tensor_map], "prefetch.tensormap [$0];", "l,~{memory}")


def tile(shared: Int32, tensor_map: Int64, x: Int32, y: Int32, barrier: Int32) -> None:
    """Copy the box of a tensor map at (x, y), the innermost coordinate first."""
    asm(
        None,
        [shared, tensor_map, x, y, barrier],
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[$0], [$1, {$2, $3}], [$4];",
        "r,l,r,r,r,~{memory}",
    )


def tile_multicast(
    shared: Int32, tensor_map: Int64, x: Int32, y: Int32, barrier: Int32, ctas: Int32
) -> None:
    """Copy as ``tile`` does, into every CTA of ``ctas``."""
    asm(
        None,
        [shared, tensor_map, x, y, barrier, ctas],
        "{ .reg .b16 mask; cvt.u16.u32 mask, $5;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [$0], [$1, {$2, $3}], [$4], mask; }",
        "r,l,r,r,r,r,~{memory}",
    )
