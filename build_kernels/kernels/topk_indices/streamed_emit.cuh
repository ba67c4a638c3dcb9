// Step 5 of the streamed form of topk_indices: the ids of the candidates that pass the cut.
#pragma once

#include "streamed_cut.cuh"

static_assert((MAX_TOP_K & (MAX_TOP_K - 1)) == 0, "the sort pads to a power of 2");

// A window of positions whose marks have room.
constexpr unsigned WINDOW = 128 * BITMAP_VECTORS;

// The vectors of marks of the positions from `window` up to `end`.
__device__ __forceinline__ unsigned vectors_of(unsigned window, unsigned end) {
    return (min(end - window, WINDOW) + 127) / 128;
}

// Zeroes the marks of so many vectors, where the rings were. A barrier has to precede and to follow.
__device__ __forceinline__ void clear_marks(unsigned vectors) {
    for (unsigned i = threadIdx.x; i < vector_slot(vectors); i += THREADS) dynamic_shared[i] = uint4{};
}

// Stores the positions of the candidates that reach share.limit, in ascending order from the sum of the
// warps' share.place on. They are in [begin, end), and the marks of the first window are zero: a barrier
// has to lie behind that. Called by all threads of the CTA.
__device__ __forceinline__ void emit_in_order(const Share& share, unsigned count, unsigned begin,
                                              unsigned end, const Output& output, Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned* const marks = reinterpret_cast<unsigned*>(dynamic_shared);
    unsigned* const places = marks + 4 * vector_slot(BITMAP_VECTORS);
    const auto mark_word = [&](unsigned bit) -> unsigned& {
        return marks[4 * vector_slot(bit / 128) + bit % 128 / 32];
    };
    unsigned place = 0;
    for (unsigned window = begin; window < end; window += WINDOW) {
        const unsigned vectors = vectors_of(window, end);
        if (window != begin) {
            __syncthreads();
            clear_marks(vectors);
            __syncthreads();
        }
        // Whether a candidate is to be stored and its mark is in the window, and which bit it is.
        const auto in_window = [&](Candidate candidate, unsigned& bit) {
            bit = candidate_index(candidate) - window;
            return candidate >= share.limit && bit < WINDOW;
        };
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            unsigned bit;
            if (in_window(list_entries()[i], bit)) atomicOr(&mark_word(bit), 1u << (bit % 32));
        }
        __syncthreads();
        // A thread has vectors that follow each other, 2^bits of them.
        const unsigned bits = WARP - __clz((vectors - 1) / THREADS);
        const unsigned first = min(threadIdx.x << bits, vectors);
        const unsigned last = min((threadIdx.x + 1) << bits, vectors);
        const auto marked = [](const uint4& words) {
            return __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
        };
        unsigned own = 0;
        for (unsigned i = first; i < last; ++i) own += marked(dynamic_shared[vector_slot(i)]);
        const unsigned reached = sum_up_to_lane(own, lane);
        unsigned next = reached - own;  // marks before those of a vector, in the warp's vectors
        for (unsigned i = first; i < last; ++i) {
            places[word_slot(i)] = next;
            next += marked(dynamic_shared[vector_slot(i)]);
        }
        if (lane == WARP - 1) {
            shared.warp_counts[0][warp] = reached;
            shared.warp_counts[1][warp] = window == begin ? share.place : 0;
        }
        __syncthreads();
        const unsigned in_warp = lane < WARPS ? shared.warp_counts[0][lane] : 0;
        place += __reduce_add_sync(ALL_LANES, lane < WARPS ? shared.warp_counts[1][lane] : 0);
        const unsigned up_to_warp = sum_up_to_lane(in_warp, lane);
        for (unsigned start = 0; start < count; start += THREADS) {  // as often in all lanes
            const unsigned i = start + threadIdx.x;
            unsigned bit = 0;
            const bool taken = i < count && in_window(list_entries()[i], bit);
            const unsigned vector = taken ? bit / 128 : 0;
            unsigned to =
                place + __shfl_sync(ALL_LANES, up_to_warp - in_warp, vector >> bits >> 5);
            if (!taken) continue;
            to += places[word_slot(vector)] + __popc(mark_word(bit) & ((1u << (bit % 32)) - 1));
            for (unsigned before = 128 * vector; before + 32 <= bit; before += 32)
                to += __popc(mark_word(before));
            output.store(to, window + bit);
        }
        place += __shfl_sync(ALL_LANES, up_to_warp, WARP - 1);
    }
}

// Stores the positions of the candidates that reach share.limit, in rank order. `wanted` is their
// number in the cluster, the sum of the warps' share.place that in the CTAs before this one. Called by all
// threads of the cluster, between an arrival and a wait.
__device__ __forceinline__ void emit_by_rank(const Share& share, unsigned count, unsigned wanted,
                                             unsigned cta_rank, const Output& output,
                                             Shared& shared) {
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_wait();
    }
    __syncthreads();  // the count has been read
    if (threadIdx.x == 0) shared.count = shared.notices[1].above = 0;
    __syncthreads();
    if (threadIdx.x % WARP == 0) atomicAdd(&shared.notices[1].above, share.place);
    compact_list(count, share.limit, shared);
    __syncthreads();
    if constexpr (BLOCKS_PER_ROW > 1) {
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
