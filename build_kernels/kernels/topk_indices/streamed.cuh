// The streamed form of topk_indices: the scores pass through shared memory, and the candidates that
// reach a bound stay in a list. For rows of any length.
//
// Each CTA of the cluster has a contiguous slice of the row. Steps:
//
//   1. Bound. Each warp starts to copy its part of the slice. Of its first chunk it takes the maxima of
//      groups of scores; parts being spread over the row, so are the groups. From histograms of all maxima
//      of the cluster follows a candidate that, most likely, somewhat more than top_k candidates of
//      the row reach. Short rows: all of them. No score is read for this alone.
//   2. Stream. Each warp copies its part of the slice, chunks from its start and its end by turns, to
//      its own ring of buffers in shared memory, several ahead, and appends the candidates that reach the
//      bound to the CTA's list, in no order. A warp that finds the list full makes its CTA reduce the
//      list to the top_k largest candidates, and the bound rises to the least of them. So no input
//      makes the list overflow. Warps wait for each other only for such a reduction, and at the end of
//      the slice.
//   3. Verify. If all lists together have fewer than top_k candidates, the bound was too high:
//      steps 1 and 2 again with a lower bound, at last with one that every candidate reaches.
//   4. Cut. The threads of each CTA read the keys of all lists of the cluster, READ of them each. (If the
//      lists are longer, they are collected in shared memory, or their histograms are, one for each
//      round.) A radix search, 8 bits a round, ends with the few keys of a bin. It finds the key of rank
//      top_k, how many of the scores with that key are taken, and how many candidates the CTAs before
//      this one emit.
//   5. Emit. Each CTA marks the positions of its candidates that pass the cut in a bitmap, which is
//      cleared while the cluster waits, and counts the marks before each candidate: its place. In rank
//      order: the CTA of rank 0 collects and sorts them.
//
// Steps 1, 2, 4 and 5 each have a file of their own. What they share is in streamed_memory.cuh (the
// slice, the shared memory), streamed_copies.cuh (chunks), streamed_search.cuh (the key of a rank) and
// streamed_list.cuh.
//
// Constants of this form: LOADS (16-byte vectors of a lane per chunk), STAGES (chunks of a warp's
// ring), CAPACITY (of the list).
#pragma once

#include "streamed_append.cuh"
#include "streamed_bound.cuh"
#include "streamed_cut.cuh"
#include "streamed_emit.cuh"

// Prepares the shared memory of a CTA, before the wait for the grids before this one. Called by all
// threads; a barrier has to follow.
__device__ __forceinline__ void prepare(Shared& shared) {
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (unsigned stage = 0; stage < STAGES; ++stage)
            init_barrier(&shared.arrivals[threadIdx.x / WARP][stage]);
        publish_barriers();
    }
    clear_bins(shared.bins);
    clear_bins(shared.group_bins);
    if (threadIdx.x < NEAR) shared.near[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.near_count = 0;
    __syncwarp();
}

// Selects and stores the k largest scores of a row. Called by all threads of the cluster, after
// prepare().
__device__ __forceinline__ void select_row(const Row& given, unsigned k, bool sorted,
                                           const OutputParameters& outputs, Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    Slice row{given};
    row.body = min((row.begin + VALUES - 1) / VALUES * VALUES, row.end);
    row.tail = max(row.end / VALUES * VALUES, row.body);
    row.block = row.of_block(cta_rank);
    row.own = row.block.of_warp(threadIdx.x / WARP);
    const unsigned wanted = min(k, row.length());

    const unsigned begin = cta_rank == 0 ? row.begin : max(row.block.first * VALUES, row.body);
    const unsigned end =
        cta_rank == BLOCKS_PER_ROW - 1 ? row.end : max(row.block.last * VALUES, row.body);

    // 1 and 2, and 3: until the lists hold the row's largest scores.
    unsigned consumed = 0, count = 0, all = 0, least = 0, largest = 0;
    unsigned lane_count = 0;  // candidates in the list of the CTA of the lane's number
    ListedKeys listed;
    for (unsigned attempt = 0;; ++attempt) {
        begin_list(row, k, attempt, cta_rank, consumed, shared);
        __syncthreads();
        stream_slice(row, k, consumed, shared);
        count = lane_count = all = shared.count;
        least = max(candidate_key(shared.bound), LEAST_KEY);
        largest = shared.largest;
        if constexpr (BLOCKS_PER_ROW > 1) {
            Notice& notice = shared.notices[attempt];
            if (threadIdx.x == 0) {
                notice.count = count;
                notice.least = least;
                notice.largest = largest;
            }
            cluster_arrive_shared();
            if (!sorted && begin < end) clear_marks(vectors_of(begin, end));  // while others arrive
            cluster_wait();
            const bool one = lane < BLOCKS_PER_ROW;
            lane_count = one ? load_from_cluster_rank(&notice.count, lane) : 0;
            least = one ? load_from_cluster_rank(&notice.least, lane) : ALL;
            largest = one ? load_from_cluster_rank(&notice.largest, lane) : 0;
            listed.load();
            all = __reduce_add_sync(ALL_LANES, lane_count);
            least = __reduce_min_sync(ALL_LANES, least);
            largest = __reduce_max_sync(ALL_LANES, largest);
        }
        if (all >= wanted || attempt + 1 == ATTEMPTS) break;
        if constexpr (BLOCKS_PER_ROW > 1) {
            cluster_sync();  // all CTAs have read the lists, which begin anew
        } else {
            __syncthreads();
        }
        clear_bins(shared.group_bins);
        fence_stores_before_copies();
        __syncthreads();
    }
    if constexpr (BLOCKS_PER_ROW == 1) {
        if (!sorted && begin < end) clear_marks(vectors_of(begin, end));
        listed.load();
    }

    // 4. All candidates, or the largest of them.
    Share share{0, 0};
    // Whether the keys that were read are used, the same in all CTAs of the cluster.
    const bool by_listed = all > wanted && !__any_sync(ALL_LANES, lane_count > READERS * READ);
    if (all > wanted) {
        if (by_listed) {
            listed.end_at(__shfl_sync(ALL_LANES, lane_count, ListedKeys::source()));
            share = share_of_listed(listed, count, cta_rank, wanted, least, largest, row.length(),
                                    shared);
        } else {
            share = share_of_long_lists(lane_count, all, count, cta_rank, wanted, least, largest,
                                        row.length(), shared);
            __syncthreads();
            if (!sorted && begin < end) clear_marks(vectors_of(begin, end));
            __syncthreads();
        }
    } else {
        if (threadIdx.x < WARP)
            share.place = __reduce_add_sync(ALL_LANES, lane < cta_rank ? lane_count : 0);
        __syncthreads();
    }
    // This CTA has read all that it needs from the others for the cut. The matching cluster_wait is the one
    // at the end or, for results in rank order, the first in emit_by_rank, which then reads other CTAs'
    // lists.
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        if (by_listed) {
            cluster_arrive_relaxed();
        } else {
            cluster_arrive();
        }
    }

    // 5.
    const Output output = outputs.of(row);
    if (cta_rank == BLOCKS_PER_ROW - 1)
#pragma unroll 1
        for (unsigned i = wanted + threadIdx.x; i < k; i += THREADS) output.store_none(i);
    if (!sorted) {
        emit_in_order(share, count, begin - row.begin, end - row.begin, output, shared);
    } else {
        emit_by_rank(share, count, wanted, cta_rank, output, shared);
    }
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_wait();
    }
}
