// The streamed form of topk_indices: the copies of a warp's chunks to its ring.
#pragma once

#include "ring.cuh"
#include "streamed_memory.cuh"

// Starts the copy of the chunk that begins with this vector of the row. Called by one thread.
__device__ __forceinline__ void start_chunk(const Slice& row, unsigned chunk, unsigned warp,
                                            unsigned stage, Shared& shared) {
    start_copy(ring_buffer(warp, stage), row.base + 16ull * chunk,
               16 * min(CHUNK_VECTORS, row.own.last - chunk), &shared.arrivals[warp][stage]);
}

// Starts the copies of this warp's chunks [first, end) of those that fill its ring; `consumed` chunks
// have gone through it. Called by one thread of the warp.
__device__ __forceinline__ void start_chunks(const Slice& row, unsigned first, unsigned end,
                                             unsigned warp, unsigned consumed, Shared& shared) {
#pragma unroll
    for (unsigned ahead = first; ahead < end; ++ahead) {
        const unsigned chunk = row.own.first + ahead * CHUNK_VECTORS;
        if (chunk < row.own.last) start_chunk(row, chunk, warp, (consumed + ahead) % STAGES, shared);
    }
}

// Waits for the chunk that goes through the ring after `consumed` others.
__device__ __forceinline__ void wait_for_chunk(unsigned warp, unsigned consumed, Shared& shared) {
    wait_for_copy(&shared.arrivals[warp][consumed % STAGES], consumed / STAGES % 2);
}
