// The streamed form of topk_indices: the copies of a warp's chunks to its ring.
#pragma once

#include "mbarrier.cuh"
#include "streamed_memory.cuh"

// The order in which a warp reads the chunks of its part: one from the start, one from the end, and so on
// inwards. In a row that ascends or descends, the first chunks then have the part's largest scores. If these
// came last, each chunk would be above all before it, and all of it would enter the list, however
// often the bound rose.
struct Turns {
    unsigned chunk;   // the one whose turn it is: its first vector
    unsigned left;    // vectors of it and those after it, were all chunks whole
    unsigned step;    // from this chunk to the next, modulo 2^32
    unsigned inward;  // from this chunk to the one after the next, modulo 2^32

    static __device__ __forceinline__ Turns of(const Vectors& part) {
        const unsigned all = part.chunks() * CHUNK_VECTORS;
        return {part.first, all, all - CHUNK_VECTORS, CHUNK_VECTORS};
    }
    // The chunk whose turn comes `turns` later. There is one if has_later(turns).
    __device__ __forceinline__ unsigned later(unsigned turns) const {
        return turns % 2 == 0 ? chunk + turns / 2 * inward : chunk + step - turns / 2 * inward;
    }
    __device__ __forceinline__ bool has_later(unsigned turns) const {
        return left > turns * CHUNK_VECTORS;
    }
    __device__ __forceinline__ void advance() {
        chunk += step;
        left -= CHUNK_VECTORS;
        step = inward - step;
        inward = 0 - inward;
    }
};

// Starts the copy of the chunk that begins with this vector of the row. Called by one thread.
__device__ __forceinline__ void start_chunk(const Slice& row, unsigned chunk, unsigned warp,
                                            unsigned stage, Shared& shared) {
    start_copy(ring_buffer(warp, stage), row.base + 16ull * chunk,
               16 * min(CHUNK_VECTORS, row.own.last - chunk), &shared.arrivals[warp][stage]);
}

// Starts to copy the chunks of this warp with the numbers [first, end), counted in the order of Turns, to its
// ring, as far as there are so many. `consumed`: how many chunks have gone through the ring before. Called
// by one thread of the warp.
__device__ __forceinline__ void start_chunks(const Slice& row, unsigned first, unsigned end,
                                             unsigned warp, unsigned consumed, Shared& shared) {
    const Turns turns = Turns::of(row.own);
#pragma unroll
    for (unsigned ahead = first; ahead < end; ++ahead) {
        if (turns.has_later(ahead))
            start_chunk(row, turns.later(ahead), warp, (consumed + ahead) % STAGES, shared);
    }
}

// Waits for the chunk that goes through the ring after `consumed` others.
__device__ __forceinline__ void wait_for_chunk(unsigned warp, unsigned consumed, Shared& shared) {
    wait_for_copy(&shared.arrivals[warp][consumed % STAGES], consumed / STAGES % 2);
}
