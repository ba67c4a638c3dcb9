// The dot products of hash_gate (step 1 of router_runtime/spec.py for the experts of a token), in
// the order of the dense kernels (dense/summation.py), so that a token gets the same bits from both:
//
//   chunk    K_CHUNK = 256 consecutive elements of the hidden dimension. mma.m16n8k16 adds 16
//            products at a time, in ascending order, to a sum that starts at zero. A hidden
//            dimension that is no multiple of 256 ends with a short chunk of fewer MMAs.
//   slice    the chunks in ascending order; the chunks are divided into SLICES contiguous slices
//   logit    the slices in ascending order
//
// A warp computes a group of TOGETHER chunks for COLUMN_EXPERTS experts, which are the 8 columns of
// an MMA. Of lane 4 g + q:
//
//   B, the weights: column g, that is chunk g % TOGETHER of the group and expert g / TOGETHER of
//   the warp's. The weight is packed (contract.py) so that a lane's elements of two steps follow
//   each other, and one load of the warp reads whole cache lines.
//   A, the hidden state: row g is chunk g % TOGETHER of the group, from shared memory. Rows from 8
//   on hold what happens to be in the registers, because a row of the result depends on its own row
//   only.
//   C: element (row, column) is a chunk's sum where both are of the same chunk. Others are not used.
//
// Constants: HIDDEN, elements of a hidden state, a multiple of 64; K_CHUNK (common/numerics.py);
// SLICES (contract.py).
#pragma once

#include "common/selection.cuh"

using bf16 = unsigned short;  // the bits of a bfloat16

constexpr unsigned CHUNKS = (HIDDEN + K_CHUNK - 1) / K_CHUNK;  // of the hidden dimension
// Chunks side by side in an MMA: 4 if they divide the hidden dimension, so that of 6 experts no
// column is unused.
constexpr unsigned TOGETHER = HIDDEN % (4 * K_CHUNK) == 0   ? 4
                              : HIDDEN % (2 * K_CHUNK) == 0 ? 2
                                                            : 1;
constexpr unsigned GROUPS = (CHUNKS + TOGETHER - 1) / TOGETHER;
constexpr unsigned COLUMNS = 8;  // of an MMA
constexpr unsigned COLUMN_EXPERTS = COLUMNS / TOGETHER;

// Two steps of 16 elements are a pair: a lane loads its elements of both with one load.
constexpr unsigned PAIR = 32;
constexpr unsigned PAIRS = K_CHUNK / PAIR;
static_assert(HIDDEN % PAIR == 0, "a pair is whole");
static_assert(K_CHUNK == 8 * WARP, "a warp loads a chunk with one load per lane");

// A group of chunks of a hidden state in shared memory. Chunks begin in different banks.
constexpr unsigned CHUNK_STRIDE = K_CHUNK + 8;
struct alignas(16) HiddenStateGroup {
    bf16 chunks[TOGETHER][CHUNK_STRIDE];
};

// The same in the registers of a warp, on its way there: 8 consecutive elements of each chunk.
struct HiddenStateLoads {
    uint4 chunk[TOGETHER];
};

// This lane's column of a group: of each pair the elements 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of the
// first step, then those of the second.
struct WeightLoads {
    uint4 pair[PAIRS];
};

// True if a group has its pair of that number: all but a short last chunk have all.
__device__ __forceinline__ bool has_pair(unsigned group, unsigned pair) {
    return HIDDEN % K_CHUNK == 0 || group * K_CHUNK + pair * PAIR < HIDDEN;
}

// Loads 16 bytes. The load is volatile so that it is issued here: the compiler would delay some
// loads to save registers, and the warp would then wait for memory several times instead of once.
__device__ __forceinline__ uint4 load_16_bytes(const bf16* address) {
    uint4 words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(address));
    return words;
}

// Starts to load a group of chunks of a hidden state.
__device__ __forceinline__ void load_hidden_state(const bf16* row, unsigned group, unsigned lane,
                                                  HiddenStateLoads& x) {
    const unsigned element = group * (TOGETHER * K_CHUNK) + lane * 8;
    const bf16* first = row + element;
#pragma unroll
    for (unsigned i = 0; i < TOGETHER; ++i) {
        x.chunk[i] = make_uint4(0, 0, 0, 0);
        // Only a short last chunk, which is alone in its group, leaves lanes without elements.
        if (HIDDEN % K_CHUNK == 0 || element < HIDDEN) {
            x.chunk[i] = load_16_bytes(first + i * K_CHUNK);
        }
    }
}

// Stores the group to shared memory, where the full warp, which calls this, may then read it.
__device__ __forceinline__ void store_hidden_state(const HiddenStateLoads& x, unsigned lane,
                                                   HiddenStateGroup& shared) {
    __syncwarp();  // the group before it has been read
#pragma unroll
    for (unsigned i = 0; i < TOGETHER; ++i) {
        *reinterpret_cast<uint4*>(&shared.chunks[i][lane * 8]) = x.chunk[i];
    }
    __syncwarp();
}

// Starts to load this lane's column of a group of chunks of the packed weight.
__device__ __forceinline__ void load_weights(const bf16* packed_weight, int expert, unsigned group,
                                             unsigned lane, WeightLoads& w) {
    const unsigned chunk = lane / 4 % TOGETHER;
    const bf16* first = packed_weight + static_cast<long long>(expert) * HIDDEN +
                        (group * (TOGETHER * K_CHUNK) + chunk * PAIR + lane % 4 * 8);
#pragma unroll
    for (unsigned i = 0; i < PAIRS; ++i) {
        w.pair[i] = make_uint4(0, 0, 0, 0);
        if (has_pair(group, i)) w.pair[i] = load_16_bytes(first + i * TOGETHER * PAIR);
    }
}

// Loads the four 8 x 8 matrices whose rows' shared addresses lanes 0-7, 8-15, 16-23 and 24-31 give:
// lane 4 g + q gets the elements 2 q and 2 q + 1 of row g of each. The full warp calls it.
__device__ __forceinline__ uint4 load_matrices(unsigned row_address) {
    uint4 words;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(row_address)
                 : "memory");
    return words;
}

// c += A B for one step of 16 elements. a[0] and a[2] are rows 0 to 7, a[1] and a[3] the others.
__device__ __forceinline__ void multiply_step(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                              unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The sums of this warp's columns: c[i], i < 2, of the element (row g, column 2 q + i). The full
// warp calls it, after store_hidden_state.
__device__ __forceinline__ void multiply(const HiddenStateGroup& x, const WeightLoads& w,
                                         unsigned group, unsigned lane, float (&c)[4]) {
    // Matrices of a pair: elements 0-7 of the first step, of the second, 8-15 of both. So the four
    // registers are the A of the first step; the rows from 8 on are the second step, and not used.
    const unsigned matrix = lane / 8;
    const bf16* row = &x.chunks[lane % 8 % TOGETHER][matrix % 2 * 16 + matrix / 2 * 8];
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) c[i] = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < PAIRS; ++i) {
        if (!has_pair(group, i)) break;
        const uint4 a = load_matrices(address + i * (PAIR * sizeof(bf16)));
        multiply_step(c, a.x, a.y, a.z, a.w, w.pair[i].x, w.pair[i].y);
        multiply_step(c, a.y, 0, a.w, 0, w.pair[i].z, w.pair[i].w);
    }
}

// The logit of a column: its chunks' sums, in the order of slices. Called by one lane.
__device__ __forceinline__ float add_chunks(const float (&sums)[CHUNKS][WARP], unsigned column) {
    constexpr unsigned slices = CHUNKS < SLICES ? CHUNKS : SLICES;
    float logit = 0.0f;
#pragma unroll
    for (unsigned slice = 0; slice < slices; ++slice) {
        const unsigned first = slice * CHUNKS / slices;
        const unsigned end = (slice + 1) * CHUNKS / slices;
        float sum = sums[first][column];
#pragma unroll
        for (unsigned chunk = first + 1; chunk < end; ++chunk) {
            sum = __fadd_rn(sum, sums[chunk][column]);
        }
        logit = slice == 0 ? sum : __fadd_rn(logit, sum);
    }
    return logit;
}
