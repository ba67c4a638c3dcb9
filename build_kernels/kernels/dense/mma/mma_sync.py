"""The decode form's multiplication by ``mma.sync``, with the weights in registers."""

from __future__ import annotations

from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common.ptx import arith, memory, mma_sync
from build_kernels.kernels.dense.geometry.common import LANES, MMA_K
from build_kernels.kernels.dense.geometry.decode import MMA_SYNC_N, DecodeGeometry

#: Registers of one thread: [m-tile][k16 step][register] of weights, and [m-tile][chunk][n-tile]
#: [register] of sums.
Weights = list[list[list[Int32]]]
Sums = list[list[list[list[Float32]]]]


class DecodeMmaSync:
    """``warp_m`` tiles of 16 experts x up to ``tokens_tile`` tokens of one warp, over one slab."""

    def __init__(self, geometry: DecodeGeometry) -> None:
        self.g = geometry

    def load_weight(
        self, packed_weight: cute.Pointer, m_tile: Int32, slab: Int32, lane: Int32
    ) -> Weights:
        """Start loading this warp's A fragments, 16 bytes per lane, m-tile and step.

        ``packed_weight`` is laid out as the lanes read it (contract.fragment_image): one k16 step
        of an m-tile is 32 lanes x 16 bytes, and the steps follow each other.
        """
        g = self.g
        if g.cta_slabs * g.cluster_k > g.slabs:
            # A warp whose slab is past the last one loads the last one; its sums are not sent.
            slab = arith.min_s32(slab, Int32(g.slabs - 1))
        step = slab * g.slab_steps
        fragments = []
        for tile in range(g.warp_m):
            first = (Int64(m_tile + tile) * g.hidden_steps + step) * LANES + lane
            steps = []
            for i in range(g.slab_steps):
                # A short last slab reads its last step again; ``multiply`` skips it.
                inside = g.hidden % g.slab == 0
                offset = Int32(i) if inside else arith.min_s32(Int32(i), g.hidden_steps - 1 - step)
                address = packed_weight.toint() + (first + offset * LANES) * 16
                steps.append(memory.load_weight_v4(address))
            fragments.append(steps)
        return fragments

    def multiply(
        self, weights: Weights, rows: Int32, n_tiles: int, steps_left: Int32, lane: Int32
    ) -> Sums:
        """Return this warp's partial sums of ``n_tiles`` times 8 tokens.

        A whole warp calls this, after the tokens' rows have arrived at the shared address ``rows``.
        ``steps_left`` is the number of steps from the slab's first to the end of the hidden
        dimension.
        """
        g = self.g
        sums = [
            [[[Float32(0.0)] * 4 for _ in range(n_tiles)] for _ in range(g.slab_chunks)]
            for _ in range(g.warp_m)
        ]
        # Lanes 0-7 give the addresses of 8 tokens' first 8 elements of two steps, lanes 8-15 those
        # of the next 8 elements, and so on.
        row = rows + (lane & 7) * g.row_bytes + arith.quotient(lane, 8) * 16

        def request(step: int) -> list[list[Int32]]:
            return [
                mma_sync.ldmatrix_x4(row + (tile * MMA_SYNC_N * g.row_bytes + step * (MMA_K * 2)))
                for tile in range(n_tiles)
            ]

        # Instructions are issued in the order written here: first the next loads, then MMAs that do
        # not depend on each other, since the next MMA of a chain would wait for some 35 cycles.
        ahead = request(0)
        for step in range(g.slab_steps):
            if step % 2 == 0:
                fragments = ahead
                if step + 2 < g.slab_steps:
                    ahead = request(step + 2)
            chunk = step // (g.k_chunk // MMA_K)
            for tile in range(n_tiles):
                for m in range(g.warp_m):
                    before = sums[m][chunk][tile]
                    b = fragments[tile][step % 2 * 2 : step % 2 * 2 + 2]
                    after = mma_sync.mma_m16n8k16(before, weights[m][step], b)
                    if g.hidden % g.slab:
                        inside = arith.less(Int32(step), steps_left)
                        after = [
                            arith.select(inside, new, old)
                            for new, old in zip(after, before, strict=True)
                        ]
                    sums[m][chunk][tile] = after
        return sums
