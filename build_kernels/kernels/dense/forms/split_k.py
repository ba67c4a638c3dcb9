"""The split-K form: the hidden dimension is divided among the CTAs of a cluster (CuTe DSL).

It is for batches whose tiles, with all of the hidden dimension, would not fill the GPU. Steps 1 to
7 of the router, in the summation order that all forms share. A launch (geometry/split_k.py):

1. before the wait on the previous kernel, a CTA requests all of its weights, by bulk copies of the
   packed image;
2. after it, the CTA's share of the tile's hidden states, by the tensor map, 64 elements per stage;
3. the MMA object multiplies the experts by all tokens of the tile, one accumulator for each chunk:
   experts are the rows of the MMA, tokens its columns, k ascending;
4. when every CTA of the cluster has read its operands, partial sums take their place, and those of
   a token go to one CTA of the cluster (exchange/split_k.py);
5. that CTA adds the chunks (summation.py) and scores; one warp per token selects;
6. with several groups of experts, the last to finish a token merges (common/epilogue.py).

A CTA exits only after all that is sent to it has arrived and all that it sent has been received.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from build_kernels.kernels.common import epilogue, scoring
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, async_copy, mbarrier, memory
from build_kernels.kernels.common.scoring import Scoring
from build_kernels.kernels.dense import biases, summation
from build_kernels.kernels.dense.exchange.split_k import SumsExchange
from build_kernels.kernels.dense.geometry.common import BARRIER_BYTES, K_BLOCK, LANES
from build_kernels.kernels.dense.geometry.split_k import SplitKGeometry
from build_kernels.kernels.dense.hidden_map import hidden_map
from build_kernels.kernels.dense.mma.interface import SplitKMma

#: The warp that requests the operands. It multiplies, too: one more warp would shrink the registers
#: of every thread.
PRODUCER = 0


class SplitK:
    """The host function of the form, when called, and its device code."""

    def __init__(
        self, geometry: SplitKGeometry, mma: SplitKMma, exchange: SumsExchange, rule: Scoring
    ) -> None:
        self.g, self.mma, self.exchange, self.rule = geometry, mma, exchange, rule
        self.expert_groups = epilogue.ExpertGroups.of(geometry)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        packed_weight: cute.Pointer,
        bias: cute.Pointer,
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        row_stride: Int64,
        routing: Routing,
    ) -> None:
        """Launch the kernel for ``routing.tokens`` tokens. Traced as host code.

        Args:
            hidden_states: BF16 [tokens, hidden], rows ``row_stride`` elements apart.
            packed_weight: BF16, laid out by contract.stage_image.
            bias: FP32 [experts], the biases that experts are selected with.
            logits_out: FP32 [tokens, experts]; null if the logits are not wanted.
            workspace: Tickets and candidates (common/epilogue.py), zero before and after the
                launch; not read with one group.
            row_stride: Elements between the starts of two rows of ``hidden_states``.
            routing: The parameters that all dense kernels share.

        """
        g = self.g
        tokens = routing.tokens
        tensor_map = hidden_map(hidden_states, tokens, g.hidden, row_stride, g.tokens_tile)
        self.kernel(
            tensor_map,
            packed_weight,
            bias,
            logits_out,
            workspace,
            routing,
        ).launch(
            grid=(
                g.cluster_k,
                arith.quotient(tokens + (g.tokens_tile - 1), g.tokens_tile),
                g.groups,
            ),
            block=(g.threads, 1, 1),
            cluster=(g.cluster_k, 1, 1),
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
        logits_out: cute.Pointer,
        workspace: cute.Pointer,
        routing: Routing,
    ) -> None:
        """Route one tile of ``tokens_tile`` tokens, with a group of experts per cluster.

        Grid: (``cluster_k``, tiles of tokens, ``groups``), ``threads`` threads, clusters of
        ``cluster_k`` CTAs. ``hidden_states`` is the tensor map; the other arguments are those of
        ``__call__``.
        """
        g = self.g
        tokens = routing.tokens
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(arith.quotient(thread, LANES))
        lane = arith.remainder(thread, LANES)
        k_rank = cute.arch.block_idx()[0]
        first_token = cute.arch.block_idx()[1] * g.tokens_tile
        group = cute.arch.block_idx()[2]
        tile_tokens = arith.min_s32(tokens - first_token, Int32(g.tokens_tile))

        shared = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        bias_row = shared + g.bias_offset
        weight_full = shared + g.barrier_offset
        hidden_full = shared + g.hidden_barrier_offset
        sums_full = shared + g.sums_barrier_offset

        cute.arch.griddepcontrol_launch_dependents()

        # --- 1. Before the wait on the previous kernel: only buffers that the router owns. ---
        if warp == PRODUCER and lane == 0:
            async_copy.prefetch_tensor_map(async_copy.tensor_map_address(hidden_states))
            self.init_barriers(weight_full, hidden_full, sums_full, k_rank, tile_tokens)
            self.load_weight(packed_weight.toint(), shared, weight_full, k_rank, group)
        biases.load(
            bias.toint(),
            bias_row,
            group,
            g.group_experts,
            g.experts,
            0.0,
            thread,
            g.threads,
        )
        self.mma.allocate(shared, warp)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()

        # --- 2. hidden states -> shared memory ---
        if warp == PRODUCER:
            if lane == 0:
                tensor_map = async_copy.tensor_map_address(hidden_states)
                self.load_hidden(tensor_map, shared, hidden_full, first_token, k_rank)
            cute.arch.sync_warp()

        # --- 3. multiply, and 4. send the partial sums to the CTA that adds them ---
        sums = self.mma.multiply(shared, weight_full, hidden_full, warp)
        self.exchange.run(sums, shared, sums_full, k_rank, tile_tokens, warp, lane)

        # --- 5. add the chunks, score, select ---
        slots = self.exchange.owned(tile_tokens, k_rank)
        self.score(shared, bias_row, logits_out.toint(), slots, first_token, k_rank, group, thread)
        cute.arch.sync_threads()
        self.mma.free(shared, warp)

        def locate(slot: Int32) -> tuple[Int32, Int32, Int32]:
            row = shared + slot * g.slot_bytes
            return row, row + g.group_experts * 8, first_token + slot * g.cluster_k + k_rank

        epilogue.route_all(
            routing,
            workspace.toint(),
            (warp, slots, g.warps),
            locate,
            group,
            self.expert_groups,
            lane,
            cute.arch.cluster_wait,
        )

    # --- the producer: one thread -----------------------------------------------------------------

    def init_barriers(
        self,
        weight_full: Int32,
        hidden_full: Int32,
        sums_full: Int32,
        k_rank: Int32,
        tile_tokens: Int32,
    ) -> None:
        """Initialise all barriers of the form, and expect the sums that will be received."""
        for stage in range(self.g.k_blocks):
            mbarrier.init(weight_full + BARRIER_BYTES * stage, 1)
            mbarrier.init(hidden_full + BARRIER_BYTES * stage, 1)
        owned = self.exchange.init(sums_full, k_rank, tile_tokens)
        mbarrier.fence_init()
        self.exchange.expect(sums_full, owned)

    def load_weight(
        self, weight: Int64, shared: Int32, weight_full: Int32, k_rank: Int32, group: Int32
    ) -> None:
        """Request all weights, in the order in which the hidden states will come."""
        g = self.g
        first = weight + Int64(group * g.weight_stage_bytes)
        for number in range(g.k_blocks):
            stage = g.stage_of(number)
            block = Int64(k_rank * g.k_blocks + stage)
            full = weight_full + BARRIER_BYTES * stage
            mbarrier.arrive_expect_tx(full, Int32(g.weight_stage_bytes))
            async_copy.bulk(
                shared + stage * g.weight_stage_bytes,
                first + block * (g.padded_experts * K_BLOCK * 2),
                Int32(g.weight_stage_bytes),
                full,
            )

    def load_hidden(
        self,
        tensor_map: Int64,
        shared: Int32,
        hidden_full: Int32,
        first_token: Int32,
        k_rank: Int32,
    ) -> None:
        """Request the share of the hidden states in blocks of 64, one of each chunk in turn."""
        g = self.g
        for number in range(g.k_blocks):
            stage = g.stage_of(number)
            full = hidden_full + BARRIER_BYTES * stage
            mbarrier.arrive_expect_tx(full, Int32(g.hidden_stage_bytes))
            async_copy.tile(
                shared + g.weight_bytes + stage * g.hidden_stage_bytes,
                tensor_map,
                (k_rank * g.k_blocks + stage) * K_BLOCK,
                first_token,
                full,
            )

    # --- the epilogue -----------------------------------------------------------------------------

    @cute.jit
    def score(
        self,
        received: Int32,
        bias_row: Int32,
        logits_out: Int64,
        slots: Int32,
        first_token: Int32,
        k_rank: Int32,
        group: Int32,
        thread: Int32,
    ) -> None:
        """Add the chunks of every (slot, expert), and store keys and scores.

        All threads call this. ``received`` is the address of the received sums. The (key,
        score) pairs take the place of a slot's first sums, as ``epilogue.route_all`` reads them.
        ``logits_out`` is 0 if the logits are not wanted.
        """
        g = self.g
        items = slots * g.group_experts
        results = []
        for number in cutlass.range_constexpr(g.score_passes):
            item = thread + number * g.threads
            inside = arith.min_s32(item, Int32(g.slots * g.group_experts - 1))
            slot = arith.quotient(inside, g.group_experts)
            place = arith.remainder(inside, g.group_experts)
            # Undo the order in which the exchange stores the experts.
            column = (place & -16) | (place & 1) << 3 | (place & 15) >> 1
            start = received + slot * g.slot_bytes + place * 4
            terms = [
                memory.load_shared_f32(start + chunk * (g.group_experts * 4))
                for chunk in range(g.chunks)
            ]
            logit = summation.add_chunks(terms, arith.add_rn)
            score = self.rule.score(logit)
            expert = group * g.group_experts + column
            real = arith.less(expert, Int32(g.experts))
            key = scoring.ordered_key(logit, score, memory.load_shared_f32(bias_row + column * 4))
            key = arith.select(real, key, Int32(0))
            if logits_out != 0 and item < items and real:
                token = Int64(first_token + slot * g.cluster_k + k_rank)
                memory.store_global_b32(
                    logits_out + (token * g.experts + expert) * 4, scoring.stored_logit(logit)
                )
            pair = arith.remainder(column, g.lane_keys) * LANES + arith.quotient(
                column, g.lane_keys
            )
            results.append((item, received + slot * g.slot_bytes + pair * 8, key, score))
        # The pairs take the place of the sums of two chunks, which all threads have read by then.
        cute.arch.sync_threads()
        for item, target, key, score in results:
            if item < items:
                memory.store_shared_v2(target, key, arith.bits(score))
