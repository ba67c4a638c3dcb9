// The held form of topk_indices: each thread keeps its scores of the row in registers, so that they are
// read once and every later step costs a fixed number of instructions, whatever the scores are. For rows
// of at most BLOCKS_PER_ROW * THREADS * HELD * VALUES scores.
//
// A CTA has a contiguous slice of the row. Vector q of thread t is the vector q * THREADS + t of the
// slice, so that one vector of each thread, a stripe, is contiguous too. Places behind the end of the
// row hold -inf: their positions come last, so that by the rule for ties they are never selected. In a
// cluster, the positions behind the end of a slice are those of the next CTA's scores. So vectors that lie
// wholly behind the end of a slice get key 0, which means no score, unless slices fill all registers.
//
// Steps, with the barriers of the CTA (of the cluster: the exchanges) between them:
//
//   1. Range. A key that at least `wanted` keys reach: if that many groups of scores each have a
//      maximum that is at least x, so many scores reach x. Without SAMPLES, in one CTA: the least maximum
//      of all groups, of which there are at least `wanted` (one barrier); every key if `wanted` is larger.
//      With SAMPLES: each CTA reads the same sample, one score for each thread, and takes the largest
//      group maximum that as many group maxima reach as range_of_sample computes (one barrier, while the
//      slice arrives). This key is only likely to be low enough. Short rows: every key, without a sample.
//   2. Count. Each thread counts its keys in the range, in 256 bins of equal width (one barrier or
//      exchange); then the bin is found that has the key of rank `wanted`, counted from the largest.
//      If a sampled range has fewer keys than that: step 2 again with the keys below the range.
//   3. Near. If the bin has at most NEAR keys, they are collected, and the cut is found among them. In a
//      cluster each of them is sent to all CTAs, which wait for as many bytes as the counts tell; no
//      barrier of the cluster is needed. If the bin has more, step 2 again with its range; a bin of a
//      single key ends that.
//   4. Emit. Each thread marks its scores that the cut takes; the marks of a warp are transposed so that
//      each lane has 32 consecutive positions; their counts give the places (one barrier).
//
// Constants of this form: HELD (vectors of a thread), SAMPLES (of the sample that the range comes from: one
// for each thread, or 0).
#pragma once

#include "cluster.cuh"
#include "mbarrier.cuh"
#include "near.cuh"
#include "rows.cuh"

constexpr bool SAMPLED = SAMPLES > 0;
constexpr unsigned PER_THREAD = HELD * VALUES;            // scores
constexpr unsigned WORDS = (PER_THREAD + WARP - 1) / WARP;  // masks of a thread's scores
constexpr unsigned FIELDS = WARP / VALUES;                // stripes of one mask
constexpr unsigned ROUNDS = 8;                            // at most: see tests/kernels/test_held_walk.py
constexpr unsigned ENTRIES = HELD * WARPS;                // one for each warp and stripe
constexpr unsigned ENTRIES_PER_LANE = ENTRIES / WARP;
constexpr unsigned HALF = WARP / 2;
constexpr unsigned GROUPS = 8;                            // of a thread's scores
constexpr unsigned UNCOUNTED = ROUNDS * BINS;
// Keys of bf16 scores have 16 bits.
constexpr unsigned KEY_SHIFT = SCORE_BYTES == 2 ? 16 : 0;
constexpr unsigned LEAST = LEAST_KEY >> KEY_SHIFT;
constexpr unsigned MOST = ALL >> KEY_SHIFT;
constexpr unsigned WIDEST = 0xfd000000u;  // 255 bins of 2^24 keys hold it, and sums with it fit 32 bits
static_assert(THREADS >= BINS, "one thread for each bin");
static_assert(PER_THREAD >= GROUPS, "each group has a score");
static_assert(PER_THREAD <= WARP || PER_THREAD % WARP == 0, "each mask has as many scores");
static_assert(ENTRIES % WARP == 0 && WARPS % ENTRIES_PER_LANE == 0, "a lane has entries of one stripe");
static_assert(PER_THREAD * THREADS < 1 << 16, "16 bits for a count of the CTA");
static_assert(BLOCKS_PER_ROW == 1 || SAMPLED, "CTAs agree on a range by a sample");
static_assert(!SAMPLED || (SAMPLES == THREADS && 2 * WARPS == WARP), "one group of samples for each lane");
static_assert((MAX_TOP_K & (MAX_TOP_K - 1)) == 0, "the sort pads to a power of 2");

// Where the key of a rank is.
struct Spot {
    BinOfRank found;
    unsigned above_earlier;   // keys in the bins above it, of the CTAs before this one
    unsigned inside_earlier;  // keys in it, of those
};

// Which scores are selected: those with a key above `key`, and the first `ties` of the row with this
// one.
struct HeldCut {
    unsigned key, ties;
    unsigned above_earlier, equal_earlier;  // scores of the CTAs before this one: above it, at it
};

struct Shared {
    unsigned lows[WARPS], highs[WARPS];
    alignas(16) unsigned groups[WARP];       // maxima of the sample
    alignas(16) unsigned bins[UNCOUNTED + 4];  // of each round, and one of which nothing is read
    unsigned pairs[2][BINS / 2];             // counts of two bins each, of every other round
    alignas(16) unsigned sums[BINS];         // of the cluster
    alignas(16) unsigned earlier[BINS];      // of the CTAs before this one
    alignas(16) unsigned near[NEAR];         // keys in the bin of the cut, CTA by CTA; 0: none
    unsigned near_count;                     // of this CTA's
    Spot spot;                               // what one warp has found and the others read
    HeldCut cut;
    unsigned long long near_arrivals;        // of the other CTAs' keys
    alignas(16) unsigned entries[ENTRIES];   // scores above the cut, and 2^16 times those at it
};

// For results in rank order: the candidates of the row, in the CTA of rank 0.
extern __shared__ Candidate row_list[];

// A range of keys, and how they are counted in bins. Bin 0 has the key `low` alone, each other one
// 2^shift keys, and the last one all from there up.
struct Range {
    unsigned low, upper;  // low <= key <= upper
    unsigned high;        // keys from here up share a bin
    unsigned shift;
    unsigned offset;      // 2^shift - 1 - low

    __device__ __forceinline__ bool contains(unsigned key) const { return key - low <= upper - low; }
    __device__ __forceinline__ unsigned bin(unsigned key) const {
        return (min(key, high) + offset) >> shift;
    }
    __device__ __forceinline__ unsigned last_bin() const { return (high + offset) >> shift; }
    // Whether a bin has a single key.
    __device__ __forceinline__ bool is_exact(unsigned bin) const {
        return (bin == 0 || shift == 0) && (bin != last_bin() || high == upper);
    }
    __device__ __forceinline__ unsigned least_of(unsigned bin) const {
        return bin == 0 ? low : low + ((bin - 1) << shift) + 1;
    }
    __device__ __forceinline__ unsigned most_of(unsigned bin) const {
        return bin == last_bin() ? upper : low + (bin << shift);
    }
};

// The range [low, upper] in bins that resolve its keys up to `high`.
__device__ __forceinline__ Range make_range(unsigned low, unsigned upper, unsigned high) {
    const unsigned span = min(min(high, upper) - low, WIDEST);
    const unsigned bits = WARP - __clz(span);
    unsigned shift = bits > 8 ? bits - 8 : 0;
    if (span > 255u << shift) ++shift;
    return {low, upper, low + span, shift, (1u << shift) - 1 - low};
}

// The ordered key of a score with these bits. `nan_score` is -inf, or a NaN if NaN ranks first.
__device__ __forceinline__ unsigned held_key(unsigned bits, float nan_score) {
    // The maximum of a NaN and a number is the number; the sum turns -0 to +0.
    const float score = __fadd_rn(fmaxf(__uint_as_float(bits), nan_score), 0.0f);
    const unsigned canonical = __float_as_uint(score);
    const unsigned sign = static_cast<unsigned>(static_cast<int>(canonical) >> 31);
    return (canonical ^ (sign | 0x80000000u)) >> KEY_SHIFT;
}

// Element `index` of COUNT registers: a tree of selections, where an address would need them in memory.
template <unsigned COUNT>
__device__ __forceinline__ unsigned pick(const unsigned* keys, unsigned index) {
    static_assert((COUNT & (COUNT - 1)) == 0, "halves");
    unsigned level[COUNT];
#pragma unroll
    for (unsigned i = 0; i < COUNT; ++i) level[i] = keys[i];
#pragma unroll
    for (unsigned half = COUNT / 2; half > 0; half /= 2) {
#pragma unroll
        for (unsigned i = 0; i < COUNT / 2; ++i)
            if (i < half && (index & half) != 0) level[i] = level[i + half];
    }
    return level[0];
}

// The scores of a vector that begins at a position, one by one; -inf from `end` on.
__device__ __forceinline__ uint4 load_scores(const Row& row, unsigned position, unsigned end) {
    unsigned words[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        words[i] = SCORE_BYTES == 4 ? 0xff800000u : 0xff80ff80u;
#pragma unroll
        for (unsigned j = 0; j < VALUES / 4; ++j) {
            const unsigned at = position + i * (VALUES / 4) + j;
            if (at >= end) continue;
            const unsigned bits = row.bits(row.begin + at);
            if constexpr (SCORE_BYTES == 4) {
                words[i] = bits;
            } else {
                words[i] = j == 0 ? (words[i] & 0xffff0000u) | bits >> 16 : (words[i] & 0xffff) | bits;
            }
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

// Zeroes what is counted. Called by all threads, before the wait for the grids before this one; a
// barrier has to follow.
__device__ __forceinline__ void prepare(Shared& shared) {
    uint4* const bins = reinterpret_cast<uint4*>(shared.bins);
#pragma unroll
    for (unsigned first = 0; first < UNCOUNTED / 4; first += THREADS)
        if (first + threadIdx.x < UNCOUNTED / 4) bins[first + threadIdx.x] = uint4{};
    if (threadIdx.x < NEAR) shared.near[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        shared.near_count = 0;
        if constexpr (BLOCKS_PER_ROW > 1) {
            init_barrier(&shared.near_arrivals);
            publish_barriers();
        }
    }
}

// Counts a key in a bin of the first round if it is in the range. If the range comes from a sample, few
// keys are in it, and most warps skip a branch. Otherwise few warps would skip the branch: it is shorter to
// count every key, those outside the range in a bin of its own, UNCOUNTED.
__device__ __forceinline__ void count_key(bool in_range, unsigned bin, Shared& shared) {
    if constexpr (SAMPLED) {
        if (in_range) atomicAdd(&shared.bins[bin], 1u);
    } else {
        atomicAdd(&shared.bins[in_range ? bin : UNCOUNTED], 1u);
    }
}

// A range that at least `wanted` keys of the CTA reach, up to their largest. Called by all threads.
__device__ __forceinline__ Range range_of_maxima(const unsigned (&keys)[PER_THREAD], unsigned wanted,
                                                 Shared& shared) {
    // Each thread has GROUPS groups, or half as many of twice the size, and so on: as few as have
    // `wanted` maxima.
    unsigned maxima[GROUPS];
#pragma unroll
    for (unsigned v = 0; v < PER_THREAD; ++v)
        maxima[v % GROUPS] = v < GROUPS ? keys[v] : max(maxima[v % GROUPS], keys[v]);
    unsigned low = 0;
#pragma unroll
    for (unsigned groups = GROUPS; groups > 0; groups /= 2) {
        unsigned least = maxima[0];
#pragma unroll
        for (unsigned i = 1; i < groups; ++i) least = min(least, maxima[i]);
        if (groups == GROUPS || wanted <= groups * THREADS) low = least;
#pragma unroll
        for (unsigned i = 0; i < groups / 2; ++i) maxima[i] = max(maxima[i], maxima[i + groups / 2]);
    }
    const unsigned high = __reduce_max_sync(ALL_LANES, maxima[0]);
    low = __reduce_min_sync(ALL_LANES, low);
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (lane == 0) {
        shared.lows[warp] = low;
        shared.highs[warp] = high;
    }
    __syncthreads();
    const unsigned warp_high = lane < WARPS ? shared.highs[lane] : 0;
    low = lane < WARPS ? (wanted <= WARPS ? warp_high : shared.lows[lane]) : ALL;
    low = __reduce_min_sync(ALL_LANES, low);
    if (wanted > GROUPS * THREADS) low = LEAST;
    const unsigned most = __reduce_max_sync(ALL_LANES, warp_high);
    return make_range(low, most, most);
}

// A range that, most likely, `wanted` keys of the row reach and few more, from the key of each
// thread's score of the sample. Called by all threads.
__device__ __forceinline__ Range range_of_sample(unsigned key, unsigned wanted, unsigned length,
                                                 Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (unsigned step = 1; step < HALF; step *= 2)
        key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
    if (lane % HALF == 0) shared.groups[2 * warp + lane / HALF] = key;
    __syncthreads();
    // Of the row's `wanted` largest scores the sample holds `mean` on average, Poisson distributed. The
    // sample's key of rank `rank` is above the row's key of rank `wanted` in one row of a hundred thousand.
    const float mean = static_cast<float>(wanted * THREADS) / static_cast<float>(length);
    const unsigned rank = static_cast<unsigned>(mean + 4.0f * sqrtf(mean) + 4.0f);
    const unsigned own = shared.groups[lane];
    unsigned reaching = 0;  // groups whose maximum is at least this lane's
#pragma unroll
    for (unsigned i = 0; i < WARP / 4; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(shared.groups)[i];
        reaching += (four.x >= own) + (four.y >= own) + (four.z >= own) + (four.w >= own);
    }
    const unsigned low = __reduce_max_sync(ALL_LANES, reaching >= rank ? own : LEAST);
    const unsigned most = __reduce_max_sync(ALL_LANES, own);
    // The row's largest keys are beyond the sample's; the one of rank `wanted` is not far.
    const unsigned spread = max(2 * min(most - low, 1u << 30), 254u);
    return make_range(low, MOST, low + min(spread, MOST - low));
}

// The bin of the key of rank `wanted` among those that the threads have counted in a round's bins.
// Called by all threads of the cluster.
__device__ __forceinline__ Spot find_spot(unsigned round, unsigned wanted, unsigned cta_rank,
                                          Shared& shared) {
    const unsigned* bins = shared.bins + round * BINS;
    if constexpr (BLOCKS_PER_ROW > 1) {
        // Two counts in a word: each CTA reads the counts of all, and what it reads limits how fast.
        unsigned* const pairs = shared.pairs[round % 2];
        __syncthreads();
        if (threadIdx.x < BINS / 2)
            pairs[threadIdx.x] = bins[threadIdx.x] | bins[threadIdx.x + BINS / 2] << 16;
        cluster_sync();
        if (threadIdx.x < BINS / 2) {
            unsigned sums[2] = {}, earlier[2] = {};
#pragma unroll
            for (unsigned cta = 0; cta < BLOCKS_PER_ROW; ++cta) {
                const unsigned both = load_from_cluster_rank(&pairs[threadIdx.x], cta);
#pragma unroll
                for (unsigned half = 0; half < 2; ++half) {
                    const unsigned count = half == 0 ? both & 0xffff : both >> 16;
                    sums[half] += count;
                    earlier[half] += cta < cta_rank ? count : 0;
                }
            }
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                shared.sums[threadIdx.x + half * (BINS / 2)] = sums[half];
                shared.earlier[threadIdx.x + half * (BINS / 2)] = earlier[half];
            }
        }
        bins = shared.sums;
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % WARP;
    // Alone, each warp searches for itself. In a cluster the search is longer, and with 16 warps what
    // all of them repeat takes more time than another barrier.
    if constexpr (BLOCKS_PER_ROW == 1) return {bin_of_rank(bins, wanted, lane), 0, 0};
    if (threadIdx.x < WARP) {
        Spot spot{bin_of_rank(bins, wanted, lane), 0, 0};
        const uint4* mine = reinterpret_cast<const uint4*>(shared.earlier) + 2 * lane;
        const uint4 low = mine[0], high = mine[1];
        const unsigned counts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        unsigned above = 0, inside = 0;
        // Without a bin of that rank all keys are above.
        const int bin = spot.found.exists ? static_cast<int>(spot.found.bin) : -1;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            const int other = static_cast<int>(8 * lane + j);
            if (other > bin) above += counts[j];
            if (other == bin) inside = counts[j];
        }
        spot.above_earlier = __reduce_add_sync(ALL_LANES, above);
        spot.inside_earlier = __reduce_add_sync(ALL_LANES, inside);
        if (lane == 0) shared.spot = spot;
    }
    __syncthreads();
    return shared.spot;
}

// The cut at the key of rank `wanted` of the `size` listed keys. Called by a warp.
__device__ __forceinline__ HeldCut cut_of_near(unsigned size, unsigned wanted, unsigned above_earlier,
                                               unsigned inside_earlier, const Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
    const NearKey found = near_key(shared.near, size, wanted, lane);
    HeldCut cut{found.key, wanted - found.above(), above_earlier, 0};
    if constexpr (BLOCKS_PER_ROW > 1) {
#pragma unroll
        for (unsigned j = 0; j < 2; ++j) {
            const unsigned earlier = __ballot_sync(ALL_LANES, lane + j * WARP < inside_earlier);
            cut.above_earlier += __popc(found.over[j] & earlier);
            cut.equal_earlier += __popc(found.same[j] & earlier);
        }
    }
    if (cut.ties == found.equal()) {  // all of them: above a lower key
        cut.above_earlier += cut.equal_earlier;
        cut.equal_earlier = cut.ties = 0;
        --cut.key;
    }
    return cut;
}

// The cut at the key of rank `wanted` of the `size` keys in [least, most], at most NEAR, of which
// `inside_earlier` are in the CTAs before this one. Called by all threads of the cluster, once, after a
// cluster barrier.
__device__ __forceinline__ HeldCut near_cut(const unsigned (&keys)[PER_THREAD], unsigned least,
                                            unsigned most, unsigned size, unsigned wanted,
                                            unsigned above_earlier, unsigned inside_earlier,
                                            Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
    unsigned marks[WORDS] = {};
#pragma unroll
    for (unsigned v = 0; v < PER_THREAD; ++v)
        if (keys[v] - least <= most - least) marks[v / WARP] |= 1u << (v % WARP);
#pragma unroll
    for (unsigned word = 0; word < WORDS; ++word) {
        for (unsigned rest = marks[word]; rest != 0; rest &= rest - 1) {
            const unsigned key =
                pick<PER_THREAD / WORDS>(keys + word * (PER_THREAD / WORDS), __ffs(rest) - 1);
            const unsigned place = inside_earlier + atomicAdd(&shared.near_count, 1u);
            if constexpr (BLOCKS_PER_ROW > 1) {
#pragma unroll 1
                for (unsigned cta = 0; cta < BLOCKS_PER_ROW; ++cta)
                    store_counted(&shared.near[place], cta, key, &shared.near_arrivals);
            } else {
                shared.near[place] = key;
            }
        }
    }
    if constexpr (BLOCKS_PER_ROW == 1) {
        __syncthreads();
        return cut_of_near(size, wanted, above_earlier, inside_earlier, shared);
    }
    __syncwarp();
    if (threadIdx.x < WARP) {
        if (lane == 0) expect_bytes(&shared.near_arrivals, 4 * size);
        wait_for_stores(&shared.near_arrivals);
        const HeldCut cut = cut_of_near(size, wanted, above_earlier, inside_earlier, shared);
        if (lane == 0) shared.cut = cut;
    }
    __syncthreads();
    return shared.cut;
}

// The cut that takes the `wanted` largest keys of the cluster. The keys in `range` have already been
// counted in the bins of round 0. Called by all threads of the cluster.
__device__ __forceinline__ HeldCut find_held_cut(const unsigned (&keys)[PER_THREAD], Range range,
                                                 unsigned wanted, unsigned cta_rank, Shared& shared) {
    unsigned above_earlier = 0;
    for (unsigned round = 0;; ++round) {
        if (round > 0) {
#pragma unroll
            for (unsigned v = 0; v < PER_THREAD; ++v)
                if (range.contains(keys[v]))
                    atomicAdd(&shared.bins[round * BINS + range.bin(keys[v])], 1u);
        }
        const Spot spot = find_spot(round, wanted, cta_rank, shared);
        above_earlier += spot.above_earlier;
        wanted = spot.found.rest;
        if (!spot.found.exists) {  // the range of the sample begins too high
            range = make_range(LEAST, range.low - 1, range.low - 1);
            continue;
        }
        const unsigned bin = spot.found.bin, least = range.least_of(bin), most = range.most_of(bin);
        if (spot.found.size == wanted)
            return {least - 1, 0, above_earlier + spot.inside_earlier, 0};
        if (range.is_exact(bin)) return {least, wanted, above_earlier, spot.inside_earlier};
        if (spot.found.size <= NEAR)
            return near_cut(keys, least, most, spot.found.size, wanted, above_earlier,
                            spot.inside_earlier, shared);
        range = make_range(least, most, most);
    }
}

// The marks of a warp in the order of positions: from one bit for each of the lane's scores of FIELDS
// stripes, VALUES consecutive bits for each stripe, to the bits of 32 consecutive positions: of stripe
// lane / VALUES, and of it the part lane % VALUES. Called by a warp.
__device__ __forceinline__ unsigned in_order_of_positions(unsigned marks, unsigned lane) {
    // A transposition within each FIELDS lanes, by halves: lane f has the f-th fields of all of them.
#pragma unroll
    for (unsigned half = FIELDS / 2; half > 0; half /= 2) {
        unsigned lower = 0;  // the fields whose number has a zero in the place of `half`
#pragma unroll
        for (unsigned bit = 0; bit < WARP; ++bit)
            if ((bit / VALUES & half) == 0) lower |= 1u << bit;
        const unsigned other = __shfl_xor_sync(ALL_LANES, marks, half);
        marks = (lane & half) == 0 ? (marks & lower) | (other & lower) << (half * VALUES)
                                   : (marks & ~lower) | (other & ~lower) >> (half * VALUES);
    }
    return __shfl_sync(ALL_LANES, marks, lane % VALUES * FIELDS + lane / VALUES);
}

// Calls store(place, position) for each selected score of the CTA, ascending in both. Called by all
// threads.
template <typename Store>
__device__ __forceinline__ void emit_held(const unsigned (&keys)[PER_THREAD], const HeldCut& cut,
                                          unsigned begin, Shared& shared, const Store& store) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned above[WORDS] = {}, equal[WORDS] = {};
#pragma unroll
    for (unsigned v = 0; v < PER_THREAD; ++v)
        if (keys[v] > cut.key) above[v / WARP] |= 1u << (v % WARP);
    if (cut.ties > 0) {
#pragma unroll
        for (unsigned v = 0; v < PER_THREAD; ++v)
            if (keys[v] == cut.key) equal[v / WARP] |= 1u << (v % WARP);
    }
    // Here and below a count is two numbers in a word: scores above the cut in the low 16 bits, and scores
    // equal to the cut in the high 16 bits.
    unsigned before[WORDS];
#pragma unroll
    for (unsigned word = 0; word < WORDS; ++word) {
        above[word] = in_order_of_positions(above[word], lane);
        if (cut.ties > 0) equal[word] = in_order_of_positions(equal[word], lane);
        const unsigned counts = __popc(above[word]) | __popc(equal[word]) << 16;
        unsigned reached = counts;  // of the lanes of this stripe up to this one
#pragma unroll
        for (unsigned step = 1; step < VALUES; step *= 2) {
            const unsigned other = __shfl_up_sync(ALL_LANES, reached, step);
            if (lane % VALUES >= step) reached += other;
        }
        const unsigned stripe = word * FIELDS + lane / VALUES;
        if (lane % VALUES == VALUES - 1 && stripe < HELD)
            shared.entries[stripe * WARPS + warp] = reached;
        before[word] = reached - counts;
    }
    __syncthreads();
    unsigned own[ENTRIES_PER_LANE], sum = 0;
#pragma unroll
    for (unsigned i = 0; i < ENTRIES_PER_LANE; ++i) {
        own[i] = shared.entries[lane * ENTRIES_PER_LANE + i];
        sum += own[i];
    }
    unsigned start = sum_up_to_lane(sum, lane) - sum;
#pragma unroll
    for (unsigned i = 0; i < ENTRIES_PER_LANE; ++i)
        if (i < warp % ENTRIES_PER_LANE) start += own[i];
    // `start` is the sum of all entries before one: of those that this lane loaded, the one of this warp.
#pragma unroll
    for (unsigned word = 0; word < WORDS; ++word) {
        const unsigned stripe = word * FIELDS + lane / VALUES;
        const unsigned entry = min(stripe, HELD - 1u) * WARPS + warp;
        before[word] += __shfl_sync(ALL_LANES, start, entry / ENTRIES_PER_LANE);
        unsigned bits = equal[word];
        const unsigned ties_before = min(cut.equal_earlier + (before[word] >> 16), cut.ties);
        const unsigned ties = cut.ties - ties_before;
        while (__popc(bits) > ties) bits &= ~(0x80000000u >> __clz(bits));
        unsigned place = cut.above_earlier + (before[word] & 0xffff) + ties_before;
        const unsigned position =
            begin + (stripe * THREADS + warp * WARP) * VALUES + lane % VALUES * WARP;
        for (bits |= above[word]; bits != 0; bits &= bits - 1)
            store(place++, position + __ffs(bits) - 1);
    }
}

// Selects and stores the k largest scores of a row. Called by all threads of the cluster, after
// prepare().
__device__ __forceinline__ void select_row(const Row& row, unsigned k, bool sorted,
                                           const OutputParameters& outputs, Shared& shared) {
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    const unsigned length = row.length(), wanted = min(k, length);
    if (wanted == length && !sorted || length == 0) {  // nothing to compare
        const Output output = outputs.of(row);
#pragma unroll 1
        for (unsigned i = cta_rank * THREADS + threadIdx.x; i < k; i += BLOCKS_PER_ROW * THREADS) {
            if (i < length) {
                output.store(i, i);
            } else {
                output.store_none(i);
            }
        }
        return;
    }
    const unsigned share = (length + BLOCKS_PER_ROW * VALUES - 1) / (BLOCKS_PER_ROW * VALUES) * VALUES;
    const unsigned begin = cta_rank * share, end = min(begin + share, length);
    const float nan_score = __uint_as_float(row.nan_key == LEAST_KEY ? 0xff800000u : 0x7fffffffu);

    // All loads are on their way before the first is waited for.
    const bool sampled = SAMPLED && length >= 4 * THREADS;
    unsigned sample = 0;
    if constexpr (SAMPLED) {
        constexpr unsigned SAMPLE_BITS = 9;
        static_assert(!SAMPLED || 1u << SAMPLE_BITS == SAMPLES, "its logarithm");
        if (sampled)
            sample = row.bits(row.begin + sampled_position(threadIdx.x, SAMPLE_BITS, length));
    }
    const unsigned char* const base = row.base + (row.begin + begin) * static_cast<size_t>(SCORE_BYTES);
    const unsigned first = begin + threadIdx.x * VALUES;
    const bool aligned = row.begin % VALUES == 0;
    uint4 vectors[HELD];
#pragma unroll
    for (unsigned q = 0; q < HELD; ++q) {
        constexpr unsigned NONE = SCORE_BYTES == 4 ? 0xff800000u : 0xff80ff80u;
        vectors[q] = {NONE, NONE, NONE, NONE};
        if (aligned && first + q * THREADS * VALUES + VALUES <= end)
            vectors[q] = load_once(base + 16 * (q * THREADS + threadIdx.x));
    }
    if (!aligned || length % VALUES != 0) {
#pragma unroll
        for (unsigned q = 0; q < HELD; ++q) {
            const unsigned position = first + q * THREADS * VALUES;
            if (position < end && (!aligned || position + VALUES > end))
                vectors[q] = load_scores(row, position, end);
        }
    }
    unsigned keys[PER_THREAD];
    Range range;
    if constexpr (SAMPLED) {
        if (sampled) {
            range = range_of_sample(held_key(sample, nan_score), wanted, length, shared);
        } else {
            __syncthreads();
            range = make_range(LEAST, MOST, MOST);
        }
    } else {
#pragma unroll
        for (unsigned v = 0; v < PER_THREAD; ++v)
            keys[v] = held_key(score_bits(vectors[v / VALUES], v % VALUES), nan_score);
        range = range_of_maxima(keys, wanted, shared);
    }
    const bool whole = share == PER_THREAD * THREADS;
#pragma unroll
    for (unsigned v = 0; v < PER_THREAD; ++v) {
        if constexpr (SAMPLED)
            keys[v] = held_key(score_bits(vectors[v / VALUES], v % VALUES), nan_score);
        if (BLOCKS_PER_ROW > 1 && !whole && first + v / VALUES * THREADS * VALUES >= end) keys[v] = 0;
        count_key(keys[v] >= range.low, range.bin(keys[v]), shared);
    }
    const Output output = outputs.of(row);
    const HeldCut cut = find_held_cut(keys, range, wanted, cta_rank, shared);
    if constexpr (BLOCKS_PER_ROW > 1) {  // no CTA reads another's memory from here on
        __syncwarp();
        cluster_arrive_relaxed();
    }
    emit_held(keys, cut, begin, shared, [&](unsigned place, unsigned position) {
        if (!sorted) {
            output.store(place, position);
            return;
        }
        const Candidate candidate = row.candidate(row.bits(row.begin + position), position);
        if constexpr (BLOCKS_PER_ROW > 1) {
            store_to_cluster_rank(&row_list[place], 0, candidate);
        } else {
            row_list[place] = candidate;
        }
    });
    if constexpr (BLOCKS_PER_ROW > 1) {
        __syncwarp();
        cluster_wait();
        if (!sorted) return;
        __syncwarp();
        cluster_arrive();  // it releases the stores to another CTA too
        cluster_wait();
        if (cta_rank != 0) return;
    } else {
        if (!sorted) return;
        __syncthreads();
    }
#pragma unroll 1
    for (unsigned i = wanted + threadIdx.x; i < k; i += THREADS) output.store_none(i);
    unsigned size = 1;
    while (size < wanted) size *= 2;
#pragma unroll 1
    for (unsigned i = wanted + threadIdx.x; i < size; i += THREADS) row_list[i] = 0;
    sort_descending(row_list, size);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < wanted; i += THREADS)
        output.store(i, candidate_index(row_list[i]));
}
