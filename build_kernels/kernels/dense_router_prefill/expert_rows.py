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
   adds those columns of tokens that it holds: a warp hands the others to the warps of the same
   number in the other shares, by bulk copies, and adds what it got while the next chunk is being
   multiplied;
4. the logits go to shared memory, a row a token. A few threads a token bound its keys
   (screening.py); whatever may be among the best becomes a candidate;
5. the parts of the experts divide the tokens that they hold; the owner of a token reads the
   candidates of all parts, scores them exactly, ranks them and stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.common import bulk, finish, ptx, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.dense_router_prefill import screening
from build_kernels.kernels.dense_router_prefill.geometry import K_BLOCK, LANES
from build_kernels.kernels.dense_router_prefill.rows_geometry import (
    COLUMN,
    COLUMN_BYTES,
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
        # Only the type of the atom matters: it becomes the tensor-map parameter, which the runtime
        # encodes by the recipe in contract.py.
        matrix = cute.make_tensor(
            hidden_states, cute.make_layout((tokens, g.hidden), stride=(row_stride, 1))
        )
        box = cute.make_composed_layout(
            cute.make_swizzle(3, 4, 3),
            0,
            cute.make_layout((g.tile_tokens, K_BLOCK), stride=(K_BLOCK, 1)),
        )
        tensor_map, _ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), matrix, box, (g.tile_tokens, K_BLOCK)
        )
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
        credit = received + 8 * g.consumer_warps

        cute.arch.griddepcontrol_launch_dependents()

        if thread == 0:
            for stage in cutlass.range_constexpr(g.stages):
                ptx.barrier_init(full + 8 * stage, 1)
                ptx.barrier_init(hidden_empty + 8 * stage, g.consumer_warps * g.cluster_e)
                ptx.barrier_init(weight_empty + 8 * stage, g.consumer_warps * g.cluster_t)
            if cutlass.const_expr(g.split_k > 1):
                for number in cutlass.range_constexpr(g.consumer_warps):
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
            self.meet()
            self.part()
        else:
            cute.arch.setmaxregister_increase(g.consumer_registers)
            totals = self.multiply(
                shared, full, hidden_empty, weight_empty, part_e, share, part_t, warp, lane, thread
            )
            # The ring becomes the epilogue's: everything sent to it has arrived and been read.
            self.sync_consumers()
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

    def meet(self) -> None:
        """The parts of the experts have multiplied, and their logits and masks can be read."""
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
            own = cute.make_rmem_tensor(4 * g.held_columns, Float32)
            place = (part_e, share, part_t, warp, lane)
            received = weight_empty + 8 * g.stages
            stage, parity, number = self.chunk(rows, ring, stage, parity, number, None)
            self.hand_over(rows, own, shared, received, place, Int32(0))
            for turn in cutlass.range(1, g.rounds, unroll=1):
                stage, parity, number = self.chunk(
                    rows,
                    ring,
                    stage,
                    parity,
                    number,
                    partial(self.add, totals, own, shared, received, place, turn - 1),
                )
                self.hand_over(rows, own, shared, received, place, turn)
            self.add(totals, own, shared, received, place, Int32(g.rounds - 1))
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
        """Multiply a chunk, from the ring's ``stage`` on; ``meanwhile`` runs in the middle
        of it. A stage is released one block later, when its MMAs are known to have finished."""
        g = self.g
        before = stage
        for block in range(g.chunk_blocks):
            bulk.wait(ring[0] + 8 * stage, parity)
            self.expect(ring, stage, number)
            rows.multiply(stage, starts=block == 0)
            if block > 0:
                rows.wait(1)
                self.release(ring, before, number - 1)
            if block == g.chunk_blocks // 2 and meanwhile is not None:
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
        own: cute.Tensor,
        shared: Int32,
        received: Int32,
        place: tuple[Int32, ...],
        turn: Int32,
    ) -> None:
        """Send this warp's sums of a chunk to the shares that add them; keep the own columns."""
        g = self.g
        part_e, share, part_t, warp, lane = place
        credit = received + 8 * g.consumer_warps
        # What was staged, and what the others had room for, has been read.
        if turn > 0:
            bulk.wait(credit + 8 * warp, (turn - 1) & 1)
        else:
            self.expect_sums(received, place)
        staged = shared + g.staged_offset + warp * g.warp_bytes
        for i in cutlass.range_constexpr(4 * g.held_columns):
            value = Float32(0.0)
            for peer in cutlass.range_constexpr(g.split_k):
                column = min(g.first_column(peer) + i // 4, g.columns - 1)
                value = ptx.select(ptx.equal(share, Int32(peer)), rows.column(column)[i % 4], value)
            own[i] = value
        for peer in cutlass.range_constexpr(g.split_k):
            if share != peer:
                slot = self.slot(Int32(peer), share)
                self.stage(rows, peer, staged + slot * g.slot_bytes + lane * 16)
        ptx.fence_async_shared()
        cute.arch.sync_warp()
        if lane < g.split_k - 1:
            # Each share begins with the next one, so that no one is sent everything at once.
            peer = ptx.remainder(share + 1 + lane, g.split_k)
            block = self.block_at(part_e, peer, part_t)
            target = (
                shared
                + g.received_offset
                + warp * g.warp_bytes
                + self.slot(share, peer) * g.slot_bytes
            )
            columns = self.first_column(peer + 1) - self.first_column(peer)
            ptx.copy_bulk_to_peer(
                ptx.map_shared(target, block),
                staged + self.slot(peer, share) * g.slot_bytes,
                columns * COLUMN_BYTES,
                ptx.map_shared(received + 8 * warp, block),
            )
        cute.arch.sync_warp()

    def stage(self, rows: WgmmaRows, peer: int, place: Int32) -> None:
        """Store this thread's sums of the columns that a share adds."""
        first = self.g.first_column(peer)
        for column in range(self.g.column_count(peer)):
            sums = [ptx.bits(value) for value in rows.column(first + column)]
            ptx.store_shared_v4(place + column * COLUMN_BYTES, sums)

    @cute.jit
    def add(
        self,
        totals: cute.Tensor,
        own: cute.Tensor,
        shared: Int32,
        received: Int32,
        place: tuple[Int32, ...],
        turn: Int32,
    ) -> None:
        """Add one chunk of every share, in ascending order, to the columns that this one holds."""
        g = self.g
        part_e, share, part_t, warp, lane = place
        credit = received + 8 * g.consumer_warps
        bulk.wait(received + 8 * warp, turn & 1)
        first = shared + g.received_offset + warp * g.warp_bytes + lane * 16
        seen = Int32(1)
        for source in cutlass.range_constexpr(g.split_k):
            slot = ptx.min_s32(self.slot(Int32(source), share), Int32(g.split_k - 2))
            mine = ptx.equal(share, Int32(source))
            for column in cutlass.range_constexpr(g.held_columns):
                got = ptx.load_shared_v4(first + slot * g.slot_bytes + column * COLUMN_BYTES)
                for i in cutlass.range_constexpr(4):
                    term = ptx.select(mine, Float32(own[4 * column + i]), ptx.from_bits(got[i]))
                    totals[4 * column + i] = ptx.add_rn(Float32(totals[4 * column + i]), term)
                    seen = seen | got[i]
        if turn < g.rounds - 1:
            self.expect_sums(received, place)
            # The room may be given away only when the loads have returned: MMAs can hold them back
            # for longer than the others need to fill it again. So the arrival depends on their
            # values; none of them leaves ``seen`` zero.
            seen = ptx.redux_max_u32(seen)
            if lane < g.split_k - 1 and seen != 0:
                peer = ptx.remainder(share + 1 + lane, g.split_k)
                block = self.block_at(part_e, peer, part_t)
                bulk.arrive_remote(ptx.map_shared(credit + 8 * warp, block))

    @cute.jit
    def expect_sums(self, received: Int32, place: tuple[Int32, ...]) -> None:
        """This warp's sums of one chunk, from all other shares."""
        g = self.g
        _, share, _, warp, lane = place
        columns = self.first_column(share + 1) - self.first_column(share)
        if lane == 0:
            ptx.barrier_expect(received + 8 * warp, columns * ((g.split_k - 1) * COLUMN_BYTES))

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
        """Leave the masks of candidates of the held tokens, ``token_threads`` threads a token."""
        g = self.g
        for turn in cutlass.range_constexpr(g.screen_passes):
            index = thread + turn * g.consumers
            token = ptx.min_s32(ptx.quotient(index, g.token_threads), Int32(g.held_tokens - 1))
            biases = self.biases_of(routing, shared, images, first_held + token)
            biases = biases + part_e * (g.tile_experts * 4)
            part = ptx.remainder(index, g.token_threads)
            masks = self.candidates(shared, biases, token, part)
            if index < g.held_tokens * g.token_threads:
                place = shared + g.mask_offset + (token * g.mask_words + part * g.thread_words) * 4
                for word in cutlass.range_constexpr(g.thread_words):
                    ptx.store_shared_b32(place + 4 * word, masks[word])

    def candidates(self, shared: Int32, biases: Int32, token: Int32, part: Int32) -> list[Int32]:
        """The mask of one thread's candidates among its experts of its token."""
        g = self.g
        own = part * (g.thread_experts * 4)
        row = shared + token * g.logit_row_bytes + own
        flip = self.scatter(part)
        quads = g.thread_experts // 4
        offsets = [(flip ^ quad) * 16 for quad in range(quads)]

        def four(address: Int32) -> list[Float32]:
            return [ptx.from_bits(value) for value in ptx.load_shared_v4(address)]

        scores = [[screening.screened(logit) for logit in four(row + offset)] for offset in offsets]
        groups = max(1, g.bounds // g.token_threads)
        best = [Float32(float("-inf"))] * groups
        for quad, offset in enumerate(offsets):
            for i, bias in enumerate(four(biases + own + offset)):
                number = (4 * quad + i) % groups
                best[number] = ptx.max_f32(best[number], screening.low(scores[quad][i], bias))
        threshold = screening.threshold(best, g.token_threads, g.top_k, g.bounds)
        masks = [Int32(0) for _ in range(g.thread_words)]
        for quad, offset in enumerate(offsets):
            for i, bias in enumerate(four(biases + own + offset)):
                word, bit = divmod(4 * quad + i, 32)
                flag = (1 << bit) - (1 << 32 if bit == 31 else 0)
                near = bulk.not_less(screening.high(scores[quad][i], bias), threshold)
                masks[word] = masks[word] | ptx.select(near, Int32(flag), Int32(0))
        return masks

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
        """Rank the candidates of this block's tokens, ``rank_threads`` threads a token."""
        g = self.g
        member = ptx.remainder(thread, g.rank_threads)
        place = ptx.quotient(thread, g.rank_threads)
        row = ptx.min_s32(part_e * g.owned_tokens + place, Int32(g.held_tokens - 1))
        token = first_held + part_e * g.owned_tokens + place
        valid = ptx.both(ptx.less(place, Int32(g.owned_tokens)), ptx.less(token, end_held))
        biases = shared + g.bias_offset
        # Whether somebody else has chosen the experts: the caller, or nobody for a padding token.
        given, padding = Int32(0), Int32(0)
        if routing.serving != 0 and valid:
            images = Int32(0)
            if routing.image_mask.toint() != 0:
                images = Int32(1)
            biases = self.biases_of(routing, shared, images, token)
            given = finish.replays(routing)
            padding = finish.is_padding(routing, token)
        ranked = ptx.both(valid, ptx.equal(given | padding, Int32(0)))
        logits, masks = [], []
        for part in cutlass.range_constexpr(g.cluster_e):
            block = self.block_at(Int32(part), share, part_t)
            words_of = g.mask_offset + (row * g.mask_words + member * g.rank_words) * 4
            logits.append(self.at_block(shared + row * g.logit_row_bytes, block))
            masks.append(self.at_block(shared + words_of, block))
        words = cute.make_rmem_tensor(g.cluster_e * g.rank_words, Int32)
        for i in cutlass.range_constexpr(g.cluster_e * g.rank_words):
            part, word = divmod(i, g.rank_words)
            found = bulk.load_cluster_b32(masks[part] + 4 * word)
            words[i] = ptx.select(ranked, found, Int32(0))
        ranks = cute.make_rmem_tensor(g.top_k, Int64)
        for i in cutlass.range_constexpr(g.top_k):
            ranks[i] = Int64(0)
        # Two at a time, and two ahead: what one waits for hides behind the arithmetic of the other,
        # and the next loads behind both.
        first, second = self.take(words, member), self.take(words, member)
        first_logit, second_logit = self.load_if(first, logits), self.load_if(second, logits)
        while first >= 0:
            third, fourth = self.take(words, member), self.take(words, member)
            third_logit, fourth_logit = self.load_if(third, logits), self.load_if(fourth, logits)
            one = self.rank_of(first, first_logit, biases)
            other = self.rank_of(second, second_logit, biases)
            screening.insert(ranks, one, g.top_k)
            screening.insert(ranks, other, g.top_k)
            first, second = third, fourth
            first_logit, second_logit = third_logit, fourth_logit
        best = screening.merge_lanes([Int64(ranks[i]) for i in range(g.top_k)], g.rank_threads)
        screening.finish_token(
            routing,
            best,
            logits,
            g.tile_experts,
            token,
            valid,
            given,
            padding,
            ptx.remainder(thread, LANES) - member,
            member,
            g.rank_threads,
            g.experts,
        )

    def rank_of(self, column: Int32, logit: Float32, biases: Int32) -> Int64:
        """The rank of a candidate; 0, which is below all, for the column -1."""
        none = ptx.less(column, Int32(0))
        bias = ptx.load_shared_f32(biases + ptx.max_s32(column, Int32(0)) * 4)
        key = scoring.ordered_key(logit, scoring.score(logit), bias)
        return ptx.select(none, Int64(0), bulk.pack(key, ~column))

    def at_block(self, address: Int32, block: Int32) -> Int32:
        """The same shared address in a block of the cluster."""
        return address if self.g.cluster_e == 1 else ptx.map_shared(address, block)

    def take(self, words: cute.Tensor, member: Int32) -> Int32:
        """Remove the first candidate from the masks; its expert, or -1 if there is none."""
        g = self.g
        left = [Int32(words[i]) for i in range(g.cluster_e * g.rank_words)]
        first, index, word = Int32(-1), Int32(0), Int32(0)
        for i in reversed(range(len(left))):
            none = ptx.equal(left[i], Int32(0))
            part, number = divmod(i, g.rank_words)
            word = ptx.select(none, word, left[i])
            first = ptx.select(none, first, Int32(part * g.tile_experts))
            index = ptx.select(none, index, Int32(number))
        earlier = Int32(0)
        for i in range(len(left)):
            # Only the word that was taken loses its lowest bit.
            mine = ptx.equal(earlier, Int32(0))
            words[i] = ptx.select(mine, left[i] & (left[i] - 1), left[i])
            earlier = earlier | left[i]
        index = member * g.rank_words + index
        part = ptx.quotient(index, g.thread_words)
        bit = ptx.remainder(index, g.thread_words) * 32 + bulk.lowest_bit(word)
        column = first + part * g.thread_experts + (bit ^ (self.scatter(part) * 4))
        return ptx.select(ptx.less(first, Int32(0)), first, column)

    def load_if(self, column: Int32, logits: list[Int32]) -> Float32:
        """The logit of that expert; of the first one for -1."""
        column = ptx.max_s32(column, Int32(0))
        return screening.logit_at(column, logits, self.g.tile_experts)


def program(constants: Mapping[str, int | float]) -> tuple[Callable[..., None], tuple[object, ...]]:
    """The host function and placeholder arguments to compile it with."""
    kinds = ("ptr:bf16", "ptr:bf16", "ptr:f32", "ptr:f32", "i64")
    return ExpertRows(RowsGeometry.of(constants)), finish.arguments(*kinds)
