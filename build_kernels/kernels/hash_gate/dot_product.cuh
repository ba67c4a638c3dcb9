// The dot products of hash_gate (step 1 of router_runtime/spec.py for the experts of a token) and
// the one order in which they are summed. common/numerics.py names that order (gather_tag); it is
// not the order of the dense kernels.
//
//   chunk    K_CHUNK = 256 consecutive elements of the hidden dimension, summed by one warp. Lane l
//            has elements 8l to 8l + 7. The last chunk may be short; missing elements count as 0.
//   lane     acc = fma(x[i], w[i], acc) for ascending i, from acc = +0
//   warp     a butterfly: acc = acc + (acc of lane l ^ d), for d = 16, 8, 4, 2, 1
//   logit    the chunks' sums in ascending order, each added to the running sum that starts with
//            chunk 0's
//
// Addition commutes, so after each butterfly step both lanes of a pair hold the same bits. That
// leaves free which lane keeps which of several sums: sum_over_warp uses it to save shuffles.
//
// Constants: HIDDEN, elements of a hidden state; K_CHUNK (common/numerics.py).
#pragma once

#include "common/selection.cuh"

using bf16 = unsigned short;  // the bits of a bfloat16

constexpr unsigned LANE_VALUES = 8;  // elements of a lane in a chunk: 16 bytes
static_assert(K_CHUNK == LANE_VALUES * WARP, "a warp loads a chunk with one load per lane");

constexpr unsigned CHUNKS = (HIDDEN + K_CHUNK - 1) / K_CHUNK;  // of the hidden dimension

// Loads 8 bf16 elements, row[element] to row[element + 7], as packed pairs; zeros past HIDDEN.
// Called by one lane; the address is a multiple of 16 bytes.
//
// The load is volatile so that it is issued here: the compiler would delay some loads to save
// registers, and the warp would then wait for memory several times instead of once.
__device__ __forceinline__ uint4 load_8_elements(const bf16* row, unsigned element) {
    uint4 packed = {};
    // Only a short last chunk leaves lanes without elements.
    if (HIDDEN % K_CHUNK == 0 || element < HIDDEN) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
                     : "l"(row + element));
    }
    return packed;
}

struct Floats8 {
    float at[LANE_VALUES];
};

// The 8 packed bf16 elements as floats, exactly.
__device__ __forceinline__ Floats8 to_floats(const uint4& packed) {
    const unsigned words[] = {packed.x, packed.y, packed.z, packed.w};
    Floats8 floats;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        floats.at[2 * i] = __uint_as_float(words[i] << 16);
        floats.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return floats;
}

// The sum of this lane's 8 products of a chunk ("lane" above).
__device__ __forceinline__ float dot_of_lane(const Floats8& x, const uint4& packed_weight) {
    const Floats8 w = to_floats(packed_weight);
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < LANE_VALUES; ++i) sum = __fmaf_rn(x.at[i], w.at[i], sum);
    return sum;
}

// The sums of COUNT values over the warp ("warp" above): lane l gets the sum of value
// l / (32 / COUNT). COUNT is a power of two, at most 32. The full warp calls it; `values` is
// overwritten.
//
// A transposing reduction: at each distance a lane keeps half of its values, hands the other half
// to its partner and adds what it receives. So COUNT values take COUNT - 1 shuffles until one is
// left, instead of 5 * COUNT.
template <unsigned COUNT>
__device__ __forceinline__ float sum_over_warp(float (&values)[COUNT], unsigned lane) {
    static_assert(COUNT <= WARP && (COUNT & (COUNT - 1)) == 0, "a power of two");
    __syncwarp();
    unsigned count = COUNT;  // values that this lane still holds
#pragma unroll
    for (unsigned distance = WARP / 2; distance != 0; distance /= 2) {
        if (count == 1) {
            const float received = __shfl_xor_sync(ALL_LANES, values[0], distance);
            values[0] = __fadd_rn(values[0], received);
            continue;
        }
        count /= 2;
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (unsigned i = 0; i < COUNT / 2; ++i) {
            if (i >= count) break;
            const float kept = upper ? values[i + count] : values[i];
            const float sent = upper ? values[i] : values[i + count];
            values[i] = __fadd_rn(kept, __shfl_xor_sync(ALL_LANES, sent, distance));
        }
    }
    return values[0];
}
