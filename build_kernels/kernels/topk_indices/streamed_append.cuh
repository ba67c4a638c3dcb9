// Step 2 of the streamed form of topk_indices: the candidates of the slice that reach the bound.
#pragma once

#include "streamed_copies.cuh"
#include "streamed_list.cuh"

// Returns a mask of the scores of this lane in a chunk: bit q * VALUES + j is set if score j of the lane's
// vector q is at least `least`. For a NaN the bit is NAN_ENTERS.
template <bool NAN_ENTERS>
__device__ __forceinline__ unsigned scores_from(const uint4* buffer, float least, unsigned lane) {
    uint4 vectors[LOADS];
#pragma unroll
    for (unsigned q = 0; q < LOADS; ++q) vectors[q] = buffer[q * WARP + lane];
    unsigned entering = 0;
#pragma unroll
    for (unsigned q = 0; q < LOADS; ++q) {
#pragma unroll
        for (unsigned j = 0; j < VALUES; ++j) {
            const float score = __uint_as_float(score_bits(vectors[q], j));
            const bool enters = NAN_ENTERS ? !(score < least) : score >= least;
            if (enters) entering |= 1u << (q * VALUES + j);
        }
    }
    return entering;
}

// Which scores of this lane in a chunk of `vectors` vectors may reach the bound: all that do, and
// few more. `position` is that of its first score.
__device__ __forceinline__ unsigned entering_scores(const uint4* buffer, unsigned vectors,
                                                    unsigned position, Candidate bound,
                                                    unsigned nan_key, unsigned lane) {
    unsigned key = candidate_key(bound);
    if (position > candidate_index(bound)) {  // a score with the key of the bound comes too late
        if (key == ALL) return 0;
        ++key;
    }
    if (key > max(INFINITE_KEY, nan_key)) return 0;
    const unsigned finite = min(max(key, LEAST_KEY), INFINITE_KEY);
    const float least = __uint_as_float((finite >> 31) != 0 ? finite ^ 0x80000000u : ~finite);
    unsigned entering = nan_key >= key ? scores_from<true>(buffer, least, lane)
                                       : scores_from<false>(buffer, least, lane);
    if (vectors < CHUNK_VECTORS) {
        const unsigned own = (vectors + WARP - 1 - lane) / WARP;
        if (own < LOADS) entering &= (1u << (own * VALUES)) - 1;
    }
    return entering;
}

// The place in a chunk of the score that has this bit of this lane.
__device__ __forceinline__ unsigned score_of_bit(unsigned bit, unsigned lane) {
    return (bit / VALUES * WARP + lane) * VALUES + bit % VALUES;
}

// Those of the scores in `entering` that reach the bound, compared as whole candidates. Needed if the bound
// has risen since `entering` was found; if the position of the bound lies in this chunk, where scores with
// the bound's key may come before or after that position; and if the bound's key is that of +inf or above.
__device__ __noinline__ unsigned reaching(unsigned entering, const uint4* buffer, unsigned position,
                                          Candidate bound, const Row& row, unsigned lane) {
    unsigned found = 0;
    for (unsigned rest = entering; rest != 0; rest &= rest - 1) {
        const unsigned bit = __ffs(rest) - 1, score = score_of_bit(bit, lane);
        if (row.candidate(score_at(buffer, score), position + score) >= bound) found |= 1u << bit;
    }
    return found;
}

// Reserves places of the list for a warp, `own` for this lane, and returns its first one.
//
// One addition for the whole warp: the addition to the count, which all warps of the CTA share, is
// what limits how many candidates can enter.
__device__ __forceinline__ unsigned reserve_places(unsigned own, unsigned lane, Shared& shared) {
    const unsigned before = (1u << lane) - 1;
    unsigned first = 0, total = 0;
#pragma unroll
    for (unsigned bit = 0; bit < 3; ++bit) {
        const unsigned lanes = __ballot_sync(ALL_LANES, (own >> bit & 1) != 0);
        first += __popc(lanes & before) << bit;
        total += __popc(lanes) << bit;
    }
    if (__any_sync(ALL_LANES, own >= 8)) {
        const unsigned reached = sum_up_to_lane(own, lane);
        first = reached - own;
        total = __shfl_sync(ALL_LANES, reached, WARP - 1);
    }
    unsigned start = 0;
    if (lane == 0) start = atomicAdd(&shared.count, total);
    return __shfl_sync(ALL_LANES, start, 0) + first;
}

// Reads the slice and completes the list: all candidates of it that reach the bound, unless the list
// has k larger ones. All threads of the CTA call it, after a barrier; it ends with one.
__device__ __forceinline__ void stream_slice(const Slice& row, unsigned k, unsigned& consumed,
                                             Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Candidate bound = shared.bound;
    Turns turns = Turns::of(row.own);
    unsigned entering = 0, largest = 0;
    bool full = false;  // the list; `entering` then tells what is left of the chunk
    for (;;) {
        while (turns.left != 0) {
            const unsigned stage = consumed % STAGES;
            const uint4* buffer = ring_buffer(warp, stage);
            const unsigned position = turns.chunk * VALUES - row.begin;
            if (!full) {
                wait_for_chunk(warp, consumed, shared);
                entering = entering_scores(buffer, min(CHUNK_VECTORS, row.own.last - turns.chunk),
                                           position, bound, row.nan_key, lane);
            }
            const bool risen = full;  // the bound, after the scores of the chunk were compared
            full = false;
            if (__any_sync(ALL_LANES, entering != 0)) {
                if (risen || candidate_key(bound) >= INFINITE_KEY ||
                    candidate_index(bound) - position < CHUNK_VECTORS * VALUES)
                    entering = reaching(entering, buffer, position, bound, row, lane);
                unsigned place = reserve_places(__popc(entering), lane, shared);
                while (entering != 0 && place < CAPACITY) {
                    const unsigned score = score_of_bit(__ffs(entering) - 1, lane);
                    const Candidate candidate =
                        row.candidate(score_at(buffer, score), position + score);
                    list_entries()[place++] = candidate;
                    largest = max(largest, candidate_key(candidate));
                    entering &= entering - 1;
                }
                full = __any_sync(ALL_LANES, entering != 0);
            }
            if (full) break;
            __syncwarp();
            if (lane == 0 && turns.has_later(STAGES))
                start_chunk(row, turns.later(STAGES), warp, stage, shared);
            ++consumed;
            turns.advance();
        }
        const unsigned warp_largest = __reduce_max_sync(ALL_LANES, largest);
        if (lane == 0 && warp_largest != 0) atomicMax(&shared.largest, warp_largest);
        if (__syncthreads_and(!full)) return;
        reduce_list(k, row.length(), shared);
        bound = shared.bound;
    }
}
