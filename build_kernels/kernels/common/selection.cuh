// Selection: the k largest of the keys that a warp holds in registers, in rank order.
//
// A key is a float mapped to an unsigned integer of the same order; `ordered` maps -inf to
// 0x007fffff, the smallest that occurs, and 0 stands for "no candidate here". A candidate is packed
// as (key, inverted index): the largest packed value is the largest key and, of equal keys, the one
// with the lowest index. Packed values are distinct, so a rank is well defined: always k distinct
// candidates, even if all keys are -inf.
//
// Layout: value v of a lane has index (v / 4) * 128 + lane * 4 + v % 4, which is what 16-byte loads
// of consecutive elements give.
//
// Method. No pass over the keys is made once per selected candidate; instead a threshold is found
// that at least k and at most 32 keys reach, these are compacted into one shared-memory slot each,
// and each lane ranks one of them by counting.
//   1. First threshold: the k-th largest of the 32 lane maxima. At least k keys reach it. On data
//      in random order few more than k do (about 7 for k = 6, 105 of 1024 for k = 32).
//   2. If more than 32 reach it, bisect between it and the largest key, at most 32 counting passes,
//      until at most 32 keys reach the threshold or it is the k-th key itself. In that last case
//      several candidates share that key, and the lowest indices among them fill the places.
#pragma once

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr unsigned WARP = 32;

using Packed = unsigned long long;

struct alignas(16) SelectionScratch {  // one for each warp
    Packed candidates[WARP];
    unsigned maxima[WARP];
};

// The order of floats as unsigned integers. -0 ranks as +0, NaN as -inf.
__device__ __forceinline__ unsigned ordered(float key) {
    const float canonical = key != key ? __int_as_float(0xff800000) : __fadd_rn(key, 0.0f);
    const int bits = __float_as_int(canonical);
    return static_cast<unsigned>(bits) ^ (static_cast<unsigned>(bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ Packed pack(unsigned key, unsigned index) {
    return static_cast<Packed>(key) << 32 | static_cast<unsigned>(~index);
}

__device__ __forceinline__ unsigned index_of(Packed candidate) {
    return ~static_cast<unsigned>(candidate);
}

__device__ __forceinline__ unsigned first_index(unsigned lane, unsigned group) {
    return group * (4 * WARP) + lane * 4;
}

// Appends the candidates with low <= key <= high to `list` from position `size` on, in ascending
// order of index, up to `capacity`. Returns what the size would be without that limit.
template <unsigned VALUES>
__device__ __forceinline__ unsigned append(const unsigned (&keys)[VALUES], unsigned lane,
                                           unsigned low, unsigned high, Packed* list,
                                           unsigned size, unsigned capacity) {
    const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
    for (unsigned group = 0; group < VALUES / 4; ++group) {
        unsigned lanes[4];
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            lanes[j] = __ballot_sync(ALL_LANES, keys[4 * group + j] - low <= high - low);
        }
        if ((lanes[0] | lanes[1] | lanes[2] | lanes[3]) == 0) continue;  // the same for all lanes
        unsigned place = size;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            place += __popc(lanes[j] & lower_lanes);
            size += __popc(lanes[j]);
        }
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if ((lanes[j] >> lane & 1) != 0) {
                if (place < capacity) {
                    list[place] = pack(keys[4 * group + j], first_index(lane, group) + j);
                }
                ++place;
            }
        }
    }
    return size;
}

// Returns to lane j the candidate of rank j, or 0 from rank k on and where there are fewer
// candidates. 1 <= k <= 32. All 32 lanes call it.
template <unsigned VALUES>
__device__ __forceinline__ Packed warp_top_k(const unsigned (&keys)[VALUES], unsigned lane,
                                             unsigned k, SelectionScratch& scratch) {
    static_assert(VALUES % 4 == 0, "values come in groups of four");
    unsigned largest = keys[0];
#pragma unroll
    for (unsigned v = 1; v < VALUES; ++v) largest = max(largest, keys[v]);

    // The k-th largest lane maximum is the largest that at least k of them reach.
    scratch.maxima[lane] = largest;
    __syncwarp();
    unsigned reach = 0;
#pragma unroll
    for (unsigned i = 0; i < WARP / 4; ++i) {
        const uint4 others = reinterpret_cast<const uint4*>(scratch.maxima)[i];
        reach += (others.x >= largest) + (others.y >= largest) + (others.z >= largest) +
                 (others.w >= largest);
    }
    // Where fewer than k lanes have a candidate, every candidate reaches the threshold of 1.
    unsigned low = max(__reduce_max_sync(ALL_LANES, reach >= k ? largest : 0u), 1u);

    Packed* list = scratch.candidates;
    unsigned size = append(keys, lane, low, 0xffffffffu, list, 0, WARP);
    if (size > WARP) {
        // At least k keys reach low (size of them), fewer than k exceed high.
        unsigned high = __reduce_max_sync(ALL_LANES, largest);
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
            append(keys, lane, low, 0xffffffffu, list, 0, WARP);
        } else {  // low is the k-th key
            size = append(keys, lane, low + 1, 0xffffffffu, list, 0, WARP);
            append(keys, lane, low, low, list, size, k);
            size = k;
        }
    }
    __syncwarp();

    const Packed mine = lane < size ? list[lane] : 0;
    unsigned rank = 0;
    for (unsigned first = 0; first < size; first += 4) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) rank += first + j < size && list[first + j] > mine;
    }
    __syncwarp();
    if (lane < size) list[rank] = mine;
    __syncwarp();
    return lane < min(k, size) ? list[lane] : 0;
}
