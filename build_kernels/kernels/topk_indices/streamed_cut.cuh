// Step 4 of the streamed form of topk_indices: the cut of the lists of a cluster.
#pragma once

#include "streamed_list.cuh"

static_assert(WARPS % BLOCKS_PER_ROW == 0, "warps are divided among the CTAs to read from");

// READERS threads read the list of one CTA, and each of them holds READ of its keys. If a list is longer
// than that, share_of_long_lists finds the cut.
constexpr unsigned READERS = WARPS / BLOCKS_PER_ROW * WARP;
constexpr unsigned READ = READERS < 256 ? 8 : 4;
static_assert(READERS * READ <= CAPACITY, "places that are read exist");

// The keys of the cluster's lists, READ in each thread.
struct ListedKeys {
    unsigned keys[READ];  // 0: none

    // The CTA of whose list the calling thread's warp has a part.
    static __device__ __forceinline__ unsigned source() {
        return threadIdx.x / WARP % BLOCKS_PER_ROW;
    }
    // Places of a list that are read.
    static __device__ __forceinline__ unsigned place(unsigned j) {
        return threadIdx.x / WARP / BLOCKS_PER_ROW * WARP + threadIdx.x % WARP + j * READERS;
    }
    // Reads them, wherever the lists end. In a cluster, after a cluster barrier.
    __device__ __forceinline__ void load() {
        const unsigned* const key_words = reinterpret_cast<const unsigned*>(list_entries()) + 1;
#pragma unroll
        for (unsigned j = 0; j < READ; ++j) {
            const unsigned* const word = key_words + 2 * place(j);
            if constexpr (BLOCKS_PER_ROW == 1) {
                keys[j] = *word;
            } else {
                keys[j] = load_from_cluster_rank(word, source());
            }
        }
    }
    // Forgets those behind the end of a list of `size`.
    __device__ __forceinline__ void end_at(unsigned size) {
#pragma unroll
        for (unsigned j = 0; j < READ; ++j)
            if (place(j) >= size) keys[j] = 0;
    }
    __device__ __forceinline__ unsigned above(unsigned key) const {
        unsigned count = 0;
#pragma unroll
        for (unsigned j = 0; j < READ; ++j) count += keys[j] > key;
        return count;
    }
    __device__ __forceinline__ unsigned equal_to(unsigned key) const {
        unsigned count = 0;
#pragma unroll
        for (unsigned j = 0; j < READ; ++j) count += keys[j] == key;
        return count;
    }
};

// What the cluster has found, the same in all CTAs but for the last three.
struct Found {
    Cut cut;
    unsigned above, equal;  // candidates in the CTAs before this one: above the cut, at its key
    unsigned own_equal;     // candidates of this CTA at the key of the cut
};

// Which candidates a CTA emits, and to which places.
struct Share {
    Candidate limit;  // those that reach it
    unsigned place;   // a part of the place of their first one: of each warp, to be added up
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
// `all` together, few enough that each CTA holds their keys in shared memory.
__device__ __noinline__ Found find_gathered(unsigned count, unsigned all, unsigned cta_rank,
                                               unsigned wanted, unsigned least, unsigned largest,
                                               Shared& shared) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned behind = sum_up_to_lane(count, lane);
    const unsigned source = warp % BLOCKS_PER_ROW;
    const unsigned size = __shfl_sync(ALL_LANES, count, source);
    unsigned* const keys = gathered_keys() + __shfl_sync(ALL_LANES, behind, source) - size;
    // Another thread may still be zeroing marks in the memory that the keys are stored to: each does so
    // between its arrival at the cluster's barrier and its wait.
    __syncthreads();
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

// The share of this CTA where `found` is what the cluster has found.
__device__ __forceinline__ Share share_of(const Found& found, unsigned count, unsigned row_length,
                                          Shared& shared) {
    const unsigned taken_before = min(found.equal, found.cut.ties);
    const Cut own{found.cut.key, min(found.cut.ties - taken_before, found.own_equal),
                  found.own_equal};
    return {least_taken(own, count, row_length, shared),
            threadIdx.x < WARP ? found.above + taken_before : 0};
}

// The share of this CTA of the `wanted` candidates, if threads hold the keys of all lists. Called by all
// threads of the cluster.
__device__ __forceinline__ Share share_of_listed(const ListedKeys& listed, unsigned count,
                                                 unsigned cta_rank, unsigned wanted, unsigned least,
                                                 unsigned largest, unsigned row_length,
                                                 Shared& shared) {
    const Cut cut = find_cut<false, true>(
        [&](const auto& visit) {
#pragma unroll
            for (unsigned key : listed.keys) visit(key);
        },
        wanted, least, largest, shared.bins, shared);
    const unsigned source = ListedKeys::source();
    unsigned over = source < cta_rank ? listed.above(cut.key) : 0;
    if (cut.ties == 0)
        return {least_taken(cut, count, row_length, shared), __reduce_add_sync(ALL_LANES, over)};
    const unsigned equal = listed.equal_to(cut.key);
    unsigned same = source < cta_rank ? equal : 0, own = source == cta_rank ? equal : 0;
    add_over_block(over, same, own, shared);
    return share_of({cut, over, same, own}, count, row_length, shared);
}

// The same, if the lists are longer. `counts`: the candidates in the CTA of the lane's number, `all`:
// together.
__device__ __forceinline__ Share share_of_long_lists(unsigned counts, unsigned all, unsigned count,
                                                     unsigned cta_rank, unsigned wanted,
                                                     unsigned least, unsigned largest,
                                                     unsigned row_length, Shared& shared) {
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
        found = find_gathered(counts, all, cta_rank, wanted, least, largest, shared);
    } else {
        found = find_by_histograms(count, cta_rank, wanted, least, largest, shared);
    }
    return share_of(found, count, row_length, shared);
}
