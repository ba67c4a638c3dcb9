"""The tile form: the whole dense router for many tokens, 128 per CTA (CuTe DSL).

Steps 1 to 7 of the router. The summation order is the one that all forms share, so a token's result
does not depend on its neighbours, its row or their number.

A CTA multiplies 128 tokens by its part of the experts over the whole hidden dimension
(geometry/tile.py). Two producer warps fill two rings: one of hidden states (by a tensor map), one
of weights (bulk copies of the packed image). CTAs of a cluster that need the same stage each fetch
a part of it and multicast. Two consumer warpgroups hold the sums of 64 tokens each. The MMA
accumulates each chunk of the hidden dimension from zero; its partial sums are then added to those
of the slice, and a slice's sums to the totals (summation.py). Tokens are the rows of the MMA and
experts its columns; the consumer warps issue the MMAs.

The epilogue (epilogue/tile.py) works on few experts: screening makes some seven experts per token
candidates, and only these get their exact score and key.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, cluster
from build_kernels.kernels.dense.epilogue.tile import TileEpilogue
from build_kernels.kernels.dense.geometry.common import K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.tile import TileGeometry
from build_kernels.kernels.dense.hidden_map import hidden_map
from build_kernels.kernels.dense.mma.interface import TileMma
from build_kernels.kernels.dense.ring import Ring, RingState

#: Registers of a consumer thread and of a producer thread.
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24


class Tile:
    """The host function of the form, when called, and its device code."""

    def __init__(self, geometry: TileGeometry, mma: TileMma, rule: Scoring) -> None:
        self.g, self.mma = geometry, mma
        self.epilogue = TileEpilogue(geometry, mma, rule)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        """Launch the kernel for ``routing.tokens`` tokens. Traced as host code.

        Args:
            hidden_states: BF16 [tokens, hidden], rows ``row_stride`` elements apart.
            packed_weight: BF16, laid out by contract.stage_image.
            bias: FP32 [experts], the biases that experts are selected with.
            row_stride: Elements between the starts of two rows of ``hidden_states``.
            routing: The parameters that all dense kernels share.

        """
        g = self.g
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.owned_tokens)
        tiles = arith.quotient(
            tokens + (g.tokens_tile * g.cluster_t - 1), g.tokens_tile * g.cluster_t
        )
        self.kernel(
            tensor_map,
            packed_weight,
            bias,
            routing,
        ).launch(
            grid=(g.cluster_e, tiles * g.cluster_t, 1),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_e, g.cluster_t, 1),
            smem=g.shared_bytes,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        hidden_states: cute.CopyAtom,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        routing: Routing,
    ) -> None:
        """Route ``cluster_t`` tiles of 128 tokens per cluster.

        Grid: (``cluster_e``, tiles of tokens), ``threads`` threads, of which the last warpgroup
        produces; clusters of ``cluster_e`` x ``cluster_t`` CTAs. ``hidden_states`` is the tensor
        map; the other arguments are those of ``__call__``.
        """
        g = self.g
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(arith.quotient(thread, LANES))
        lane = arith.remainder(thread, LANES)
        e_rank = cute.arch.block_idx()[0]
        tile = cute.arch.block_idx()[1]
        t_rank = arith.remainder(tile, g.cluster_t)
        first_token = tile * g.tokens_tile

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        bias_row = shared + g.bias_offset
        hidden = Ring.of(
            shared, 0, g.hidden_stage_bytes, g.hidden_stages, shared + g.barrier_offset
        )
        weight = Ring.of(
            shared,
            g.weight_offset,
            g.weight_stage_bytes,
            g.weight_stages,
            shared + g.weight_barrier_offset,
        )

        cute.arch.griddepcontrol_launch_dependents()

        if thread == 0:
            hidden.init(self.mma.releases * g.cluster_e)
            weight.init(self.mma.weight_releases)
            mbarrier.fence_init()
        self.mma.allocate(shared, warp)
        biases.load(
            bias.toint(),
            bias_row,
            Int32(0),
            g.padded_experts,
            g.experts,
            biases.LOWEST,
            thread,
            g.threads,
        )
        # Relaxed: the fence has published the barriers, and nothing else crosses CTAs yet.
        if cutlass.const_expr(g.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()

        if warp >= g.consumer_warps:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            self.mma.issue(shared, hidden, weight, e_rank, t_rank, warp)
            if warp == g.consumer_warps:
                if lane == 0:
                    tensor_map = async_copy.tensor_map_address(hidden_states)
                    async_copy.prefetch_tensor_map(tensor_map)
                    cute.arch.griddepcontrol_wait()
                    self.load_hidden(tensor_map, hidden, first_token, e_rank, t_rank)
            elif warp == g.consumer_warps + 1 and lane == 0:
                self.load_weight(packed_weight.toint(), weight, e_rank, t_rank)
            cluster.wait_for_logits(g.cluster_e, g.cluster)
            cluster.wait_before_exit(g.cluster_e, g.cluster)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            totals = self.mma.multiply(shared, hidden, weight, e_rank, t_rank, thread)
            # From here on the epilogue uses the rings' place: all stages have arrived and been
            # read.
            self.epilogue.sync_consumers()
            # It returns at once, because the producer has waited already. Each thread waits for
            # itself, so that it may read global memory (masks, counts, ids) from here on.
            cute.arch.griddepcontrol_wait()
            own = e_rank * (g.cta_experts * 4)
            images = Int32(0)
            if routing.serving != 0 and routing.image_mask.toint() != 0:
                images = Int32(1)
            if images == 0:
                self.epilogue.screen(totals, shared, [bias_row + own], thread)
            else:
                self.epilogue.load_image_biases(routing.image_bias.toint(), shared, thread)
                chosen = [
                    self.epilogue.biases_of(routing, shared, first_token + row)
                    for row in self.epilogue.screened_rows(thread)
                ]
                self.epilogue.screen(totals, shared, [place + own for place in chosen], thread)
            cluster.wait_for_logits(g.cluster_e, g.cluster)
            if cutlass.const_expr(g.cluster_e == 1):
                self.epilogue.sync_consumers()
            self.epilogue.select(routing, shared, first_token, e_rank, t_rank, thread)
            cluster.wait_before_exit(g.cluster_e, g.cluster)

    # --- producers ------------------------------------------------------------------------------

    @cute.jit
    def load_hidden(
        self, tensor_map: Int64, ring: Ring, first_token: Int32, e_rank: Int32, t_rank: Int32
    ) -> None:
        """Fill the ring of hidden states, one 64-element block of the tile's tokens per stage.

        One thread calls this. Each CTA of the tile fetches its part of the tokens for all of them.
        """
        g = self.g
        part_bytes = g.hidden_stage_bytes // g.cluster_e
        peers = Int32((1 << g.cluster_e) - 1) << (t_rank * g.cluster_e)
        row = first_token + e_rank * g.owned_tokens
        state = RingState(g.hidden_stages, phase=1)
        for block in cutlass.range(g.k_blocks, unroll=1):
            full = ring.full_at(state.stage)
            mbarrier.wait(ring.empty_at(state.stage), state.phase)
            mbarrier.arrive_expect_tx(full, Int32(g.hidden_stage_bytes))
            place = ring.data_at(state.stage) + e_rank * part_bytes
            if cutlass.const_expr(g.cluster_e > 1):
                async_copy.tile_multicast(place, tensor_map, block * K_BLOCK, row, full, peers)
            else:
                async_copy.tile(place, tensor_map, block * K_BLOCK, row, full)
            state = state.next()

    @cute.jit
    def load_weight(self, weight: Int64, ring: Ring, e_rank: Int32, t_rank: Int32) -> None:
        """Fill the ring of weights, one 64-element block of a pass's experts per stage.

        One thread calls this. The order is that in which consumers read: chunk, pass, block. Each
        CTA with the same experts fetches its part for all of them.
        """
        g = self.g
        part_bytes = g.weight_stage_bytes // g.cluster_t
        peers = Int32(sum(1 << (i * g.cluster_e) for i in range(g.cluster_t))) << e_rank
        first = weight + Int64(e_rank * (g.cta_experts * K_BLOCK * 2) + t_rank * part_bytes)
        state = RingState(g.weight_stages, phase=1)
        for item in cutlass.range(g.k_blocks * g.passes, unroll=1):
            # The last chunk may be short; the others have chunk_k_blocks blocks per pass.
            chunk = arith.quotient(item, g.chunk_k_blocks * g.passes)
            within = item - chunk * (g.chunk_k_blocks * g.passes)
            length = Int32(g.chunk_k_blocks)
            if cutlass.const_expr(g.last_k_blocks > 0):
                length = arith.min_s32(length, g.k_blocks - chunk * g.chunk_k_blocks)
            number, block = Int32(0), within
            for _ in cutlass.range_constexpr(g.passes - 1):
                inside = arith.less(block, length)
                number = arith.select(inside, number, number + 1)
                block = arith.select(inside, block, block - length)
            k_block = chunk * g.chunk_k_blocks + block
            address = (
                first
                + Int64(k_block) * (g.padded_experts * K_BLOCK * 2)
                + number * g.weight_stage_bytes
            )
            full = ring.full_at(state.stage)
            mbarrier.wait(ring.empty_at(state.stage), state.phase)
            mbarrier.arrive_expect_tx(full, Int32(g.weight_stage_bytes))
            place = ring.data_at(state.stage) + t_rank * part_bytes
            if cutlass.const_expr(g.cluster_t > 1):
                async_copy.bulk_multicast(place, address, Int32(part_bytes), full, peers)
            else:
                async_copy.bulk(place, address, Int32(part_bytes), full)
            state = state.next()
