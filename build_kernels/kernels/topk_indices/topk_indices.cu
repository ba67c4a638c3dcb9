// topk_indices: the positions of the top_k largest scores of every row, exactly.
//
//   positions = the top_k largest of scores[row, row_starts[row] : row_ends[row]], counted from
//   row_starts[row]; in ascending order, or in rank order
//
// The order of scores is that of steps 4 and 5 of router_runtime/spec.py: a NaN ranks as -inf (or,
// with nan_first, above +inf), +0 and -0 rank alike, and of scores that rank alike the lower
// position comes first. A row with fewer than top_k scores is filled up with -1. Scores outside of
// the row's bounds are never read.
//
// The CTAs of a cluster share one row, each has a contiguous slice. Steps:
//
//   1. Bound. Every CTA reads the same sample of the row and takes a key that, most likely, somewhat
//      more than top_k scores of the row reach. Short rows: a bound that all scores reach.
//   2. Stream. Each CTA reads its slice once, tile by tile, and appends the scores above the bound
//      to a list in shared memory, in the order of their positions. Whenever the list has no room
//      for another tile, it is reduced to its top_k entries, and the bound rises to the least of
//      them. So no input makes the list overflow: scores equal to the bound that come later have
//      higher positions and lose the tie.
//   3. Verify. If all lists together have fewer than top_k entries, the bound was too high: steps
//      1 and 2 again with a lower bound, at last with one that every score reaches.
//   4. Cut. A radix search over the keys in the lists of the cluster, 8 bits a round, finds the
//      key of rank top_k, and how many of the scores with that key are taken.
//   5. Emit. Each CTA writes the entries of its list that pass the cut, in order, behind those of
//      the CTAs before it. In rank order: the CTA of rank 0 collects and sorts them first.
//
// The result depends on nothing but the row: the sample only decides how long the lists become.
//
// Cluster barriers: each is executed by all threads of the cluster, because every condition around
// one follows from numbers that all CTAs have exchanged. The last one keeps every CTA alive until
// the others have read its shared memory.
// Dependent launch (common/ptx.cuh): nothing comes before the wait.
//
// Constants (build_kernels/catalog): SCORE_BYTES (4: fp32, 2: bf16), BLOCKS_PER_ROW, THREADS, LOADS
// (16-byte loads of a thread per tile), SAMPLES (a power of 2), CAPACITY (of the list), MAX_TOP_K.
// Preconditions: 1 <= top_k <= MAX_TOP_K, columns < 2^31, page_size >= 1 if there is a page_table.

#include "cluster.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/selection.cuh"

constexpr unsigned WARPS = THREADS / WARP;
constexpr unsigned VALUES = 16 / SCORE_BYTES;             // scores of one load
constexpr unsigned TILE = THREADS * LOADS * VALUES;       // scores
constexpr unsigned TILE_VECTORS = THREADS * LOADS;        // loads
constexpr unsigned LIMIT = CAPACITY - TILE - VALUES;      // of a list that takes another tile
constexpr unsigned BINS = 256;
constexpr unsigned ROUNDS = 4;                            // of 8 bits each
constexpr unsigned ATTEMPTS = 3;
constexpr unsigned LEAST_KEY = 0x007fffffu;               // of -inf
constexpr unsigned ALL = 0xffffffffu;
static_assert(LIMIT >= MAX_TOP_K, "a reduced list takes another tile");
static_assert(LOADS * VALUES <= 32, "one bit for each score of a thread");
static_assert(WARPS <= WARP && BLOCKS_PER_ROW <= WARP, "one lane for each");
static_assert(THREADS >= BINS, "one thread for each bin");

// Which scores are selected: those with a key above `key`, and of those with this key the first
// `ties`, by position.
struct Cut {
    unsigned key;
    unsigned ties;
};

// What a CTA tells the others of its cluster. One for each exchange, so that none is overwritten
// while another CTA reads it.
struct Notice {
    unsigned count;  // entries of its list
    unsigned least;  // their least and largest keys
    unsigned largest;
    unsigned above;  // entries above the cut
    unsigned equal;  // entries with the key of the cut
};

struct Shared {
    unsigned bins[ROUNDS][BINS];
    unsigned sums[BINS];  // of the cluster
    unsigned warp_counts[2][WARP];
    unsigned warp_least[WARP];
    unsigned warp_largest[WARP];
    Notice notices[ATTEMPTS];
};

// The list of a CTA: CAPACITY keys, then as many positions.
extern __shared__ uint4 dynamic_shared[];
__device__ __forceinline__ unsigned* list_keys() {
    return reinterpret_cast<unsigned*>(dynamic_shared);
}
__device__ __forceinline__ unsigned* list_positions() { return list_keys() + CAPACITY; }

// The ordered key of a score with these bits (of fp32).
__device__ __forceinline__ unsigned score_key(unsigned bits, unsigned nan_key) {
    const float score = __uint_as_float(bits);
    const unsigned canonical = __float_as_uint(__fadd_rn(score, 0.0f));  // -0 becomes +0
    const unsigned sign = static_cast<unsigned>(static_cast<int>(canonical) >> 31);
    return score != score ? nan_key : canonical ^ (sign | 0x80000000u);
}

// The fp32 bits of score `j` of a loaded vector.
__device__ __forceinline__ unsigned score_bits(const uint4& vector, unsigned j) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
    if constexpr (SCORE_BYTES == 4) return words[j];
    return j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u;
}

// One row, and the place of this thread's CTA in it. Scores are numbered from the 16-byte boundary
// at or before column 0, so that vector v holds the scores VALUES * v up to VALUES * (v + 1).
struct Row {
    const unsigned char* base;  // of score 0: aligned to 16 bytes
    unsigned begin, end;        // the scores of the row
    unsigned body, tail;        // where its first whole vector begins, where its last one ends
    unsigned first, last;       // the vectors of this CTA: [first, last)
    unsigned nan_key;

    __device__ __forceinline__ unsigned length() const { return end - begin; }

    __device__ __forceinline__ unsigned bits(unsigned score) const {
        if constexpr (SCORE_BYTES == 4) return reinterpret_cast<const unsigned*>(base)[score];
        return static_cast<unsigned>(reinterpret_cast<const unsigned short*>(base)[score]) << 16;
    }

    // A vector of this CTA; zeros from the last one on.
    __device__ __forceinline__ uint4 load(unsigned vector) const {
        uint4 loaded = {};
        if (vector < last) loaded = load_once(base + 16ull * vector);
        return loaded;
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

// The least and largest of `least` and `largest` over the threads of the CTA, to all of them. One
// barrier; the caller has another one between two calls.
__device__ __forceinline__ void extent_of_block(unsigned& least, unsigned& largest,
                                                Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    least = __reduce_min_sync(ALL_LANES, least);
    largest = __reduce_max_sync(ALL_LANES, largest);
    if (lane == 0) {
        shared.warp_least[warp] = least;
        shared.warp_largest[warp] = largest;
    }
    __syncthreads();
    least = __reduce_min_sync(ALL_LANES, lane < WARPS ? shared.warp_least[lane] : ALL);
    largest = __reduce_max_sync(ALL_LANES, lane < WARPS ? shared.warp_largest[lane] : 0u);
}

// The cut that takes the `wanted` largest of the keys that the threads of the CTA, or of the
// cluster, visit: for_each(visit) calls visit(key) for each key of the calling thread.
//
// All keys are in [least, largest], and there are at least `wanted` >= 1. The bins are zero, with a
// barrier behind that; afterwards they are not. Each round counts the keys of a range of 256 bins,
// finds the bin of rank `wanted`, and goes on with its range. A bin that is taken whole ends it.
template <bool CLUSTERED, typename ForEach>
__device__ __forceinline__ Cut find_cut(const ForEach& for_each, unsigned wanted, unsigned least,
                                        unsigned largest, Shared& shared) {
    const unsigned lane = threadIdx.x % WARP;
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
        // Every warp: lane l has the 8 bins from 8 * (31 - l) up, so that lane order is descending.
        const uint4* mine = reinterpret_cast<const uint4*>(bins) + 2 * (WARP - 1 - lane);
        const uint4 low = mine[0], high = mine[1];
        const unsigned counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
        unsigned sum = 0;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) sum += counts[j];
        unsigned reached = sum;  // by the keys of this lane's bins and of those above
#pragma unroll
        for (unsigned step = 1; step < WARP; step *= 2) {
            const unsigned other = __shfl_up_sync(ALL_LANES, reached, step);
            if (lane >= step) reached += other;
        }
        const unsigned owner = __ffs(__ballot_sync(ALL_LANES, reached >= wanted)) - 1;
        unsigned rest = wanted - (reached - sum);  // meaningful in the owner
        unsigned bin = 8 * (WARP - lane) - 1, size = counts[0];
#pragma unroll
        for (unsigned j = 1; j < 8; ++j) {
            if (rest > size) {
                rest -= size;
                size = counts[j];
                --bin;
            } else {
                break;
            }
        }
        bin = __shfl_sync(ALL_LANES, bin, owner);
        size = __shfl_sync(ALL_LANES, size, owner);
        wanted = __shfl_sync(ALL_LANES, rest, owner);
        least += bin << shift;
        if (shift == 0) return {least, wanted};
        if (size == wanted) return {least - 1, 0};
        largest = least + min(largest - least, (1u << shift) - 1);
        // The next round's bins are others; the cluster's sums are written after its barrier.
    }
}

// Zeroes the bins. A barrier has to precede and to follow.
__device__ __forceinline__ void clear_bins(Shared& shared) {
    for (unsigned i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) (&shared.bins[0][0])[i] = 0;
}

// Calls take(place, key, position) for the entries of the list that pass the cut, in order; the
// first one has the place that `above` entries above the cut and `equal` at it, in the CTAs before,
// leave. Returns the place behind the last one.
//
// All threads of the CTA call it, after a barrier that follows the stores to the list. Entries are
// read in steps of THREADS, and `take` is called for a step after every thread has read its entry
// of it. So `take` may store to the list, at a place that is not above the entry's.
template <typename Take>
__device__ __forceinline__ unsigned take_in_order(unsigned count, Cut cut, unsigned above,
                                                  unsigned equal, Shared& shared,
                                                  const Take& take) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned lower_lanes = (1u << lane) - 1;
    for (unsigned start = 0, turn = 0; start < count; start += THREADS, turn ^= 1) {
        const unsigned entry = start + threadIdx.x;
        unsigned key = 0, position = 0;
        if (entry < count) {
            key = list_keys()[entry];
            position = list_positions()[entry];
        }
        const unsigned over = __ballot_sync(ALL_LANES, entry < count && key > cut.key);
        const unsigned same = __ballot_sync(ALL_LANES, entry < count && key == cut.key);
        // Both counts in one word: a list has fewer than 2^16 entries.
        if (lane == 0) shared.warp_counts[turn][warp] = __popc(over) | __popc(same) << 16;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[turn], warp, lane, before, total);
        const unsigned over_before = above + (before & 0xffff) + __popc(over & lower_lanes);
        const unsigned same_before = equal + (before >> 16) + __popc(same & lower_lanes);
        const bool taken = (over >> lane & 1) != 0 ||
                           ((same >> lane & 1) != 0 && same_before < cut.ties);
        if (taken) take(over_before + min(same_before, cut.ties), key, position);
        above += total & 0xffff;
        equal += total >> 16;
    }
    return above + min(equal, cut.ties);
}

// The least and largest key of the list.
__device__ __forceinline__ void extent_of_list(unsigned count, unsigned& least, unsigned& largest,
                                               Shared& shared) {
    least = ALL;
    largest = 0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) {
        least = min(least, list_keys()[i]);
        largest = max(largest, list_keys()[i]);
    }
    extent_of_block(least, largest, shared);
}

// Reduces the list to its k largest entries, in order, and raises the bound: a score that comes
// later enters only with a key above it. Returns k. Called by all threads, count > k.
__device__ __noinline__ unsigned reduce_list(unsigned count, unsigned k, unsigned& bound,
                                             Shared& shared) {
    __syncthreads();  // orders the list's stores
    clear_bins(shared);
    unsigned least, largest;
    extent_of_list(count, least, largest, shared);
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
            for (unsigned i = threadIdx.x; i < count; i += THREADS) visit(list_keys()[i]);
        },
        k, least, largest, shared);
    take_in_order(count, cut, 0, 0, shared, [](unsigned place, unsigned key, unsigned position) {
        list_keys()[place] = key;
        list_positions()[place] = position;
    });
    __syncthreads();
    bound = cut.key;
    return k;
}

// A key below which no score of the row can be among the k largest, most likely: at least k scores
// are above it. 0 if there is nothing to gain. The same in all threads of the cluster.
__device__ __forceinline__ unsigned sampled_bound(const Row& row, unsigned k, unsigned attempt,
                                                  Shared& shared) {
    const unsigned length = row.length();
    if (length <= LIMIT / 2 || attempt + 1 >= ATTEMPTS) return 0;
    // Of the k largest scores a sample holds `mean`, Poisson distributed. The key of this rank of
    // the sample is below that of rank k of the row but for one row in ten million.
    const float mean = static_cast<float>(k) * SAMPLES / static_cast<float>(length);
    unsigned rank = static_cast<unsigned>(mean + 4.5f * sqrtf(mean) + 5.5f);
    if (attempt > 0) rank = 4 * rank + 16;
    if (rank > SAMPLES / 2) return 0;
    unsigned keys[SAMPLES / THREADS];
    unsigned least = ALL, largest = 0;
#pragma unroll
    for (unsigned j = 0; j < SAMPLES / THREADS; ++j) {
        const unsigned i = j * THREADS + threadIdx.x;
        // One score of each SAMPLES-th part of the row, at a place in it that has no period.
        const unsigned fraction = (i * 2654435761u) >> 16;
        const unsigned long long scaled = (static_cast<unsigned long long>(i) << 16 | fraction);
        const unsigned place = static_cast<unsigned>(scaled * length / SAMPLES >> 16);
        keys[j] = score_key(row.bits(row.begin + place), row.nan_key);
    }
    clear_bins(shared);
#pragma unroll
    for (unsigned j = 0; j < SAMPLES / THREADS; ++j) {
        least = min(least, keys[j]);
        largest = max(largest, keys[j]);
    }
    extent_of_block(least, largest, shared);
    const Cut cut = find_cut<false>(
        [&](const auto& visit) {
#pragma unroll
            for (unsigned j = 0; j < SAMPLES / THREADS; ++j) visit(keys[j]);
        },
        rank, least, largest, shared);
    // Scores with the key of the cut enter too. One below -inf lets all of them enter.
    return cut.ties == 0 ? cut.key : cut.key - 1;
}

// Appends those of the scores [first, end), fewer than VALUES, that are above `bound`. Returns the
// number of entries then. All threads of the CTA call it.
__device__ __forceinline__ unsigned append_few(const Row& row, unsigned first, unsigned end,
                                               unsigned bound, unsigned count) {
    const unsigned lane = threadIdx.x % WARP;
    unsigned key = 0;
    if (lane < end - first) key = score_key(row.bits(first + lane), row.nan_key);
    const unsigned entering = __ballot_sync(ALL_LANES, key > bound);
    if (threadIdx.x < WARP && key > bound) {
        const unsigned place = count + __popc(entering & ((1u << lane) - 1));
        list_keys()[place] = key;
        list_positions()[place] = first + lane - row.begin;
    }
    return count + __popc(entering);
}

// Reads the slice and makes the list: all scores of it above `bound`, unless k entries that rank
// before a score make it needless. Returns the number of entries. All threads of the CTA call it;
// `next` holds the first tile. A barrier has to follow before the list is read.
__device__ __forceinline__ unsigned stream_slice(const Row& row, unsigned k, unsigned bound,
                                                 uint4 (&next)[LOADS], Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned lower_lanes = (1u << lane) - 1;
    const unsigned mine = warp * (LOADS * WARP) + lane;  // a warp has adjacent vectors of a tile
    unsigned count = 0, turn = 0;
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    if (cta_rank == 0) count = append_few(row, row.begin, row.body, bound, 0);
    for (unsigned tile = row.first; tile < row.last; tile += TILE_VECTORS, turn ^= 1) {
        uint4 loaded[LOADS];
#pragma unroll
        for (unsigned q = 0; q < LOADS; ++q) loaded[q] = next[q];
#pragma unroll
        for (unsigned q = 0; q < LOADS; ++q)
            next[q] = row.load(tile + TILE_VECTORS + mine + q * WARP);
        if (count > LIMIT) count = reduce_list(count, k, bound, shared);
        unsigned entering = 0;  // bit q * VALUES + j
#pragma unroll
        for (unsigned q = 0; q < LOADS; ++q) {
            unsigned above = 0;
#pragma unroll
            for (unsigned j = 0; j < VALUES; ++j)
                above |= (score_key(score_bits(loaded[q], j), row.nan_key) > bound ? 1u : 0u) << j;
            if (tile + mine + q * WARP < row.last) entering |= above << (q * VALUES);
        }
        const bool any = __any_sync(ALL_LANES, entering != 0);
        unsigned entered = 0;
        if (any) entered = __reduce_add_sync(ALL_LANES, __popc(entering));
        if (lane == 0) shared.warp_counts[turn][warp] = entered;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[turn], warp, lane, before, total);
        if (any) {
            unsigned place = count + before;
#pragma unroll
            for (unsigned q = 0; q < LOADS; ++q) {
                const unsigned group = entering >> (q * VALUES) & ((1u << VALUES) - 1);
                if (!__any_sync(ALL_LANES, group != 0)) continue;
                unsigned own = place;
#pragma unroll
                for (unsigned j = 0; j < VALUES; ++j) {
                    const unsigned lanes = __ballot_sync(ALL_LANES, (group >> j & 1) != 0);
                    own += __popc(lanes & lower_lanes);
                    place += __popc(lanes);
                }
                const unsigned score = (tile + mine + q * WARP) * VALUES;
#pragma unroll
                for (unsigned j = 0; j < VALUES; ++j) {
                    if ((group >> j & 1) != 0) {
                        list_keys()[own] = score_key(score_bits(loaded[q], j), row.nan_key);
                        list_positions()[own] = score + j - row.begin;
                        ++own;
                    }
                }
            }
        }
        count += total;
    }
    if (cta_rank == BLOCKS_PER_ROW - 1) count = append_few(row, row.tail, row.end, bound, count);
    return count;
}

// Sorts `size` composite numbers in shared memory, a power of 2 of them, in descending order.
__device__ __forceinline__ void sort_descending(unsigned long long* items, unsigned size) {
    for (unsigned run = 2; run <= size; run *= 2) {
        for (unsigned stride = run / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (unsigned pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const unsigned low = 2 * pair - (pair & (stride - 1));
                const unsigned long long a = items[low], b = items[low + stride];
                const bool descending = (low & run) == 0;
                if ((a < b) == descending) {
                    items[low] = b;
                    items[low + stride] = a;
                }
            }
        }
    }
    __syncthreads();
}

// Where the results of one row go.
struct Output {
    const Row& row;
    unsigned* values;  // null: not stored
    int* ids;
    int* slots;
    const int* pages;  // of the row's request; null: slots are positions
    unsigned page_columns, page_size;
    int offset;

    __device__ __forceinline__ void store(unsigned place, unsigned position) const {
        if (values != nullptr) values[place] = row.bits(row.begin + position);
        if (ids != nullptr) ids[place] = static_cast<int>(position);
        if (slots == nullptr) return;
        int slot = static_cast<int>(position);
        if (pages != nullptr) {
            const unsigned page = position / page_size;
            if (page >= page_columns) {
                slots[place] = -1;
                return;
            }
            slot = pages[page] * static_cast<int>(page_size) +
                   static_cast<int>(position - page * page_size);
        }
        slots[place] = slot + offset;
    }

    __device__ __forceinline__ void store_none(unsigned place) const {
        if (values != nullptr) values[place] = 0xff800000u;
        if (ids != nullptr) ids[place] = -1;
        if (slots != nullptr) slots[place] = -1;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
topk_indices(const unsigned char* scores, const int* row_starts, const int* row_ends,
             const int* page_table, const int* requests, const int* offsets, unsigned* values_out,
             int* ids_out, int* slots_out, int rows, int row_length, long long row_stride,
             int top_k, int page_rows, int page_columns, long long page_stride, int page_size,
             int sorted, int nan_first) {
    __shared__ Shared shared;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();

    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;
    const unsigned row_number = blockIdx.x / BLOCKS_PER_ROW;
    const unsigned k = static_cast<unsigned>(top_k);

    Row row;
    {
        const int first = row_starts != nullptr ? max(row_starts[row_number], 0) : 0;
        const int end = row_ends != nullptr ? min(row_ends[row_number], row_length) : row_length;
        const unsigned long long address =
            reinterpret_cast<unsigned long long>(scores) + row_number * row_stride * SCORE_BYTES;
        const unsigned skipped = static_cast<unsigned>(address % 16) / SCORE_BYTES;
        row.base = reinterpret_cast<const unsigned char*>(address - skipped * SCORE_BYTES);
        row.begin = skipped + static_cast<unsigned>(min(first, max(end, 0)));
        row.end = max(row.begin, skipped + static_cast<unsigned>(max(end, 0)));
        row.nan_key = nan_first != 0 ? ALL : LEAST_KEY;
        // Whole vectors are divided among the CTAs. The scores before them belong to the first
        // CTA, those behind them to the last one: VALUES - 1 at most.
        row.body = min((row.begin + VALUES - 1) / VALUES * VALUES, row.end);
        row.tail = max(row.end / VALUES * VALUES, row.body);
        const unsigned vectors = (row.tail - row.body) / VALUES;
        const unsigned share = (vectors + BLOCKS_PER_ROW - 1) / BLOCKS_PER_ROW;
        row.first = row.body / VALUES + min(cta_rank * share, vectors);
        row.last = row.body / VALUES + min((cta_rank + 1) * share, vectors);
    }
    const unsigned wanted = min(k, row.length());

    Output output{row};
    {
        const long long first = static_cast<long long>(row_number) * top_k;
        output.values = values_out != nullptr ? values_out + first : nullptr;
        output.ids = ids_out != nullptr ? ids_out + first : nullptr;
        output.slots = slots_out != nullptr ? slots_out + first : nullptr;
        output.pages = nullptr;
        output.page_columns = static_cast<unsigned>(page_columns);
        output.page_size = static_cast<unsigned>(page_size);
        output.offset = offsets != nullptr ? offsets[row_number] : 0;
        if (page_table != nullptr) {
            const int request = requests != nullptr ? requests[row_number]
                                                    : static_cast<int>(row_number);
            const bool known = request >= 0 && request < page_rows;
            output.pages = page_table + (known ? request * page_stride : 0);
            if (!known) output.page_columns = 0;
        }
    }

    // 1 and 2, and 3: until the lists hold the row's largest scores.
    unsigned count = 0, all = 0, least = 0, largest = 0;
    for (unsigned attempt = 0;; ++attempt) {
        uint4 first_tile[LOADS];
#pragma unroll
        for (unsigned q = 0; q < LOADS; ++q)
            first_tile[q] =
                row.load(row.first + threadIdx.x / WARP * (LOADS * WARP) + q * WARP +
                         threadIdx.x % WARP);
        const unsigned bound = sampled_bound(row, k, attempt, shared);
        count = stream_slice(row, k, bound, first_tile, shared);
        __syncthreads();
        clear_bins(shared);
        extent_of_list(count, least, largest, shared);
        all = count;
        if constexpr (BLOCKS_PER_ROW > 1) {
            if (threadIdx.x == 0) {
                shared.notices[attempt].count = count;
                shared.notices[attempt].least = least;
                shared.notices[attempt].largest = largest;
            }
            cluster_sync();
            const unsigned lane = threadIdx.x % WARP;
            const Notice& notice = shared.notices[attempt];
            const bool one = lane < BLOCKS_PER_ROW;
            all = __reduce_add_sync(ALL_LANES, one ? load_from_cluster_rank(&notice.count, lane) : 0);
            least = __reduce_min_sync(ALL_LANES,
                                      one ? load_from_cluster_rank(&notice.least, lane) : ALL);
            largest = __reduce_max_sync(ALL_LANES,
                                        one ? load_from_cluster_rank(&notice.largest, lane) : 0);
        }
        if (all >= wanted || attempt + 1 == ATTEMPTS) break;
        __syncthreads();
    }

    // 4. All entries, or the largest of them.
    Cut cut{0, 0};
    if (all > wanted) {
        cut = find_cut<true>(
            [&](const auto& visit) {
                for (unsigned i = threadIdx.x; i < count; i += THREADS) visit(list_keys()[i]);
            },
            wanted, least, largest, shared);
    }

    // 5. What the CTAs before this one emit.
    unsigned above = 0, equal = 0;
    if constexpr (BLOCKS_PER_ROW > 1) {
        const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        unsigned over = 0, same = 0;
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            over += list_keys()[i] > cut.key;
            same += list_keys()[i] == cut.key;
        }
        const unsigned both = __reduce_add_sync(ALL_LANES, over | same << 16);
        __syncthreads();
        if (lane == 0) shared.warp_counts[0][warp] = both;
        __syncthreads();
        unsigned before, total;
        sum_of_warps(shared.warp_counts[0], warp, lane, before, total);
        if (threadIdx.x == 0) {
            shared.notices[0].above = total & 0xffff;
            shared.notices[0].equal = total >> 16;
        }
        cluster_sync();
        const Notice& notice = shared.notices[0];
        const bool one = lane < cta_rank;
        above = __reduce_add_sync(ALL_LANES, one ? load_from_cluster_rank(&notice.above, lane) : 0);
        equal = __reduce_add_sync(ALL_LANES, one ? load_from_cluster_rank(&notice.equal, lane) : 0);
    }
    if (sorted == 0) {
        take_in_order(count, cut, above, equal, shared,
                      [&](unsigned place, unsigned, unsigned position) {
                          output.store(place, position);
                      });
    } else {
        // Each CTA makes its list dense, and that of rank 0 appends those of the others to its own.
        const unsigned first = above + min(equal, cut.ties);
        const unsigned behind = take_in_order(
            count, cut, above, equal, shared, [&](unsigned place, unsigned key, unsigned position) {
                list_keys()[place - first] = key;
                list_positions()[place - first] = position;
            });
        if constexpr (BLOCKS_PER_ROW > 1) {
            if (threadIdx.x == 0) {
                shared.notices[1].above = first;
                shared.notices[1].equal = behind;
            }
            cluster_sync();
            if (cta_rank == 0) {
                for (unsigned cta = 1; cta < BLOCKS_PER_ROW; ++cta) {
                    const unsigned from = load_from_cluster_rank(&shared.notices[1].above, cta);
                    const unsigned to = load_from_cluster_rank(&shared.notices[1].equal, cta);
                    for (unsigned i = from + threadIdx.x; i < to; i += THREADS) {
                        list_keys()[i] = load_from_cluster_rank(list_keys() + (i - from), cta);
                        list_positions()[i] =
                            load_from_cluster_rank(list_positions() + (i - from), cta);
                    }
                }
            }
        }
        __syncthreads();
        if (cta_rank == 0 && wanted > 0) {
            unsigned size = 1;
            while (size < wanted) size *= 2;
            constexpr unsigned EACH = (MAX_TOP_K + THREADS - 1) / THREADS;
            Candidate candidates[EACH];
#pragma unroll
            for (unsigned j = 0; j < EACH; ++j) {
                const unsigned i = j * THREADS + threadIdx.x;
                candidates[j] =
                    i < wanted ? make_candidate(list_keys()[i], list_positions()[i]) : 0;
            }
            __syncthreads();
            Candidate* items = reinterpret_cast<Candidate*>(dynamic_shared);
#pragma unroll
            for (unsigned j = 0; j < EACH; ++j) {
                const unsigned i = j * THREADS + threadIdx.x;
                if (i < size) items[i] = candidates[j];
            }
            sort_descending(items, size);
            for (unsigned i = threadIdx.x; i < wanted; i += THREADS)
                output.store(i, candidate_index(items[i]));
        }
    }
    if (cta_rank == BLOCKS_PER_ROW - 1)
        for (unsigned i = wanted + threadIdx.x; i < k; i += THREADS) output.store_none(i);
    if constexpr (BLOCKS_PER_ROW > 1) cluster_sync();  // no CTA reads another's memory any more
}
