// The streamed form of topk_indices: the list of candidates, reduced to the largest of them.
#pragma once

#include "streamed_search.cuh"

// The first `ties` of the candidates of the list with this key, by position: those that reach the
// number that is returned. Called by all threads of the CTA; leaves the bins not zero.
__device__ __noinline__ Candidate first_of_equal(unsigned key, unsigned ties, unsigned count,
                                                 unsigned row_length, Shared& shared) {
    __syncthreads();
    clear_bins(shared.bins);
    __syncthreads();
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < count; i += THREADS) {
                const Candidate candidate = list_entries()[i];
                if (candidate_key(candidate) == key) visit(static_cast<unsigned>(candidate));
            }
        },
        ties, 0u - row_length, ALL, shared.bins, shared);
    return static_cast<Candidate>(key) << 32 | (cut.key + 1);  // inverted positions are distinct
}

// The least candidate of the list that the cut takes, or a number between it and the next.
__device__ __forceinline__ Candidate least_taken(Cut cut, unsigned count, unsigned row_length,
                                                 Shared& shared) {
    // No key is above ALL: a CTA takes none then. Position 0, the only candidate that reaches this
    // number, is in the first CTA, where the first ties are.
    if (cut.ties == 0 && cut.key == ALL) return ~Candidate{0};
    if (cut.ties == 0) return static_cast<Candidate>(cut.key + 1) << 32;
    if (cut.ties == cut.equal) return static_cast<Candidate>(cut.key) << 32;
    return first_of_equal(cut.key, cut.ties, count, row_length, shared);
}

// Moves the candidates of the list that reach `limit` to its front, in no order. Counts them in
// shared.count, which is 0 before, with a barrier behind that. A barrier has to follow.
__device__ __forceinline__ void compact_list(unsigned count, Candidate limit, Shared& shared) {
    for (unsigned start = 0; start < count; start += THREADS) {
        const unsigned i = start + threadIdx.x;
        const Candidate candidate = i < count ? list_entries()[i] : 0;
        __syncthreads();  // no place below `start` + THREADS is read any more
        if (i < count && candidate >= limit) list_entries()[atomicAdd(&shared.count, 1u)] = candidate;
    }
}

// Reduces the full list to its k largest candidates and raises the bound to the least of them.
// Called by all threads of the CTA, after a barrier.
__device__ __noinline__ void reduce_list(unsigned k, unsigned row_length, Shared& shared) {
    const unsigned least = max(candidate_key(shared.bound), LEAST_KEY);
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < CAPACITY; i += THREADS)
                visit(candidate_key(list_entries()[i]));
        },
        k, least, shared.largest, shared.bins, shared);
    const Candidate limit = least_taken(cut, CAPACITY, row_length, shared);
    if (threadIdx.x == 0) {
        shared.count = 0;
        shared.bound = limit;
    }
    __syncthreads();
    compact_list(CAPACITY, limit, shared);
    clear_bins(shared.bins);
    __syncthreads();
}
