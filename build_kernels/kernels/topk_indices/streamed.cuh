// The streamed form of topk_indices: the scores pass through shared memory, and the candidates that
// reach a bound stay in a list. For rows of any length.
//
// Each CTA of the cluster has a contiguous slice of the row. Steps:
//
//   1. Bound. Every CTA reads the same sample of the row and takes a candidate that, most likely,
//      somewhat more than top_k candidates of the row reach. Short rows: all of them.
//   2. Stream. Each warp copies chunks of the slice to its own ring of buffers in shared memory,
//      several ahead, and appends the candidates that reach the bound to the CTA's list, in no
//      order. A thread that finds the list full makes its CTA reduce the list to the top_k largest
//      candidates, and the bound rises to the least of them. So no input makes the list overflow.
//      Warps wait for each other only then, and at the end.
//   3. Verify. If all lists together have fewer than top_k candidates, the bound was too high:
//      steps 1 and 2 again with a lower bound, at last with one that every candidate reaches.
//   4. Cut. Each CTA collects the keys of all lists of the cluster (if they are too many, their
//      histograms instead, one for each round). A radix search, 8 bits a round, finds the key of
//      rank top_k, how many of the scores with that key are taken, and how many candidates the CTAs
//      before this one emit.
//   5. Emit. Each CTA marks the positions of its candidates that pass the cut in a bitmap and writes
//      them in order. In rank order: the CTA of rank 0 collects and sorts them.
//
// Constants of this form: LOADS (16-byte vectors of a lane per chunk), STAGES (chunks of a warp's
// ring), SAMPLES (at most, a power of 2), CAPACITY (of the list), EARLY (1: a buffer of a ring is copied
// to again before its candidates are appended, whose scores are then read from global memory).
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
constexpr unsigned BITMAP_BITS = 8 * RING_BYTES;
constexpr unsigned GROUP = 4 * WARP;                // words of the bitmap that a warp reads at once
static_assert(CAPACITY > MAX_TOP_K, "a reduced list takes another candidate");
static_assert((MAX_TOP_K & (MAX_TOP_K - 1)) == 0, "the sort pads to a power of 2");
static_assert(2 * CAPACITY >= SAMPLES && SAMPLES >= GROUP && (SAMPLES & (SAMPLES - 1)) == 0,
              "the sample lies where the list will");
static_assert(LOADS * VALUES <= 32, "one bit for each score of a lane");
static_assert(WARPS % BLOCKS_PER_ROW == 0, "warps are divided among the CTAs to read from");
static_assert(THREADS >= BINS, "one thread for each bin");
static_assert(RING_BYTES % (4 * GROUP) == 0, "whole groups of the bitmap");

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

struct Shared {
    unsigned long long arrivals[WARPS][STAGES];  // of the copies to the rings
    Candidate bound;  // candidates that reach it enter the list
    unsigned count;   // of those that tried to enter the list
    unsigned largest;
    unsigned warp_counts[2][WARP];
    Notice notices[ATTEMPTS];
    alignas(16) unsigned bins[ROUNDS][BINS];  // zero, except during a search
    alignas(16) unsigned sums[BINS];          // of the cluster
};

// The rings of the warps, then the list of CAPACITY candidates. After the stream the rings' memory
// holds the gathered keys, then the bitmap.
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

// A row, and the place of this thread's CTA in it.
struct Slice : Row {
    unsigned body, tail;   // where the row's first whole vector begins, where its last one ends
    unsigned first, last;  // the vectors of this CTA: [first, last)
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
// bins, finds the bin of rank `wanted`, and goes on with its range. A bin that is taken whole ends it.
template <bool CLUSTERED, typename ForEach>
__device__ __forceinline__ Cut find_cut(const ForEach& for_each, unsigned wanted, unsigned least,
                                        unsigned largest, Shared& shared) {
    for (unsigned round = 0;; ++round) {
        const unsigned span = largest - least;
        const unsigned bits = WARP - __clz(span);
        const unsigned shift = bits > 8 ? bits - 8 : 0;
        unsigned* bins = shared.bins[round];
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
        if (found.size == wanted) return {least - 1, 0, 0};
        if (shift == 0) return {least, wanted, found.size};
        largest = least + min(largest - least, (1u << shift) - 1);
        // The next round's bins are others; the cluster's sums are written after its barrier.
    }
}

// Zeroes the bins. A barrier has to precede and to follow.
__device__ __forceinline__ void clear_bins(Shared& shared) {
    for (unsigned i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) (&shared.bins[0][0])[i] = 0;
}

// The first `ties` of the candidates of the list with this key, by position: those that reach the
// number that is returned. Called by all threads of the CTA; leaves the bins not zero.
__device__ __noinline__ Candidate first_of_equal(unsigned key, unsigned ties, unsigned count,
                                                 unsigned row_length, Shared& shared) {
    __syncthreads();
    clear_bins(shared);
    __syncthreads();
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < count; i += THREADS) {
                const Candidate candidate = list_entries()[i];
                if (candidate_key(candidate) == key) visit(static_cast<unsigned>(candidate));
            }
        },
        ties, 0u - row_length, ALL, shared);
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
        k, least, shared.largest, shared);
    const Candidate limit = least_taken(cut, CAPACITY, row_length, shared);
    if (threadIdx.x == 0) {
        shared.count = 0;
        shared.bound = limit;
    }
    __syncthreads();
    compact_list(CAPACITY, limit, shared);
    clear_bins(shared);
    __syncthreads();
}

// The sample of a row has 2^bits scores: one in 32, which reads a quarter of its sectors, but at
// least GROUP and at most SAMPLES.
__device__ __forceinline__ unsigned sample_bits(unsigned length) {
    const unsigned bits = WARP - __clz(length / 32);
    return min(max(bits, WARP - __clz(GROUP)), WARP - __clz(SAMPLES)) - 1;
}

// The number of keys of the sample that are at least `key`. Called by a warp.
__device__ __forceinline__ unsigned sampled_from(const unsigned* keys, unsigned bits, unsigned key,
                                                 unsigned lane) {
    unsigned reached = 0;
#pragma unroll 4
    for (unsigned i = lane; i < (1u << bits) / 4; i += WARP) {
        const uint4 four = reinterpret_cast<const uint4*>(keys)[i];
        reached += (four.x >= key) + (four.y >= key) + (four.z >= key) + (four.w >= key);
    }
    return __reduce_add_sync(ALL_LANES, reached);
}

// A candidate that `rank` or a few more candidates of the sample reach. Called by a warp.
//
// A first guess spares most of the bisection: as many keys as lanes reach the key that `rank` lanes'
// maxima reach, and seldom many more.
__device__ __forceinline__ Candidate sampled_candidate(const unsigned* keys, unsigned bits,
                                                       unsigned rank, unsigned length,
                                                       unsigned lane) {
    unsigned low = ALL, high = 0;
#pragma unroll 4
    for (unsigned i = lane; i < (1u << bits) / 4; i += WARP) {
        const uint4 four = reinterpret_cast<const uint4*>(keys)[i];
        low = min(min(low, min(four.x, four.y)), min(four.z, four.w));
        high = max(max(high, max(four.x, four.y)), max(four.z, four.w));
    }
    unsigned reaching = 0;  // lanes whose maximum is at least this lane's
#pragma unroll
    for (unsigned other = 0; other < WARP; ++other)
        reaching += __shfl_sync(ALL_LANES, high, other) >= high;
    const unsigned guess = __reduce_max_sync(ALL_LANES, reaching >= rank ? high : 0u);
    low = __reduce_min_sync(ALL_LANES, low);
    high = __reduce_max_sync(ALL_LANES, high);
    unsigned size = 1u << bits;  // at least `rank` keys reach `low`, fewer exceed `high`
    if (guess > low) {
        low = guess;
        size = sampled_from(keys, bits, low, lane);
    }
    const unsigned enough = rank + rank / 3;
    while (size > enough && low < high) {
        const unsigned middle = low + (high - low) / 2 + 1;
        const unsigned reached = sampled_from(keys, bits, middle, lane);
        if (reached < rank) {
            high = middle - 1;
        } else {
            low = middle;
            size = reached;
        }
    }
    if (size <= enough) return static_cast<Candidate>(low) << 32;
    // Many scores of the sample have this key: those with the lowest positions.
    unsigned rest = rank - (low == ALL ? 0 : sampled_from(keys, bits, low + 1, lane));
    for (unsigned first = 0;; first += WARP) {
        unsigned equal = __ballot_sync(ALL_LANES, keys[first + lane] == low);
        if (rest > __popc(equal)) {
            rest -= __popc(equal);
            continue;
        }
        for (; rest > 1; --rest) equal &= equal - 1;
        return make_candidate(low, sampled_position(first + __ffs(equal) - 1, bits, length));
    }
}

// Chooses a bound that, most likely, at least k candidates of the row reach, the same in all CTAs of
// the cluster, and begins the list with the scores of the row that are in no whole vector. Called by
// all threads; a barrier has to follow.
__device__ __forceinline__ void begin_list(const Slice& row, unsigned k, unsigned attempt,
                                           unsigned cta_rank, Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned length = row.length();
    // Lanes from 0 up: those before the first vector, in the first CTA. From 16 up: those behind the
    // last one, in the last CTA.
    const bool behind = lane >= 16;
    const unsigned edge = behind ? row.tail + lane - 16 : row.begin + lane;
    const bool on_edge = behind ? cta_rank == BLOCKS_PER_ROW - 1 && edge < row.end
                                : cta_rank == 0 && edge < row.body;
    unsigned edge_bits = 0;
    if (warp == 0 && on_edge) edge_bits = row.bits(edge);
    // Of the k largest scores a sample holds `mean`, Poisson distributed. The sample's candidate of
    // this rank is below the row's of rank k but for one row in a hundred thousand.
    const unsigned bits = sample_bits(length), samples = 1u << bits;
    const float mean = static_cast<float>(k * samples) / static_cast<float>(length);
    unsigned rank = static_cast<unsigned>(mean + 4.0f * sqrtf(mean) + 4.0f);
    if (attempt > 0) rank = 4 * rank + 16;
    const bool sampled = length >= 4 * samples && rank <= samples / 2 && attempt + 1 < ATTEMPTS;
    unsigned* const keys = reinterpret_cast<unsigned*>(list_entries());
    if (sampled) {
        for (unsigned i = threadIdx.x; i < samples; i += THREADS)
            keys[i] =
                score_key(row.bits(row.begin + sampled_position(i, bits, length)), row.nan_key);
        __syncthreads();
    }
    if (warp != 0) return;
    const Candidate bound = sampled ? sampled_candidate(keys, bits, rank, length, lane) : 0;
    __syncwarp();
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

// Starts the copy of the chunk that begins with this vector of the row. Called by one thread.
__device__ __forceinline__ void start_chunk(const Slice& row, unsigned chunk, unsigned warp,
                                            unsigned stage, Shared& shared) {
    start_copy(ring_buffer(warp, stage), row.base + 16ull * chunk,
               16 * min(CHUNK_VECTORS, row.last - chunk), &shared.arrivals[warp][stage]);
}

// Starts the copies of this warp's first chunks; `consumed` chunks have gone through its ring.
// Called by one thread of the warp.
__device__ __forceinline__ void start_chunks(const Slice& row, unsigned warp, unsigned consumed,
                                             Shared& shared) {
    unsigned chunk = row.first + warp * CHUNK_VECTORS;
#pragma unroll
    for (unsigned ahead = 0; ahead < STAGES; ++ahead, chunk += WARPS * CHUNK_VECTORS)
        if (chunk < row.last) start_chunk(row, chunk, warp, (consumed + ahead) % STAGES, shared);
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

// Reads the slice and completes the list: all candidates of it that reach the bound, unless the list
// has k larger ones. All threads of the CTA call it, after a barrier; it ends with one.
__device__ __forceinline__ void stream_slice(const Slice& row, unsigned k, unsigned& consumed,
                                             Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Candidate bound = shared.bound;
    unsigned chunk = row.first + warp * CHUNK_VECTORS;
    unsigned entering = 0, largest = 0;
    bool full = false;  // the list; `entering` then tells what is left of the chunk
    for (;;) {
        while (chunk < row.last) {
            const unsigned stage = consumed % STAGES;
            const uint4* buffer = ring_buffer(warp, stage);
            const unsigned position = chunk * VALUES - row.begin;
            const unsigned next = chunk + STAGES * WARPS * CHUNK_VECTORS;
            if (!full) {
                wait_for_copy(&shared.arrivals[warp][stage], consumed / STAGES % 2);
                entering = entering_scores(buffer, min(CHUNK_VECTORS, row.last - chunk), position,
                                           bound, row.nan_key, lane);
                if constexpr (EARLY) {
                    __syncwarp();
                    if (lane == 0 && next < row.last) start_chunk(row, next, warp, stage, shared);
                }
            }
            full = false;
            while (!full && __any_sync(ALL_LANES, entering != 0)) {
                bool refused = false;
                if (entering != 0) {
                    const unsigned bit = __ffs(entering) - 1;
                    const unsigned score =
                        (bit / VALUES * WARP + lane) * VALUES + bit % VALUES;
                    const unsigned bits = EARLY ? row.bits(row.begin + position + score)
                                                : score_at(buffer, score);
                    const Candidate candidate = row.candidate(bits, position + score);
                    if (candidate >= bound) {
                        const unsigned place = atomicAdd(&shared.count, 1u);
                        refused = place >= CAPACITY;
                        if (!refused) {
                            list_entries()[place] = candidate;
                            largest = max(largest, candidate_key(candidate));
                        }
                    }
                    if (!refused) entering &= entering - 1;
                }
                full = __any_sync(ALL_LANES, refused);
            }
            if (full) break;
            if constexpr (!EARLY) {
                __syncwarp();
                if (lane == 0 && next < row.last) start_chunk(row, next, warp, stage, shared);
            }
            ++consumed;
            chunk += WARPS * CHUNK_VECTORS;
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
    unsigned* const bitmap = reinterpret_cast<unsigned*>(dynamic_shared);
    for (unsigned window = begin; window < end; window += BITMAP_BITS) {
        const unsigned groups = (min(end - window, BITMAP_BITS) + 32 * GROUP - 1) / (32 * GROUP);
        __syncthreads();
        for (unsigned i = threadIdx.x; i < groups * WARP; i += THREADS) dynamic_shared[i] = uint4{};
        __syncthreads();
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            const Candidate candidate = list_entries()[i];
            const unsigned bit = candidate_index(candidate) - window;
            if (candidate >= limit && bit < BITMAP_BITS)
                atomicOr(&bitmap[bit / 32], 1u << (bit % 32));
        }
        __syncthreads();
        const unsigned share = (groups + WARPS - 1) / WARPS;
        const unsigned first = min(warp * share, groups), last = min(first + share, groups);
        unsigned marked = 0;
        for (unsigned i = first; i < last; ++i) {
            const uint4 words = dynamic_shared[i * WARP + lane];
            marked += __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
        }
        marked = __reduce_add_sync(ALL_LANES, marked);
        if (lane == 0) shared.warp_counts[0][warp] = marked;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[0], warp, lane, before, total);
        unsigned next = place + before;
        for (unsigned i = first; i < last; ++i) {
            const uint4 words = dynamic_shared[i * WARP + lane];
            const unsigned own = __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
            const unsigned reached = sum_up_to_lane(own, lane);
            unsigned to = next + reached - own;
            const unsigned position = window + (i * WARP + lane) * 128;
            const auto store = [&](unsigned word, unsigned offset) {
                for (; word != 0; word &= word - 1)
                    output.store(to++, position + offset + __ffs(word) - 1);
            };
            store(words.x, 0);
            store(words.y, 32);
            store(words.z, 64);
            store(words.w, 96);
            next += __shfl_sync(ALL_LANES, reached, WARP - 1);
        }
        place += total;
    }
}

// What the cluster has found, the same in all CTAs but for the last three.
struct Found {
    Cut cut;
    unsigned above, equal;  // candidates in the CTAs before this one: above the cut, at its key
    unsigned own_equal;     // candidates of this CTA at the key of the cut
};

// The number of candidates above and at the key of the cut, over the threads of the CTA; each below
// 2^16. Two barriers may lie between a call and the next one's first store.
template <unsigned TURN>
__device__ __forceinline__ void count_of_block(unsigned& over, unsigned& same, Shared& shared) {
    const unsigned both = __reduce_add_sync(ALL_LANES, over | same << 16);
    if (threadIdx.x % WARP == 0) shared.warp_counts[TURN][threadIdx.x / WARP] = both;
    __syncthreads();
    unsigned before, total;
    sum_of_warps(shared.warp_counts[TURN], threadIdx.x / WARP, threadIdx.x % WARP, before, total);
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
        wanted, least, largest, shared);
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
    count_of_block<0>(over, same, shared);
    unsigned none = 0;
    count_of_block<1>(none, own, shared);
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
        wanted, least, largest, shared);
    unsigned over = 0, same = 0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) {
        over += candidate_key(list_entries()[i]) > found.cut.key;
        same += candidate_key(list_entries()[i]) == found.cut.key;
    }
    count_of_block<0>(over, same, shared);
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
    clear_bins(shared);
    __syncwarp();
}

// Selects and stores the k largest scores of a row. Called by all threads of the cluster, after
// prepare().
__device__ __forceinline__ void select_row(const Row& given, unsigned k, bool sorted,
                                           const OutputParameters& outputs, Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    Slice row{given};
    // Whole vectors are divided among the CTAs. The scores before them belong to the first CTA, those
    // behind them to the last one: VALUES - 1 at most.
    row.body = min((row.begin + VALUES - 1) / VALUES * VALUES, row.end);
    row.tail = max(row.end / VALUES * VALUES, row.body);
    const unsigned vectors = (row.tail - row.body) / VALUES;
    const unsigned share = (vectors + BLOCKS_PER_ROW - 1) / BLOCKS_PER_ROW;
    row.first = row.body / VALUES + min(cta_rank * share, vectors);
    row.last = row.body / VALUES + min((cta_rank + 1) * share, vectors);
    const unsigned wanted = min(k, row.length());

    // 1 and 2, and 3: until the lists hold the row's largest scores.
    unsigned consumed = 0, count = 0, all = 0, least = 0, largest = 0;
    unsigned lane_count = 0;  // candidates in the list of the CTA of the lane's number
    for (unsigned attempt = 0;; ++attempt) {
        if (lane == 0) start_chunks(row, warp, consumed, shared);
        begin_list(row, k, attempt, cta_rank, shared);
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
                wanted, least, largest, shared);
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
        const unsigned begin = cta_rank == 0 ? row.begin : max(row.first * VALUES, row.body);
        const unsigned end = cta_rank == BLOCKS_PER_ROW - 1 ? row.end
                                                            : max(row.last * VALUES, row.body);
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
