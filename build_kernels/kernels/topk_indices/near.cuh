// What both forms of topk_indices do at last: of a few keys in shared memory, each warp finds the one of
// a rank.
#pragma once

#include "rows.cuh"

constexpr unsigned NEAR = 2 * WARP;

// Where the key of a rank is among listed ones.
struct NearKey {
    unsigned key;
    unsigned over[2], same[2];  // a bit for each place of the list: keys above it, at it

    __device__ __forceinline__ unsigned above() const { return __popc(over[0]) + __popc(over[1]); }
    __device__ __forceinline__ unsigned equal() const { return __popc(same[0]) + __popc(same[1]); }
};

// The key of rank `wanted` >= 1 from above of the `size` keys in `near`, whose other places up to NEAR
// are 0. Called by a warp.
__device__ __forceinline__ NearKey near_key(const unsigned* near, unsigned size, unsigned wanted,
                                            unsigned lane) {
    const unsigned own[2] = {near[lane], size > WARP ? near[lane + WARP] : 0};
    unsigned above[2] = {};
    // A turn compares TURN vectors of four keys, all loaded before the first comparison, so that the loads
    // overlap. Places behind the last key hold 0, which is above no key.
    constexpr unsigned TURN = 4;
#pragma unroll 1
    for (unsigned first = 0; first < size; first += 4 * TURN) {
        uint4 fours[TURN];
#pragma unroll
        for (unsigned i = 0; i < TURN; ++i)
            fours[i] = reinterpret_cast<const uint4*>(near + first)[i];
#pragma unroll
        for (unsigned i = 0; i < TURN; ++i) {
#pragma unroll
            for (unsigned j = 0; j < 2; ++j)
                above[j] += (fours[i].x > own[j]) + (fours[i].y > own[j]) + (fours[i].z > own[j]) +
                            (fours[i].w > own[j]);
        }
    }
    unsigned least_taken = ALL;  // the least key that fewer than `wanted` are above
#pragma unroll
    for (unsigned j = 0; j < 2; ++j)
        if (own[j] != 0 && above[j] < wanted) least_taken = min(least_taken, own[j]);
    NearKey found;
    found.key = __reduce_min_sync(ALL_LANES, least_taken);
#pragma unroll
    for (unsigned j = 0; j < 2; ++j) {
        found.over[j] = __ballot_sync(ALL_LANES, own[j] > found.key);
        found.same[j] = __ballot_sync(ALL_LANES, own[j] == found.key);
    }
    return found;
}
