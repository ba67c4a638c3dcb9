// The streamed form of topk_indices: the key of a rank, by counts of keys in bins.
#pragma once

#include "cluster.cuh"
#include "streamed_memory.cuh"

static_assert(THREADS >= BINS, "one thread for each bin");

// Which scores are selected: those with a key above `key`, and of the `equal` scores with this key
// the first `ties`, by position.
struct Cut {
    unsigned key;
    unsigned ties;
    unsigned equal;
};

// The sum of one value of each warp, and of those of the warps before this one. All lanes of a warp
// call it, after a barrier that follows the stores to `values`.
__device__ __forceinline__ void sum_of_warps(const unsigned* values, unsigned warp, unsigned lane,
                                             unsigned& before, unsigned& total) {
    const unsigned value = lane < WARPS ? values[lane] : 0;
    before = __reduce_add_sync(ALL_LANES, lane < warp ? value : 0);
    total = __reduce_add_sync(ALL_LANES, value);
}

// The cut that takes the `wanted` largest of the keys that the threads of the CTA, or of the
// cluster, visit: for_each(visit) calls visit(key) for each key of the calling thread.
//
// At least `wanted` >= 1 keys are in [least, largest]; those outside are ignored. The bins are zero,
// with a barrier behind that; afterwards they are not. Each round counts the keys of a range of 256
// bins, finds the bin of rank `wanted`, and goes on with its range. A bin that is taken whole ends it,
// as does one of which at most `spare` keys more than wanted are taken then. With LISTED, which a row
// has once, so does one with at most NEAR keys: they are listed, and each warp finds the cut among them.
template <bool CLUSTERED, bool LISTED = false, typename ForEach>
__device__ __forceinline__ Cut find_cut(const ForEach& for_each, unsigned wanted, unsigned least,
                                        unsigned largest, Bins& all_bins, Shared& shared,
                                        unsigned spare = 0) {
    for (unsigned round = 0;; ++round) {
        const unsigned span = largest - least;
        const unsigned bits = WARP - __clz(span);
        const unsigned shift = bits > 8 ? bits - 8 : 0;
        unsigned* bins = all_bins[round];
        for_each([&](unsigned key) {
            if (key - least <= span) atomicAdd(&bins[(key - least) >> shift], 1u);
        });
        if constexpr (CLUSTERED && BLOCKS_PER_ROW > 1) {
            cluster_sync();
            if (threadIdx.x < BINS) {
                unsigned sum = 0;
#pragma unroll
                for (unsigned cta = 0; cta < BLOCKS_PER_ROW; ++cta)
                    sum += load_from_cluster_rank(&bins[threadIdx.x], cta);
                shared.sums[threadIdx.x] = sum;
            }
            bins = shared.sums;
        }
        __syncthreads();
        const BinOfRank found = bin_of_rank(bins, wanted, threadIdx.x % WARP);
        wanted = found.rest;
        least += found.bin << shift;
        if (found.size - wanted <= spare) return {least - 1, 0, 0};
        if (shift == 0) return {least, wanted, found.size};
        largest = least + min(largest - least, (1u << shift) - 1);
        if constexpr (LISTED) {
            if (found.size <= NEAR) {
                for_each([&](unsigned key) {
                    if (key - least <= largest - least)
                        shared.near[atomicAdd(&shared.near_count, 1u)] = key;
                });
                __syncthreads();
                const NearKey near =
                    near_key(shared.near, found.size, wanted, threadIdx.x % WARP);
                const unsigned ties = wanted - near.above(), equal = near.equal();
                if (ties == equal) return {near.key - 1, 0, 0};
                return {near.key, ties, equal};
            }
        }
        // The next round's bins are others; the cluster's sums are written after its barrier.
    }
}

// Zeroes bins. A barrier has to precede and to follow.
__device__ __forceinline__ void clear_bins(Bins& bins) {
    for (unsigned i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) (&bins[0][0])[i] = 0;
}
