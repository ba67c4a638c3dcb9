// Step 1 of the streamed form of topk_indices: a bound from the maxima of the first chunks.
#pragma once

#include "streamed_copies.cuh"
#include "streamed_search.cuh"

constexpr unsigned GROUPS = 2 * THREADS * BLOCKS_PER_ROW;  // two in the first chunk for each lane
static_assert(LOADS % 2 == 0, "two groups in the vectors of a lane");

// The key of the largest score in half of this lane's vectors of a chunk: those from `first` on. 0: the
// chunk has no such vector.
template <bool NAN_FIRST>
__device__ __forceinline__ unsigned largest_key(const uint4* buffer, unsigned vectors, unsigned first,
                                                unsigned nan_key, unsigned lane) {
    // A NaN is passed on by one maximum and left out by the other.
    float largest = __uint_as_float(NAN_FIRST ? 0xff800000u : 0x7fffffffu);
    unsigned present = 0;
#pragma unroll
    for (unsigned q = 0; q < LOADS / 2; ++q) {
        const unsigned place = (first + q) * WARP + lane;
        if (place >= vectors) continue;
        present = ALL;
        const uint4 vector = buffer[place];
#pragma unroll
        for (unsigned j = 0; j < VALUES; ++j) {
            const float score = __uint_as_float(score_bits(vector, j));
            largest = NAN_FIRST ? max_or_nan(largest, score) : fmaxf(largest, score);
        }
    }
    return score_key(__float_as_uint(largest), nan_key) & present;
}

// The keys of the maxima of this lane's two groups of a chunk.
struct Maxima {
    unsigned keys[2];
};
__device__ __forceinline__ Maxima maxima_of(const uint4* buffer, unsigned vectors, unsigned nan_key,
                                            unsigned lane) {
    Maxima found;
#pragma unroll
    for (unsigned half = 0; half < 2; ++half)
        found.keys[half] =
            nan_key == ALL ? largest_key<true>(buffer, vectors, half * LOADS / 2, nan_key, lane)
                           : largest_key<false>(buffer, vectors, half * LOADS / 2, nan_key, lane);
    return found;
}

// The range of the keys of all threads of the CTA, those that are 0 left out.
struct Range {
    unsigned least, largest;
};
__device__ __forceinline__ Range range_of_block(const Maxima& maxima, unsigned warp, unsigned lane,
                                                Shared& shared) {
    unsigned least = ALL, largest = 0;
#pragma unroll
    for (unsigned key : maxima.keys) {
        least = min(least, key != 0 ? key : ALL);
        largest = max(largest, key);
    }
    least = __reduce_min_sync(ALL_LANES, least);
    largest = __reduce_max_sync(ALL_LANES, largest);
    if (lane == 0) {
        shared.warp_counts[0][warp] = least;
        shared.warp_counts[1][warp] = largest;
    }
    __syncthreads();
    least = lane < WARPS ? shared.warp_counts[0][lane] : ALL;
    largest = lane < WARPS ? shared.warp_counts[1][lane] : 0;
    return {__reduce_min_sync(ALL_LANES, least), __reduce_max_sync(ALL_LANES, largest)};
}

// The number of warps of the cluster, each of which has a first chunk.
constexpr unsigned FIRST_CHUNKS = BLOCKS_PER_ROW * WARPS;

// Takes scores from the first chunks of all warps, in the order of their positions: all whose key is above
// `key`, then those whose key is equal to it, until there are k. Returns the number of the chunk of the k-th;
// FIRST_CHUNKS if the chunks have fewer than k such scores. Called by all threads of the cluster, each with
// the first chunk of its warp.
__device__ __noinline__ unsigned chunk_of_ties(unsigned key, unsigned k, const uint4* buffer,
                                               unsigned vectors, unsigned nan_key, Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned counts = 0;
    for (unsigned place = lane; place < vectors; place += WARP) {
        const uint4 vector = buffer[place];
#pragma unroll
        for (unsigned j = 0; j < VALUES; ++j) {
            const unsigned other = score_key(score_bits(vector, j), nan_key);
            counts += other == key ? 1 : other > key ? 1 << 16 : 0;
        }
    }
    counts = __reduce_add_sync(ALL_LANES, counts);
    if (lane == 0) shared.ties[warp] = counts;
    if constexpr (BLOCKS_PER_ROW > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    const auto counts_of = [&](unsigned chunk) {
        if (chunk >= FIRST_CHUNKS) return 0u;
        if constexpr (BLOCKS_PER_ROW == 1) return shared.ties[chunk];
        return load_from_cluster_rank(&shared.ties[chunk % WARPS], chunk / WARPS);
    };
    unsigned above = 0;
    for (unsigned first = 0; first < FIRST_CHUNKS; first += WARP)
        above += __reduce_add_sync(ALL_LANES, counts_of(first + lane) >> 16);
    unsigned wanted = k - min(above, k - 1);
    for (unsigned first = 0; first < FIRST_CHUNKS; first += WARP) {
        const unsigned reached = sum_up_to_lane(counts_of(first + lane) & 0xffff, lane);
        const unsigned reaching = __ballot_sync(ALL_LANES, reached >= wanted);
        if (reaching != 0) return first + __ffs(reaching) - 1;
        wanted -= __shfl_sync(ALL_LANES, reached, WARP - 1);
    }
    return FIRST_CHUNKS;
}

// Which of the maxima of all groups is to be the bound: returns its rank, 1 for the largest. It is the number
// of groups that are expected to have one of the k largest scores of a row of `length` scores, and some more.
// So the bound is too high, above the row's score of rank k, for one row in a hundred thousand, if the scores
// are in no order. After an attempt that found fewer than k scores the rank is larger. Returns 0 if there are
// too few groups for such a rank, and in the last attempt: every candidate is to reach the bound then.
__device__ __forceinline__ unsigned groups_to_reach(unsigned length, unsigned k, unsigned attempt) {
    constexpr float READ = BLOCKS_PER_ROW * WARPS * CHUNK_VECTORS * VALUES;
    // Of the k largest scores, those in the groups: Poisson distributed.
    const float mean = static_cast<float>(k) * fminf(READ / static_cast<float>(length), 1.0f);
    float most = mean + 4.0f * sqrtf(mean) + 4.0f;
    if (attempt > 0) most = 4.0f * most + 16.0f;
    if (most > static_cast<float>(GROUPS) || attempt + 1 == ATTEMPTS) return 0;
    // So many scores, each in any group, are in so many different ones.
    return static_cast<unsigned>(GROUPS * (1.0f - expf(-most / GROUPS))) + 1;
}

// Starts to read the slice, chooses a bound that, most likely, at least k candidates of the row reach,
// the same in all CTAs of the cluster, and begins the list with the scores of the row that are in no
// whole vector. Called by all threads; a barrier has to follow.
__device__ __forceinline__ void begin_list(const Slice& row, unsigned k, unsigned attempt,
                                           unsigned cta_rank, unsigned consumed, Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (lane == 0) start_chunks(row, 0, 1, warp, consumed, shared);
    // Lanes from 0 up: those before the first vector, in the first CTA. From 16 up: those behind the
    // last one, in the last CTA.
    const bool behind = lane >= 16;
    const unsigned edge = behind ? row.tail + lane - 16 : row.begin + lane;
    const bool on_edge = behind ? cta_rank == BLOCKS_PER_ROW - 1 && edge < row.end
                                : cta_rank == 0 && edge < row.body;
    unsigned edge_bits = 0;
    if (warp == 0 && on_edge) edge_bits = row.bits(edge);
    const unsigned rank = groups_to_reach(row.length(), k, attempt);
    // Every warp of the cluster has a chunk then, and all groups but few exist. The last CTA has the
    // fewest: its slice may be a few vectors shorter than the others'.
    const bool chosen = rank != 0 && row.of_block(BLOCKS_PER_ROW - 1).chunks() >= WARPS;
    // All bins are zero behind this; one CTA for a row has a barrier in range_of_block.
    if constexpr (BLOCKS_PER_ROW > 1) __syncthreads();
    // The other copies follow when the first has arrived, so that the first ones of all warps are not
    // behind them, and memory is busy while a bound is chosen.
    if (chosen) wait_for_chunk(warp, consumed, shared);
    if (lane == 0) start_chunks(row, 1, STAGES, warp, consumed, shared);
    Candidate bound = 0;
    if (chosen) {
        const uint4* const chunk = ring_buffer(warp, consumed % STAGES);
        const Maxima maxima = maxima_of(chunk, row.own.last - row.own.first, row.nan_key, lane);
        // A range of the cluster's keys would take an exchange, which a round of the search takes too.
        Range range{LEAST_KEY, ALL};
        if constexpr (BLOCKS_PER_ROW == 1) range = range_of_block(maxima, warp, lane, shared);
        const Cut cut = find_cut<true>(
            [&](const auto& visit) {
#pragma unroll
                for (unsigned key : maxima.keys) visit(key);
            },
            rank, range.least, range.largest, shared.group_bins, shared, rank / 4);
        bound = static_cast<Candidate>(cut.ties == 0 ? cut.key + 1 : cut.key) << 32;
        if (cut.ties != 0) {
            // Of many scores with this key, those up to a position.
            const unsigned last = chunk_of_ties(
                cut.key, k, chunk, min(row.own.last - row.own.first, CHUNK_VECTORS), row.nan_key, shared);
            if (last < FIRST_CHUNKS) {
                const Vectors part = row.of_block(last / WARPS).of_warp(last % WARPS);
                const unsigned end = min(part.first + CHUNK_VECTORS, part.last) * VALUES;
                bound = make_candidate(cut.key, end - 1 - row.begin);
            }
        }
    }
    if (warp != 0) return;
    const Candidate candidate = row.candidate(edge_bits, edge - row.begin);
    const bool enters = on_edge && candidate >= bound;
    const unsigned entering = __ballot_sync(ALL_LANES, enters);
    if (enters) list_entries()[__popc(entering & ((1u << lane) - 1))] = candidate;
    const unsigned largest = __reduce_max_sync(ALL_LANES, enters ? candidate_key(candidate) : 0);
    if (lane == 0) {
        shared.bound = bound;
        shared.count = __popc(entering);
        shared.largest = largest;
    }
}
