// The dot products of hash_gate and the one order in which they are summed (numerics.py):
//
//   chunk    256 consecutive elements of the hidden dimension; a warp computes it, lane l has
//            elements 8l to 8l + 7. The last chunk may be short; what is missing counts as zero.
//   lane     acc = fma(x[i], w[i], acc) for ascending i, from acc = +0
//   warp     acc = acc + acc of lane l ^ d, for d = 16, 8, 4, 2, 1
//   logit    the chunks' sums, added in ascending order to that of chunk 0
//
// Addition commutes, so all lanes end with the same bits, and so does any lane that takes part in
// an exchange: which lane keeps which of several sums is free, and is chosen to need few shuffles.
#pragma once

#include "common/selection.cuh"

using bf16 = unsigned short;

constexpr unsigned LANE_VALUES = 8;  // 16 bytes
static_assert(K_CHUNK == LANE_VALUES * WARP, "a warp reads a chunk with one load a lane");

constexpr unsigned CHUNKS = (HIDDEN + K_CHUNK - 1) / K_CHUNK;

// This lane's elements of a chunk. Loads are issued where they are written: left alone, the compiler
// delays some to save registers, and the warp waits for memory several times instead of once.
__device__ __forceinline__ uint4 load8(const bf16* values, unsigned element) {
    uint4 packed = {};
    // Only a short last chunk leaves lanes without elements.
    if (HIDDEN % K_CHUNK == 0 || element < HIDDEN) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
                     : "l"(values + element));
    }
    return packed;
}

struct Floats8 {
    float at[LANE_VALUES];
};

__device__ __forceinline__ Floats8 widen(const uint4& packed) {
    const unsigned words[] = {packed.x, packed.y, packed.z, packed.w};
    Floats8 wide;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        wide.at[2 * i] = __uint_as_float(words[i] << 16);
        wide.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return wide;
}

// This lane's share of a chunk's sum.
__device__ __forceinline__ float lane_dot(const Floats8& x, const uint4& packed_weight) {
    const Floats8 w = widen(packed_weight);
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < LANE_VALUES; ++i) sum = __fmaf_rn(x.at[i], w.at[i], sum);
    return sum;
}

// The warp's sums of COUNT values, a power of two: value v goes to the lanes l with
// l / (WARP / COUNT) == v. At every distance a lane keeps half of its values and hands over the
// other half, until it has one left.
template <unsigned COUNT>
__device__ __forceinline__ float warp_sums(float (&values)[COUNT], unsigned lane) {
    static_assert(COUNT <= WARP && (COUNT & (COUNT - 1)) == 0, "a power of two");
    __syncwarp();
    unsigned count = COUNT;
#pragma unroll
    for (unsigned distance = WARP / 2; distance != 0; distance /= 2) {
        if (count == 1) {
            const float other = __shfl_xor_sync(ALL_LANES, values[0], distance);
            values[0] = __fadd_rn(values[0], other);
            continue;
        }
        count /= 2;
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (unsigned i = 0; i < COUNT / 2; ++i) {
            if (i >= count) break;
            const float kept = upper ? values[i + count] : values[i];
            const float given = upper ? values[i] : values[i + count];
            values[i] = __fadd_rn(kept, __shfl_xor_sync(ALL_LANES, given, distance));
        }
    }
    return values[0];
}
