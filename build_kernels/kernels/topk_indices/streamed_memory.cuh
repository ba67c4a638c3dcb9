// The streamed form of topk_indices: how a row is divided, and what lies where in shared memory.
#pragma once

#include "near.cuh"
#include "rows.cuh"

constexpr unsigned CHUNK_VECTORS = WARP * LOADS;
constexpr unsigned CHUNK_BYTES = 16 * CHUNK_VECTORS;
constexpr unsigned RING_BYTES = WARPS * STAGES * CHUNK_BYTES;
constexpr unsigned ROUNDS = 4;  // of 8 bits each
constexpr unsigned ATTEMPTS = 3;
constexpr unsigned GATHERED = RING_BYTES / 4 < 16384 ? RING_BYTES / 4 : 16384;  // keys, at most
// 128 positions have a vector of marks and a word for the number of marks before them. Every 8 vectors
// and every 32 words are followed by an unused one: threads that read vectors a few apart use other banks.
constexpr unsigned BITMAP_VECTORS = RING_BYTES / 23 / 32 * 32;
__device__ __forceinline__ constexpr unsigned vector_slot(unsigned vector) {
    return vector + vector / 8;
}
__device__ __forceinline__ constexpr unsigned word_slot(unsigned word) { return word + word / 32; }
static_assert(16 * vector_slot(BITMAP_VECTORS) + 4 * word_slot(BITMAP_VECTORS) <= RING_BYTES,
              "marks and places lie where the rings were");

static_assert(CAPACITY > MAX_TOP_K, "a reduced list takes another candidate");
static_assert(LOADS * VALUES <= 32, "one bit for each score of a lane");

// What a CTA tells the others of its cluster. One for each exchange, so that none is overwritten
// while another CTA reads it.
struct Notice {
    unsigned count;  // candidates of its list
    unsigned least;  // a lower bound of their keys, and the largest of them
    unsigned largest;
    unsigned above;  // candidates above the cut
    unsigned equal;  // candidates with the key of the cut
};

// Counts of keys, for each round of a search.
using Bins = unsigned[ROUNDS][BINS];

struct Shared {
    unsigned long long arrivals[WARPS][STAGES];  // of the copies to the rings
    Candidate bound;  // candidates that reach it enter the list
    unsigned count;   // of those that tried to enter the list
    unsigned largest;
    unsigned warp_counts[2][WARP];
    Notice notices[ATTEMPTS];
    unsigned ties[WARPS];  // in each warp's first chunk: scores with a key, scores above it << 16
    alignas(16) unsigned near[NEAR];  // keys in the bin of the cut; 0: none
    unsigned near_count;
    alignas(16) Bins bins;        // zero, except during a search
    alignas(16) Bins group_bins;  // zero before the search for a bound
    alignas(16) unsigned sums[BINS];          // of the cluster
};

// The rings of the warps, then the list of CAPACITY candidates. After the stream the rings' memory
// holds the gathered keys, then the bitmap and the places.
extern __shared__ uint4 dynamic_shared[];
__device__ __forceinline__ uint4* ring_buffer(unsigned warp, unsigned stage) {
    return dynamic_shared + (warp * STAGES + stage) * CHUNK_VECTORS;
}
__device__ __forceinline__ unsigned* gathered_keys() {
    return reinterpret_cast<unsigned*>(dynamic_shared);
}
__device__ __forceinline__ Candidate* list_entries() {
    return reinterpret_cast<Candidate*>(dynamic_shared + RING_BYTES / 16);
}

// Vectors of a row: [first, last).
struct Vectors {
    unsigned first, last;

    __device__ __forceinline__ unsigned chunks() const {
        return (last - first + CHUNK_VECTORS - 1) / CHUNK_VECTORS;
    }
    // The part of a warp: whole chunks, which begin at the warp's share of all chunks.
    __device__ __forceinline__ Vectors of_warp(unsigned warp) const {
        const unsigned all = chunks();
        return {first + all * warp / WARPS * CHUNK_VECTORS,
                min(first + all * (warp + 1) / WARPS * CHUNK_VECTORS, last)};
    }
};

// A row, and how it is divided.
struct Slice : Row {
    // The first score of the row's whole vectors, and the one behind their last. The scores before them
    // belong to the first CTA, those behind them to the last one: VALUES - 1 at most.
    unsigned body, tail;
    Vectors block, own;  // of this CTA, of this warp

    __device__ __forceinline__ Vectors of_block(unsigned cta_rank) const {
        const unsigned vectors = (tail - body) / VALUES, begin = body / VALUES;
        const unsigned share = (vectors + BLOCKS_PER_ROW - 1) / BLOCKS_PER_ROW;
        return {begin + min(cta_rank * share, vectors), begin + min((cta_rank + 1) * share, vectors)};
    }
};
