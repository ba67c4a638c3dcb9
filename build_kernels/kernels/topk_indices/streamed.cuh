// The streamed form of topk_indices: the scores pass through shared memory, and the candidates that
// reach a bound stay in a list. For rows of any length.
//
// Each CTA of the cluster has a contiguous slice of the row. Steps:
//
//   1. Bound. Each warp starts to copy its part of the slice. Of its first chunk it takes the maxima of
//      groups of scores; parts being spread over the row, so are the groups. From histograms of all maxima
//      of the cluster follows a candidate that, most likely, somewhat more than top_k candidates of
//      the row reach. Short rows: all of them. No score is read for this alone.
//   2. Stream. Each warp copies its part of the slice, chunk after chunk, to its own ring of buffers in
//      shared memory, several ahead, and appends the candidates that reach the bound to the CTA's
//      list, in no order. A warp that finds the list full makes its CTA reduce the list to the top_k
//      largest candidates, and the bound rises to the least of them. So no input makes the list
//      overflow. Warps wait for each other only then, and at the end.
//   3. Verify. If all lists together have fewer than top_k candidates, the bound was too high:
//      steps 1 and 2 again with a lower bound, at last with one that every candidate reaches.
//   4. Cut. Each CTA collects the keys of all lists of the cluster (if they are too many, their
//      histograms instead, one for each round). A radix search, 8 bits a round, finds the key of
//      rank top_k, how many of the scores with that key are taken, and how many candidates the CTAs
//      before this one emit.
//   5. Emit. Each CTA marks the positions of its candidates that pass the cut in a bitmap, and counts
//      the marks before each candidate: its place. In rank order: the CTA of rank 0 collects and
//      sorts them.
//
// Constants of this form: LOADS (16-byte vectors of a lane per chunk), STAGES (chunks of a warp's
// ring), CAPACITY (of the list).
#pragma once

#include "cluster.cuh"
#include "ring.cuh"
#include "rows.cuh"

constexpr unsigned CHUNK_VECTORS = WARP * LOADS;
constexpr unsigned CHUNK_BYTES = 16 * CHUNK_VECTORS;
constexpr unsigned RING_BYTES = WARPS * STAGES * CHUNK_BYTES;
constexpr unsigned ROUNDS = 4;                      // of 8 bits each
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
constexpr unsigned GROUPS = 2 * THREADS * BLOCKS_PER_ROW;  // two in the first chunk for each lane
static_assert(CAPACITY > MAX_TOP_K, "a reduced list takes another candidate");
static_assert((MAX_TOP_K & (MAX_TOP_K - 1)) == 0, "the sort pads to a power of 2");
static_assert(LOADS * VALUES <= 32, "one bit for each score of a lane");
static_assert(LOADS % 2 == 0, "two groups in the vectors of a lane");
static_assert(WARPS % BLOCKS_PER_ROW == 0, "warps are divided among the CTAs to read from");
static_assert(THREADS >= BINS, "one thread for each bin");

// Which scores are selected: those with a key above `key`, and of the `equal` scores with this key
// the first `ties`, by position.
struct Cut {
    unsigned key;
    unsigned ties;
    unsigned equal;
};

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

// The sum of one value of each warp, and of those of the warps before this one. All lanes of a warp
// call it, after a barrier that follows the stores to `values`.
__device__ __forceinline__ void sum_of_warps(const unsigned* values, unsigned warp, unsigned lane,
                                             unsigned& before, unsigned& total) {
    const unsigned value = lane < WARPS ? values[lane] : 0;
    before = __reduce_add_sync(ALL_LANES, lane < warp ? value : 0);
    total = __reduce_add_sync(ALL_LANES, value);
}

// The cut that takes the `wanted` largest of the keys that the threads of the CTA, or of the
// cluster, visit: for_each(visit) calls visit(key) for each key of the calling thread.
//
// At least `wanted` >= 1 keys are in [least, largest]; those outside are ignored. The bins are zero,
// with a barrier behind that; afterwards they are not. Each round counts the keys of a range of 256
// bins, finds the bin of rank `wanted`, and goes on with its range. A bin that is taken whole ends it,
// as does one of which at most `spare` keys more than wanted are taken then.
template <bool CLUSTERED, typename ForEach>
__device__ __forceinline__ Cut find_cut(const ForEach& for_each, unsigned wanted, unsigned least,
                                        unsigned largest, Bins& all_bins, Shared& shared,
                                        unsigned spare = 0) {
    for (unsigned round = 0;; ++round) {
        const unsigned span = largest - least;
        const unsigned bits = WARP - __clz(span);
        const unsigned shift = bits > 8 ? bits - 8 : 0;
        unsigned* bins = all_bins[round];
        for_each([&](unsigned key) {
            if (key - least <= span) atomicAdd(&bins[(key - least) >> shift], 1u);
        });
        if constexpr (CLUSTERED && BLOCKS_PER_ROW > 1) {
            cluster_sync();
            if (threadIdx.x < BINS) {
                unsigned sum = 0;
#pragma unroll
                for (unsigned cta = 0; cta < BLOCKS_PER_ROW; ++cta)
                    sum += load_from_cluster_rank(&bins[threadIdx.x], cta);
                shared.sums[threadIdx.x] = sum;
            }
            bins = shared.sums;
        }
        __syncthreads();
        const BinOfRank found = bin_of_rank(bins, wanted, threadIdx.x % WARP);
        wanted = found.rest;
        least += found.bin << shift;
        if (found.size - wanted <= spare) return {least - 1, 0, 0};
        if (shift == 0) return {least, wanted, found.size};
        largest = least + min(largest - least, (1u << shift) - 1);
        // The next round's bins are others; the cluster's sums are written after its barrier.
    }
}

// Zeroes bins. A barrier has to precede and to follow.
__device__ __forceinline__ void clear_bins(Bins& bins) {
    for (unsigned i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) (&bins[0][0])[i] = 0;
}

// The first `ties` of the candidates of the list with this key, by position: those that reach the
// number that is returned. Called by all threads of the CTA; leaves the bins not zero.
__device__ __noinline__ Candidate first_of_equal(unsigned key, unsigned ties, unsigned count,
                                                 unsigned row_length, Shared& shared) {
    __syncthreads();
    clear_bins(shared.bins);
    __syncthreads();
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < count; i += THREADS) {
                const Candidate candidate = list_entries()[i];
                if (candidate_key(candidate) == key) visit(static_cast<unsigned>(candidate));
            }
        },
        ties, 0u - row_length, ALL, shared.bins, shared);
    return static_cast<Candidate>(key) << 32 | (cut.key + 1);  // inverted positions are distinct
}

// The least candidate of the list that the cut takes, or a number between it and the next.
__device__ __forceinline__ Candidate least_taken(Cut cut, unsigned count, unsigned row_length,
                                                 Shared& shared) {
    // No key is above ALL: a CTA takes none then. Position 0, the only candidate that reaches this
    // number, is in the first CTA, where the first ties are.
    if (cut.ties == 0 && cut.key == ALL) return ~Candidate{0};
    if (cut.ties == 0) return static_cast<Candidate>(cut.key + 1) << 32;
    if (cut.ties == cut.equal) return static_cast<Candidate>(cut.key) << 32;
    return first_of_equal(cut.key, cut.ties, count, row_length, shared);
}

// Moves the candidates of the list that reach `limit` to its front, in no order, and sets
// shared.count to their number, which was set to 0 before a barrier. A barrier has to follow.
__device__ __forceinline__ void compact_list(unsigned count, Candidate limit, Shared& shared) {
    for (unsigned start = 0; start < count; start += THREADS) {
        const unsigned i = start + threadIdx.x;
        const Candidate candidate = i < count ? list_entries()[i] : 0;
        __syncthreads();  // no place below `start` + THREADS is read any more
        if (i < count && candidate >= limit) list_entries()[atomicAdd(&shared.count, 1u)] = candidate;
    }
}

// Reduces the full list to its k largest candidates and raises the bound to the least of them.
// Called by all threads of the CTA, after a barrier.
__device__ __noinline__ void reduce_list(unsigned k, unsigned row_length, Shared& shared) {
    const unsigned least = max(candidate_key(shared.bound), LEAST_KEY);
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < CAPACITY; i += THREADS)
                visit(candidate_key(list_entries()[i]));
        },
        k, least, shared.largest, shared.bins, shared);
    const Candidate limit = least_taken(cut, CAPACITY, row_length, shared);
    if (threadIdx.x == 0) {
        shared.count = 0;
        shared.bound = limit;
    }
    __syncthreads();
    compact_list(CAPACITY, limit, shared);
    clear_bins(shared.bins);
    __syncthreads();
}

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

// Of the first chunks of all warps, in the order of their positions, the one that completes k scores,
// if those above `key` and those with this key are counted; FIRST_CHUNKS if none does. All threads of
// the cluster call it with their warp's chunk.
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

// How many groups of those of a row of `length` scores are expected to have a maximum that a score of
// rank k reaches, and some more, so that the row's score of rank k is below theirs but for one row in a
// hundred thousand, if its scores are in no order. 0: too many to tell. The more `attempts` have found
// fewer than k scores, the more.
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
    // Every warp has a chunk then, and all groups but few exist.
    const bool chosen = rank != 0 && row.of_block(0).chunks() >= WARPS;
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

// Which scores of this lane in a chunk are at least `least`: bit q * VALUES + j. A NaN as told.
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

// Those of the scores in `entering` that reach the bound: for the chunk that its position is in, where
// scores with its key may come before or after it.
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
    unsigned chunk = row.own.first;
    unsigned entering = 0, largest = 0;
    bool full = false;  // the list; `entering` then tells what is left of the chunk
    for (;;) {
        while (chunk < row.own.last) {
            const unsigned stage = consumed % STAGES;
            const uint4* buffer = ring_buffer(warp, stage);
            const unsigned position = chunk * VALUES - row.begin;
            const unsigned next = chunk + STAGES * CHUNK_VECTORS;
            if (!full) {
                wait_for_chunk(warp, consumed, shared);
                entering = entering_scores(buffer, min(CHUNK_VECTORS, row.own.last - chunk),
                                           position, bound, row.nan_key, lane);
            }
            const bool risen = full;  // the bound, after the scores of the chunk were compared
            full = false;
            if (__any_sync(ALL_LANES, entering != 0)) {
                if (risen || candidate_index(bound) - position < CHUNK_VECTORS * VALUES)
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
            if (lane == 0 && next < row.own.last) start_chunk(row, next, warp, stage, shared);
            ++consumed;
            chunk += CHUNK_VECTORS;
        }
        const unsigned warp_largest = __reduce_max_sync(ALL_LANES, largest);
        if (lane == 0 && warp_largest != 0) atomicMax(&shared.largest, warp_largest);
        if (__syncthreads_and(!full)) return;
        reduce_list(k, row.length(), shared);
        bound = shared.bound;
    }
}

// Stores the positions of the candidates that reach `limit`, in ascending order from `place` on. They
// are in [begin, end). Called by all threads of the CTA.
__device__ __forceinline__ void emit_in_order(Candidate limit, unsigned count, unsigned place,
                                              unsigned begin, unsigned end, const Output& output,
                                              Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned* const marks = reinterpret_cast<unsigned*>(dynamic_shared);
    unsigned* const places = marks + 4 * vector_slot(BITMAP_VECTORS);
    const auto mark_word = [&](unsigned bit) -> unsigned& {
        return marks[4 * vector_slot(bit / 128) + bit % 128 / 32];
    };
    // Calls visit(candidate, bit) for each of them whose mark is in the window, over all threads.
    const auto for_each = [&](unsigned window, const auto& visit) {
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            const Candidate candidate = list_entries()[i];
            const unsigned bit = candidate_index(candidate) - window;
            if (candidate >= limit && bit < 128 * BITMAP_VECTORS) visit(candidate, bit);
        }
    };
    for (unsigned window = begin; window < end; window += 128 * BITMAP_VECTORS) {
        const unsigned vectors = (min(end - window, 128 * BITMAP_VECTORS) + 127) / 128;
        __syncthreads();
        for (unsigned i = threadIdx.x; i < vector_slot(vectors); i += THREADS)
            dynamic_shared[i] = uint4{};
        __syncthreads();
        for_each(window, [&](Candidate, unsigned bit) {
            atomicOr(&mark_word(bit), 1u << (bit % 32));
        });
        __syncthreads();
        // A thread has vectors that follow each other.
        const unsigned share = (vectors + THREADS - 1) / THREADS;
        const unsigned first = min(threadIdx.x * share, vectors), last = min(first + share, vectors);
        const auto marked = [](const uint4& words) {
            return __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
        };
        unsigned own = 0;
        for (unsigned i = first; i < last; ++i) own += marked(dynamic_shared[vector_slot(i)]);
        const unsigned reached = sum_up_to_lane(own, lane);
        if (lane == WARP - 1) shared.warp_counts[0][warp] = reached;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[0], warp, lane, before, total);
        unsigned next = place + before + reached - own;
        for (unsigned i = first; i < last; ++i) {
            places[word_slot(i)] = next;
            next += marked(dynamic_shared[vector_slot(i)]);
        }
        __syncthreads();
        for_each(window, [&](Candidate candidate, unsigned bit) {
            unsigned to = places[word_slot(bit / 128)] +
                          __popc(mark_word(bit) & ((1u << (bit % 32)) - 1));
            for (unsigned before = bit / 128 * 128; before + 32 <= bit; before += 32)
                to += __popc(mark_word(before));
            output.store(to, candidate_index(candidate));
        });
        place += total;
    }
}

// What the cluster has found, the same in all CTAs but for the last three.
struct Found {
    Cut cut;
    unsigned above, equal;  // candidates in the CTAs before this one: above the cut, at its key
    unsigned own_equal;     // candidates of this CTA at the key of the cut
};

// The sums of two numbers, each below 2^16, and of a third over the threads of the CTA. A barrier has to
// lie between a call and the next store to the warps' counts.
__device__ __forceinline__ void add_over_block(unsigned& over, unsigned& same, unsigned& own,
                                               Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned both = __reduce_add_sync(ALL_LANES, over | same << 16);
    own = __reduce_add_sync(ALL_LANES, own);
    if (lane == 0) {
        shared.warp_counts[0][warp] = both;
        shared.warp_counts[1][warp] = own;
    }
    __syncthreads();
    unsigned before, total;
    sum_of_warps(shared.warp_counts[0], warp, lane, before, total);
    sum_of_warps(shared.warp_counts[1], warp, lane, before, own);
    over = total & 0xffff;
    same = total >> 16;
}

// The cut of a cluster whose lists have `count` candidates in the CTA of the lane's number and
// `all` together, few enough that each CTA holds their keys.
__device__ __forceinline__ Found find_gathered(unsigned count, unsigned all, unsigned cta_rank,
                                               unsigned wanted, unsigned least, unsigned largest,
                                               Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned behind = sum_up_to_lane(count, lane);
    const unsigned source = warp % BLOCKS_PER_ROW;
    const unsigned size = __shfl_sync(ALL_LANES, count, source);
    unsigned* const keys = gathered_keys() + __shfl_sync(ALL_LANES, behind, source) - size;
    const unsigned* const key_words = reinterpret_cast<const unsigned*>(list_entries()) + 1;
#pragma unroll 4
    for (unsigned i = warp / BLOCKS_PER_ROW * WARP + lane; i < size;
         i += WARPS / BLOCKS_PER_ROW * WARP)
        keys[i] = load_from_cluster_rank(key_words + 2 * i, source);
    __syncthreads();
    Found found;
    found.cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < all; i += THREADS) visit(gathered_keys()[i]);
        },
        wanted, least, largest, shared.bins, shared);
    const unsigned end = __shfl_sync(ALL_LANES, behind, cta_rank);
    const unsigned begin = end - __shfl_sync(ALL_LANES, count, cta_rank);
    unsigned over = 0, same = 0, own = 0;
    for (unsigned i = threadIdx.x; i < end; i += THREADS) {
        const unsigned key = gathered_keys()[i];
        const bool before = i < begin;
        over += before && key > found.cut.key;
        same += before && key == found.cut.key;
        own += !before && key == found.cut.key;
    }
    add_over_block(over, same, own, shared);
    found.above = over;
    found.equal = same;
    found.own_equal = own;
    return found;
}

// The same where the lists are too long for that: their histograms are added up, round by round.
__device__ __noinline__ Found find_by_histograms(unsigned count, unsigned cta_rank, unsigned wanted,
                                                 unsigned least, unsigned largest, Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
    Found found;
    found.cut = find_cut<true>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < count; i += THREADS)
                visit(candidate_key(list_entries()[i]));
        },
        wanted, least, largest, shared.bins, shared);
    unsigned over = 0, same = 0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) {
        over += candidate_key(list_entries()[i]) > found.cut.key;
        same += candidate_key(list_entries()[i]) == found.cut.key;
    }
    unsigned none = 0;
    add_over_block(over, same, none, shared);
    Notice& notice = shared.notices[0];
    if (threadIdx.x == 0) {
        notice.above = over;
        notice.equal = same;
    }
    cluster_sync();
    const bool one = lane < cta_rank;
    found.above = __reduce_add_sync(ALL_LANES, one ? load_from_cluster_rank(&notice.above, lane) : 0);
    found.equal = __reduce_add_sync(ALL_LANES, one ? load_from_cluster_rank(&notice.equal, lane) : 0);
    found.own_equal = same;
    return found;
}

// Prepares the shared memory of a CTA, before the wait for the grids before this one. Called by all
// threads; a barrier has to follow.
__device__ __forceinline__ void prepare(Shared& shared) {
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (unsigned stage = 0; stage < STAGES; ++stage)
            init_barrier(&shared.arrivals[threadIdx.x / WARP][stage]);
        publish_barriers();
    }
    clear_bins(shared.bins);
    clear_bins(shared.group_bins);
    __syncwarp();
}

// Selects and stores the k largest scores of a row. Called by all threads of the cluster, after
// prepare().
__device__ __forceinline__ void select_row(const Row& given, unsigned k, bool sorted,
                                           const OutputParameters& outputs, Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    Slice row{given};
    row.body = min((row.begin + VALUES - 1) / VALUES * VALUES, row.end);
    row.tail = max(row.end / VALUES * VALUES, row.body);
    row.block = row.of_block(cta_rank);
    row.own = row.block.of_warp(threadIdx.x / WARP);
    const unsigned wanted = min(k, row.length());

    // 1 and 2, and 3: until the lists hold the row's largest scores.
    unsigned consumed = 0, count = 0, all = 0, least = 0, largest = 0;
    unsigned lane_count = 0;  // candidates in the list of the CTA of the lane's number
    for (unsigned attempt = 0;; ++attempt) {
        begin_list(row, k, attempt, cta_rank, consumed, shared);
        __syncthreads();
        stream_slice(row, k, consumed, shared);
        count = all = shared.count;
        least = max(candidate_key(shared.bound), LEAST_KEY);
        largest = shared.largest;
        if constexpr (BLOCKS_PER_ROW > 1) {
            Notice& notice = shared.notices[attempt];
            if (threadIdx.x == 0) {
                notice.count = count;
                notice.least = least;
                notice.largest = largest;
            }
            cluster_sync();
            const bool one = lane < BLOCKS_PER_ROW;
            lane_count = one ? load_from_cluster_rank(&notice.count, lane) : 0;
            least = one ? load_from_cluster_rank(&notice.least, lane) : ALL;
            largest = one ? load_from_cluster_rank(&notice.largest, lane) : 0;
            all = __reduce_add_sync(ALL_LANES, lane_count);
            least = __reduce_min_sync(ALL_LANES, least);
            largest = __reduce_max_sync(ALL_LANES, largest);
        }
        if (all >= wanted || attempt + 1 == ATTEMPTS) break;
        __syncthreads();
        clear_bins(shared.group_bins);
        __syncthreads();
    }

    // 4. All candidates, or the largest of them.
    Candidate limit = 0;
    unsigned place = 0;
    if (all > wanted) {
        Found found{};
        if constexpr (BLOCKS_PER_ROW == 1) {
            found.cut = find_cut<false>(
                [&](const auto& visit) {
                    for (unsigned i = threadIdx.x; i < count; i += THREADS)
                        visit(candidate_key(list_entries()[i]));
                },
                wanted, least, largest, shared.bins, shared);
            found.own_equal = found.cut.equal;
        } else if (all <= GATHERED) {
            found = find_gathered(lane_count, all, cta_rank, wanted, least, largest, shared);
        } else {
            found = find_by_histograms(count, cta_rank, wanted, least, largest, shared);
        }
        const unsigned taken_before = min(found.equal, found.cut.ties);
        place = found.above + taken_before;
        const Cut own{found.cut.key, min(found.cut.ties - taken_before, found.own_equal),
                      found.own_equal};
        limit = least_taken(own, count, row.length(), shared);
    } else {
        place = __reduce_add_sync(ALL_LANES, lane < cta_rank ? lane_count : 0);
    }
    // No CTA reads another's memory from here on; completed by a cluster_wait below.
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_arrive();
    }

    // 5.
    const Output output = outputs.of(row);
    if (cta_rank == BLOCKS_PER_ROW - 1)
#pragma unroll 1
        for (unsigned i = wanted + threadIdx.x; i < k; i += THREADS) output.store_none(i);
    if (!sorted) {
        const unsigned begin = cta_rank == 0 ? row.begin : max(row.block.first * VALUES, row.body);
        const unsigned end = cta_rank == BLOCKS_PER_ROW - 1 ? row.end
                                                            : max(row.block.last * VALUES, row.body);
        emit_in_order(limit, count, place, begin - row.begin, end - row.begin, output, shared);
    } else {
        if constexpr (BLOCKS_PER_ROW > 1) {
            __syncwarp();
            cluster_wait();
        }
        __syncthreads();  // the count has been read
        if (threadIdx.x == 0) shared.count = 0;
        __syncthreads();
        compact_list(count, limit, shared);
        __syncthreads();
        if constexpr (BLOCKS_PER_ROW > 1) {
            if (threadIdx.x == 0) shared.notices[1].above = place;
            cluster_sync();
            if (cta_rank == 0) {
                for (unsigned cta = 1; cta < BLOCKS_PER_ROW; ++cta) {
                    const unsigned size = load_from_cluster_rank(&shared.count, cta);
                    const unsigned to = load_from_cluster_rank(&shared.notices[1].above, cta);
                    const unsigned* words = reinterpret_cast<const unsigned*>(list_entries());
                    for (unsigned i = threadIdx.x; i < size; i += THREADS) {
                        const unsigned inverted = load_from_cluster_rank(words + 2 * i, cta);
                        const unsigned key = load_from_cluster_rank(words + 2 * i + 1, cta);
                        list_entries()[to + i] = static_cast<Candidate>(key) << 32 | inverted;
                    }
                }
            }
            __syncwarp();
            cluster_arrive();
        }
        if (cta_rank == 0 && wanted > 0) {
            unsigned size = 1;
            while (size < wanted) size *= 2;
#pragma unroll 1
            for (unsigned i = wanted + threadIdx.x; i < size; i += THREADS) list_entries()[i] = 0;
            sort_descending(list_entries(), size);
#pragma unroll 1
            for (unsigned i = threadIdx.x; i < wanted; i += THREADS)
                output.store(i, candidate_index(list_entries()[i]));
        }
    }
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_wait();
    }
}
