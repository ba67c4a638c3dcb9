// What both forms of topk_indices know of a row: its scores as ordered keys, and where its results go.
#pragma once

#include "common/selection.cuh"

constexpr unsigned WARPS = THREADS / WARP;
constexpr unsigned VALUES = 16 / SCORE_BYTES;   // scores of one vector
constexpr unsigned LEAST_KEY = 0x007fffffu;     // of -inf
constexpr unsigned INFINITE_KEY = 0xff800000u;  // of +inf
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned BINS = 256;
static_assert(WARPS <= WARP && BLOCKS_PER_ROW <= WARP, "one lane for each");

// The ordered key of a score with these bits (of fp32).
__device__ __forceinline__ unsigned score_key(unsigned bits, unsigned nan_key) {
    const float score = __uint_as_float(bits);
    const unsigned canonical = __float_as_uint(__fadd_rn(score, 0.0f));  // -0 becomes +0
    const unsigned sign = static_cast<unsigned>(static_cast<int>(canonical) >> 31);
    return score != score ? nan_key : canonical ^ (sign | 0x80000000u);
}

// The fp32 bits of score `j` of a vector.
__device__ __forceinline__ unsigned score_bits(const uint4& vector, unsigned j) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
    if constexpr (SCORE_BYTES == 4) return words[j];
    return j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u;
}

// The fp32 bits of score `index` of an array.
__device__ __forceinline__ unsigned score_at(const void* scores, unsigned index) {
    if constexpr (SCORE_BYTES == 4) return static_cast<const unsigned*>(scores)[index];
    return static_cast<unsigned>(static_cast<const unsigned short*>(scores)[index]) << 16;
}

// One row. Scores are numbered from the 16-byte boundary at or before column 0, so that vector v holds
// the scores VALUES * v up to VALUES * (v + 1). Positions are numbered from the first score of the row.
struct Row {
    const unsigned char* base;  // of score 0: aligned to 16 bytes
    unsigned begin, end;        // the scores of the row
    unsigned nan_key;

    __device__ __forceinline__ unsigned length() const { return end - begin; }
    __device__ __forceinline__ unsigned bits(unsigned score) const { return score_at(base, score); }
    __device__ __forceinline__ Candidate candidate(unsigned score_bits, unsigned position) const {
        return make_candidate(score_key(score_bits, nan_key), position);
    }
};

// The part of `scores` that row_starts and row_ends leave of a row; each of them may be null.
__device__ __forceinline__ Row bounded_row(const unsigned char* scores, const int* row_starts,
                                           const int* row_ends, unsigned row_number, int row_length,
                                           long long row_stride, bool nan_first) {
    const int first = row_starts != nullptr ? max(row_starts[row_number], 0) : 0;
    const int end = row_ends != nullptr ? min(row_ends[row_number], row_length) : row_length;
    const unsigned long long address =
        reinterpret_cast<unsigned long long>(scores) + row_number * row_stride * SCORE_BYTES;
    const unsigned skipped = static_cast<unsigned>(address % 16) / SCORE_BYTES;
    Row row;
    row.base = reinterpret_cast<const unsigned char*>(address - skipped * SCORE_BYTES);
    row.begin = skipped + static_cast<unsigned>(min(first, max(end, 0)));
    row.end = max(row.begin, skipped + static_cast<unsigned>(max(end, 0)));
    row.nan_key = nan_first ? ALL : LEAST_KEY;
    return row;
}

// The sum of `value` over the lanes up to this one.
__device__ __forceinline__ unsigned sum_up_to_lane(unsigned value, unsigned lane) {
#pragma unroll
    for (unsigned step = 1; step < WARP; step *= 2) {
        const unsigned other = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The bin of the key of a rank, among keys that were counted in bins.
struct BinOfRank {
    bool exists;         // false: the bins have fewer keys than the rank
    unsigned bin, size;  // which, and its keys
    unsigned rest;       // the rank within the bin; without one, the rank less all keys of the bins
};

// The bin with the key of rank `wanted` >= 1 from above, the same in all lanes. The bins are aligned
// to 16 bytes. Called by a warp, after a barrier that follows the counts.
__device__ __forceinline__ BinOfRank bin_of_rank(const unsigned* bins, unsigned wanted,
                                                 unsigned lane) {
    // Lane l has the 8 bins from 8 * (31 - l) up, so that lane order is descending.
    const uint4* mine = reinterpret_cast<const uint4*>(bins) + 2 * (WARP - 1 - lane);
    const uint4 low = mine[0], high = mine[1];
    const unsigned counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
    unsigned sum = 0;
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) sum += counts[j];
    const unsigned reached = sum_up_to_lane(sum, lane);  // by this lane's bins and those above
    const unsigned reaching = __ballot_sync(ALL_LANES, reached >= wanted);
    const unsigned owner = reaching != 0 ? __ffs(reaching) - 1 : WARP - 1;
    unsigned rest = wanted - (reached - sum);  // meaningful in the owner
    unsigned bin = 8 * (WARP - lane) - 1, size = counts[0];
    bool found = false;
#pragma unroll
    for (unsigned j = 1; j < 8; ++j) {
        found = found || rest <= size;
        if (!found) {
            rest -= size;
            size = counts[j];
            --bin;
        }
    }
    if (rest > size) rest -= size;
    return {reaching != 0, __shfl_sync(ALL_LANES, bin, owner), __shfl_sync(ALL_LANES, size, owner),
            __shfl_sync(ALL_LANES, rest, owner)};
}

// The position of a score of the sample: one in each part of 2^bits equal ones of the row, at a
// place in it that has no period. Ascending.
__device__ __forceinline__ unsigned sampled_position(unsigned i, unsigned bits, unsigned length) {
    const unsigned fraction = (i * 2654435761u) >> 16;
    const unsigned long long scaled = static_cast<unsigned long long>(i) << 16 | fraction;
    return static_cast<unsigned>(scaled * length >> (16 + bits));
}

// Sorts `size` composite numbers in shared memory, a power of 2 of them, in descending order.
__device__ __forceinline__ void sort_descending(unsigned long long* items, unsigned size) {
    for (unsigned run = 2; run <= size; run *= 2) {
        for (unsigned stride = run / 2; stride > 0; stride /= 2) {
            __syncthreads();
#pragma unroll 1
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

// The kernel's parameters that tell where results go. Each pointer may be null.
struct OutputParameters {
    const int* page_table;
    const int* requests;
    const int* offsets;
    unsigned* values_out;
    int* ids_out;
    int* slots_out;
    int top_k, page_rows, page_columns, page_size;
    long long page_stride;

    // Where the results of one row go.
    __device__ __forceinline__ Output of(const Row& row) const {
        const unsigned row_number = blockIdx.x / BLOCKS_PER_ROW;
        const long long first = static_cast<long long>(row_number) * top_k;
        Output output{row};
        output.values = values_out != nullptr ? values_out + first : nullptr;
        output.ids = ids_out != nullptr ? ids_out + first : nullptr;
        output.slots = slots_out != nullptr ? slots_out + first : nullptr;
        output.pages = nullptr;
        output.page_columns = static_cast<unsigned>(page_columns);
        output.page_size = static_cast<unsigned>(page_size);
        output.offset = offsets != nullptr ? offsets[row_number] : 0;
        if (page_table != nullptr) {
            const int request =
                requests != nullptr ? requests[row_number] : static_cast<int>(row_number);
            const bool known = request >= 0 && request < page_rows;
            output.pages = page_table + (known ? request * page_stride : 0);
            if (!known) output.page_columns = 0;
        }
        return output;
    }
};
