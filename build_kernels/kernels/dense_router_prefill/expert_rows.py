"""The form of dense_router_prefill with experts as the rows of the MMA and tokens as its columns:
tiles of any multiple of 8 tokens, so that one wave of blocks covers a batch.

A cluster (rows_geometry.py) is parts of the experts x shares of the hidden dimension x tiles of
tokens. A launch is

1. two warps feed a ring of stages, 64 elements of the hidden dimension each: the tile's weights by
   bulk copies of the packed image, already before the wait on the previous kernel, and its hidden
   states by the tensor map. Blocks that need the same fetch it in turns and multicast;
2. each warpgroup multiplies 64 experts by all tokens of the tile, one chunk at a time, in one
   accumulator (rows_wgmma.py);
3. the partial sums of a chunk are added to the totals, in ascending order of chunks. Where the
   hidden dimension is split, the shares multiply as many neighbouring chunks at a time, and each
   adds those columns of tokens that it holds: a warp stores the others into the shared memory of
   the warps of the same number in the other shares, and adds what it got while a later chunk is
   being multiplied;
4. the logits go to shared memory, a row a token. A few threads a token bound its keys
   (screening.py); whatever may be among the best becomes a candidate. The parts of the experts
   divide the tokens that they hold, and the owner of a token is sent its candidates;
5. it scores them exactly and ranks them by counting, and stores. A token with more candidates than
   its list holds, by ties, say, is ranked from all its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from build_kernels.kernels.common import bulk, finish, ptx, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.dense_router_prefill import rows_ptx, screening
from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, LANES
from build_kernels.kernels.dense_router_prefill.hidden_map import hidden_map
from build_kernels.kernels.dense_router_prefill.rows_geometry import (
    COLUMN,
    COLUMN_BYTES,
    LISTED,
    RANKED,
    RowsGeometry,
)
from build_kernels.kernels.dense_router_prefill.rows_wgmma import WgmmaRows

#: Named barrier of the warps that multiply.
CONSUMERS = 1


class ExpertRows:
    def __init__(self, geometry: RowsGeometry) -> None:
        self.g = geometry

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        g = self.g
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.tile_tokens)
        tiles = ptx.quotient(
            tokens + (g.tile_tokens * g.cluster_t - 1), g.tile_tokens * g.cluster_t
        )
        self.dense_router_prefill(
            tensor_map,
            packed_weight,
            bias,
            logits_out,
            routing,
        ).launch(
            grid=(g.cluster_x, tiles * g.cluster_t, 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_x, g.cluster_t, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def dense_router_prefill(
        self,
        hidden_states: cute.CopyAtom,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        routing: Routing,
    ) -> None:
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(ptx.quotient(thread, LANES))
        lane = ptx.remainder(thread, LANES)
        part_e = ptx.remainder(cute.arch.block_idx()[0], g.cluster_e)
        share = ptx.quotient(cute.arch.block_idx()[0], g.cluster_e)
        tile = cute.arch.block_idx()[1]
        part_t = ptx.remainder(tile, g.cluster_t)
        first_token = tile * g.tile_tokens

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        biases = shared + g.bias_offset
        full = shared + g.barrier_offset
        hidden_empty = full + 8 * g.stages
        weight_empty = hidden_empty + 8 * g.stages
        received = weight_empty + 8 * g.stages
        credit = received + 8 * g.buffers * g.consumer_warps

        cute.arch.griddepcontrol_launch_dependents()

        if thread == 0:
            for stage in cutlass.range_constexpr(g.stages):
                ptx.barrier_init(full + 8 * stage, 1)
                ptx.barrier_init(hidden_empty + 8 * stage, g.consumer_warps * g.cluster_e)
                ptx.barrier_init(weight_empty + 8 * stage, g.consumer_warps * g.cluster_t)
            if cutlass.const_expr(g.split_k > 1):
                for number in cutlass.range_constexpr(g.buffers * g.consumer_warps):
                    ptx.barrier_init(received + 8 * number, 1)
                    ptx.barrier_init(credit + 8 * number, g.split_k - 1)
            ptx.barrier_init_fence()
            # The first filling of every stage; thread 0 expects each later one in time.
            for stage in cutlass.range_constexpr(g.stages):
                ptx.barrier_expect(full + 8 * stage, Int32(g.stage_bytes))
        self.load_biases(bias.toint(), biases, thread, g.threads)
        # Relaxed: the fence above has published the barriers, and nothing else crosses blocks yet.
        if cutlass.const_expr(g.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()

        if warp >= g.consumer_warps:
            cute.arch.setmaxregister_decrease(g.producer_registers)
            if warp == g.consumer_warps:
                if lane == 0:
                    tensor_map = bulk.tensor_map_address(hidden_states)
                    bulk.prefetch_tensor_map(tensor_map)
                    cute.arch.griddepcontrol_wait()
                    self.feed_hidden(
                        tensor_map,
                        shared + g.weight_stage_bytes,
                        full,
                        hidden_empty,
                        first_token,
                        part_e,
                        share,
                        part_t,
                    )
            elif warp == g.consumer_warps + 1 and lane == 0:
                first = packed_weight.toint() + Int64(part_e * g.weight_stage_bytes)
                self.feed_weight(first, shared, full, weight_empty, part_e, share, part_t)
            self.retire()
            self.await_retired()
            self.meet()
            self.part()
        else:
            cute.arch.setmaxregister_increase(g.consumer_registers)
            totals = self.multiply(
                shared, full, hidden_empty, weight_empty, part_e, share, part_t, warp, lane, thread
            )
            # The ring becomes the epilogue's: everything sent to it has arrived and been read.
            self.sync_consumers()
            self.retire()
            self.store_logits(totals, shared, warp, lane)
            self.sync_consumers()
            # The hidden states' arrival implies it; it stands here for what is read from here on.
            cute.arch.griddepcontrol_wait()
            images = Int32(0)
            if routing.serving != 0 and routing.image_mask.toint() != 0:
                images = Int32(1)
                self.load_biases(
                    routing.image_bias.toint(), shared + g.image_bias_offset, thread, g.consumers
                )
                self.sync_consumers()
            first_held = first_token + self.first_column(share) * COLUMN
            end_held = ptx.min_s32(
                routing.tokens, first_token + self.first_column(share + 1) * COLUMN
            )
            if logits_out.toint() != 0:
                self.export(shared, logits_out.toint(), first_held, end_held, part_e, thread)
            self.await_retired()
            self.screen(routing, shared, first_held, images, part_e, share, part_t, thread)
            self.meet()
            if cutlass.const_expr(g.cluster_e == 1):
                self.sync_consumers()
            self.rank(routing, shared, first_held, end_held, part_e, share, part_t, thread)
            self.part()

    @cute.jit
    def load_biases(
        self, source: Int64, target: Int32, thread: Int32, threads: cutlass.Constexpr[int]
    ) -> None:
        """Biases to shared memory. A padding expert loses every tie: its id is above all others."""
        g = self.g
        for i in cutlass.range_constexpr(-(-g.padded_experts // threads)):
            expert = thread + i * threads
            if expert < g.padded_experts:
                value = Float32(float("-inf"))
                if expert < g.experts:
                    value = ptx.load_global_f32(source + Int64(expert) * 4)
                ptx.store_shared_f32(target + expert * 4, value)

    @cute.jit
    def biases_of(self, routing: Routing, shared: Int32, images: Int32, token: Int32) -> Int32:
        """Where the biases lie that a token is selected by."""
        image = Int32(0)
        if images != 0 and token < routing.tokens:
            image = finish.is_image(routing, token)
        usual = ptx.equal(image, Int32(0))
        return ptx.select(usual, shared + self.g.bias_offset, shared + self.g.image_bias_offset)

    def sync_consumers(self) -> None:
        cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=self.g.consumers)

    def retire(self) -> None:
        """This block's ring is at the others' disposal. Relaxed: its reads are complete."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive_relaxed()

    def await_retired(self) -> None:
        """Every ring of the cluster may hold candidates."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_wait()

    def meet(self) -> None:
        """All candidates have been sent, and logits can be read."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        elif self.g.cluster > 1:
            cute.arch.cluster_arrive_relaxed()

    def part(self) -> None:
        """Leave only after the others have read this block's logits, have released its stages and
        have got its sums."""
        if self.g.cluster_e > 1:
            cute.arch.cluster_arrive_relaxed()
        if self.g.cluster > 1:
            cute.arch.cluster_wait()

    def block_at(self, part_e: Int32, share: Int32, part_t: Int32) -> Int32:
        """The rank of a block in its cluster."""
        return part_e + share * self.g.cluster_e + part_t * self.g.cluster_x

    def first_column(self, share: Int32) -> Int32:
        """The first column of tokens that a share adds."""
        whole, more = divmod(self.g.columns, self.g.split_k)
        return share * whole + ptx.min_s32(share, Int32(more))

    def column_count(self, share: Int32) -> Int32:
        """How many columns a share adds."""
        return self.first_column(share + 1) - self.first_column(share)

    # --- producers ------------------------------------------------------------------------------

    @cute.jit
    def feed_hidden(
        self,
        tensor_map: Int64,
        ring: Int32,
        full: Int32,
        empty: Int32,
        first_token: Int32,
        part_e: Int32,
        share: Int32,
        part_t: Int32,
    ) -> None:
        """Fetch the tile's hidden states of every ``cluster_e``-th stage for all parts of the
        experts."""
        g = self.g
        peers = Int32((1 << g.cluster_e) - 1) << self.block_at(Int32(0), share, part_t)
        stage, laps = Int32(0), Int32(0)
        for number in cutlass.range(g.blocks, unroll=1):
            if ptx.remainder(number, g.cluster_e) == part_e:
                if number >= g.stages:
                    bulk.wait(empty + 8 * stage, (laps >> stage) & 1)
                    laps = laps ^ (Int32(1) << stage)
                place = ring + stage * g.stage_bytes
                x = self.block_of(number, share) * K_BLOCK
                if cutlass.const_expr(g.cluster_e > 1):
                    bulk.copy_tile_multicast(
                        place, tensor_map, x, first_token, full + 8 * stage, peers
                    )
                else:
                    bulk.copy_tile(place, tensor_map, x, first_token, full + 8 * stage)
            stage = self.following(stage)

    @cute.jit
    def feed_weight(
        self,
        first: Int64,
        ring: Int32,
        full: Int32,
        empty: Int32,
        part_e: Int32,
        share: Int32,
        part_t: Int32,
    ) -> None:
        """Fetch the part's weights of every ``cluster_t``-th stage for all tiles of tokens."""
        g = self.g
        peers = Int32(sum(1 << (i * g.cluster_x) for i in range(g.cluster_t)))
        peers = peers << self.block_at(part_e, share, Int32(0))
        stage, laps = Int32(0), Int32(0)
        for number in cutlass.range(g.blocks, unroll=1):
            if ptx.remainder(number, g.cluster_t) == part_t:
                if number >= g.stages:
                    bulk.wait(empty + 8 * stage, (laps >> stage) & 1)
                    laps = laps ^ (Int32(1) << stage)
                place = ring + stage * g.stage_bytes
                address = first + Int64(self.block_of(number, share)) * (
                    g.padded_experts * K_BLOCK * 2
                )
                size = Int32(g.weight_stage_bytes)
                if cutlass.const_expr(g.cluster_t > 1):
                    ptx.copy_bulk_multicast(place, address, size, full + 8 * stage, peers)
                else:
                    ptx.copy_bulk(place, address, size, full + 8 * stage)
            stage = self.following(stage)

    def block_of(self, number: Int32, share: Int32) -> Int32:
        """The 64-element block of the hidden dimension that is a share's stage of that number."""
        g = self.g
        turn = ptx.quotient(number, g.chunk_blocks)
        return (turn * g.split_k + share) * g.chunk_blocks + ptx.remainder(number, g.chunk_blocks)

    def following(self, stage: Int32) -> Int32:
        """The ring's next stage."""
        return ptx.select(ptx.equal(stage, Int32(self.g.stages - 1)), Int32(0), stage + 1)

    # --- step 1: the multiplication ---------------------------------------------------------------

    @cute.jit
    def multiply(
        self,
        shared: Int32,
        full: Int32,
        hidden_empty: Int32,
        weight_empty: Int32,
        part_e: Int32,
        share: Int32,
        part_t: Int32,
        warp: Int32,
        lane: Int32,
        thread: Int32,
    ) -> cute.Tensor:
        """This thread's logits of the columns that the block holds, four a column."""
        g = self.g
        rows = WgmmaRows(g, shared, warp)
        totals = cute.make_rmem_tensor(4 * g.held_columns, Float32)
        for i in cutlass.range_constexpr(4 * g.held_columns):
            # The neutral element: the sum starts from the first chunk's partial sums, bit for bit.
            totals[i] = Float32(-0.0)
        ring = (full, hidden_empty, weight_empty, part_e, share, part_t, lane, thread)
        stage, parity, number = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(g.split_k == 1):
            for _ in cutlass.range(g.rounds, unroll=1):
                stage, parity, number = self.chunk(rows, ring, stage, parity, number, None)
                self.promote(rows, totals)
        else:
            own = [cute.make_rmem_tensor(4 * g.held_columns, Float32) for _ in range(g.buffers)]
            place = (part_e, share, part_t, warp, lane)
            received = weight_empty + 8 * g.stages
            exchange = (totals, own, shared, received, place)
            laps = g.rounds // g.buffers
            for lap in cutlass.range(laps, unroll=1):
                for buffer in cutlass.range_constexpr(g.buffers):
                    add = partial(self.add_before, *exchange, buffer, lap)
                    stage, parity, number = self.chunk(rows, ring, stage, parity, number, add)
                    self.hand_over(rows, *exchange, buffer, lap)
            if cutlass.const_expr(g.rounds % g.buffers > 0):
                add = partial(self.add_before, *exchange, 0, Int32(laps))
                stage, parity, number = self.chunk(rows, ring, stage, parity, number, add)
                self.hand_over(rows, *exchange, 0, Int32(laps))
            for turn in cutlass.range_constexpr(g.rounds - g.buffers, g.rounds):
                self.add(*exchange, turn % g.buffers, Int32(turn // g.buffers))
        return totals

    def promote(self, rows: WgmmaRows, totals: cute.Tensor) -> None:
        """Add the chunk's partial sums to the totals."""
        for column in range(self.g.columns):
            for i, term in enumerate(rows.column(column), 4 * column):
                totals[i] = ptx.add_rn(Float32(totals[i]), term)

    def chunk(
        self,
        rows: WgmmaRows,
        ring: tuple[Int32, ...],
        stage: Int32,
        parity: Int32,
        number: Int32,
        meanwhile: Callable[[], None] | None,
    ) -> tuple[Int32, Int32, Int32]:
        """Multiply a chunk, from the ring's ``stage`` on; ``meanwhile`` runs under its MMAs. A
        stage is released one block later, when its MMAs are known to have finished."""
        g = self.g
        before = stage
        # Sums of the chunk before the last one are there; those of the last one are on their way.
        moment = 0 if g.buffers > 1 else g.chunk_blocks // 2
        for block in range(g.chunk_blocks):
            bulk.wait(ring[0] + 8 * stage, parity)
            self.expect(ring, stage, number)
            rows.multiply(stage, starts=block == 0)
            if block > 0:
                rows.wait(1)
                self.release(ring, before, number - 1)
            if block == moment and meanwhile is not None:
                meanwhile()
            before = stage
            wraps = ptx.equal(stage, Int32(g.stages - 1))
            parity = ptx.select(wraps, parity ^ 1, parity)
            stage = self.following(stage)
            number = number + 1
        rows.wait(0)
        self.release(ring, before, number - 1)
        return stage, parity, number

    @cute.jit
    def expect(self, ring: tuple[Int32, ...], stage: Int32, number: Int32) -> None:
        """The next filling of a stage that has just arrived: before anybody can release it."""
        g = self.g
        full, thread = ring[0], ring[7]
        if thread == 0 and number + g.stages < g.blocks:
            ptx.barrier_expect(full + 8 * stage, Int32(g.stage_bytes))

    @cute.jit
    def release(self, ring: tuple[Int32, ...], stage: Int32, number: Int32) -> None:
        """Tell the two blocks that will fill the stage again."""
        g = self.g
        _, hidden_empty, weight_empty, part_e, share, part_t, lane, _ = ring
        following = number + g.stages
        if lane < 2 and following < g.blocks:
            first = ptx.equal(lane, Int32(0))
            barrier = ptx.select(first, hidden_empty, weight_empty) + 8 * stage
            e = ptx.select(first, ptx.remainder(following, g.cluster_e), part_e)
            t = ptx.select(first, part_t, ptx.remainder(following, g.cluster_t))
            bulk.arrive_remote(ptx.map_shared(barrier, self.block_at(e, share, t)))

    # --- sums that cross from share to share ------------------------------------------------------

    @cute.jit
    def hand_over(
        self,
        rows: WgmmaRows,
        totals: cute.Tensor,
        own: list[cute.Tensor],
        shared: Int32,
        received: Int32,
        place: tuple[Int32, ...],
        buffer: cutlass.Constexpr[int],
        lap: Int32,
    ) -> None:
        """Send this warp's sums of a chunk to the shares that add them; keep the own columns. A
        buffer's chunks are its laps."""
        g = self.g
        part_e, share, part_t, warp, lane = place
        arrival, credit = self.exchange_barriers(received, buffer, warp)
        # The others have read what was in the buffer.
        if lap > 0:
            bulk.wait(credit, (lap - 1) & 1)
        else:
            self.expect_sums(arrival, place)
        room = shared + g.received_offset + buffer * g.exchange_bytes + warp * g.warp_bytes
        for i in cutlass.range_constexpr(4 * g.held_columns):
            value = Float32(0.0)
            for peer in cutlass.range_constexpr(g.split_k):
                column = min(g.first_column(peer) + i // 4, g.columns - 1)
                value = ptx.select(ptx.equal(share, Int32(peer)), rows.column(column)[i % 4], value)
            own[buffer][i] = rows_ptx.kept(value)
        for peer in cutlass.range_constexpr(g.split_k):
            if share != peer:
                block = self.block_at(part_e, Int32(peer), part_t)
                slot = room + self.slot(share, Int32(peer)) * g.slot_bytes + lane * 16
                slot, counted = ptx.map_shared(slot, block), ptx.map_shared(arrival, block)
                self.send_sums(rows, peer, slot, counted)

    def send_sums(self, rows: WgmmaRows, peer: int, place: Int32, counted: Int32) -> None:
        """Store this thread's sums of the columns that a share adds, where it counts them."""
        first = self.g.first_column(peer)
        for column in range(self.g.column_count(peer)):
            sums = [ptx.bits(value) for value in rows.column(first + column)]
            ptx.store_remote(place + column * COLUMN_BYTES, counted, sums)

    @cute.jit
    def add_before(
        self,
        totals: cute.Tensor,
        own: list[cute.Tensor],
        shared: Int32,
        received: Int32,
        place: tuple[Int32, ...],
        buffer: cutlass.Constexpr[int],
        lap: Int32,
    ) -> None:
        """Add the chunk that the buffer had before, if it had one."""
        if lap > 0:
            self.add(totals, own, shared, received, place, buffer, lap - 1)

    @cute.jit
    def add(
        self,
        totals: cute.Tensor,
        own: list[cute.Tensor],
        shared: Int32,
        received: Int32,
        place: tuple[Int32, ...],
        buffer: cutlass.Constexpr[int],
        lap: Int32,
    ) -> None:
        """Add one chunk of every share, in ascending order, to the columns that this one holds."""
        g = self.g
        part_e, share, part_t, warp, lane = place
        arrival, credit = self.exchange_barriers(received, buffer, warp)
        bulk.wait(arrival, lap & 1)
        room = buffer * g.exchange_bytes + warp * g.warp_bytes
        first = shared + g.received_offset + room + lane * 16
        seen = Int32(1)
        for source in cutlass.range_constexpr(g.split_k):
            slot = ptx.min_s32(self.slot(Int32(source), share), Int32(g.split_k - 2))
            mine = ptx.equal(share, Int32(source))
            for column in cutlass.range_constexpr(g.held_columns):
                got = ptx.load_shared_v4(first + slot * g.slot_bytes + column * COLUMN_BYTES)
                for i in cutlass.range_constexpr(4):
                    kept = Float32(own[buffer][4 * column + i])
                    term = ptx.select(mine, kept, ptx.from_bits(got[i]))
                    totals[4 * column + i] = ptx.add_rn(Float32(totals[4 * column + i]), term)
                    seen = seen | got[i]
        if lap * g.buffers + buffer < g.rounds - g.buffers:
            self.expect_sums(arrival, place)
            # The room may be given away only when the loads have returned: MMAs can hold them back
            # for longer than the others need to fill it again. So the arrival depends on their
            # values; none of them leaves ``seen`` zero.
            seen = ptx.redux_max_u32(seen)
            if lane < g.split_k - 1 and seen != 0:
                peer = ptx.remainder(share + 1 + lane, g.split_k)
                block = self.block_at(part_e, peer, part_t)
                bulk.arrive_remote(ptx.map_shared(credit, block))

    @cute.jit
    def expect_sums(self, arrival: Int32, place: tuple[Int32, ...]) -> None:
        """This warp's sums of one chunk, from all other shares."""
        g = self.g
        _, share, _, _, lane = place
        columns = self.column_count(share)
        if lane == 0:
            ptx.barrier_expect(arrival, columns * ((g.split_k - 1) * COLUMN_BYTES))

    def exchange_barriers(self, received: Int32, buffer: int, warp: Int32) -> tuple[Int32, Int32]:
        """(the sums of a warp's buffer have arrived, those handed over have been read)"""
        arrival = received + 8 * (buffer * self.g.consumer_warps + warp)
        return arrival, arrival + 8 * self.g.buffers * self.g.consumer_warps

    def slot(self, of: Int32, at: Int32) -> Int32:
        """Where share ``at`` keeps what belongs to share ``of``: it has no slot of its own."""
        return ptx.select(ptx.less(at, of), of - 1, of)

    # --- steps 2 to 5: candidates -----------------------------------------------------------------

    def store_logits(self, totals: cute.Tensor, shared: Int32, warp: Int32, lane: Int32) -> None:
        """Lay the held logits out as rows, one a token."""
        g = self.g
        for i in range(4):
            expert = WgmmaRows.expert_of(i, warp, lane)
            place = shared + WgmmaRows.token_of(i, lane) * g.logit_row_bytes + expert * 4
            for column in range(g.held_columns):
                ptx.store_shared_f32(
                    place + column * (COLUMN * g.logit_row_bytes), Float32(totals[4 * column + i])
                )

    def scatter(self, part: Int32) -> Int32:
        """What a thread's numbers of groups of 4 experts are xored with, so that neighbouring
        threads read different banks. Rows that are no power of two long need none."""
        g = self.g
        quads = g.thread_experts // 4
        if quads & (quads - 1):
            return Int32(0)
        spread = part * max(1, 8 // g.token_threads)
        return ptx.quotient(spread, max(1, g.token_threads // 4)) & (quads - 1)

    @cute.jit
    def export(
        self,
        shared: Int32,
        logits_out: Int64,
        first_token: Int32,
        end_token: Int32,
        part_e: Int32,
        thread: Int32,
    ) -> None:
        """Store the held logits, a warp a row."""
        g = self.g
        lane = ptx.remainder(thread, LANES)
        rows = end_token - first_token
        for row in range(ptx.quotient(thread, LANES), rows, g.consumer_warps):
            for i in cutlass.range_constexpr(g.tile_experts // LANES):
                column = i * LANES + lane
                expert = part_e * g.tile_experts + column
                if expert < g.experts:
                    place = shared + row * g.logit_row_bytes + column * 4
                    target = logits_out + (Int64(first_token + row) * g.experts + expert) * 4
                    ptx.store_global_b32(target, scoring.stored_logit(ptx.load_shared_f32(place)))

    @cute.jit
    def screen(
        self,
        routing: Routing,
        shared: Int32,
        first_held: Int32,
        images: Int32,
        part_e: Int32,
        share: Int32,
        part_t: Int32,
        thread: Int32,
    ) -> None:
        """Send the candidates of the held tokens to their owners, ``token_threads`` threads a
        token: up to LISTED of a part's, and how many there are."""
        g = self.g
        lane = ptx.remainder(thread, LANES)
        for first in cutlass.range(
            thread - lane, g.held_tokens * g.token_threads, g.consumers, unroll=1
        ):
            index = first + lane
            held = ptx.less(index, Int32(g.held_tokens * g.token_threads))
            token = ptx.min_s32(ptx.quotient(index, g.token_threads), Int32(g.held_tokens - 1))
            biases = self.biases_of(routing, shared, images, first_held + token)
            biases = biases + part_e * (g.tile_experts * 4)
            member = ptx.remainder(index, g.token_threads)
            masks = self.candidates(shared, biases, token, member)
            self.send(shared, held, token, member, masks, part_e, share, part_t)

    @cute.jit
    def send(
        self,
        shared: Int32,
        held: Boolean,
        token: Int32,
        member: Int32,
        masks: list[Int32],
        part_e: Int32,
        share: Int32,
        part_t: Int32,
    ) -> None:
        """Send this thread's candidates of a token to the token's owner."""
        g = self.g
        owner = self.block_at(ptx.quotient(token, g.owned_tokens), share, part_t)
        row = ptx.remainder(token, g.owned_tokens)
        count = rows_ptx.population(masks[0])
        for word in cutlass.range_constexpr(1, g.thread_words):
            count = count + rows_ptx.population(masks[word])
        place, total = self.before(count, member)
        if held:
            if member == 0:
                target = shared + g.count_offset + (row * g.cluster_e + part_e) * 4
                rows_ptx.store_cluster_b32(ptx.map_shared(target, owner), total)
            target = shared + g.list_offset + row * g.list_row_bytes + part_e * (LISTED * 8)
            target = ptx.map_shared(target, owner)
            logits = shared + token * g.logit_row_bytes
            for word in cutlass.range_constexpr(g.thread_words):
                mask = masks[word]
                while mask != 0 and place < LISTED:
                    number = bulk.lowest_bit(mask) + 32 * word
                    column = member * g.thread_experts + (number ^ (self.scatter(member) * 4))
                    logit = ptx.load_shared_f32(logits + column * 4)
                    expert = part_e * g.tile_experts + column
                    rows_ptx.store_cluster_v2(target + place * 8, ptx.bits(logit), expert)
                    mask = mask & (mask - 1)
                    place = place + 1

    def before(self, count: Int32, member: Int32) -> tuple[Int32, Int32]:
        """(sum of the counts of a token's members before this one, sum of all)"""
        before, total = Int32(0), count
        distance = 1
        while distance < self.g.token_threads:
            other = bulk.shuffle_xor(total, distance)
            later = ptx.equal(member & distance, Int32(distance))
            before = ptx.select(later, before + other, before)
            total = total + other
            distance *= 2
        return before, total

    def candidates(self, shared: Int32, biases: Int32, token: Int32, member: Int32) -> list[Int32]:
        """The mask of one thread's candidates among its experts of its token."""
        g = self.g
        own = member * (g.thread_experts * 4)
        row = shared + token * g.logit_row_bytes + own
        flip = self.scatter(member)
        quads = g.thread_experts // 4
        offsets = [(flip ^ quad) * 16 for quad in range(quads)]

        def four(address: Int32) -> list[Float32]:
            return [ptx.from_bits(value) for value in ptx.load_shared_v4(address)]

        highs: list[Float32] = []
        groups = max(1, g.bounds // g.token_threads)
        best = [Float32(float("-inf"))] * groups
        for offset in offsets:
            for logit, bias in zip(four(row + offset), four(biases + own + offset), strict=True):
                low, high = screening.bounds(screening.screened(logit), bias)
                group = len(highs) % groups
                best[group] = ptx.max_f32(best[group], low)
                highs.append(high)
        threshold = screening.threshold(best, g.token_threads, g.top_k, g.bounds)
        return screening.near(highs, threshold)

    # --- steps 2 to 7: the candidates' exact scores, ranks and weights ----------------------------

    @cute.jit
    def rank(
        self,
        routing: Routing,
        shared: Int32,
        first_held: Int32,
        end_held: Int32,
        part_e: Int32,
        share: Int32,
        part_t: Int32,
        thread: Int32,
    ) -> None:
        """Rank the candidates of this block's tokens, ``rank_threads`` threads a token: a candidate
        counts those above it."""
        g = self.g
        member = ptx.remainder(thread, g.rank_threads)
        leader = ptx.remainder(thread, LANES) - member
        for turn in cutlass.range(g.rank_passes, unroll=1):
            place = ptx.quotient(thread + turn * g.consumers, g.rank_threads)
            row = ptx.min_s32(place, Int32(g.owned_tokens - 1))
            held = ptx.min_s32(part_e * g.owned_tokens + row, Int32(g.held_tokens - 1))
            token = first_held + part_e * g.owned_tokens + place
            valid = ptx.both(ptx.less(place, Int32(g.owned_tokens)), ptx.less(token, end_held))
            biases = shared + g.bias_offset
            # Whether somebody else has chosen: the caller, or nobody for a padding token.
            given, padding = Int32(0), Int32(0)
            if routing.serving != 0 and valid:
                images = Int32(0)
                if routing.image_mask.toint() != 0:
                    images = Int32(1)
                biases = self.biases_of(routing, shared, images, token)
                given = finish.replays(routing)
                padding = finish.is_padding(routing, token)
            ranked = ptx.both(valid, ptx.equal(given | padding, Int32(0)))
            logits = []
            for part in cutlass.range_constexpr(g.cluster_e):
                block = self.block_at(Int32(part), share, part_t)
                logits.append(ptx.map_shared(shared + held * g.logit_row_bytes, block))
            counts = [
                ptx.load_shared_b32(shared + g.count_offset + (row * g.cluster_e + part) * 4)
                for part in range(g.cluster_e)
            ]
            # Where they do not fit, as with many ties: every expert of the token.
            total, most = counts[0], counts[0]
            for count in counts[1:]:
                total, most = total + count, ptx.max_s32(most, count)
            fits = ptx.both(ptx.less(total, Int32(RANKED + 1)), ptx.less(most, Int32(LISTED + 1)))
            total = ptx.select(ptx.both(ranked, fits), total, Int32(0))
            # Threads without a token have a row of their own.
            own_row = ptx.min_s32(place, Int32(g.owned_tokens))
            slots = shared + g.slot_offset + own_row * g.slot_row_bytes
            records = shared + g.record_offset + own_row * (g.top_k * 16)
            listed = shared + g.list_offset + row * g.list_row_bytes
            rounds = ptx.quotient(ptx.redux_max_u32(total) + (g.rank_round - 1), g.rank_round)
            for round_ in cutlass.range(rounds, unroll=1):
                for i in cutlass.range_constexpr(g.rank_round // g.rank_threads):
                    number = round_ * g.rank_round + i * g.rank_threads + member
                    some = ptx.less(number, total)
                    entry = ptx.select(some, self.entry(number, counts), Int32(0))
                    logit, expert = ptx.load_shared_v2(listed + entry * 8)
                    logit = ptx.from_bits(logit)
                    expert = ptx.select(some, expert, Int32(0))
                    score = scoring.score(logit)
                    bias = ptx.load_shared_f32(biases + expert * 4)
                    key = ptx.select(some, scoring.ordered_key(logit, score, bias), Int32(0))
                    ptx.store_shared_v2(slots + number * 8, ~expert, key)
                    ptx.store_shared_f32(slots + (RANKED * 8 + number * 4), score)
            cute.arch.sync_warp()
            for round_ in cutlass.range(rounds, unroll=1):
                numbers, ranks = [], []
                for i in cutlass.range_constexpr(g.rank_round // g.rank_threads):
                    numbers.append(round_ * g.rank_round + i * g.rank_threads + member)
                    inverse, key = ptx.load_shared_v2(slots + numbers[i] * 8)
                    ranks.append(bulk.pack(key, inverse))
                above = [Int32(0) for _ in ranks]
                for pair in cutlass.range(ptx.quotient(total + 1, 2), unroll=4):
                    words = ptx.load_shared_v4(slots + pair * 16)
                    for low, high in ((words[0], words[1]), (words[2], words[3])):
                        other = bulk.pack(high, low)
                        above = [
                            count + ptx.select(bulk.above(other, rank), Int32(1), Int32(0))
                            for count, rank in zip(above, ranks, strict=True)
                        ]
                for i in cutlass.range_constexpr(len(ranks)):
                    key, inverse = bulk.halves(ranks[i])
                    if key != 0 and above[i] < g.top_k:
                        score_bits = ptx.load_shared_b32(slots + (RANKED * 8 + numbers[i] * 4))
                        ptx.store_shared_v2(records + above[i] * 16, ~inverse, score_bits)
            lacking = ptx.both(ranked, ptx.equal(total, Int32(0)))
            if ptx.ballot(lacking) != 0:
                self.rank_all(lacking, biases, logits, records, member)
            cute.arch.sync_warp()
            own_experts, own_scores = [], []
            for first in cutlass.range_constexpr(0, g.top_k, g.rank_threads):
                number = ptx.min_s32(first + member, Int32(g.top_k - 1))
                expert, score = ptx.load_shared_v2(records + number * 16)
                own_experts.append(expert)
                own_scores.append(ptx.from_bits(score))
            screening.finish_token(
                routing,
                own_experts,
                own_scores,
                g.top_k,
                logits,
                g.tile_experts,
                token,
                valid,
                given,
                padding,
                leader,
                member,
                g.rank_threads,
                g.experts,
            )

    def entry(self, number: Int32, counts: list[Int32]) -> Int32:
        """Where a token's candidate of that number lies: every part has a list of its own."""
        entry = number
        for part in range(len(counts) - 1):
            beyond = ptx.less(counts[part] - 1, number)
            # Of a later list, as far as this one knows.
            later = (part + 1) * LISTED + number - counts[part]
            entry = ptx.select(beyond, later, entry)
            number = ptx.select(beyond, number - counts[part], Int32(-1))
        return entry

    @cute.jit
    def rank_all(
        self,
        wanted: Boolean,
        biases: Int32,
        logits: list[Int32],
        records: Int32,
        member: Int32,
    ) -> None:
        """Leave the records of a token that has more candidates than are listed. A whole warp
        comes here."""
        g = self.g
        ranks = cute.make_rmem_tensor(g.top_k, Int64)
        for i in cutlass.range_constexpr(g.top_k):
            ranks[i] = Int64(0)
        for expert in cutlass.range(member, g.experts, g.rank_threads, unroll=1):
            logit = screening.logit_at(expert, logits, g.tile_experts)
            bias = ptx.load_shared_f32(biases + expert * 4)
            key = scoring.ordered_key(logit, scoring.score(logit), bias)
            screening.insert(ranks, bulk.pack(key, ~expert), g.top_k)
        best = screening.merge_lanes([Int64(ranks[i]) for i in range(g.top_k)], g.rank_threads)
        if wanted and member == 0:
            for i in cutlass.range_constexpr(g.top_k):
                expert = ~bulk.halves(best[i])[1]
                score = scoring.score(screening.logit_at(expert, logits, g.tile_experts))
                ptx.store_shared_v2(records + i * 16, expert, ptx.bits(score))


def program(constants: Mapping[str, int | float]) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    kinds = ("ptr:bf16", "ptr:bf16", "ptr:f32", "ptr:f32", "i64")
    return ExpertRows(RowsGeometry.of(constants)), finish.arguments(*kinds)
