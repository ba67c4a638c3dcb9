"""Exchange of the swap-A/B form: the sums of every slice cross between the k ranks.

In each turn, the CTAs of the k ranks multiply one of the next slices each. Every n-tile of tokens
has one CTA that adds its slices, in ascending order. Warp w of a CTA sends its sums of all other
n-tiles to warp w of the CTA that adds them, by asynchronous stores into its shared memory. Each
buffer and warp has a full barrier, which counts the bytes that arrive here, and an empty barrier,
which counts the peers that have read what this warp sent.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier, memory, warp_ops
from build_kernels.kernels.dense.cluster import Cta
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES
from build_kernels.kernels.dense.geometry.swap_ab import N_TILE_BYTES, SwapAbGeometry


def first_n_tile(g: SwapAbGeometry, k_rank: Int32) -> Int32:
    """Return the first n-tile of tokens that a k rank adds."""
    whole, more = divmod(g.n_tiles, g.split_k)
    return k_rank * whole + arith.min_s32(k_rank, Int32(more))


def exchange_barriers(
    g: SwapAbGeometry, first: Int32, buffer: int, warp: Int32 | int
) -> tuple[Int32, Int32]:
    """Return the (full, empty) barriers of a buffer and warp; all begin at ``first``."""
    full = first + BARRIER_BYTES * (buffer * g.consumer_warps + warp)
    return full, full + BARRIER_BYTES * g.buffers * g.consumer_warps


class SliceExchange:
    """The exchange of one consumer warp. All its lanes call the methods."""

    def __init__(
        self, geometry: SwapAbGeometry, shared: Int32, cta: Cta, warp: Int32, lane: Int32
    ) -> None:
        self.g, self.shared, self.cta, self.warp, self.lane = geometry, shared, cta, warp, lane
        # This warp's sums of the n-tiles that it adds itself, for each buffer.
        size = 4 * geometry.held_n_tiles
        self.own = [cute.make_rmem_tensor(size, Float32) for _ in range(geometry.buffers)]

    def barriers(self, buffer: int) -> tuple[Int32, Int32]:
        """Return this warp's (full, empty) barriers of a buffer."""
        first = self.shared + self.g.exchange_barrier_offset
        return exchange_barriers(self.g, first, buffer, self.warp)

    @cute.jit
    def send(self, sums: cute.Tensor, turn: cutlass.Constexpr[int]) -> None:
        """Send the sums of a slice to the peers that add them, and keep those that this CTA adds.

        ``sums`` has four of this thread for each n-tile of tokens. ``turn`` is how many
        slices this CTA has sent before.
        """
        g = self.g
        e_rank, k_rank, t_rank = self.cta
        buffer, phase = turn % g.buffers, turn // g.buffers
        full, empty = self.barriers(buffer)
        if cutlass.const_expr(phase > 0):
            # The peers have read what was in the buffer.
            mbarrier.wait(empty, Int32((phase - 1) & 1))
        else:
            self.expect(full)
        room = (
            self.shared + g.exchange_offset + buffer * g.exchange_bytes + self.warp * g.warp_bytes
        )
        for i in cutlass.range_constexpr(4 * g.held_n_tiles):
            value = Float32(0.0)
            for peer in cutlass.range_constexpr(g.split_k):
                n_tile = min(g.first_n_tile(peer) + i // 4, g.n_tiles - 1)
                mine = arith.equal(k_rank, Int32(peer))
                value = arith.select(mine, Float32(sums[4 * n_tile + i % 4]), value)
            self.own[buffer][i] = arith.read_now(value)
        for peer in cutlass.range_constexpr(g.split_k):
            if k_rank != peer:
                rank = g.cta_rank(e_rank, Int32(peer), t_rank)
                place = room + self.slot(k_rank, Int32(peer)) * g.slot_bytes + self.lane * 16
                place, counted = memory.map_shared(place, rank), memory.map_shared(full, rank)
                self.send_to(sums, peer, place, counted)

    def send_to(self, sums: cute.Tensor, peer: int, place: Int32, full: Int32) -> None:
        """Store this thread's sums of the n-tiles that ``peer`` adds at the address ``place``."""
        first = self.g.first_n_tile(peer)
        for n_tile in range(self.g.n_tile_count(peer)):
            own = range(4 * (first + n_tile), 4 * (first + n_tile) + 4)
            words = [arith.bits(Float32(sums[i])) for i in own]
            async_copy.store_async(place + n_tile * N_TILE_BYTES, full, words)

    @cute.jit
    def add(self, totals: cute.Tensor, turn: cutlass.Constexpr[int]) -> None:
        """Add the slices of a turn, in ascending order, to this thread's totals.

        It waits for the peers' sums; then the buffer is empty.
        """
        g = self.g
        e_rank, k_rank, t_rank = self.cta
        buffer, phase = turn % g.buffers, turn // g.buffers
        full, empty = self.barriers(buffer)
        mbarrier.wait(full, Int32(phase & 1))
        room = buffer * g.exchange_bytes + self.warp * g.warp_bytes
        first = self.shared + g.exchange_offset + room + self.lane * 16
        seen = Int32(1)
        for source in g.ascending(turn):
            slot = arith.min_s32(self.slot(Int32(source), k_rank), Int32(g.split_k - 2))
            mine = arith.equal(k_rank, Int32(source))
            for n_tile in cutlass.range_constexpr(g.held_n_tiles):
                got = memory.load_shared_v4(first + slot * g.slot_bytes + n_tile * N_TILE_BYTES)
                for i in cutlass.range_constexpr(4):
                    kept = Float32(self.own[buffer][4 * n_tile + i])
                    term = arith.select(mine, kept, arith.from_bits(got[i]))
                    total = Float32(totals[4 * n_tile + i])
                    totals[4 * n_tile + i] = arith.add_rn(total, term)
                    seen = seen | got[i]
        if cutlass.const_expr(turn < g.cta_slices - g.buffers):
            self.expect(full)
            # The buffer may be released only when the loads have returned. MMAs that were issued
            # before can delay the loads for longer than the peers need to fill the buffer again, so
            # the arrival is made to depend on the loaded values. The condition always holds:
            # ``seen`` starts with a bit set.
            seen = warp_ops.redux_max_u32(seen)
            if self.lane < g.split_k - 1 and seen != 0:
                peer = arith.remainder(k_rank + 1 + self.lane, g.split_k)
                rank = g.cta_rank(e_rank, peer, t_rank)
                mbarrier.arrive_remote(memory.map_shared(empty, rank))

    @cute.jit
    def expect(self, full: Int32) -> None:
        """Expect this warp's sums of one slice from every peer."""
        g = self.g
        k_rank = self.cta.k_rank
        count = first_n_tile(g, k_rank + 1) - first_n_tile(g, k_rank)
        if self.lane == 0:
            mbarrier.arrive_expect_tx(full, count * ((g.split_k - 1) * N_TILE_BYTES))

    def slot(self, sender: Int32, receiver: Int32) -> Int32:
        """Return the slot of a sending k rank at a receiving one, which has none for itself."""
        return arith.select(arith.less(receiver, sender), sender - 1, sender)
