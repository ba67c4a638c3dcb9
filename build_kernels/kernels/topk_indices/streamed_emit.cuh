// Step 5 of the streamed form of topk_indices: the ids of the candidates that pass the cut.
#pragma once

#include "streamed_list.cuh"

static_assert((MAX_TOP_K & (MAX_TOP_K - 1)) == 0, "the sort pads to a power of 2");

// Stores the positions of the candidates that reach `limit`, in ascending order from `place` on. They
// are in [begin, end). Called by all threads of the CTA.
__device__ __forceinline__ void emit_in_order(Candidate limit, unsigned count, unsigned place,
                                              unsigned begin, unsigned end, const Output& output,
                                              Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned* const marks = reinterpret_cast<unsigned*>(dynamic_shared);
    unsigned* const places = marks + 4 * vector_slot(BITMAP_VECTORS);
    const auto mark_word = [&](unsigned bit) -> unsigned& {
        return marks[4 * vector_slot(bit / 128) + bit % 128 / 32];
    };
    // Calls visit(candidate, bit) for each of them whose mark is in the window, over all threads.
    const auto for_each = [&](unsigned window, const auto& visit) {
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            const Candidate candidate = list_entries()[i];
            const unsigned bit = candidate_index(candidate) - window;
            if (candidate >= limit && bit < 128 * BITMAP_VECTORS) visit(candidate, bit);
        }
    };
    for (unsigned window = begin; window < end; window += 128 * BITMAP_VECTORS) {
        const unsigned vectors = (min(end - window, 128 * BITMAP_VECTORS) + 127) / 128;
        __syncthreads();
        for (unsigned i = threadIdx.x; i < vector_slot(vectors); i += THREADS)
            dynamic_shared[i] = uint4{};
        __syncthreads();
        for_each(window, [&](Candidate, unsigned bit) {
            atomicOr(&mark_word(bit), 1u << (bit % 32));
        });
        __syncthreads();
        // A thread has vectors that follow each other.
        const unsigned share = (vectors + THREADS - 1) / THREADS;
        const unsigned first = min(threadIdx.x * share, vectors), last = min(first + share, vectors);
        const auto marked = [](const uint4& words) {
            return __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
        };
        unsigned own = 0;
        for (unsigned i = first; i < last; ++i) own += marked(dynamic_shared[vector_slot(i)]);
        const unsigned reached = sum_up_to_lane(own, lane);
        if (lane == WARP - 1) shared.warp_counts[0][warp] = reached;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[0], warp, lane, before, total);
        unsigned next = place + before + reached - own;
        for (unsigned i = first; i < last; ++i) {
            places[word_slot(i)] = next;
            next += marked(dynamic_shared[vector_slot(i)]);
        }
        __syncthreads();
        for_each(window, [&](Candidate candidate, unsigned bit) {
            unsigned to = places[word_slot(bit / 128)] +
                          __popc(mark_word(bit) & ((1u << (bit % 32)) - 1));
            for (unsigned before = bit / 128 * 128; before + 32 <= bit; before += 32)
                to += __popc(mark_word(before));
            output.store(to, candidate_index(candidate));
        });
        place += total;
    }
}

// Stores the positions of the candidates that reach `limit`, in rank order. `place` is the number of
// those in the CTAs before this one, `wanted` of those in the cluster. Called by all threads of the
// cluster between a cluster_arrive and a cluster_wait.
__device__ __forceinline__ void emit_by_rank(Candidate limit, unsigned count, unsigned place,
                                             unsigned wanted, unsigned cta_rank,
                                             const Output& output, Shared& shared) {
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_wait();
    }
    __syncthreads();  // the count has been read
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    compact_list(count, limit, shared);
    __syncthreads();
    if constexpr (BLOCKS_PER_ROW > 1) {
        if (threadIdx.x == 0) shared.notices[1].above = place;
        cluster_sync();
        if (cta_rank == 0) {
            for (unsigned cta = 1; cta < BLOCKS_PER_ROW; ++cta) {
                const unsigned size = load_from_cluster_rank(&shared.count, cta);
                const unsigned to = load_from_cluster_rank(&shared.notices[1].above, cta);
                const unsigned* words = reinterpret_cast<const unsigned*>(list_entries());
                for (unsigned i = threadIdx.x; i < size; i += THREADS) {
                    const unsigned inverted = load_from_cluster_rank(words + 2 * i, cta);
                    const unsigned key = load_from_cluster_rank(words + 2 * i + 1, cta);
                    list_entries()[to + i] = static_cast<Candidate>(key) << 32 | inverted;
                }
            }
        }
        __syncwarp();
        cluster_arrive();
    }
    if (cta_rank == 0 && wanted > 0) {
        unsigned size = 1;
        while (size < wanted) size *= 2;
#pragma unroll 1
        for (unsigned i = wanted + threadIdx.x; i < size; i += THREADS) list_entries()[i] = 0;
        sort_descending(list_entries(), size);
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < wanted; i += THREADS)
            output.store(i, candidate_index(list_entries()[i]));
    }
}
