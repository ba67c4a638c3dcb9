// Top-k selection by one warp: the k largest of the keys that its lanes hold in registers, in rank
// order (step 5 of router_runtime/spec.py). 1 <= k <= 32.
//
// Ordered key: a float mapped to an unsigned integer that compares like the float. -inf maps to
// 0x007fffff, the smallest that occurs. 0 means "no candidate", for the places past the end of a
// row.
//
// Candidate: (ordered key, inverted index) in 64 bits. The largest candidate has the largest key
// and, among equal keys, the lowest index, which is the tie rule. Candidates are distinct, so each
// has one rank: the result is k distinct indices even where all keys are -inf.
//
// Layout: value v of a lane has the index (v / 4) * 128 + lane * 4 + v % 4. Values therefore come
// in groups of 4, and each group is one 16-byte load of a lane, 512 contiguous bytes of a warp.
//
// Method: no pass over all keys per selected expert (a repeated argmax makes k passes). Instead:
//
//   1. Threshold. Each lane takes the maximum of its keys; the k-th largest of these 32 maxima is
//      the threshold. At least k keys reach it. On data in random order few more than k do (about
//      7 for k = 6, 105 of 1024 for k = 32).
//   2. Compaction. The candidates that reach the threshold go to a list of 32 in shared memory.
//   3. If they are more than 32, bisect between the threshold and the largest key, at most 32
//      counting passes, until at most 32 keys reach the threshold or it is the k-th largest key
//      itself. In the latter case several candidates share that key; those above it are taken, and
//      the lowest indices among the equal ones fill the rest.
//   4. Ranking. Lane j takes candidate j of the list and counts the larger ones: that is its rank.
#pragma once

constexpr unsigned ALL_LANES = 0xffffffffu;  // the mask of a full warp
constexpr unsigned WARP = 32;                // lanes of a warp

using Candidate = unsigned long long;  // 0: none

// Shared memory of one warp for warp_top_k.
struct alignas(16) SelectionScratch {
    Candidate candidates[WARP];
    unsigned maxima[WARP];
};

// The ordered key of a float (step 4): -0 ranks as +0, a NaN as -inf. Called by one lane.
__device__ __forceinline__ unsigned ordered_key(float key) {
    // Adding +0 turns -0 into +0.
    const float canonical = key != key ? __int_as_float(0xff800000) : __fadd_rn(key, 0.0f);
    const int bits = __float_as_int(canonical);
    // A negative float has all bits inverted, any other only the sign bit.
    return static_cast<unsigned>(bits) ^ (static_cast<unsigned>(bits >> 31) | 0x80000000u);
}

// The candidate with this ordered key and index.
__device__ __forceinline__ Candidate make_candidate(unsigned key, unsigned index) {
    return static_cast<Candidate>(key) << 32 | static_cast<unsigned>(~index);
}

__device__ __forceinline__ unsigned candidate_key(Candidate candidate) {
    return static_cast<unsigned>(candidate >> 32);
}

__device__ __forceinline__ unsigned candidate_index(Candidate candidate) {
    return ~static_cast<unsigned>(candidate);
}

// The index of the first of the four values of a lane's group.
__device__ __forceinline__ unsigned group_index(unsigned lane, unsigned group) {
    return group * (4 * WARP) + lane * 4;
}

// The index of value `v` of a lane.
__device__ __forceinline__ unsigned value_index(unsigned lane, unsigned v) {
    return group_index(lane, v / 4) + v % 4;
}

// Appends the candidates with low <= key <= high to `list`, which holds `size` of them, in
// ascending order of index, and drops those past `capacity`. Returns the size that the list would
// have without that limit.
//
// The full warp calls it, with everything but `keys` and `lane` the same in all lanes. The list
// lies in the warp's shared memory; the caller orders its stores before other lanes' loads
// (__syncwarp).
template <unsigned VALUES>
__device__ __forceinline__ unsigned append_in_range(const unsigned (&keys)[VALUES], unsigned lane,
                                                    unsigned low, unsigned high, Candidate* list,
                                                    unsigned size, unsigned capacity) {
    const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
    for (unsigned group = 0; group < VALUES / 4; ++group) {
        unsigned hits[4];  // bit l: value j of lane l's group is in range
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            // Unsigned: a key below low wraps around to a large difference.
            hits[j] = __ballot_sync(ALL_LANES, keys[4 * group + j] - low <= high - low);
        }
        if ((hits[0] | hits[1] | hits[2] | hits[3]) == 0) continue;  // the same in all lanes
        // Index order within a group is lane by lane: first come all hits of the lower lanes.
        unsigned slot = size;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            slot += __popc(hits[j] & lower_lanes);
            size += __popc(hits[j]);
        }
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if ((hits[j] >> lane & 1) != 0) {
                if (slot < capacity) {
                    list[slot] = make_candidate(keys[4 * group + j], group_index(lane, group) + j);
                }
                ++slot;
            }
        }
    }
    return size;
}

// Returns to lane j the candidate of rank j; 0 to lanes from k on, and where the warp holds fewer
// than j + 1 candidates.
//
// The full warp calls it. `keys` are the lane's ordered keys, 0 for none; k (1 to 32) is the same
// in all lanes; `scratch` is used by this warp alone and may be used again right after the call.
// __syncwarp orders the exchanges in it.
template <unsigned VALUES>
__device__ __forceinline__ Candidate warp_top_k(const unsigned (&keys)[VALUES], unsigned lane,
                                                unsigned k, SelectionScratch& scratch) {
    static_assert(VALUES % 4 == 0, "values come in groups of four");

    // 1. Threshold: the largest lane maximum that at least k lane maxima reach.
    unsigned lane_max = keys[0];
#pragma unroll
    for (unsigned v = 1; v < VALUES; ++v) lane_max = max(lane_max, keys[v]);
    scratch.maxima[lane] = lane_max;
    __syncwarp();
    unsigned reaching = 0;  // lane maxima that are at least this lane's
#pragma unroll
    for (unsigned i = 0; i < WARP / 4; ++i) {
        const uint4 maxima = reinterpret_cast<const uint4*>(scratch.maxima)[i];
        reaching += (maxima.x >= lane_max) + (maxima.y >= lane_max) + (maxima.z >= lane_max) +
                    (maxima.w >= lane_max);
    }
    // Where fewer than k lanes hold a candidate the threshold is 1, which every candidate reaches.
    unsigned low = max(__reduce_max_sync(ALL_LANES, reaching >= k ? lane_max : 0u), 1u);

    // 2. Compaction.
    Candidate* list = scratch.candidates;
    unsigned size = append_in_range(keys, lane, low, 0xffffffffu, list, 0, WARP);
    if (size > WARP) {
        // 3. Bisection. Throughout, `size` keys (at least k) reach low and fewer than k exceed
        // high.
        unsigned high = __reduce_max_sync(ALL_LANES, lane_max);
        while (size > WARP && low < high) {
            const unsigned middle = low + (high - low + 1) / 2;
            unsigned reached = 0;
#pragma unroll
            for (unsigned v = 0; v < VALUES; ++v) reached += keys[v] >= middle;
            reached = __reduce_add_sync(ALL_LANES, reached);
            if (reached < k) {
                high = middle - 1;
            } else {
                low = middle;
                size = reached;
            }
        }
        __syncwarp();
        if (size <= WARP) {
            append_in_range(keys, lane, low, 0xffffffffu, list, 0, WARP);
        } else {  // low is the k-th largest key: those above it, then the lowest indices at it
            size = append_in_range(keys, lane, low + 1, 0xffffffffu, list, 0, WARP);
            append_in_range(keys, lane, low, low, list, size, k);
            size = k;
        }
    }
    __syncwarp();

    // 4. Ranking: the list is read by all lanes, then overwritten in rank order.
    const Candidate own = lane < size ? list[lane] : 0;
    unsigned rank = 0;
    for (unsigned first = 0; first < size; first += 4) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) rank += first + j < size && list[first + j] > own;
    }
    __syncwarp();
    if (lane < size) list[rank] = own;
    __syncwarp();
    return lane < min(k, size) ? list[lane] : 0;
}
